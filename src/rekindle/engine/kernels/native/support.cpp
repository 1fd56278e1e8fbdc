// What this build of the kernels needs and offers.

#include "abi.h"
#include "simd.h"

// Whether this CPU has every instruction this library was compiled for.
REKINDLE_EXPORT int rekindle_is_supported() {
#if !defined(__x86_64__)
  return 1;
#elif REKINDLE_AVX512
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
#if REKINDLE_BF16_DOT
  return has_avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return has_avx512;
#endif
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// Whether `rekindle_linear` exists, and how many outputs one of its panels holds.
REKINDLE_EXPORT int rekindle_has_linear() { return REKINDLE_BF16_DOT; }
REKINDLE_EXPORT int rekindle_lanes() { return rekindle::LANES; }
