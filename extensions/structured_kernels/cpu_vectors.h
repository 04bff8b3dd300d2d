// Vectors of the instruction set that this is compiled for, and scratch memory.
#pragma once
#include "cpu_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef S4NB_ISA
#define S4NB_ISA base
#endif
#if defined(__AVX512F__)
#define S4NB_BYTES 64
#elif defined(__AVX__)
#define S4NB_BYTES 32
#else
#define S4NB_BYTES 16
#endif

namespace s4nb { namespace S4NB_ISA {

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(S4NB_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(S4NB_BYTES))); };
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> struct IntegerOf;
template <> struct IntegerOf<float> { typedef int32_t type; };
template <> struct IntegerOf<double> { typedef int64_t type; };
template <class T> constexpr int LANES = S4NB_BYTES / int(sizeof(T));

#define S4NB_FORCE inline __attribute__((always_inline))
S4NB_FORCE Vec<double> reciprocal(Vec<double> q) { return 1.0 / q; }
S4NB_FORCE Vec<float> reciprocal(Vec<float> q) {
#ifdef __AVX512F__  // 14 bits
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)q);
#else
  Vec<float> r = 1.0f / q;
#endif
  return r + r * (1.0f - q * r);  // a Newton step; 0 and infinity give nan, which `finite` notices
}

}}  // namespace s4nb::S4NB_ISA

#include "pair_math.h"

namespace s4nb { namespace S4NB_ISA { namespace {

template <class T> S4NB_FORCE Vec<T> load(const T* p) { Vec<T> x; memcpy(&x, p, sizeof x); return x; }
template <class T> S4NB_FORCE void store(T* p, Vec<T> x) { memcpy(p, &x, sizeof x); }

// Sums over the lanes of a vector, half upon half: a row of additions would wait for each other.
template <class T, int BYTES> struct Half { typedef T type __attribute__((vector_size(BYTES))); };
template <class T, int BYTES = S4NB_BYTES> S4NB_FORCE typename Half<T, 16>::type folded(typename Half<T, BYTES>::type x) {
  if constexpr (BYTES == 16) return x;
  else {
    typename Half<T, BYTES / 2>::type low, high;
    memcpy(&low, &x, BYTES / 2);
    memcpy(&high, (const char*)&x + BYTES / 2, BYTES / 2);
    return folded<T, BYTES / 2>(low + high);
  }
}
S4NB_FORCE double total(Vec<float> x) { auto t = folded<float>(x); return double((t[0] + t[1]) + (t[2] + t[3])); }
S4NB_FORCE double total(Vec<double> x) { auto t = folded<double>(x); return t[0] + t[1]; }
S4NB_FORCE float even_less_odd(Vec<float> x) { auto t = folded<float>(x); return (t[0] - t[1]) + (t[2] - t[3]); }
S4NB_FORCE double even_less_odd(Vec<double> x) { auto t = folded<double>(x); return t[0] - t[1]; }

template <class T> S4NB_FORCE Complex<double> number(const T* p, int64_t i) { return {double(p[2 * i]), double(p[2 * i + 1])}; }
S4NB_FORCE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
S4NB_FORCE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T> struct Memory {  // aligned scratch memory, freed at the end of the scope
  T* p;
  explicit Memory(int64_t n) : p((T*)aligned_alloc(64, up(n * int64_t(sizeof(T)) + 64, 64))) { if (!p) abort(); }
  ~Memory() { free(p); }
  Memory(const Memory&) = delete;
  operator T*() const { return p; }
};

}}}  // namespace s4nb::S4NB_ISA
