// Target regions: code between MGT_TARGET_*_BEGIN and MGT_TARGET_END may use that instruction set, whatever the flags
// of the build. A kernel file includes this header first (it brings every standard header, which must stay outside the
// regions), then opens a region and includes the kernel bodies inside it. Everything included there lives in an unnamed
// namespace, or the linker could hand the AVX-512 copy of an inline function to a baseline caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "mgt_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define MGT_X86 1
#endif

#define MGT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MGT_TARGET_BEGIN(features) \
  MGT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MGT_TARGET_END _Pragma("clang attribute pop")
#else
#define MGT_TARGET_BEGIN(features) _Pragma("GCC push_options") MGT_PRAGMA(GCC target(features))
#define MGT_TARGET_END _Pragma("GCC pop_options")
#endif
// What each instruction set may use. isa.cpp reads these very strings and asks the processor for every name in them.
#define MGT_AVX2_FEATURES "avx2,fma,f16c"
#define MGT_AVX512_FEATURES MGT_AVX2_FEATURES ",avx512f,avx512bw,avx512dq,avx512vl"
#define MGT_AVX512_VNNI_FEATURES MGT_AVX512_FEATURES ",avx512vnni"
#define MGT_AVX512_BF16_FEATURES MGT_AVX512_VNNI_FEATURES ",avx512bf16"
#define MGT_AMX_FEATURES MGT_AVX512_BF16_FEATURES ",amx-tile,amx-int8,amx-bf16"
#define MGT_TARGET_AVX2_BEGIN MGT_TARGET_BEGIN(MGT_AVX2_FEATURES)
#define MGT_TARGET_AVX512_BEGIN MGT_TARGET_BEGIN(MGT_AVX512_FEATURES)
#define MGT_TARGET_AVX512_VNNI_BEGIN MGT_TARGET_BEGIN(MGT_AVX512_VNNI_FEATURES)
#define MGT_TARGET_AVX512_BF16_BEGIN MGT_TARGET_BEGIN(MGT_AVX512_BF16_FEATURES)
#define MGT_TARGET_AMX_BEGIN MGT_TARGET_BEGIN(MGT_AMX_FEATURES)

#define MGT_INLINE inline __attribute__((always_inline))
#define MGT_INLINE_LAMBDA __attribute__((always_inline))
#define MGT_NOINLINE __attribute__((noinline))

// Keeps an accumulator in its register: without it GCC 12 moves some of a large array of them to the stack and back in
// the innermost loop.
#define MGT_HOLD(x) asm("" : "+v"(x))
