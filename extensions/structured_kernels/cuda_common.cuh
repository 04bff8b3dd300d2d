// The CUDA kernels of s4nb and how they are launched, on raw memory and without torch: cuda.cu makes ops of them, and
// tests/cuda_emulator.cpp runs the same text on a CPU. Every function that launches takes `launch(kernel, blocks,
// threads, arguments...)`. Grids have one dimension, so no size is limited to 65535. Nothing is summed by atomics:
// reruns agree bitwise.
#pragma once
#include <cstdint>
#include <type_traits>

#include "pair_math.h"

namespace s4nb { namespace S4NB_ISA {

constexpr int WARP = 32, THREADS = 128;

template <class T> S4NB_INLINE bool finite(Complex<T> x) { return x.re - x.re == 0 && x.im - x.im == 0; }
template <class T, class S> S4NB_INLINE Complex<T> cast(Complex<S> x) { return {T(x.re), T(x.im)}; }
template <class T, class S> S4NB_INLINE Complex<T> cast(AxisNode<S> z) { return {T(0), T(z.im)}; }
S4NB_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
S4NB_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> __device__ T warp_sum(T x) {
  for (int far = WARP / 2; far; far /= 2) x += __shfl_xor_sync(0xffffffffu, x, far);
  return x;
}

}}  // namespace s4nb::S4NB_ISA
