// The spectrum of a DPLR kernel of rank 1, Cauchy sums and Woodbury's identity in one pass, and its gradients, in CUDA.
#pragma once
#include "cuda_cauchy.cuh"

namespace s4nb { namespace S4NB_ISA {

template <class T> struct RootsOfUnity {  // z_k = 2i tan(pi k / length)
  static constexpr bool imaginary = true;
  int64_t length;
  static __device__ Complex<double> half_root(double turn) {  // exp(i pi turn)
    Complex<double> x;
    sincospi(turn, &x.im, &x.re);
    return x;
  }
  static __device__ double y(Complex<double> x) { return 2 * x.im * bounded_reciprocal(x.re); }
  __device__ double exact(int64_t k) const { return y(half_root(double(k) / double(length))); }
  __device__ AxisNode<T> operator()(int64_t, int64_t k) const { return AxisNode<T>::of(exact(k)); }
};

// The spectrum's numerators are a matrix (I, J), its last row and column the low-rank ones. At the two ends of the
// axis, z = 0 and the limit z -> infinity (of even lengths only), the sums are real; a row's first block does them in
// double, a warp for each numerator.
struct Ends { double zero, limit; };

__device__ inline Complex<double> at_zero(double k_ij, double k_iJ, double k_Ij, double k_IJ) {
  return {k_ij - k_iJ * k_Ij / (1 + k_IJ), 0};
}

template <class T, int R>  // one node, all of it in double
__device__ __noinline__ void exact_node(const Complex<double>* v, const Complex<double>* w, Complex<T>* sums,
                                        Complex<T>* spectrum, Shape s, int count, double y) {
  Complex<double> k[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (r >= count) continue;
    k[r] = exact_sum<true>(v + r * s.modes, w, s.modes, {0, y});
    sums[r * s.nodes] = cast<T>(k[r]);
  }
  if constexpr (R == 4)
    if (spectrum) *spectrum = cast<T>(woodbury<double>({1, y / 2}, k[0], k[1], k[2], woodbury_q(k[3])));
}

// FUSED: four numerators, I = J = 2; Woodbury's identity is applied at once. Otherwise the sums and ends are all.
template <class T, int R, bool FUSED> __global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 4 : 3)
    spectrum_kernel(RootsOfUnity<T> nodes, double per, Complex<double> stride, const Complex<double>* v,
                    const Complex<double>* w, Complex<T>* sums, Complex<T>* spectrum, Ends* ends, Shape s) {
  constexpr int N = EACH<T>;
  if (FUSED) s.numerators = R;
  Place at = Place::of<R, N>(blockIdx.x, threadIdx.x, s);
  v += (at.row * s.numerators + at.first) * s.modes;
  w += at.row * s.modes;
  sums += (at.row * s.numerators + at.first) * s.nodes;
  if (FUSED) spectrum += at.row * (nodes.length / 2 + 1);
  if (at.node < THREADS) {
    __shared__ Ends end[THREADS / WARP];
    const int r = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Ends sum = {0, 0};
    if (r < at.count)
      for (int64_t m = lane; m < s.modes; m += WARP) {
        Complex<double> V = v[r * s.modes + m], W = w[m];
        sum.zero -= 2 * (V.re * W.re + V.im * W.im) / (W.re * W.re + W.im * W.im);
        sum.limit += V.re;
      }
    sum = {warp_sum(sum.zero), warp_sum(sum.limit)};
    if (lane == 0) end[r] = sum;
    if (lane == 0 && r < at.count) {
      sums[r * s.nodes] = {T(sum.zero), T(0)};
      if (!FUSED) ends[at.row * s.numerators + at.first + r] = sum;
    }
    __syncthreads();
    if (FUSED && threadIdx.x == 0) {
      spectrum[0] = cast<T>(at_zero(end[0].zero, end[1].zero, end[2].zero, end[3].zero));
      if (nodes.length % 2 == 0) spectrum[s.nodes] = {T(end[0].limit), T(0)};
    }
  }
  AxisNode<T> z[N];
  Complex<T> k[N][R];
  Complex<double> x = nodes.half_root(double(at.node) * per);  // per: 1 / length
#pragma unroll
  for (int o = 0; o < N; o++, x = x * stride)  // stride: exp(i pi THREADS / length)
    z[o] = AxisNode<T>::of(o * THREADS < at.left ? nodes.y(x) : 0);
  sum_modes<true, AxisMode<T>>(k, z, at.left > 0, at.count, v, w, s.modes);
  T bad = 0;
  sums += at.node;
  if (FUSED) spectrum += at.node;
#pragma unroll
  for (int o = 0; o < N; o++) {
    if (o * THREADS >= at.left || (o == 0 && at.node == 0)) continue;
#pragma unroll
    for (int r = 0; r < R; r++)
      if (r < at.count) {
        sums[r * s.nodes + o * THREADS] = k[o][r];
        if (!FUSED) check(bad, k[o][r]);
      }
    if constexpr (FUSED) {
      auto x = woodbury<T>({T(1), z[o].im / 2}, k[o][0], k[o][1], k[o][2], woodbury_q(k[o][3]));
      spectrum[o * THREADS] = x;
      check(bad, x);  // not finite if one of the sums is not
    }
  }
  if (sizeof(T) == 4 && bad != 0)
#pragma unroll 1
    for (int o = at.node ? 0 : THREADS; o < at.left; o += THREADS)
      exact_node<T, R>(v, w, sums + o, FUSED ? spectrum + o : nullptr, s, at.count, nodes.exact(at.node + o));
}

// Woodbury's identity for any number of numerators, from the sums: one thread for each (h, i, j, bin).
template <class T> __global__ void __launch_bounds__(THREADS)
    woodbury_kernel(RootsOfUnity<T> nodes, const Complex<T>* sums, const Ends* ends, Complex<T>* spectrum, int64_t I,
                    int64_t J, int64_t total) {
  int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= total) return;
  int64_t bins = nodes.length / 2 + 1, K = (nodes.length + 1) / 2, l = index % bins, ij = index / bins;
  int64_t j = ij % (J - 1), i = ij / (J - 1) % (I - 1), h = ij / (J - 1) / (I - 1);
  int64_t at[4] = {(h * I + i) * J + j, (h * I + i) * J + J - 1, (h * I + I - 1) * J + j, (h * I + I - 1) * J + J - 1};
  if (l == K) spectrum[index] = {T(ends[at[0]].limit), T(0)};
  else if (l == 0)
    spectrum[index] = cast<T>(at_zero(ends[at[0]].zero, ends[at[1]].zero, ends[at[2]].zero, ends[at[3]].zero));
  else
    spectrum[index] = woodbury<T>({T(1), nodes(h, l).im / 2}, sums[at[0] * K + l], sums[at[1] * K + l],
                                  sums[at[2] * K + l], woodbury_q(sums[at[3] * K + l]));
}

// The conjugate gradients of the sums, from those of the spectrum.
template <class T> struct ThroughWoodbury {
  const Complex<T> *grad, *sums; int I, J; int64_t length;
  __device__ Complex<T> operator()(int64_t row, int64_t r, int64_t l, AxisNode<T> z) const {
    const int c = I - 1, b = J - 1, i = int(r) / J, j = int(r) % J;
    const int64_t K = (length + 1) / 2, bins = length / 2 + 1;
    const Complex<T> *k = sums + row * I * J * K + l, *g = grad + row * c * b * bins + l;
    Complex<T> total = {0, 0};
#pragma unroll 1
    for (int m = i < c ? i : 0; m < (i < c ? i + 1 : c); m++)
#pragma unroll 1
      for (int n = j < b ? j : 0; n < (j < b ? j + 1 : b); n++) {
        Complex<T> term = conj(g[(m * b + n) * bins]);
        if (i == c) term = term * k[(m * J + b) * K];
        if (j == b) term = term * k[(c * J + n) * K];
        total = total + term;
      }
    total = total * Complex<T>{T(1), z.im / 2};
    if (i < c && j < b) return total;
    Complex<T> q = woodbury_q(k[(c * J + b) * K]);
    total = total * q;
    return i < c || j < b ? Complex<T>{-total.re, -total.im} : total * q;
  }
  // All sums at once where they are four, I = J = 2.
  template <class F> __device__ bool all(int64_t row, int64_t l, AxisNode<T> z, F stage) const {
    if (I != 2 || J != 2) return false;
    const int64_t K = (length + 1) / 2;
    const Complex<T>* k = sums + row * 4 * K + l;
    Complex<T> g = conj(grad[row * (length / 2 + 1) + l]) * Complex<T>{T(1), z.im / 2}, q = woodbury_q(k[3 * K]);
    Complex<T> left = k[K] * q, right = k[2 * K] * q, x = g * left, y = g * right;
    stage(0, g); stage(1, {-y.re, -y.im}); stage(2, {-x.re, -x.im}); stage(3, x * right);
    return true;
  }
  __device__ double limit(int64_t row, int64_t r) const {  // what each Re v gets from the last bin
    const int c = I - 1, b = J - 1, i = int(r) / J, j = int(r) % J;
    if (length % 2 || i >= c || j >= b) return 0;
    return double(grad[((row * c + i) * b + j) * (length / 2 + 1) + length / 2].re);
  }
};

// ---- Launches ------------------------------------------------------------------------------------------------------
struct Dplr {
  const Complex<double> *v, *w; int64_t H, I, J, M, length;
  Shape shape() const { return {H, I * J, M, (length + 1) / 2}; }
  bool fused() const { return I == 2 && J == 2; }  // one kernel does it all, and needs no `ends`
};

// ends: (H, I, J)
template <class T, class L> void launch_spectrum(L launch, Dplr a, Complex<T>* sums, Complex<T>* spectrum, Ends* ends) {
  Shape s = a.shape();
  RootsOfUnity<T> nodes = {a.length};
  const double per = 1 / double(a.length), angle = M_PI * THREADS * per;
  const Complex<double> stride = {std::cos(angle), std::sin(angle)};
  if (!s.rows || !s.numerators) return;
  by_count(s.numerators, [&](auto n) {
    constexpr int R = decltype(n)::value;
    auto kernel = a.fused() ? spectrum_kernel<T, 4, true> : spectrum_kernel<T, R, false>;
    launch(kernel, Place::blocks(s, R, EACH<T>), THREADS, nodes, per, stride, a.v, a.w, sums, spectrum,
           ends, s);
  });
  int64_t total = a.H * (a.I - 1) * (a.J - 1) * (a.length / 2 + 1);
  if (!a.fused() && total)
    launch(woodbury_kernel<T>, pieces(total, THREADS), THREADS, nodes, sums, ends, spectrum, a.I, a.J, total);
}

template <class T, class L>
void launch_spectrum_backward(L launch, Dplr a, const Complex<T>* grad, const Complex<T>* sums, double* partial,
                              Complex<double>* dv, Complex<double>* dw) {
  ThroughWoodbury<T> upstream = {grad, sums, int(a.I), int(a.J), a.length};
  launch_gradients<true, T>(launch, RootsOfUnity<T>{a.length}, upstream, a.v, a.w, partial, dv, dw, a.shape());
}

}}  // namespace s4nb::S4NB_ISA
