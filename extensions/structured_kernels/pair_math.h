// The formulas of the structured kernels, written once for the CPU (V: a vector of floats or doubles) and for CUDA
// (V: one float or double). Derivations: notebooks 13 (Cauchy sums) and 14 (Vandermonde sums).
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define S4NB_INLINE __host__ __device__ __forceinline__
#else
#define S4NB_INLINE inline __attribute__((always_inline))
#endif
#ifndef S4NB_ISA
#define S4NB_ISA base
#endif

namespace s4nb { namespace S4NB_ISA {

template <class V> struct alignas(2 * sizeof(V)) Complex { V re, im; };

template <class V> S4NB_INLINE Complex<V> operator+(Complex<V> a, Complex<V> b) { return {a.re + b.re, a.im + b.im}; }
template <class V> S4NB_INLINE Complex<V> operator-(Complex<V> a, Complex<V> b) { return {a.re - b.re, a.im - b.im}; }
template <class V> S4NB_INLINE Complex<V> operator*(Complex<V> a, Complex<V> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class V> S4NB_INLINE Complex<V> conj(Complex<V> a) { return {a.re, -a.im}; }

S4NB_INLINE double reciprocal(double q) { return 1 / q; }
#ifdef __CUDA_ARCH__  // of positive q, without branches: 1/sqrt(q) squared and one Newton step; 0 and infinity give nan
S4NB_INLINE float reciprocal(float q) {
  float s, r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(q));
  r = s * s;
  return r + r * (1.0f - q * r);
}
#else
S4NB_INLINE float reciprocal(float q) {
  float r = 1 / q;
  return r + r * (1 - q * r);  // the same nan at 0 and infinity: the sum is then done in double
}
#endif

// Of q below 2^126 in float (a larger one could give 0 unnoticed). 0 gives infinity or nan.
template <class V> S4NB_INLINE V bounded_reciprocal(V q) { return reciprocal(q); }
#ifdef __CUDA_ARCH__
template <> S4NB_INLINE float bounded_reciprocal(float q) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(q));
  return r;
}
template <> S4NB_INLINE double bounded_reciprocal(double q) {  // 20 bits, then 60
  double r, e;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(q));
  e = 1 - q * r;
  return r + r * (e + e * e);
}
#else
template <> S4NB_INLINE float bounded_reciprocal(float q) { return 1 / q; }
#endif

template <class V> S4NB_INLINE Complex<V> inverse(Complex<V> a) {
  V r = reciprocal(a.re * a.re + a.im * a.im);
  return {a.re * r, -a.im * r};
}

// One term of a Cauchy sum at a node z. A term owns a mode w and R numerators that share it:
//   pairs:   v/(z-w) + conj(v)/(z-conj w) = (a z - b) u,  u = 1/((z-w)(z-conj w)),  a = 2 Re v,  b = 2 Re(v conj w)
//   singles: v/(z-w) = v u,  u = 1/(z-w)
// (c0, c1) are (a, b) or (Re v, Im v). The product (z-w)(z-conj w) is formed from differences, s^2 - (y-x)(y+x) with
// s = Re(z-w): a difference of rounded squares would lose more next to a pole. IMAGINARY: Re z = 0, s is a constant.
template <class S> struct Mode {
  S re, im;
  static S4NB_INLINE Mode of(Complex<double> w) { return {S(w.re), S(w.im)}; }
};

// Where w and y of a node z = iy are known in double, the product is |w|^2 - y^2 - 2i y Re w: squares that are rounded
// once, from double, lose no more next to a pole than rounding w and y does. In float, squares of 2^60 and more become
// infinite and the sums nan, so that bounded_reciprocal never meets what is out of its range.
template <class S> S4NB_INLINE S rounded_square(double x) {
  return sizeof(S) > 4 || S(x) < S(0x1p60) ? S(x) : S(INFINITY);
}
template <class S> struct AxisMode {
  S square, twice;  // |w|^2, 2 Re w
  static S4NB_INLINE AxisMode of(Complex<double> w) {
    return {rounded_square<S>(w.re * w.re + w.im * w.im), S(2 * w.re)};
  }
};
template <class V> struct AxisNode {
  V im, square;  // y, y^2
  static S4NB_INLINE AxisNode of(double y) { return {V(y), rounded_square<V>(y * y)}; }
};
template <class V> S4NB_INLINE Complex<V> operator*(AxisNode<V> z, Complex<V> a) {
  return {-(z.im * a.im), z.im * a.re};
}

template <bool PAIRS, bool IMAGINARY, class V, class S> S4NB_INLINE Complex<V> pole(Complex<V> z, Mode<S> w) {
  if constexpr (!PAIRS) {
    return inverse(Complex<V>{z.re - w.re, z.im - w.im});
  } else if constexpr (IMAGINARY) {
    return inverse(Complex<V>{w.re * w.re - (z.im - w.im) * (z.im + w.im), (S(-2) * w.re) * z.im});
  } else {
    V s = z.re - w.re;
    return inverse(Complex<V>{s * s - (z.im - w.im) * (z.im + w.im), (s + s) * z.im});
  }
}

template <bool PAIRS, bool IMAGINARY, class V, class S> S4NB_INLINE Complex<V> pole(AxisNode<V> z, AxisMode<S> w) {
  V re = w.square - z.square, im = w.twice * z.im, r = bounded_reciprocal(re * re + im * im);
  return {re * r, im * r};
}

// The sum of one numerator over the modes: sum a u and sum b u (pairs), or sum v u (singles; the second stays unused).
template <bool PAIRS, class V> struct Sum {
  Complex<V> first, second;
  template <class S> S4NB_INLINE void add(Complex<V> u, S c0, S c1) {
    if constexpr (PAIRS) {
      first.re += c0 * u.re; first.im += c0 * u.im;
      second.re += c1 * u.re; second.im += c1 * u.im;
    } else {
      first.re += c0 * u.re; first.re -= c1 * u.im;  // statements of one product each become fused multiply-adds
      first.im += c0 * u.im; first.im += c1 * u.re;
    }
  }
  template <class Z> S4NB_INLINE Complex<V> value(Z z) const {
    if constexpr (PAIRS) return z * first - second;
    else return first;
  }
};

// Gradients of one mode, summed over the nodes. k = conj(grad), kz = k z (pairs only) at a node; h = k u.
//   pairs:   da = Re sum h z, db = -Re sum h;   singles: conj(dv) = sum h
//   N = sum over the numerators of k (a z - b) or k v;  E = N u^2
//   pairs:   Re sum E, Re sum E (z - Re w), or Re sum E z where z is IMAGINARY;  singles: sum E
template <bool PAIRS, class V> struct Slope {  // of one numerator: (da, -db), or conj(dv)
  V first, second;
  S4NB_INLINE void add(Complex<V> k, Complex<V> kz, Complex<V> u) {
    if constexpr (PAIRS) {
      first += kz.re * u.re; first -= kz.im * u.im;
      second += k.re * u.re; second -= k.im * u.im;
    } else {
      first += k.re * u.re; first -= k.im * u.im;
      second += k.re * u.im; second += k.im * u.re;
    }
  }
};

template <bool PAIRS, class V, class S> S4NB_INLINE void add_numerator(Complex<V>& N, Complex<V> k, Complex<V> kz, S c0, S c1) {
  if constexpr (PAIRS) {
    N.re += c0 * kz.re; N.re -= c1 * k.re;
    N.im += c0 * kz.im; N.im -= c1 * k.im;
  } else {
    N.re += c0 * k.re; N.re -= c1 * k.im;
    N.im += c0 * k.im; N.im += c1 * k.re;
  }
}

template <bool PAIRS, bool IMAGINARY, class V> struct Drift {  // of the mode
  V first, second;
  template <class Z, class W> S4NB_INLINE void add(Complex<V> N, Complex<V> u, Z z, W w) {
    Complex<V> E = (N * u) * u;
    first += E.re;
    if constexpr (!PAIRS) second += E.im;
    else second -= z.im * E.im;
    if constexpr (PAIRS && !IMAGINARY) second += (z.re - w.re) * E.re;
  }
};

// From (a, b) or (v) and the sums above back to v and w; everything in double. slope and drift as accumulated.
template <bool PAIRS> S4NB_INLINE void chain(Complex<double> v, Complex<double> w, Slope<PAIRS, double> slope,
                                             Complex<double>& dv, Complex<double>& dw) {
  if constexpr (PAIRS) {
    double da = slope.first, db = -slope.second;
    dv = {2 * da + 2 * w.re * db, 2 * w.im * db};
    dw.re += 2 * v.re * db;
    dw.im += 2 * v.im * db;
  } else {
    dv = {slope.first, -slope.second};
  }
}

template <bool PAIRS, bool IMAGINARY>
S4NB_INLINE Complex<double> drift_of_mode(Complex<double> w, Drift<PAIRS, IMAGINARY, double> drift) {
  if constexpr (PAIRS) return {2 * (drift.second - IMAGINARY * w.re * drift.first), -2 * w.im * drift.first};
  else return {drift.first, -drift.second};
}

// d out / d z of one mode times k: (sum over numerators of k a) u - 2 N u^2 (z - Re w), or -N u^2.
template <bool PAIRS, class V, class S>
S4NB_INLINE Complex<V> node_slope(Complex<V> ka, Complex<V> N, Complex<V> u, Complex<V> z, Mode<S> w) {
  Complex<V> E = (N * u) * u;
  if constexpr (!PAIRS) return {-E.re, -E.im};
  else {
    Complex<V> t = E * Complex<V>{z.re - w.re, z.im};
    return ka * u - (t + t);
  }
}

// Woodbury's identity for a system of rank 1 at one node: f (k_ij - k_iJ k_Ij / (1 + k_IJ)), f = 1 + z/2.
template <class V> S4NB_INLINE Complex<V> woodbury(Complex<V> f, Complex<V> k_ij, Complex<V> k_iJ, Complex<V> k_Ij, Complex<V> q) {
  return f * (k_ij - k_iJ * k_Ij * q);  // q = 1 / (1 + k_IJ)
}

template <class V> S4NB_INLINE Complex<V> woodbury_q(Complex<V> k_IJ) {
  Complex<V> one_more = {k_IJ.re + 1, k_IJ.im};
  return inverse(one_more);
}

// The numerator of one mode as the sums want it.
template <bool PAIRS> S4NB_INLINE Complex<double> coefficients(Complex<double> v, Complex<double> w) {
  if constexpr (PAIRS) return {2 * v.re, 2 * (v.re * w.re + v.im * w.im)};
  else return v;
}

}}  // namespace s4nb::S4NB_ISA
