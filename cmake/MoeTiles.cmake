# The tables of compiled tiles and tuned configs of ops/moe, written when a list of either changes.
set(moe_tiles_writer "${PROJECT_SOURCE_DIR}/tools/moe_tiles.py")
file(GLOB moe_configs CONFIGURE_DEPENDS python/kestrel_kernels/configs/*.json)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
             "${moe_tiles_writer}" "${PROJECT_SOURCE_DIR}/ops/moe/tiles.json" ${moe_configs})
execute_process(COMMAND "${Python_EXECUTABLE}" "${moe_tiles_writer}" "${PROJECT_BINARY_DIR}/gen"
                RESULT_VARIABLE moe_tiles_failed)
if(moe_tiles_failed)
  message(FATAL_ERROR "tools/moe_tiles.py failed")
endif()
target_include_directories(kestrel_build_options INTERFACE "${PROJECT_BINARY_DIR}/gen")
