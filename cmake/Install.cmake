# What the wheel holds beside the Python modules: two libraries, the headers, a CMake package, a list of the kernels.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package kestrel_kernels)
set(lib_dir ${package}/lib)
set(include_dir ${package}/include)
set(cmake_dir ${package}/lib/cmake/KestrelKernels)

install(TARGETS kestrel EXPORT KestrelKernels LIBRARY DESTINATION ${lib_dir} COMPONENT python
        INCLUDES DESTINATION ${include_dir})
if(KESTREL_PYTHON)
  install(TARGETS kestrel_ffi LIBRARY DESTINATION ${lib_dir} COMPONENT python)
endif()
# The public face of an op is the header of its folder's name.
file(GLOB op_folders CONFIGURE_DEPENDS LIST_DIRECTORIES true ops/*)
foreach(folder IN LISTS op_folders)
  get_filename_component(op "${folder}" NAME)
  if(EXISTS "${folder}/${op}.h")
    install(FILES "${folder}/${op}.h" DESTINATION ${include_dir}/kestrel COMPONENT python)
  endif()
endforeach()
install(FILES kestrel/tensor.h kestrel/dtype.h kestrel/error.h kestrel/info.h DESTINATION ${include_dir}/kestrel COMPONENT python)
install(FILES "${DLPACK_INCLUDE_DIR}/dlpack/dlpack.h" DESTINATION ${include_dir}/dlpack COMPONENT python)

install(FILES benchmarks/cases.json DESTINATION ${package}/benchmarks COMPONENT python)
install(EXPORT KestrelKernels NAMESPACE Kestrel:: DESTINATION ${cmake_dir} COMPONENT python FILE KestrelKernelsTargets.cmake)
configure_package_config_file(cmake/KestrelKernelsConfig.cmake.in KestrelKernelsConfig.cmake INSTALL_DESTINATION ${cmake_dir})
write_basic_package_version_file(KestrelKernelsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/KestrelKernelsConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/KestrelKernelsConfigVersion.cmake" DESTINATION ${cmake_dir} COMPONENT python)
# The names that the Python package finds at run time, for type checkers.
install(CODE "execute_process(COMMAND \"${Python_EXECUTABLE}\" \"${PROJECT_SOURCE_DIR}/tools/stubs.py\"
                              \"\${CMAKE_INSTALL_PREFIX}/${package}/__init__.pyi\" COMMAND_ERROR_IS_FATAL ANY)"
        COMPONENT python)
# What ptxas made of each kernel, for `kestrel-kernels info`.
set(kernel_list "\${CMAKE_INSTALL_PREFIX}/${lib_dir}/kernels.json")
if(KESTREL_CUDA AND NOT KESTREL_DELAYS)  # with delays some may spill
  install(CODE "execute_process(COMMAND \"${Python_EXECUTABLE}\" -m scripts.precompile --list
                                --build \"${PROJECT_BINARY_DIR}\" --json \"${kernel_list}\"
                                WORKING_DIRECTORY \"${PROJECT_SOURCE_DIR}\" OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)"
          COMPONENT python)
else()
  install(CODE "file(REMOVE \"${kernel_list}\")" COMPONENT python)
endif()
