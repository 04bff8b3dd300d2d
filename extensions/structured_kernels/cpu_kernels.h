// What cpu_kernels.cpp offers cpu.cpp: plain loops over raw memory, one table of functions for each instruction set.
#pragma once
#include <cstdint>

namespace s4nb {

// Sizes and memory of a Cauchy sum; complex numbers are interleaved. v (B,R,M), w (B,M), z (Z,L) with Z = B or 1,
// out and grad (B,R,L). `sums` is where gradients are collected: (chunks, B, M, 2R+2) doubles.
template <class T> struct CauchyArgs {
  const T *v, *z, *w, *grad;
  T *out, *dv, *dz, *dw;
  double* sums;
  int64_t B, R, M, L, Z;
  bool pairs, imaginary;
};

// v (H,I,J,M), w (H,M) doubles; nodes i y_k, k < K; sums (H,I,J,K), spectrum and grad (H,I-1,J-1,F) with F = L/2+1.
template <class T> struct DplrArgs {
  const double *v, *w, *y;
  const T* grad;
  T *spectrum, *sums;
  double *dv, *dw, *partial;
  int64_t H, I, J, M, K, F;
};

// x (B,M) doubles. vandermonde: v (B,R,M) -> out (B,R,L) real (pairs) or complex.
// power_sums: u (B,R,L) real, or complex when `complex_input` -> out (B,R,M) and, unless null, moments (B,R,M).
template <class T> struct PowerArgs {
  const T *v, *u;
  const double* x;
  T *out, *moments;
  int64_t B, R, M, L;
  bool pairs, complex_input;
};

// State space steps for features [begin, end): A, B, D, E, B2 (h,m), P, Q (r,h,m), C (c,h,m), u (b,h), states (b,h,m), y (b,c,h).
template <class T> struct StepArgs {
  const T *A, *B, *C, *D, *E, *P, *Q, *u, *state;
  T *y, *next;
  int64_t batch, H, M, channels, rank;
};

constexpr int64_t TILE = 512;  // nodes whose tables fit the first cache

template <class T> struct Kernels {
  void (*cauchy)(const CauchyArgs<T>&, int64_t row, int64_t begin, int64_t end);
  void (*cauchy_collect)(const CauchyArgs<T>&, int64_t row, int64_t begin, int64_t end, double* sums);
  void (*cauchy_chain)(const CauchyArgs<T>&, int64_t row, int64_t chunks);
  void (*cauchy_nodes)(const CauchyArgs<T>&, int64_t z_row, int64_t begin, int64_t end);
  void (*dplr)(const DplrArgs<T>&, int64_t h, int64_t begin, int64_t end);
  void (*dplr_collect)(const DplrArgs<T>&, int64_t h, int64_t begin, int64_t end, double* sums);
  void (*dplr_chain)(const DplrArgs<T>&, int64_t h, int64_t chunks);
  void (*vandermonde)(const PowerArgs<T>&, int64_t row);
  void (*power_sums)(const PowerArgs<T>&, int64_t row);
  void (*diag_step)(const StepArgs<T>&, int64_t begin, int64_t end);
  void (*dplr_step)(const StepArgs<T>&, int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  Kernels<float> single;
  Kernels<double> twice;
};

}  // namespace s4nb
