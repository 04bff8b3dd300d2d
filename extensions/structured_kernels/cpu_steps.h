// One step of a state space model, diagonal or DPLR.
#pragma once
#include "cpu_vectors.h"

namespace s4nb { namespace S4NB_ISA { namespace {

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

}}}  // namespace s4nb::S4NB_ISA
