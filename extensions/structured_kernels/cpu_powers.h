// Vandermonde sums and their transposes: tables of powers in double, one small matrix product.
#pragma once
#include "cpu_vectors.h"

namespace s4nb { namespace S4NB_ISA { namespace {

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
    for (B = 16; B * B < L * R && B < 1024 && B < L; B *= 2);
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

}}}  // namespace s4nb::S4NB_ISA
