# Warnings are errors, for every compiler. kestrel_build_options carries them with the include paths. Clang sees an
# unused parameter in tvm-ffi's export macro, and warns of every `omp simd` loop that it does not vectorize.
add_library(kestrel_build_options INTERFACE)
target_include_directories(kestrel_build_options INTERFACE "${PROJECT_SOURCE_DIR}")
target_compile_options(
  kestrel_build_options
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor;-Werror>
            $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-Wno-unused-parameter;-Wno-pass-failed>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall;-Xcompiler=-Wextra;-Xcompiler=-Werror;-Werror=all-warnings>)
