# CPU twins, compiled once for each level that kestrel/cpu/target.h names. The other objects and the baseline come
# first on the link line: where several emit the same inline function of the standard library, the linker keeps the
# first copy, which runs everywhere.
set(twin_levels v1)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(twin_levels v1 v3 v4)
  set(twin_flags_v3 -mavx2 -mfma -mbmi -mbmi2 -mf16c -mlzcnt -mmovbe)
  set(twin_flags_v4 ${twin_flags_v3} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512)
endif()

function(add_twins target host)
  foreach(level IN LISTS twin_levels)
    set(twins ${target}_cpu_${level})
    add_library(${twins} OBJECT ${ARGN})
    target_link_libraries(${twins} PRIVATE kestrel_build_options)
    target_compile_definitions(${twins} PRIVATE KESTREL_CPU=kestrel::cpu::${level})
    # No errno, no trapping comparisons: what a loop needs to become vector code. Results stay IEEE.
    target_compile_options(${twins} PRIVATE ${twin_flags_${level}} -fno-math-errno -fno-trapping-math -fopenmp-simd)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${twins}>)
  endforeach()
  if("v4" IN_LIST twin_levels)
    target_compile_definitions(${host} PRIVATE KESTREL_CPU_LEVELS)
  endif()
endfunction()
