// Cauchy sums: rows of modes, tiles of nodes, and the sums over the nodes that make the gradients.
#pragma once
#include "cpu_vectors.h"

namespace s4nb { namespace S4NB_ISA { namespace {

// Modes and coefficients of one row, the numerators in groups of up to four: (c0, c1) at [group][m][r].
template <class T, class W = Mode<T>> struct Row {
  int64_t M, R;
  Memory<W> w;
  Memory<T> c;
  Row(int64_t M, int64_t R) : M(M), R(R), w(M), c(2 * M * R) {}
  T* at(int64_t r) const { return c + 2 * M * r; }  // r: the first of a group
  template <bool PAIRS, class IO> void fill(const IO* v, const IO* poles) {
    for (int64_t m = 0; m < M; m++) {
      Complex<double> p = number(poles, m);
      w[m] = W::of(p);
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
};

template <class T> struct AxisNodes {  // the same for nodes iy, from y in double
  int64_t n, padded;
  alignas(64) T im[TILE], square[TILE];
  S4NB_FORCE AxisNode<Vec<T>> at(int64_t l) const { return {load(im + l), load(square + l)}; }
  void fill(const double* y, const int64_t* at, int64_t count) {
    n = count; padded = up(n, LANES<T>);
    for (int64_t l = 0; l < padded; l++) {
      auto z = AxisNode<T>::of(y[at[least(l, n - 1)]]);
      im[l] = z.im; square[l] = z.square;
    }
  }
};

template <class T, bool PAIRS, bool IMAGINARY, int R, int WIDE, class Z, class W>
S4NB_FORCE void sum_group(const Z& z, int64_t l, const Row<T, W>& row, int64_t r0, T* out) {
  Sum<PAIRS, Vec<T>> s[WIDE][R] = {};
  decltype(z.at(0)) node[WIDE];
  for (int k = 0; k < WIDE; k++) node[k] = z.at(l + k * LANES<T>);
  const T* c = row.at(r0);
  for (int64_t m = 0; m < row.M; m++, c += 2 * R) {
    W w = row.w[m];
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
template <class T, bool PAIRS, bool IMAGINARY, class Z, class W>
void sum_tile(const Z& z, const Row<T, W>& row, T* out) {
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
  else cauchy_row<T, false, false>(a, b, begin, end);
}

// ---- gradients of Cauchy sums ----------------------------------------------------------------------------------------
// Gradients of up to four numerators on a tile: k = conj(grad) and k z, planar: [r][re, im, z re, z im][TILE].
template <class T, bool PAIRS, class Z> void prepare(const Z& z, int64_t R, T* k) {
  for (int64_t r = 0; r < R; r++) {
    T* g = k + 4 * r * TILE;
    for (int64_t l = z.n; l < z.padded; l++) g[l] = g[TILE + l] = 0;
    if constexpr (PAIRS)
      for (int64_t l = 0; l < z.padded; l += LANES<T>) {
        Complex<Vec<T>> kz = z.at(l) * Complex<Vec<T>>{load(g + l), load(g + TILE + l)};
        store(g + 2 * TILE + l, kz.re); store(g + 3 * TILE + l, kz.im);
      }
  }
}

template <class T, bool PAIRS, bool IMAGINARY, int R, class Z, class W>
void collect_group(const Z& z, const Row<T, W>& row, int64_t r0, const T* k, double* sums) {
  const T* c = row.at(r0);
  int64_t width = 2 * row.R + 2;
  for (int64_t m = 0; m < row.M; m++, c += 2 * R, sums += width) {
    W w = row.w[m];
    Slope<PAIRS, Vec<T>> slope[R] = {};
    Drift<PAIRS, IMAGINARY, Vec<T>> drift = {};
    for (int64_t l = 0; l < z.padded; l += LANES<T>) {
      auto node = z.at(l);
      Complex<Vec<T>> u = pole<PAIRS, IMAGINARY>(node, w), N = {};
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
template <class T, bool PAIRS, bool IMAGINARY, class Z, class W, class Load>
void collect_tile(const Z& z, const Row<T, W>& row, Load load_k, double* sums) {
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
  else collect<T, false, false>(a, b, begin, end, sums);
}

// From the collected sums (chunks, rows, M, 2R+2) to dv (R, M) and dw (M) of one row.
template <bool PAIRS, bool IMAGINARY, class IO, class T>
void chain_row(const IO* v, const IO* w, const double* sums, int64_t stride, int64_t chunks, int64_t M, int64_t R, T* dv, T* dw) {
  for (int64_t m = 0; m < M; m++) {
    int64_t width = 2 * R + 2;
    auto sum = [&](int64_t i) {
      double s = 0;
      for (int64_t c = 0; c < chunks; c++) s += sums[c * stride + m * width + i];
      return s;
    };
    Complex<double> pole = number(w, m);
    Complex<double> d = drift_of_mode(pole, Drift<PAIRS, IMAGINARY, double>{sum(2 * R), sum(2 * R + 1)});
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
  (!a.pairs ? chain_row<false, false, T, T> : a.imaginary ? chain_row<true, true, T, T> : chain_row<true, false, T, T>)(
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

}}}  // namespace s4nb::S4NB_ISA
