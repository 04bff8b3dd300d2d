// The spectrum of a DPLR kernel of rank 1: Cauchy sums and Woodbury's identity in one pass.
#pragma once
#include "cpu_cauchy.h"

namespace s4nb { namespace S4NB_ISA { namespace {

// The node z = 0 in double: a mode that hardly decays has its pole there, and the two terms of Woodbury's identity cancel.
// All numbers are real: k_r = -2 Re sum v_r / w.
struct AtZero {
  int64_t I, J, M;  // I, J: of the low-rank term
  const double *v, *w;
  Memory<double> k;
  double q;
  AtZero(const double* v, const double* w, int64_t rows, int64_t columns, int64_t M)
      : I(rows - 1), J(columns - 1), M(M), v(v), w(w), k(rows * columns) {
    for (int64_t r = 0; r < rows * columns; r++) {
      k[r] = 0;
      for (int64_t m = 0; m < M; m++) k[r] -= 2 * (number(v, r * M + m) * inverse(number(w, m))).re;
    }
    q = 1 / (1 + at(I, J));
  }
  double at(int64_t i, int64_t j) const { return k[i * (J + 1) + j]; }
  template <class T> void store(const DplrArgs<T>& a, int64_t h) const {
    for (int64_t i = 0; i < I; i++)
      for (int64_t j = 0; j < J; j++) {
        T* to = a.spectrum + 2 * ((h * I + i) * J + j) * a.F;
        to[0] = T(at(i, j) - at(i, J) * at(I, j) * q); to[1] = 0;
      }
  }
  template <class T> void chain(const DplrArgs<T>& a, int64_t h, double* dv, double* dw) const {
    auto g = [&](int64_t i, int64_t j) { return double(a.grad[2 * ((h * I + i) * J + j) * a.F]); };
    for (int64_t i = 0; i <= I; i++)
      for (int64_t j = 0; j <= J; j++) {
        double s = 0;
        if (i < I && j < J) s = g(i, j);
        else if (i < I) for (int64_t n = 0; n < J; n++) s -= g(i, n) * at(I, n) * q;
        else if (j < J) for (int64_t n = 0; n < I; n++) s -= g(n, j) * at(n, J) * q;
        else for (int64_t n = 0; n < I * J; n++) s += g(n / J, n % J) * at(n / J, J) * at(I, n % J) * q * q;
        for (int64_t m = 0; m < M; m++) {
          int64_t r = (i * (J + 1) + j) * M + m;
          Complex<double> u = inverse(number(w, m)), vu = number(v, r) * u * u;
          dv[2 * r] -= 2 * s * u.re; dv[2 * r + 1] += 2 * s * u.im;
          dw[2 * m] += 2 * s * vu.re; dw[2 * m + 1] -= 2 * s * vu.im;
        }
      }
  }
};

// The spectrum at the nodes `at` of a tile from their sums k (R, 2, TILE). Next to a pole the two terms of Woodbury's identity
// cancel, and what is left of floats is rounding: `lost` gets the nodes where five bits or more went, and their number is returned.
constexpr double CANCELLED = 32;
template <class T, class C>
int64_t combine(const DplrArgs<T>& a, int64_t h, const int64_t* at, const AxisNodes<C>& z, const C* k, int64_t* lost) {
  auto k_at = [&](int64_t i, int64_t j, int64_t l) -> Complex<Vec<C>> {
    const C* p = k + 2 * (i * a.J + j) * TILE + l;
    return {load(p), load(p + TILE)};
  };
  alignas(64) C re[TILE], im[TILE], worst[TILE] = {};
  for (int64_t i = 0; i + 1 < a.I; i++)
    for (int64_t j = 0; j + 1 < a.J; j++) {
      for (int64_t l = 0; l < z.padded; l += LANES<C>) {
        Complex<Vec<C>> f = {1 + 0 * z.at(l).im, C(0.5) * z.at(l).im}, direct = f * k_at(i, j, l);
        Complex<Vec<C>> x = woodbury(f, k_at(i, j, l), k_at(i, a.J - 1, l), k_at(a.I - 1, j, l), woodbury_q(k_at(a.I - 1, a.J - 1, l)));
        Vec<C> excess = direct.re * direct.re + direct.im * direct.im - C(CANCELLED * CANCELLED) * (x.re * x.re + x.im * x.im);
        store(re + l, x.re); store(im + l, x.im);
        store(worst + l, load(worst + l) > excess ? load(worst + l) : excess);
      }
      T* to = a.spectrum + 2 * ((h * (a.I - 1) + i) * (a.J - 1) + j) * a.F;
      for (int64_t l = 0; l < z.n; l++) { to[2 * at[l]] = T(re[l]); to[2 * at[l] + 1] = T(im[l]); }
    }
  int64_t n = 0;
  for (int64_t l = 0; l < z.n; l++) if (worst[l] > 0) lost[n++] = at[l];
  return n;
}

template <class T, class C> void keep_sums(const DplrArgs<T>& a, int64_t h, const int64_t* at, int64_t n, const C* k) {
  for (int64_t r = 0; r < a.I * a.J; r++) {
    T* to = a.sums + 2 * (h * a.I * a.J + r) * a.K;
    const C* from = k + 2 * r * TILE;
    for (int64_t l = 0; l < n; l++) { to[2 * at[l]] = T(from[l]); to[2 * at[l] + 1] = T(from[TILE + l]); }
  }
}

template <class T> void dplr(const DplrArgs<T>& a, int64_t h, int64_t begin, int64_t end) {
  int64_t R = a.I * a.J, at[TILE], lost[TILE];
  const double *v = a.v + 2 * h * R * a.M, *w = a.w + 2 * h * a.M;
  Row<T, AxisMode<T>> row(a.M, R);
  row.template fill<true>(v, w);
  Row<double, AxisMode<double>> wide_row(a.M, R);
  if (sizeof(T) == 4) wide_row.template fill<true>(v, w);
  AtZero zero(v, w, a.I, a.J, a.M);
  AxisNodes<T> z;
  AxisNodes<double> wide;
  Memory<T> k(2 * R * TILE);
  Memory<double> wide_k(sizeof(T) == 4 ? 2 * R * TILE : 1);
  for (int64_t l = begin; l < end; l += TILE) {
    int64_t n = least(TILE, end - l);
    for (int64_t i = 0; i < n; i++) at[i] = l + i;
    z.fill(a.y, at, n);
    sum_tile<T, true, true>(z, row, k);
    if (sizeof(T) > 4 || finite_tile(k.p, R, n)) {
      keep_sums(a, h, at, n, k.p);
      n = combine(a, h, at, z, k.p, lost);
    } else memcpy(lost, at, sizeof at);
    if (sizeof(T) == 4 && n) {  // again in double: the nodes next to poles, or all where floats did not suffice
      wide.fill(a.y, lost, n);
      sum_tile<double, true, true>(wide, wide_row, wide_k);
      keep_sums(a, h, lost, n, wide_k.p);
      combine(a, h, lost, wide, wide_k.p, at);
    }
    if (l == 0) zero.store(a, h);
  }
  if (end == a.K && a.F > a.K)  // even length: at z = infinity only the direct sums are left
    for (int64_t i = 0; i + 1 < a.I; i++)
      for (int64_t j = 0; j + 1 < a.J; j++) {
        double s = 0;
        for (int64_t m = 0; m < a.M; m++) s += v[2 * ((i * a.J + j) * a.M + m)];
        T* to = a.spectrum + 2 * (((h * (a.I - 1) + i) * (a.J - 1) + j) * a.F + a.K);
        to[0] = T(s); to[1] = 0;
      }
}

// conj of the gradients of the sums k_ij on a tile, from those of the spectrum: planar k (R), g = conj(grad) f, q = 1/(1+k_IJ).
template <class C> struct Woodbury {
  int64_t I, J;  // of the low-rank term, the last of each
  Memory<C> k, g, q;
  Woodbury(int64_t I, int64_t J) : I(I), J(J), k(2 * (I + 1) * (J + 1) * TILE), g(2 * I * J * TILE), q(2 * TILE) {}
  S4NB_FORCE static Complex<Vec<C>> at(const C* p, int64_t r, int64_t l) {
    return {load(p + 2 * r * TILE + l), load(p + (2 * r + 1) * TILE + l)};
  }
  S4NB_FORCE Complex<Vec<C>> k_at(int64_t i, int64_t j, int64_t l) const { return at(k, i * (J + 1) + j, l); }

  template <class T> static void plane(const T* from, const AxisNodes<C>& z, C* to) {
    for (int64_t n = 0; n < z.n; n++) { to[n] = C(from[2 * n]); to[TILE + n] = C(from[2 * n + 1]); }
    for (int64_t n = z.n; n < z.padded; n++) to[n] = to[TILE + n] = 0;
  }
  template <class T> void fill(const DplrArgs<T>& a, int64_t h, int64_t begin, const AxisNodes<C>& z) {
    for (int64_t r = 0; r < (I + 1) * (J + 1); r++)
      plane(a.sums + 2 * ((h * (I + 1) * (J + 1) + r) * a.K + begin), z, k + 2 * r * TILE);
    for (int64_t r = 0; r < I * J; r++) plane(a.grad + 2 * ((h * I * J + r) * a.F + begin), z, g + 2 * r * TILE);
    for (int64_t l = 0; l < z.padded; l += LANES<C>) {
      Complex<Vec<C>> f = {1 + 0 * z.at(l).im, C(0.5) * z.at(l).im}, one = woodbury_q(k_at(I, J, l));
      store(q + l, one.re); store(q + TILE + l, one.im);
      for (int64_t r = 0; r < I * J; r++) {
        Complex<Vec<C>> x = conj(at(g, r, l)) * f;
        store(g + 2 * r * TILE + l, x.re); store(g + (2 * r + 1) * TILE + l, x.im);
      }
    }
  }
  S4NB_FORCE Complex<Vec<C>> slope(int64_t i, int64_t j, int64_t l) const {
    Complex<Vec<C>> s = {}, ql = at(q, 0, l);
    if (i < I && j < J) return at(g, i * J + j, l);
    if (i < I) for (int64_t n = 0; n < J; n++) s = s - at(g, i * J + n, l) * k_at(I, n, l);
    else if (j < J) for (int64_t n = 0; n < I; n++) s = s - at(g, n * J + j, l) * k_at(n, J, l);
    else {
      for (int64_t n = 0; n < I * J; n++) s = s + at(g, n, l) * k_at(n / J, J, l) * k_at(I, n % J, l);
      s = s * ql;
    }
    return s * ql;
  }
};

template <class C, class T> void dplr_collect_in(const DplrArgs<T>& a, int64_t h, int64_t begin, int64_t end, double* sums) {
  int64_t R = a.I * a.J, at[TILE];
  Row<C, AxisMode<C>> row(a.M, R);
  row.template fill<true>(a.v + 2 * h * R * a.M, a.w + 2 * h * a.M);
  Woodbury<C> woodbury(a.I - 1, a.J - 1);
  AxisNodes<C> z;
  memset(sums, 0, sizeof(double) * size_t(a.M * (2 * R + 2)));
  for (int64_t l = begin; l < end; l += TILE) {
    for (int64_t i = 0; i < least(TILE, end - l); i++) at[i] = l + i;
    z.fill(a.y, at, least(TILE, end - l));
    woodbury.fill(a, h, l, z);
    collect_tile<C, true, true>(z, row, [&](int64_t r, C* k) {
      for (int64_t n = 0; n < z.padded; n += LANES<C>) {
        Complex<Vec<C>> s = woodbury.slope(r / a.J, r % a.J, n);
        store(k + n, s.re); store(k + TILE + n, s.im);
      }
      if (l == 0) k[0] = k[TILE] = 0;  // AtZero has it
    }, sums);
  }
}

template <class T> void dplr_collect(const DplrArgs<T>& a, int64_t h, int64_t begin, int64_t end, double* sums) {
  dplr_collect_in<T>(a, h, begin, end, sums);
  if constexpr (sizeof(T) == 4)
    if (!finite(sums, a.M * (2 * a.I * a.J + 2))) dplr_collect_in<double>(a, h, begin, end, sums);
}

template <class T> void dplr_chain(const DplrArgs<T>& a, int64_t h, int64_t chunks) {
  int64_t R = a.I * a.J, width = a.M * (2 * R + 2);
  const double *v = a.v + 2 * h * R * a.M, *w = a.w + 2 * h * a.M;
  double *dv = a.dv + 2 * h * R * a.M, *dw = a.dw + 2 * h * a.M;
  chain_row<true, true>(v, w, a.partial + h * width, a.H * width, chunks, a.M, R, dv, dw);
  AtZero(v, w, a.I, a.J, a.M).chain(a, h, dv, dw);
  if (a.F > a.K)
    for (int64_t i = 0; i + 1 < a.I; i++)
      for (int64_t j = 0; j + 1 < a.J; j++)
        for (int64_t m = 0; m < a.M; m++)
          dv[2 * ((i * a.J + j) * a.M + m)] += a.grad[2 * (((h * (a.I - 1) + i) * (a.J - 1) + j) * a.F + a.K)];
}

}}}  // namespace s4nb::S4NB_ISA
