// What the CPU kernels share: code for several vector units in one build, chosen when the library is loaded.
#pragma once

#include <cstdint>

// One build runs everywhere: the loader picks AVX-512, AVX2 or plain x86-64 by what the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(CADD_NO_CLONES)
#define CADD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
inline const char* vector_code() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? "AVX-512" : __builtin_cpu_supports("x86-64-v3") ? "AVX2" : "SSE2";
}
#else
#define CADD_CLONES
inline const char* vector_code() { return "the compiler's default"; }
#endif
