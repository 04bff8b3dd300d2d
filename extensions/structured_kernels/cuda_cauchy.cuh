// Cauchy sums and their gradients, in CUDA.
#pragma once
#include "cuda_common.cuh"

namespace s4nb { namespace S4NB_ISA {

template <class T> constexpr int EACH = sizeof(T) == 4 ? 4 : 2;  // nodes of one thread, as registers allow
constexpr int OWN = 2;     // modes of one thread in the gradients
constexpr int MODES = 64;  // modes whose coefficients lie in shared memory at a time

// ---- Cauchy sums ---------------------------------------------------------------------------------------------------
struct Shape { int64_t rows, numerators, modes, nodes; };  // v (rows, numerators, modes), w (rows, modes)

template <class T> struct Nodes {  // given: z (1, L) or (rows, L)
  static constexpr bool imaginary = false;
  const Complex<T>* z; int64_t stride;
  __device__ Complex<T> operator()(int64_t row, int64_t l) const { return z[row * stride + l]; }
};

// One sum in double: for results that overflowed or underflowed on the way in float.
template <bool PAIRS, class S>
__device__ __noinline__ Complex<double> exact_sum(const Complex<S>* v, const Complex<S>* w, int64_t modes,
                                                  Complex<double> z) {
  Sum<PAIRS, double> sum = {};
  for (int64_t m = 0; m < modes; m++) {
    Complex<double> W = cast<double>(w[m]), c = coefficients<PAIRS>(cast<double>(v[m]), W);
    sum.add(pole<PAIRS, false>(z, Mode<double>{W.re, W.im}), c.re, c.im);
  }
  return sum.value(z);
}

template <class W, class T, int R> struct alignas(16) Term {  // a mode, and the coefficients of R numerators
  W mode;
  T c[2 * R];
};

// The sums of R numerators (`count` of them are there) at the nodes z of this thread; all threads of the block take
// part. W: what is kept of a mode.
template <bool PAIRS, class W, class T, class S, int R, int N, class Z>
__device__ void sum_modes(Complex<T> (&out)[N][R], const Z (&z)[N], bool active, int count, const Complex<S>* v,
                          const Complex<S>* w, int64_t modes) {
  __shared__ Term<W, T, R> terms[MODES];
  Sum<PAIRS, T> sum[N][R] = {};
  for (int64_t first = 0; first < modes; first += MODES) {
    int here = int(least(MODES, modes - first));
#pragma unroll 1
    for (int i = threadIdx.x; i < here * R; i += THREADS) {
      int m = unsigned(i) / R, r = unsigned(i) % R;
      Complex<double> at = cast<double>(w[first + m]), c = {0, 0};
      if (r < count) c = coefficients<PAIRS>(cast<double>(v[r * modes + first + m]), at);
      if (r == 0) terms[m].mode = W::of(at);
      terms[m].c[2 * r] = T(c.re); terms[m].c[2 * r + 1] = T(c.im);
    }
    __syncthreads();
    if (active)
#pragma unroll 4
      for (int m = 0; m < here; m++) {
        Term<W, T, R> term = terms[m];
#pragma unroll
        for (int o = 0; o < N; o++) {
          Complex<T> u = pole<PAIRS, false>(z[o], term.mode);
#pragma unroll
          for (int r = 0; r < R; r++) sum[o][r].add(u, term.c[2 * r], term.c[2 * r + 1]);
        }
      }
    __syncthreads();
  }
#pragma unroll
  for (int o = 0; o < N; o++)
#pragma unroll
    for (int r = 0; r < R; r++) out[o][r] = sum[o][r].value(z[o]);
}

// 0, or nan as soon as one x is not finite.
template <class T> __device__ void check(T& bad, Complex<T> x) { bad += 0 * x.re; bad += 0 * x.im; }

// A block: N x 128 nodes, R numerators, one row.
struct Place {
  int64_t row, first, node;  // first: numerator
  int count, left;           // left: nodes from this thread's first one on
  template <int R, int N> static S4NB_INLINE Place of(unsigned block, unsigned thread, Shape s) {
    unsigned tiles = unsigned(pieces(s.nodes, N * THREADS)), groups = unsigned(pieces(s.numerators, R));
    unsigned above = block / tiles, row = above / groups, first = (above - row * groups) * R;
    int64_t node = int64_t(block - above * tiles) * (N * THREADS) + thread;
    return {row, first, node, int(least(R, s.numerators - first)), int(least(N * THREADS, s.nodes - node))};
  }
  static int64_t blocks(Shape s, int R, int N) {
    return s.rows * pieces(s.numerators, R) * pieces(s.nodes, N * THREADS);
  }
};

template <bool PAIRS, class T, int R> __global__ void __launch_bounds__(THREADS)
    cauchy_kernel(Nodes<T> nodes, const Complex<T>* v, const Complex<T>* w, Complex<T>* out, Shape s) {
  constexpr int N = EACH<T>;
  Place at = Place::of<R, N>(blockIdx.x, threadIdx.x, s);
  Complex<T> z[N], k[N][R];
  v += (at.row * s.numerators + at.first) * s.modes;
  w += at.row * s.modes;
  out += (at.row * s.numerators + at.first) * s.nodes;
  for (int o = 0; o < N; o++) z[o] = nodes(at.row, least(at.node + o * THREADS, s.nodes - 1));
  sum_modes<PAIRS, Mode<T>>(k, z, at.left > 0, at.count, v, w, s.modes);
  T bad = 0;
#pragma unroll
  for (int o = 0; o < N; o++)
#pragma unroll
    for (int r = 0; r < R; r++)
      if (r < at.count && o * THREADS < at.left) {
        out[r * s.nodes + at.node + o * THREADS] = k[o][r];
        check(bad, k[o][r]);
      }
  if (sizeof(T) == 4 && bad != 0)
#pragma unroll 1
    for (; at.left > 0; at.left -= THREADS, at.node += THREADS)
#pragma unroll 1
      for (int r = 0; r < at.count; r++)
        out[r * s.nodes + at.node] =
            cast<T>(exact_sum<PAIRS>(v + r * s.modes, w, s.modes, cast<double>(nodes(at.row, at.node))));
}

// ---- Gradients of Cauchy sums --------------------------------------------------------------------------------------
// The conjugate gradient of sum r of a row at node l.
template <class T> struct Upstream {
  const Complex<T>* grad; Shape s;
  __device__ Complex<T> operator()(int64_t row, int64_t r, int64_t l, Complex<T>) const {
    return conj(grad[(row * s.numerators + r) * s.nodes + l]);
  }
  template <class Z, class F> __device__ bool all(int64_t, int64_t, Z, F) const { return false; }
  __device__ double limit(int64_t, int64_t) const { return 0; }
};

// How the sums over nodes are split: block = (row, R numerators, chunk of nodes, tile of modes). In a block `width`
// threads own OWN modes each; several such groups share the nodes. A block leaves 2R+2 doubles for each mode.
struct Split {
  int64_t groups, chunks, chunk, tiles;
  int R, width;
  static Split of(Shape s) {
    int64_t R = s.numerators <= 2 ? s.numerators + !s.numerators : 4, width = least(pieces(s.modes, OWN), THREADS);
    int64_t tiles = width ? pieces(s.modes, width * OWN) : 0, groups = pieces(s.numerators, R);
    int64_t wanted = pieces(s.nodes * s.rows * groups * tiles, 2048);  // some 2000 blocks fill a large GPU
    int64_t chunk = pieces(wanted < 256 ? 256 : wanted > 2048 ? 2048 : wanted, THREADS) * THREADS;
    return {groups, pieces(s.nodes, chunk), chunk, tiles, int(R), int(width)};
  }
  int64_t doubles(Shape s) const { return s.rows * groups * chunks * (2 * R + 2) * s.modes; }
};

template <class Z, class T, int R> struct alignas(16) Node { Z z; Complex<T> k[R], kz[R]; };

template <bool PAIRS, class T, class S, int R, class Z, class G>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 4 : 3)
    slopes_kernel(Z nodes, G upstream, const Complex<S>* v, const Complex<S>* w, double* partial, Shape s,
                  Split split) {
  constexpr int SUMS = 2 * R + 2;
  using At = decltype(nodes(0, 0));
  using W = std::conditional_t<Z::imaginary, AxisMode<T>, Mode<T>>;
  __shared__ Node<At, T, R> staged[THREADS];
  __shared__ T scratch[OWN * SUMS * THREADS];
  const int t = threadIdx.x, width = split.width, groups = THREADS / width, lane = t % width, group = t / width;
  const unsigned tiles = unsigned(split.tiles), chunks = unsigned(split.chunks), row_groups = unsigned(split.groups);
  const unsigned cell = blockIdx.x / tiles, above = cell / chunks;  // cell: (row, numerators, chunk)
  const int64_t begin = cell % chunks * split.chunk, end = least(begin + split.chunk, s.nodes);
  const int64_t row = above / row_groups, first = above % row_groups * R,
                mode_0 = int64_t(blockIdx.x % tiles) * width * OWN;
  const int count = int(least(R, s.numerators - first));

  W mode[OWN];
  T c[OWN][2 * R] = {};
  Slope<PAIRS, T> slope[OWN][R] = {};
  Drift<PAIRS, Z::imaginary, T> drift[OWN] = {};
#pragma unroll
  for (int o = 0; o < OWN; o++) {
    int64_t m = least(mode_0 + o * width + lane, s.modes - 1);
    Complex<double> of = cast<double>(w[row * s.modes + m]);
    mode[o] = W::of(of);
#pragma unroll
    for (int r = 0; r < R; r++)
      if (r < count) {
        Complex<double> x = coefficients<PAIRS>(cast<double>(v[(row * s.numerators + first + r) * s.modes + m]), of);
        c[o][2 * r] = T(x.re); c[o][2 * r + 1] = T(x.im);
      }
  }
  for (int64_t base = begin; base < end; base += THREADS) {
    const int here = int(least(THREADS, end - base));
    if (t < here) {
      At z = nodes(row, base + t);
      staged[t].z = z;
      auto stage = [&](int r, Complex<T> k) { staged[t].k[r] = k; staged[t].kz[r] = z * k; };
      if (R < 4 || !upstream.all(row, base + t, z, stage))
#pragma unroll 1
        for (int r = 0; r < R; r++) stage(r, r < count ? upstream(row, first + r, base + t, z) : Complex<T>{0, 0});
    }
    __syncthreads();
    if (group < groups)
      for (int n = group; n < here; n += groups) {
        const Node<At, T, R>& at = staged[n];
#pragma unroll
        for (int o = 0; o < OWN; o++) {
          Complex<T> u = pole<PAIRS, Z::imaginary>(at.z, mode[o]), N = {0, 0};
#pragma unroll
          for (int r = 0; r < R; r++) {
            slope[o][r].add(at.k[r], at.kz[r], u);
            add_numerator<PAIRS>(N, at.k[r], at.kz[r], c[o][2 * r], c[o][2 * r + 1]);
          }
          drift[o].add(N, u, at.z, mode[o]);
        }
      }
    __syncthreads();
  }
#pragma unroll
  for (int o = 0; o < OWN; o++) {
    T* mine = scratch + o * SUMS * THREADS + t;
#pragma unroll
    for (int r = 0; r < R; r++) {
      mine[2 * r * THREADS] = slope[o][r].first;
      mine[(2 * r + 1) * THREADS] = slope[o][r].second;
    }
    mine[2 * R * THREADS] = drift[o].first;
    mine[(2 * R + 1) * THREADS] = drift[o].second;
  }
  __syncthreads();
  for (int i = t; i < OWN * SUMS * width; i += THREADS) {
    int value = i / width, of = i % width;
    int64_t m = mode_0 + value / SUMS * width + of;
    double total = 0;
    for (int g = 0; g < groups; g++) total += double(scratch[value * THREADS + g * width + of]);
    if (m < s.modes) partial[(int64_t(cell) * SUMS + value % SUMS) * s.modes + m] = total;
  }
}

// The gradients of one mode in double, node by node: when the sums in float overflowed.
template <bool PAIRS, class S, class Z, class G>
__device__ __noinline__ void exact_gradients(Z nodes, G upstream, const Complex<S>* v, Complex<double> W,
                                             Complex<S>* dv, Complex<S>* dw, Shape s, int64_t row, int64_t m) {
  Complex<double> total = {0, 0};
  Drift<PAIRS, false, double> drift = {};
  for (int64_t r = 0; r < s.numerators; r++) {
    int64_t i = (row * s.numerators + r) * s.modes + m;
    Complex<double> V = cast<double>(v[i]), c = coefficients<PAIRS>(V, W), d;
    Slope<PAIRS, double> slope = {};
    for (int64_t l = 0; l < s.nodes; l++) {
      auto at = nodes(row, l);
      Complex<double> z = cast<double>(at), k = cast<double>(upstream(row, r, l, at)), kz = k * z, N = {0, 0};
      Complex<double> u = pole<PAIRS, false>(z, Mode<double>{W.re, W.im});
      slope.add(k, kz, u);
      add_numerator<PAIRS>(N, k, kz, c.re, c.im);
      drift.add(N, u, z, Mode<double>{W.re, W.im});
    }
    chain<PAIRS>(V, W, slope, d, total);
    d.re += upstream.limit(row, r);
    dv[i] = cast<S>(d);
  }
  dw[row * s.modes + m] = cast<S>(total + drift_of_mode(W, drift));
}

// One thread for each mode of each row: adds up what the blocks left, and goes back to v and w.
template <bool PAIRS, class T, class S, class Z, class G> __global__ void __launch_bounds__(THREADS, 4)
    gradients_kernel(Z nodes, G upstream, const Complex<S>* v, const Complex<S>* w, const double* partial,
                     Complex<S>* dv, Complex<S>* dw, Shape s, Split split) {
  int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index / s.modes, m = index % s.modes;
  if (row >= s.rows) return;
  const int SUMS = 2 * split.R + 2;
  auto total = [&](int64_t group, int which) {
    double sum = 0;
    for (int64_t c = 0; c < split.chunks; c++)
      sum += partial[(((row * split.groups + group) * split.chunks + c) * SUMS + which) * s.modes + m];
    return sum;
  };
  Complex<double> W = cast<double>(w[index]), of_w = {0, 0};
  bool good = true;
  for (int64_t r = 0; r < s.numerators; r++) {
    int64_t i = (row * s.numerators + r) * s.modes + m;
    int within = int(r % split.R);
    Complex<double> d;
    Slope<PAIRS, double> slope = {total(r / split.R, 2 * within), total(r / split.R, 2 * within + 1)};
    chain<PAIRS>(cast<double>(v[i]), W, slope, d, of_w);
    d.re += upstream.limit(row, r);
    good = good && finite(d);
    dv[i] = cast<S>(d);
  }
  Drift<PAIRS, Z::imaginary, double> drift = {0, 0};
  for (int64_t g = 0; g < split.groups; g++) {
    drift.first += total(g, 2 * split.R);
    drift.second += total(g, 2 * split.R + 1);
  }
  of_w = of_w + drift_of_mode(W, drift);
  dw[index] = cast<S>(of_w);
  if (sizeof(T) == 4 && !(good && finite(of_w))) exact_gradients<PAIRS>(nodes, upstream, v, W, dv, dw, s, row, m);
}

// Gradients of the nodes, seldom asked for: in double, one thread for each node of each row, rows added afterwards.
template <bool PAIRS, class T> __global__ void __launch_bounds__(THREADS)
    node_slopes_kernel(Nodes<T> nodes, Upstream<T> upstream, const Complex<T>* v, const Complex<T>* w,
                       Complex<double>* of_row, Shape s) {
  int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index / s.nodes, l = index % s.nodes;
  if (row >= s.rows) return;
  Complex<T> at = nodes(row, l);
  Complex<double> z = cast<double>(at), total = {0, 0};
  for (int64_t m = 0; m < s.modes; m++) {
    Complex<double> W = cast<double>(w[row * s.modes + m]), N = {0, 0}, ka = {0, 0};
    for (int64_t r = 0; r < s.numerators; r++) {
      Complex<double> c = coefficients<PAIRS>(cast<double>(v[(row * s.numerators + r) * s.modes + m]), W);
      Complex<double> k = cast<double>(upstream(row, r, l, at));
      add_numerator<PAIRS>(N, k, k * z, c.re, c.im);
      ka = {ka.re + k.re * c.re, ka.im + k.im * c.re};
    }
    Mode<double> mode = {W.re, W.im};
    total = total + node_slope<PAIRS>(ka, N, pole<PAIRS, false>(z, mode), z, mode);
  }
  of_row[index] = conj(total);
}

template <class T> __global__ void __launch_bounds__(THREADS)
    add_rows_kernel(const Complex<double>* of_row, Complex<T>* dz, int64_t rows, int64_t size) {
  int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= size) return;
  Complex<double> total = {0, 0};
  for (int64_t row = 0; row < rows; row++) total = total + of_row[row * size + index];
  dz[index] = cast<T>(total);
}

// ---- Launches ------------------------------------------------------------------------------------------------------
template <int N> struct Int { static constexpr int value = N; };
template <class F> void by_count(int64_t numerators, F f) {  // numerators in blocks of 1, 2 or 4, as in Split
  if (numerators <= 1) f(Int<1>());
  else if (numerators == 2) f(Int<2>());
  else f(Int<4>());
}

template <class T> struct Cauchy {
  const Complex<T> *v, *z, *w; Shape s; bool pairs; int64_t z_rows;
  Nodes<T> nodes() const { return {z, z_rows == 1 ? 0 : s.nodes}; }
};

template <class T, class L> void launch_cauchy(L launch, Cauchy<T> a, Complex<T>* out) {
  if (!a.s.rows || !a.s.numerators || !a.s.nodes) return;
  by_count(a.s.numerators, [&](auto n) {
    constexpr int R = decltype(n)::value;
    auto kernel = a.pairs ? cauchy_kernel<true, T, R> : cauchy_kernel<false, T, R>;
    launch(kernel, Place::blocks(a.s, R, EACH<T>), THREADS, a.nodes(), a.v, a.w, out, a.s);
  });
}

template <bool PAIRS, class T, class S, class L, class Z, class G>
void launch_gradients(L launch, Z nodes, G upstream, const Complex<S>* v, const Complex<S>* w, double* partial,
                      Complex<S>* dv, Complex<S>* dw, Shape s) {
  Split split = Split::of(s);
  int64_t blocks = s.rows * split.groups * split.chunks * split.tiles;
  if (blocks)
    by_count(s.numerators, [&](auto n) {
      launch(slopes_kernel<PAIRS, T, S, decltype(n)::value, Z, G>, blocks, THREADS, nodes, upstream, v, w, partial, s,
             split);
    });
  if (s.rows * s.modes > 0)
    launch(gradients_kernel<PAIRS, T, S, Z, G>, pieces(s.rows * s.modes, THREADS), THREADS, nodes, upstream, v, w,
           partial, dv, dw, s, split);
}

template <class T, class L>
void launch_cauchy_backward(L launch, Cauchy<T> a, const Complex<T>* grad, double* partial, Complex<T>* dv,
                            Complex<T>* dw) {
  Upstream<T> upstream = {grad, a.s};
  if (a.pairs) launch_gradients<true, T>(launch, a.nodes(), upstream, a.v, a.w, partial, dv, dw, a.s);
  else launch_gradients<false, T>(launch, a.nodes(), upstream, a.v, a.w, partial, dv, dw, a.s);
}

// of_row: (rows, nodes)
template <class T, class L>
void launch_cauchy_nodes(L launch, Cauchy<T> a, const Complex<T>* grad, Complex<double>* of_row, Complex<T>* dz) {
  auto kernel = a.pairs ? node_slopes_kernel<true, T> : node_slopes_kernel<false, T>;
  if (a.s.rows * a.s.nodes > 0)
    launch(kernel, pieces(a.s.rows * a.s.nodes, THREADS), THREADS, a.nodes(), Upstream<T>{grad, a.s}, a.v, a.w, of_row,
           a.s);
  int64_t size = a.z_rows * a.s.nodes, rows = a.z_rows == 1 ? a.s.rows : 1;
  if (size) launch(add_rows_kernel<T>, pieces(size, THREADS), THREADS, of_row, dz, rows, size);
}

}}  // namespace s4nb::S4NB_ISA
