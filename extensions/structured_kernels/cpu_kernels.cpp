// The loops of the CPU ops, without torch: compiled once for each instruction set (S4NB_ISA) with that set's flags.
// Nothing here may come from a C++ library template: the linker could hand an AVX-512 copy of it to everybody.
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
#ifdef __AVX512F__  // 14 bits and one Newton step; 0 and infinity give nan, which `finite` notices
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)q);
  return r + r * (1.0f - q * r);
#else
  return 1.0f / q;
#endif
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

// ---- Cauchy sums -----------------------------------------------------------------------------------------------------
// Modes and coefficients of one row, the numerators in groups of up to four: (c0, c1) at [group][m][r].
template <class T> struct Row {
  int64_t M, R;
  Memory<Mode<T>> w;
  Memory<T> c;
  Row(int64_t M, int64_t R) : M(M), R(R), w(M), c(2 * M * R) {}
  T* at(int64_t r) const { return c + 2 * M * r; }  // r: the first of a group
  template <bool PAIRS, class IO> void fill(const IO* v, const IO* poles) {
    for (int64_t m = 0; m < M; m++) {
      Complex<double> p = number(poles, m);
      w[m] = {T(p.re), T(p.im)};
      for (int64_t r = 0; r < R; r++) {
        int64_t first = r & ~int64_t(3), width = least(4, R - first);
        Complex<double> a = coefficients<PAIRS>(number(v, r * M + m), p);
        T* to = at(first) + 2 * (m * width + r - first);
        to[0] = T(a.re); to[1] = T(a.im);
      }
    }
  }
};

// Up to TILE nodes, real and imaginary parts apart, filled up to whole vectors with a harmless value.
template <class T> struct Nodes {
  int64_t n, padded;
  alignas(64) T re[TILE], im[TILE];
  S4NB_FORCE Complex<Vec<T>> at(int64_t l) const { return {load(re + l), load(im + l)}; }
  void pad(int64_t count) {
    n = count; padded = up(n, LANES<T>);
    for (int64_t l = n; l < padded; l++) { re[l] = re[n - 1]; im[l] = im[n - 1]; }
  }
  template <class IO> void fill(const IO* z, int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; l++) { re[l - begin] = T(z[2 * l]); im[l - begin] = T(z[2 * l + 1]); }
    pad(end - begin);
  }
  void fill_imaginary(const double* y, int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; l++) { re[l - begin] = 0; im[l - begin] = T(y[l]); }
    pad(end - begin);
  }
};

template <class T, bool PAIRS, bool IMAGINARY, int R, int WIDE>
S4NB_FORCE void sum_group(const Nodes<T>& z, int64_t l, const Row<T>& row, int64_t r0, T* out) {
  Sum<PAIRS, Vec<T>> s[WIDE][R] = {};
  Complex<Vec<T>> node[WIDE];
  for (int k = 0; k < WIDE; k++) node[k] = z.at(l + k * LANES<T>);
  const T* c = row.at(r0);
  for (int64_t m = 0; m < row.M; m++, c += 2 * R) {
    Mode<T> w = row.w[m];
#pragma GCC unroll 4
    for (int k = 0; k < WIDE; k++) {
      Complex<Vec<T>> u = pole<PAIRS, IMAGINARY>(node[k], w);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) s[k][r].add(u, c[2 * r], c[2 * r + 1]);
    }
  }
  for (int k = 0; k < WIDE; k++)
    for (int r = 0; r < R; r++) {
      Complex<Vec<T>> x = s[k][r].value(node[k]);
      store(out + 2 * (r0 + r) * TILE + l + k * LANES<T>, x.re);
      store(out + (2 * (r0 + r) + 1) * TILE + l + k * LANES<T>, x.im);
    }
}

// out (R, 2, TILE): the sums of all numerators at the nodes of a tile.
template <class T, bool PAIRS, bool IMAGINARY> void sum_tile(const Nodes<T>& z, const Row<T>& row, T* out) {
  constexpr int V = LANES<T>;
  for (int64_t r0 = 0; r0 < row.R; r0 += 4) {
    int64_t l = 0;
    switch (least(4, row.R - r0)) {
      case 1:
        for (; l + 4 * V <= z.padded; l += 4 * V) sum_group<T, PAIRS, IMAGINARY, 1, 4>(z, l, row, r0, out);
        for (; l < z.padded; l += V) sum_group<T, PAIRS, IMAGINARY, 1, 1>(z, l, row, r0, out);
        break;
      case 2:
        for (; l + 2 * V <= z.padded; l += 2 * V) sum_group<T, PAIRS, IMAGINARY, 2, 2>(z, l, row, r0, out);
        for (; l < z.padded; l += V) sum_group<T, PAIRS, IMAGINARY, 2, 1>(z, l, row, r0, out);
        break;
      case 3: for (; l < z.padded; l += V) sum_group<T, PAIRS, IMAGINARY, 3, 1>(z, l, row, r0, out); break;
      case 4: for (; l < z.padded; l += V) sum_group<T, PAIRS, IMAGINARY, 4, 1>(z, l, row, r0, out); break;
    }
  }
}

template <class T> bool finite(const T* x, int64_t n) {
  T bad = 0;
  for (int64_t i = 0; i < n; i++) bad += x[i] - x[i];  // 0 for finite numbers, nan for others
  return bad == 0;
}

// Off the imaginary axis, z sum a u - sum b u cancels next to a pole that is nearly real: such rows are summed in double.
template <class T> bool nearly_real(const CauchyArgs<T>& a, int64_t b) {
  if (sizeof(T) > 4 || !a.pairs || a.imaginary) return false;
  const T* w = a.w + 2 * b * a.M;
  for (int64_t m = 0; m < a.M; m++) if (fabs(double(w[2 * m])) > 4 * fabs(double(w[2 * m + 1]))) return true;
  return false;
}

template <class T> bool finite_tile(const T* out, int64_t R, int64_t n) {
  for (int64_t i = 0; i < 2 * R; i++) if (!finite(out + i * TILE, n)) return false;
  return true;
}

// The same tile in double, for the rare one that leaves the range of floats on the way. `refill` makes Row and Nodes.
template <bool PAIRS, bool IMAGINARY, class Refill> void again_in_double(Refill refill, int64_t M, int64_t R, float* out) {
  Row<double> row(M, R);
  Nodes<double> z;
  refill(row, z);
  Memory<double> wide(2 * R * TILE);
  sum_tile<double, PAIRS, IMAGINARY>(z, row, wide);
  for (int64_t i = 0; i < 2 * R; i++)
    for (int64_t l = 0; l < z.n; l++) out[i * TILE + l] = float(wide[i * TILE + l]);
}

template <class T, bool PAIRS, bool IMAGINARY> void cauchy_row(const CauchyArgs<T>& a, int64_t b, int64_t begin, int64_t end) {
  Row<T> row(a.M, a.R);
  Nodes<T> z;
  Memory<T> out(2 * a.R * TILE);
  const T *v = a.v + 2 * b * a.R * a.M, *w = a.w + 2 * b * a.M, *nodes = a.z + (a.Z == 1 ? 0 : 2 * b * a.L);
  row.template fill<PAIRS>(v, w);
  const bool wide = nearly_real(a, b);
  for (int64_t l = begin; l < end; l += TILE) {
    int64_t last = least(l + TILE, end);
    z.fill(nodes, l, last);
    if (!wide) sum_tile<T, PAIRS, IMAGINARY>(z, row, out);
    if constexpr (sizeof(T) == 4)
      if (wide || !finite_tile(out.p, a.R, z.n))
        again_in_double<PAIRS, IMAGINARY>([&](auto& wide_row, auto& wide_z) {
          wide_row.template fill<PAIRS>(v, w);
          wide_z.fill(nodes, l, last);
        }, a.M, a.R, out);
    for (int64_t r = 0; r < a.R; r++) {
      T* to = a.out + 2 * ((b * a.R + r) * a.L + l);
      const T* from = out + 2 * r * TILE;
      for (int64_t i = 0; i < z.n; i++) { to[2 * i] = from[i]; to[2 * i + 1] = from[TILE + i]; }
    }
  }
}

template <class T> void cauchy(const CauchyArgs<T>& a, int64_t b, int64_t begin, int64_t end) {
  if (a.pairs) (a.imaginary ? cauchy_row<T, true, true> : cauchy_row<T, true, false>)(a, b, begin, end);
  else (a.imaginary ? cauchy_row<T, false, true> : cauchy_row<T, false, false>)(a, b, begin, end);
}

// ---- gradients of Cauchy sums ----------------------------------------------------------------------------------------
// Gradients of up to four numerators on a tile: k = conj(grad) and k z, planar: [r][re, im, z re, z im][TILE].
template <class T, bool PAIRS> void prepare(const Nodes<T>& z, int64_t R, T* k) {
  for (int64_t r = 0; r < R; r++) {
    T* g = k + 4 * r * TILE;
    for (int64_t l = z.n; l < z.padded; l++) g[l] = g[TILE + l] = 0;
    if constexpr (PAIRS)
      for (int64_t l = 0; l < z.padded; l++) {
        g[2 * TILE + l] = g[l] * z.re[l] - g[TILE + l] * z.im[l];
        g[3 * TILE + l] = g[l] * z.im[l] + g[TILE + l] * z.re[l];
      }
  }
}

template <class T, bool PAIRS, bool IMAGINARY, int R>
void collect_group(const Nodes<T>& z, const Row<T>& row, int64_t r0, const T* k, double* sums) {
  const T* c = row.at(r0);
  int64_t width = 2 * row.R + 2;
  for (int64_t m = 0; m < row.M; m++, c += 2 * R, sums += width) {
    Mode<T> w = row.w[m];
    Slope<PAIRS, Vec<T>> slope[R] = {};
    Drift<PAIRS, IMAGINARY, Vec<T>> drift = {};
    for (int64_t l = 0; l < z.padded; l += LANES<T>) {
      Complex<Vec<T>> node = z.at(l), u = pole<PAIRS, IMAGINARY>(node, w), N = {};
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const T* g = k + 4 * r * TILE + l;
        Complex<Vec<T>> kr = {load(g), load(g + TILE)}, kz = {load(g + 2 * TILE), load(g + 3 * TILE)};
        slope[r].add(kr, kz, u);
        add_numerator<PAIRS>(N, kr, kz, c[2 * r], c[2 * r + 1]);
      }
      drift.add(N, u, node, w);
    }
    for (int r = 0; r < R; r++) {
      sums[2 * (r0 + r)] += total(slope[r].first);
      sums[2 * (r0 + r) + 1] += total(slope[r].second);
    }
    sums[width - 2] += total(drift.first);
    sums[width - 1] += total(drift.second);
  }
}

// Adds a tile's part to sums (M, 2R+2); load_k(r, k) puts conj(grad) of numerator r at k (re) and k + TILE (im).
template <class T, bool PAIRS, bool IMAGINARY, class Load>
void collect_tile(const Nodes<T>& z, const Row<T>& row, Load load_k, double* sums) {
  alignas(64) T k[16 * TILE];
  for (int64_t r0 = 0; r0 < row.R; r0 += 4) {
    int64_t R = least(4, row.R - r0);
    for (int64_t r = 0; r < R; r++) load_k(r0 + r, k + 4 * r * TILE);
    prepare<T, PAIRS>(z, R, k);
    switch (R) {
      case 1: collect_group<T, PAIRS, IMAGINARY, 1>(z, row, r0, k, sums); break;
      case 2: collect_group<T, PAIRS, IMAGINARY, 2>(z, row, r0, k, sums); break;
      case 3: collect_group<T, PAIRS, IMAGINARY, 3>(z, row, r0, k, sums); break;
      case 4: collect_group<T, PAIRS, IMAGINARY, 4>(z, row, r0, k, sums); break;
    }
  }
}

template <class T, class IO, bool PAIRS, bool IMAGINARY>
void collect_row(const CauchyArgs<IO>& a, int64_t b, int64_t begin, int64_t end, double* sums) {
  Row<T> row(a.M, a.R);
  Nodes<T> z;
  row.template fill<PAIRS>(a.v + 2 * b * a.R * a.M, a.w + 2 * b * a.M);
  memset(sums, 0, sizeof(double) * size_t(a.M * (2 * a.R + 2)));
  for (int64_t l = begin; l < end; l += TILE) {
    z.fill(a.z + (a.Z == 1 ? 0 : 2 * b * a.L), l, least(l + TILE, end));
    collect_tile<T, PAIRS, IMAGINARY>(z, row, [&](int64_t r, T* k) {
      const IO* g = a.grad + 2 * ((b * a.R + r) * a.L + l);
      for (int64_t i = 0; i < z.n; i++) { k[i] = T(g[2 * i]); k[TILE + i] = -T(g[2 * i + 1]); }
    }, sums);
  }
}

template <class T, bool PAIRS, bool IMAGINARY>
void collect(const CauchyArgs<T>& a, int64_t b, int64_t begin, int64_t end, double* sums) {
  const bool wide = nearly_real(a, b);
  if (!wide) collect_row<T, T, PAIRS, IMAGINARY>(a, b, begin, end, sums);
  if constexpr (sizeof(T) == 4)
    if (wide || !finite(sums, a.M * (2 * a.R + 2))) collect_row<double, T, PAIRS, IMAGINARY>(a, b, begin, end, sums);
}

template <class T> void cauchy_collect(const CauchyArgs<T>& a, int64_t b, int64_t begin, int64_t end, double* sums) {
  if (a.pairs) (a.imaginary ? collect<T, true, true> : collect<T, true, false>)(a, b, begin, end, sums);
  else (a.imaginary ? collect<T, false, true> : collect<T, false, false>)(a, b, begin, end, sums);
}

// From the collected sums (chunks, rows, M, 2R+2) to dv (R, M) and dw (M) of one row.
template <bool PAIRS, class IO, class T>
void chain_row(const IO* v, const IO* w, const double* sums, int64_t stride, int64_t chunks, int64_t M, int64_t R, T* dv, T* dw) {
  for (int64_t m = 0; m < M; m++) {
    int64_t width = 2 * R + 2;
    auto sum = [&](int64_t i) {
      double s = 0;
      for (int64_t c = 0; c < chunks; c++) s += sums[c * stride + m * width + i];
      return s;
    };
    Complex<double> pole = number(w, m);
    Complex<double> d = drift_of_mode<PAIRS, false>(pole, Drift<PAIRS, false, double>{sum(2 * R), sum(2 * R + 1)});
    for (int64_t r = 0; r < R; r++) {
      Complex<double> dvr;
      chain<PAIRS>(number(v, r * M + m), pole, Slope<PAIRS, double>{sum(2 * r), sum(2 * r + 1)}, dvr, d);
      dv[2 * (r * M + m)] = T(dvr.re); dv[2 * (r * M + m) + 1] = T(dvr.im);
    }
    dw[2 * m] = T(d.re); dw[2 * m + 1] = T(d.im);
  }
}

template <class T> void cauchy_chain(const CauchyArgs<T>& a, int64_t b, int64_t chunks) {
  int64_t width = a.M * (2 * a.R + 2);
  (a.pairs ? chain_row<true, T, T> : chain_row<false, T, T>)(
      a.v + 2 * b * a.R * a.M, a.w + 2 * b * a.M, a.sums + b * width, a.B * width, chunks, a.M, a.R,
      a.dv + 2 * b * a.R * a.M, a.dw + 2 * b * a.M);
}

// Gradient of the nodes, in double: it is asked for rarely. Rows that share the nodes (Z = 1) add up.
template <class T, bool PAIRS> void nodes_of(const CauchyArgs<T>& a, int64_t zb, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; l++) {
    Complex<double> z = number(a.z, zb * a.L + l), d = {0, 0};
    for (int64_t b = a.Z == 1 ? 0 : zb; b < (a.Z == 1 ? a.B : zb + 1); b++)
      for (int64_t m = 0; m < a.M; m++) {
        Complex<double> p = number(a.w, b * a.M + m), N = {0, 0}, ka = {0, 0};
        Mode<double> w = {p.re, p.im};
        Complex<double> u = pole<PAIRS, false>(z, w);
        for (int64_t r = 0; r < a.R; r++) {
          Complex<double> k = conj(number(a.grad, (b * a.R + r) * a.L + l));
          Complex<double> c = coefficients<PAIRS>(number(a.v, (b * a.R + r) * a.M + m), p);
          add_numerator<PAIRS>(N, k, k * z, c.re, c.im);
          ka = ka + Complex<double>{k.re * c.re, k.im * c.re};
        }
        d = d + node_slope<PAIRS>(ka, N, u, z, w);
      }
    a.dz[2 * (zb * a.L + l)] = T(d.re);
    a.dz[2 * (zb * a.L + l) + 1] = T(-d.im);
  }
}

template <class T> void cauchy_nodes(const CauchyArgs<T>& a, int64_t zb, int64_t begin, int64_t end) {
  (a.pairs ? nodes_of<T, true> : nodes_of<T, false>)(a, zb, begin, end);
}

// ---- the spectrum of a DPLR kernel -----------------------------------------------------------------------------------
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

// One tile of the spectrum from the sums k (R, 2, TILE).
template <class T> void combine(const DplrArgs<T>& a, int64_t h, int64_t begin, const Nodes<T>& z, const T* k) {
  auto k_at = [&](int64_t i, int64_t j, int64_t l) -> Complex<Vec<T>> {
    const T* p = k + 2 * (i * a.J + j) * TILE + l;
    return {load(p), load(p + TILE)};
  };
  alignas(64) T re[TILE], im[TILE];
  for (int64_t i = 0; i + 1 < a.I; i++)
    for (int64_t j = 0; j + 1 < a.J; j++) {
      for (int64_t l = 0; l < z.padded; l += LANES<T>) {
        Complex<Vec<T>> f = {1 + 0 * z.at(l).im, T(0.5) * z.at(l).im};
        Complex<Vec<T>> x = woodbury(f, k_at(i, j, l), k_at(i, a.J - 1, l), k_at(a.I - 1, j, l), woodbury_q(k_at(a.I - 1, a.J - 1, l)));
        store(re + l, x.re); store(im + l, x.im);
      }
      T* to = a.spectrum + 2 * (((h * (a.I - 1) + i) * (a.J - 1) + j) * a.F + begin);
      for (int64_t l = 0; l < z.n; l++) { to[2 * l] = re[l]; to[2 * l + 1] = im[l]; }
    }
}

template <class T> void dplr(const DplrArgs<T>& a, int64_t h, int64_t begin, int64_t end) {
  int64_t R = a.I * a.J;
  const double *v = a.v + 2 * h * R * a.M, *w = a.w + 2 * h * a.M;
  Row<T> row(a.M, R);
  row.template fill<true>(v, w);
  AtZero zero(v, w, a.I, a.J, a.M);
  Nodes<T> z;
  Memory<T> k(2 * R * TILE);
  for (int64_t l = begin; l < end; l += TILE) {
    int64_t last = least(l + TILE, end);
    z.fill_imaginary(a.y, l, last);
    sum_tile<T, true, true>(z, row, k);
    if constexpr (sizeof(T) == 4)
      if (!finite_tile(k.p, R, z.n))
        again_in_double<true, true>([&](auto& wide_row, auto& wide_z) {
          wide_row.template fill<true>(v, w);
          wide_z.fill_imaginary(a.y, l, last);
        }, a.M, R, k);
    for (int64_t r = 0; r < R; r++) {
      T* to = a.sums + 2 * ((h * R + r) * a.K + l);
      const T* from = k + 2 * r * TILE;
      for (int64_t i = 0; i < z.n; i++) { to[2 * i] = from[i]; to[2 * i + 1] = from[TILE + i]; }
    }
    combine(a, h, l, z, k.p);
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

  template <class T> static void plane(const T* from, const Nodes<C>& z, C* to) {
    for (int64_t n = 0; n < z.n; n++) { to[n] = C(from[2 * n]); to[TILE + n] = C(from[2 * n + 1]); }
    for (int64_t n = z.n; n < z.padded; n++) to[n] = to[TILE + n] = 0;
  }
  template <class T> void fill(const DplrArgs<T>& a, int64_t h, int64_t begin, const Nodes<C>& z) {
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
  int64_t R = a.I * a.J;
  Row<C> row(a.M, R);
  row.template fill<true>(a.v + 2 * h * R * a.M, a.w + 2 * h * a.M);
  Woodbury<C> woodbury(a.I - 1, a.J - 1);
  Nodes<C> z;
  memset(sums, 0, sizeof(double) * size_t(a.M * (2 * R + 2)));
  for (int64_t l = begin; l < end; l += TILE) {
    z.fill_imaginary(a.y, l, least(l + TILE, end));
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
  chain_row<true>(v, w, a.partial + h * width, a.H * width, chunks, a.M, R, dv, dw);
  AtZero(v, w, a.I, a.J, a.M).chain(a, h, dv, dw);
  if (a.F > a.K)
    for (int64_t i = 0; i + 1 < a.I; i++)
      for (int64_t j = 0; j + 1 < a.J; j++)
        for (int64_t m = 0; m < a.M; m++)
          dv[2 * ((i * a.J + j) * a.M + m)] += a.grad[2 * (((h * (a.I - 1) + i) * (a.J - 1) + j) * a.F + a.K)];
}

// ---- powers ----------------------------------------------------------------------------------------------------------
// C (I,J) = A (I,P) B (P,J): small products whose J is a whole number of vectors.
template <class T, int ROWS, int WIDE>
S4NB_FORCE void product_block(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t P, T* C, int64_t ldc) {
  Vec<T> s[ROWS][WIDE] = {};
  for (int64_t p = 0; p < P; p++) {
    Vec<T> b[WIDE];
#pragma GCC unroll 4
    for (int k = 0; k < WIDE; k++) b[k] = load(B + p * ldb + k * LANES<T>);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int k = 0; k < WIDE; k++) s[i][k] += A[i * lda + p] * b[k];
  }
  for (int i = 0; i < ROWS; i++)
    for (int k = 0; k < WIDE; k++) store(C + i * ldc + k * LANES<T>, s[i][k]);
}

template <class T, int WIDE>
void product_rows(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t I, int64_t P, T* C, int64_t ldc) {
  int64_t i = 0;
  for (; i + 6 <= I; i += 6) product_block<T, 6, WIDE>(A + i * lda, lda, B, ldb, P, C + i * ldc, ldc);
  for (; i + 2 <= I; i += 2) product_block<T, 2, WIDE>(A + i * lda, lda, B, ldb, P, C + i * ldc, ldc);
  for (; i < I; i++) product_block<T, 1, WIDE>(A + i * lda, lda, B, ldb, P, C + i * ldc, ldc);
}

template <class T>
void product(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t I, int64_t P, int64_t J, T* C, int64_t ldc) {
  constexpr int V = LANES<T>;
  int64_t j = 0;
  for (; j + 4 * V <= J; j += 4 * V) product_rows<T, 4>(A, lda, B + j, ldb, I, P, C + j, ldc);
  for (; j + 2 * V <= J; j += 2 * V) product_rows<T, 2>(A, lda, B + j, ldb, I, P, C + j, ldc);
  for (; j + V <= J; j += V) product_rows<T, 1>(A, lda, B + j, ldb, I, P, C + j, ldc);
}

// Powers z^0 ... z^{n-1} of z = e^{x step}, in double, eight chains side by side: re and im apart, and z^n returned.
constexpr int CHAINS = 8;
struct Powers {
  double re[CHAINS], im[CHAINS];
  Complex<double> stride;
  explicit Powers(Complex<double> z) {
    Complex<double> p = {1, 0};
    for (int i = 0; i < CHAINS; i++) { re[i] = p.re; im[i] = p.im; p = p * z; }
    stride = p;
  }
  S4NB_FORCE void advance() {
    for (int i = 0; i < CHAINS; i++) {
      double r = re[i] * stride.re - im[i] * stride.im;
      im[i] = re[i] * stride.im + im[i] * stride.re;
      re[i] = r;
    }
  }
};
S4NB_FORCE Complex<double> power(Complex<double> x, double n) {
  double r = exp(n * x.re);
  return {r * cos(n * x.im), r * sin(n * x.im)};
}

// How l = k B + j is split: B short powers (a multiple of 16) and K long ones.
struct Split {
  int64_t B, K;
  Split(int64_t L, int64_t R) {
    for (B = 16; B * B < L * R && B < 1024; B *= 2);
    K = (L + B - 1) / B;
  }
};

// Short powers of one row (2M, B), 0 from L on, and the same times j.
template <class T> void short_powers(const double* x, int64_t M, int64_t B, int64_t L, T* table, T* moments) {
  for (int64_t m = 0; m < M; m++) {
    T *re = table + m * B, *im = table + (M + m) * B;
    Powers p(power({x[2 * m], x[2 * m + 1]}, 1));
    for (int64_t j = 0; j < B; j += CHAINS) {
      for (int i = 0; i < CHAINS; i++) { re[j + i] = T(p.re[i]); im[j + i] = T(p.im[i]); }
      if (moments)
        for (int i = 0; i < CHAINS; i++) {
          moments[m * B + j + i] = T(double(j + i) * p.re[i]);
          moments[(M + m) * B + j + i] = T(double(j + i) * p.im[i]);
        }
      p.advance();
    }
    for (int64_t j = L; j < B; j++) {
      re[j] = im[j] = 0;
      if (moments) moments[m * B + j] = moments[(M + m) * B + j] = 0;
    }
  }
}

// Long powers times numerators as the left factor: (K, 2M) of (2 Re g, -2 Im g), or for complex sums (Re g, -Im g) and
// (Im g, Re g), g = v z^{kB}.
template <class T>
void long_powers(const T* v, const double* x, int64_t M, int64_t B, int64_t K, bool pairs, T* A) {
  for (int64_t m = 0; m < M; m++) {
    Powers p(power({x[2 * m], x[2 * m + 1]}, double(B)));
    Complex<double> c = number(v, m);
    for (int64_t k = 0; k < K; k += CHAINS) {
      for (int64_t i = 0; i < least(CHAINS, K - k); i++) {
        double re = c.re * p.re[i] - c.im * p.im[i], im = c.re * p.im[i] + c.im * p.re[i];
        T* row = A + (k + i) * 2 * M + m;
        row[0] = T(pairs ? 2 * re : re); row[M] = T(pairs ? -2 * im : -im);
        if (!pairs) { row += K * 2 * M; row[0] = T(im); row[M] = T(re); }
      }
      p.advance();
    }
  }
}

template <class T> void vandermonde(const PowerArgs<T>& a, int64_t b) {
  Split s(a.L, a.R);
  int64_t M = a.M, rows = a.pairs ? s.K : 2 * s.K, whole = a.L / s.B;
  Memory<T> table(2 * M * s.B), A(rows * 2 * M), out(rows * s.B);
  const double* x = a.x + 2 * b * M;
  short_powers<T>(x, M, s.B, a.L, table, (T*)nullptr);
  for (int64_t r = 0; r < a.R; r++) {
    long_powers<T>(a.v + 2 * (b * a.R + r) * M, x, M, s.B, s.K, a.pairs, A);
    if (a.pairs) {  // whole rows go straight to their place
      T* to = a.out + (b * a.R + r) * a.L;
      product<T>(A, 2 * M, table, s.B, whole, 2 * M, s.B, to, s.B);
      if (whole < s.K) {
        product<T>(A + whole * 2 * M, 2 * M, table, s.B, 1, 2 * M, s.B, out, s.B);
        memcpy(to + whole * s.B, out, sizeof(T) * size_t(a.L - whole * s.B));
      }
    } else {
      T* to = a.out + 2 * (b * a.R + r) * a.L;
      product<T>(A, 2 * M, table, s.B, rows, 2 * M, s.B, out, s.B);
      for (int64_t l = 0; l < a.L; l++) { to[2 * l] = out[l]; to[2 * l + 1] = out[s.K * s.B + l]; }
    }
  }
}

// The sums over j of one mode, (re, im) at [k], times its long powers z^{kB} and summed over k; also k z^{kB} times them.
template <class T> struct Folded { Complex<double> sum, weighted; };
template <class T> S4NB_FORCE Folded<T> fold_long(const T* re, const T* im, int64_t K, const T* long_re, const T* long_im) {
  Vec<T> s[4] = {}, lane;
  for (int i = 0; i < LANES<T>; i++) lane[i] = T(i);
  for (int64_t k = 0; k < K; k += LANES<T>) {
    Complex<Vec<T>> t = Complex<Vec<T>>{load(re + k), load(im + k)} * Complex<Vec<T>>{load(long_re + k), load(long_im + k)};
    Vec<T> index = lane + T(k);
    s[0] += t.re; s[1] += t.im; s[2] += index * t.re; s[3] += index * t.im;
  }
  return {{total(s[0]), total(s[1])}, {total(s[2]), total(s[3])}};
}

// One real input u (L) of a row; adds scale * the sums to S0 and S1 (M), scale being 1 or i.
template <class T> struct RowOfPowers {
  int64_t M, L, J;  // J: K padded to whole vectors
  Split s;
  Memory<T> table, long_re, long_im, input, out;
  bool moments;
  RowOfPowers(const double* x, int64_t M, int64_t L, bool moments)
      : M(M), L(L), J(0), s(L, 1), table((moments ? 4 : 2) * M * s.B), long_re(M * up(s.K, LANES<T>)), long_im(M * up(s.K, LANES<T>)),
        input(s.B * up(s.K, LANES<T>)), out((moments ? 4 : 2) * M * up(s.K, LANES<T>)), moments(moments) {
    J = up(s.K, LANES<T>);
    short_powers<T>(x, M, s.B, L, table, moments ? table + 2 * M * s.B : nullptr);
    for (int64_t m = 0; m < M; m++) {
      Powers p(power({x[2 * m], x[2 * m + 1]}, double(s.B)));
      for (int64_t k = 0; k < J; k += CHAINS, p.advance())
        for (int64_t i = 0; i < least(CHAINS, J - k); i++) {
          bool in = k + i < s.K;  // beyond: powers that nobody multiplies must not overflow
          long_re[m * J + k + i] = in ? T(p.re[i]) : 0; long_im[m * J + k + i] = in ? T(p.im[i]) : 0;
        }
    }
  }
  void add(const T* u, int64_t stride, Complex<double> scale, Complex<double>* S0, Complex<double>* S1) {
    for (int64_t j = 0; j < s.B; j++)
      for (int64_t k = 0; k < J; k++) {
        int64_t l = k * s.B + j;
        input[j * J + k] = l < L ? u[l * stride] : T(0);
      }
    product<T>(table, s.B, input, J, (moments ? 4 : 2) * M, s.B, J, out, J);
    for (int64_t m = 0; m < M; m++) {
      const T *lr = long_re + m * J, *li = long_im + m * J;
      Folded<T> f = fold_long<T>(out + m * J, out + (M + m) * J, J, lr, li);
      S0[m] = S0[m] + scale * f.sum;
      if (!moments) continue;
      Folded<T> g = fold_long<T>(out + (2 * M + m) * J, out + (3 * M + m) * J, J, lr, li);
      Complex<double> B = {double(s.B), 0};
      S1[m] = S1[m] + scale * (B * f.weighted + g.sum);
    }
  }
};

template <class T> void power_sums(const PowerArgs<T>& a, int64_t b) {
  RowOfPowers<T> row(a.x + 2 * b * a.M, a.M, a.L, a.moments != nullptr);
  Memory<Complex<double>> sums(2 * a.M);
  Complex<double>*S0 = sums, *S1 = sums + a.M;
  for (int64_t r = 0; r < a.R; r++) {
    for (int64_t m = 0; m < 2 * a.M; m++) sums[m] = {0, 0};
    const T* u = a.u + (b * a.R + r) * a.L * (a.complex_input ? 2 : 1);
    if (a.complex_input) { row.add(u, 2, {1, 0}, S0, S1); row.add(u + 1, 2, {0, 1}, S0, S1); }
    else row.add(u, 1, {1, 0}, S0, S1);
    for (int64_t m = 0; m < a.M; m++) {
      int64_t to = 2 * ((b * a.R + r) * a.M + m);
      a.out[to] = T(S0[m].re); a.out[to + 1] = T(S0[m].im);
      if (a.moments) { a.moments[to] = T(S1[m].re); a.moments[to + 1] = T(S1[m].im); }
    }
  }
}

// ---- one step --------------------------------------------------------------------------------------------------------
// Complex numbers as they lie in memory, re and im in turns; the last vector of a row may be a part of one.
template <class T> S4NB_FORCE Vec<T> take(const T* p, int64_t left) {
  if (left >= LANES<T>) return load(p);
  Vec<T> x = {};
  memcpy(&x, p, size_t(left) * sizeof(T));
  return x;
}
template <class T> S4NB_FORCE void give(T* p, Vec<T> x, int64_t left) {
  if (left >= LANES<T>) store(p, x);
  else memcpy(p, &x, size_t(left) * sizeof(T));
}

template <class T> using Index = typename Half<typename IntegerOf<T>::type, S4NB_BYTES>::type;
template <class T> struct Lanes {
  Index<T> even, odd, swapped;  // of each pair: the first twice, the second twice, exchanged
  Vec<T> sign;                  // -1, 1
  S4NB_FORCE Lanes() {
    for (int i = 0; i < LANES<T>; i++) { even[i] = i & ~1; odd[i] = i | 1; swapped[i] = i ^ 1; sign[i] = i & 1 ? T(1) : T(-1); }
  }
  S4NB_FORCE Vec<T> pick(Vec<T> x, Index<T> from) const {
#ifdef __clang__
    Vec<T> y;
    for (int i = 0; i < LANES<T>; i++) y[i] = x[from[i]];
    return y;
#else
    return __builtin_shuffle(x, from);
#endif
  }
  S4NB_FORCE Vec<T> times(Vec<T> a, Vec<T> s) const { return pick(a, even) * s + sign * pick(a, odd) * pick(s, swapped); }
};

template <class T> S4NB_FORCE T dot(const T* row, const T* s, int64_t M) {  // Re sum row s
  Vec<T> sum = {};
  for (int64_t i = 0; i < 2 * M; i += LANES<T>) sum += take(row + i, 2 * M - i) * take(s + i, 2 * M - i);
  return even_less_odd(sum);
}
template <class T> S4NB_FORCE T conj_dot(const T* row, const T* s, int64_t M) {  // Re sum conj(row) s
  Vec<T> sum = {};
  for (int64_t i = 0; i < 2 * M; i += LANES<T>) sum += take(row + i, 2 * M - i) * take(s + i, 2 * M - i);
  return T(total(sum));
}

template <class T> S4NB_FORCE void outputs(const StepArgs<T>& a, int64_t b, int64_t h, const T* s) {
  for (int64_t c = 0; c < a.channels; c++)
    a.y[(b * a.channels + c) * a.H + h] = 2 * dot(a.C + 2 * (c * a.H + h) * a.M, s, a.M);
}

template <class T> S4NB_FORCE void advance(const Lanes<T>& lanes, const T* A, const T* s, const T* B, T u, int64_t M, T* next) {  // A s + B u
  for (int64_t i = 0; i < 2 * M; i += LANES<T>) {
    int64_t left = 2 * M - i;
    give(next + i, lanes.times(take(A + i, left), take(s + i, left)) + take(B + i, left) * u, left);
  }
}

template <class T> void diag_step(const StepArgs<T>& a, int64_t begin, int64_t end) {
  const Lanes<T> lanes;
  for (int64_t h = begin; h < end; h++)
    for (int64_t b = 0; b < a.batch; b++) {
      int64_t row = 2 * (b * a.H + h) * a.M;
      advance(lanes, a.A + 2 * h * a.M, a.state + row, a.B + 2 * h * a.M, a.u[b * a.H + h], a.M, a.next + row);
      outputs(a, b, h, a.next + row);
    }
}

// x = E s - P 2 Re(conj(P) s) + 2B u;  s' = D (x - P 2 Re(Q x)). The low-rank vectors of a feature are `a.H` rows apart.
template <class T> void dplr_step(const StepArgs<T>& a, int64_t begin, int64_t end) {
  const Lanes<T> lanes;
  int64_t M = a.M, apart = 2 * a.H * M;
  Memory<T> k(a.rank);
  for (int64_t h = begin; h < end; h++) {
    const T *P = a.P + 2 * h * M, *Q = a.Q + 2 * h * M, *D = a.D + 2 * h * M;
    for (int64_t b = 0; b < a.batch; b++) {
      const T* s = a.state + 2 * (b * a.H + h) * M;
      T* x = a.next + 2 * (b * a.H + h) * M;
      auto project = [&] {
        for (int64_t r = 0; r < a.rank; r++)
          for (int64_t i = 0; i < 2 * M; i += LANES<T>)
            give(x + i, take(x + i, 2 * M - i) - k[r] * take(P + r * apart + i, 2 * M - i), 2 * M - i);
      };
      advance(lanes, a.E + 2 * h * M, s, a.B + 2 * h * M, a.u[b * a.H + h], M, x);
      for (int64_t r = 0; r < a.rank; r++) k[r] = 2 * conj_dot(P + r * apart, s, M);
      project();
      for (int64_t r = 0; r < a.rank; r++) k[r] = 2 * dot(Q + r * apart, x, M);
      project();
      for (int64_t i = 0; i < 2 * M; i += LANES<T>)
        give(x + i, lanes.times(take(D + i, 2 * M - i), take(x + i, 2 * M - i)), 2 * M - i);
      outputs(a, b, h, x);
    }
  }
}

template <class T> constexpr Kernels<T> kernels() {
  return {cauchy<T>, cauchy_collect<T>, cauchy_chain<T>, cauchy_nodes<T>, dplr<T>, dplr_collect<T>, dplr_chain<T>,
          vandermonde<T>, power_sums<T>, diag_step<T>, dplr_step<T>};
}

}  // namespace

#define S4NB_TEXT(x) #x
#define S4NB_NAME(x) S4NB_TEXT(x)
__attribute__((visibility("hidden"))) extern const InstructionSet kernels_here;
const InstructionSet kernels_here = {S4NB_NAME(S4NB_ISA), kernels<float>(), kernels<double>()};

}}  // namespace s4nb::S4NB_ISA
