# apache-tvm-ffi: the binding links it, and its wheel carries DLPack's header, which every part includes.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m tvm_ffi.config --cmakedir
  OUTPUT_VARIABLE tvm_ffi_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE tvm_ffi_missing)
if(tvm_ffi_missing)
  message(FATAL_ERROR "apache-tvm-ffi is not installed for ${Python_EXECUTABLE}: pip install 'apache-tvm-ffi>=0.1.15,<0.2'")
endif()
find_package(tvm_ffi CONFIG REQUIRED)
find_path(DLPACK_INCLUDE_DIR dlpack/dlpack.h
          HINTS "${tvm_ffi_DIR}/../../../include" "${tvm_ffi_DIR}/../../include" REQUIRED NO_DEFAULT_PATH)
target_include_directories(kestrel_build_options SYSTEM INTERFACE "${DLPACK_INCLUDE_DIR}")
