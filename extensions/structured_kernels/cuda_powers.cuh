// Vandermonde sums, their transpose, and single steps of state space models, in CUDA.
#pragma once
#include "cuda_common.cuh"

namespace s4nb { namespace S4NB_ISA {

// ---- Sums of powers ------------------------------------------------------------------------------------------------
// l = k N + j: e^{xl} = giant_k baby_j, k, j < N, from tables made by chains of products in double. A chain begins at
// a power of e^x, a product of rungs of the ladder e^x, e^2x, e^4x, ...: a mode takes two exponentials in a block.
constexpr int POWER_THREADS = 256, SEGMENTS = POWER_THREADS / WARP, SHARE = 16;
template <class T> constexpr int SIDE = sizeof(T) == 4 ? 64 : 32;
template <int N> constexpr int LOG2 = 1 + LOG2<N / 2>;
template <> constexpr int LOG2<1> = 0;

__device__ inline Complex<double> exponential(Complex<double> x, double n) {
  if (n == 0) return {1, 0};  // for an infinite x, too
  double size = exp(x.re * n), s, c;
  sincos(x.im * n, &s, &c);
  return {size * c, size * s};
}

// Rungs 0 .. TOP - 1 for 32 modes, and on top of them e^{x start} times scale(mode).
template <int TOP, class F>
__device__ void climb(Complex<double> (&ladder)[TOP + 1][WARP], const Complex<double>* x, int64_t first, int64_t modes,
                      int64_t start, F scale) {
  const int m = threadIdx.x % WARP, top = threadIdx.x / WARP;
  if (top > 1 || first + m >= modes) return;
  Complex<double> z = exponential(x[first + m], top ? double(start) : 1.0);
  if (top) ladder[TOP][m] = scale(first + m) * z;
  else
#pragma unroll
    for (int k = 0; k < TOP; k++, z = z * z) ladder[k][m] = z;
}

// The n-th power of what is on the first of the rungs. Those of bits that n lacks stay out: they may be infinite.
template <int BITS> __device__ Complex<double> power(const Complex<double> (*rungs)[WARP], int m, int n) {
  Complex<double> p = {1, 0};
#pragma unroll
  for (int k = 0; k < BITS; k++) if (n >> k & 1) p = p * rungs[k][m];
  return p;
}

template <class T, bool REAL> struct Output { using type = T; };
template <class T> struct Output<T, false> { using type = Complex<T>; };

// A block sees N giants and N babies; a thread adds up TILE giants times every 16th baby, TILE of them. The tables hold
// 16 modes at a time, and 16 threads make those of a mode. 8 x 8 sums and complex ones are kept to the registers of two blocks.
template <bool REAL, class T, int TILE> __global__ void __launch_bounds__(POWER_THREADS, TILE == 8 || !REAL ? 2 : 0)
    vandermonde_kernel(const Complex<T>* v, const Complex<double>* x, typename Output<T, REAL>::type* out,
                       int64_t numerators, int64_t modes, int64_t L) {
  constexpr int N = SHARE * TILE, BITS = LOG2<SHARE>, TOP = LOG2<N * N>, WIDE = 16 / int(sizeof(Complex<T>));
  __shared__ Complex<double> ladder[TOP + 1][WARP];
  __shared__ __align__(16) Complex<T> baby[SHARE][N], giant[SHARE][N];
  auto place = [](int i, int thread) { return (i / WIDE * SHARE + thread) * WIDE + i % WIDE; };  // 16 bytes at a time
  const int t = threadIdx.x, left = t / SHARE, right = t % SHARE;
  const unsigned tiles = unsigned(pieces(L, N * N)), row = blockIdx.x / tiles;  // row: (b, r)
  const int64_t start = int64_t(blockIdx.x % tiles) * (N * N);
  v += row * modes;
  x += row / unsigned(numerators) * modes;
  out += row * L + start + left * TILE * N + right;
  const int room = int(least(N * N, L - start)) - left * TILE * N - right;
  Complex<T> sum[TILE][TILE] = {};
  for (int64_t first = 0; first < modes; first += SHARE) {
    if (first % WARP == 0)
      climb<TOP>(ladder, x, first, modes, start, [&](int64_t m) {
        Complex<double> V = cast<double>(v[m]);
        return REAL ? V + V : V;
      });
    __syncthreads();  // and the tables of the modes before have been used
    {
      const int m = int(first % WARP) + left;
      Complex<double> leap = ladder[BITS][m], entry = power<BITS>(ladder, m, right);
#pragma unroll
      for (int j = 0; j < TILE; j++, entry = entry * leap) baby[left][place(j, right)] = cast<T>(entry);
      leap = ladder[LOG2<N>][m];
      entry = ladder[TOP][m] * power<BITS>(ladder + LOG2<N * TILE>, m, right);
#pragma unroll
      for (int i = 0; i < TILE; i++, entry = entry * leap) giant[left][place(i, right)] = cast<T>(entry);
    }
    __syncthreads();
    const int here = int(least(SHARE, modes - first));
    if (room > 0)
#pragma unroll 2
      for (int m = 0; m < here; m++) {
        Complex<T> a[TILE], b[TILE];
#pragma unroll
        for (int i = 0; i < TILE; i++) { a[i] = giant[m][place(i, left)]; b[i] = baby[m][place(i, right)]; }
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) {
            sum[i][j].re += a[i].re * b[j].re;
            sum[i][j].re -= a[i].im * b[j].im;
            if constexpr (!REAL) { sum[i][j].im += a[i].re * b[j].im; sum[i][j].im += a[i].im * b[j].re; }
          }
      }
  }
#pragma unroll
  for (int i = 0; i < TILE; i++)
#pragma unroll
    for (int j = 0; j < TILE; j++) {
      const int l = i * N + j * SHARE;
      if (l < room) {
        if constexpr (REAL) out[l] = sum[i][j].re;
        else out[l] = sum[i][j];
      }
    }
}

// The transpose: block = (row, chunk of SIDE giants, 32 modes); a thread owns a mode and SIDE / 8 giants (half as many
// for complex u). MOMENTS: also sum_l l u_l e^{xl}. One chunk: the result is written; several: a pair of doubles each.
template <bool REAL, bool MOMENTS, class T> __global__ void __launch_bounds__(POWER_THREADS)
    power_sums_kernel(const typename Output<T, REAL>::type* u, const Complex<double>* x, Complex<T>* out,
                      Complex<T>* second, Complex<double>* partial, int64_t numerators, int64_t modes, int64_t L) {
  constexpr int N = SIDE<T>, GIANTS = REAL ? N : N / 2, MINE = GIANTS / SEGMENTS;
  constexpr int TOP = LOG2<GIANTS * N>;
  using U = typename Output<T, REAL>::type;
  __shared__ Complex<double> ladder[TOP + 1][WARP];
  __shared__ __align__(16) U input[GIANTS][N];
  __shared__ Complex<T> baby[N][WARP];
  __shared__ Complex<double> scratch[1 + MOMENTS][SEGMENTS][WARP];
  const int t = threadIdx.x, lane = t % WARP, segment = t / WARP;
  const unsigned tiles = unsigned(pieces(modes, WARP)), chunks = unsigned(pieces(L, GIANTS * N));
  const unsigned cell = blockIdx.x / tiles, row = cell / chunks;
  const int64_t first = int64_t(blockIdx.x % tiles) * WARP, start = int64_t(cell % chunks) * (GIANTS * N);
  const int last = int(least(GIANTS * N, L - start));
  climb<TOP>(ladder, x + row / unsigned(numerators) * modes, first, modes, start,
             [](int64_t) { return Complex<double>{1, 0}; });
  u += row * L + start;
  for (int i = t; i < GIANTS * N; i += POWER_THREADS) input[i / N][i % N] = i < last ? u[i] : U{};
  __syncthreads();
  Complex<double> leap = ladder[LOG2<SEGMENTS>][lane], entry = power<LOG2<SEGMENTS>>(ladder, lane, segment);
#pragma unroll
  for (int i = 0; i < N; i += SEGMENTS, entry = entry * leap)  // powers beyond the last position may be infinite
    baby[i + segment][lane] = i + segment < last ? cast<T>(entry) : Complex<T>{0, 0};
  __syncthreads();
  Complex<T> sum[MINE] = {}, moment[MINE] = {};
  if (segment * MINE * N < last)
#pragma unroll 4
    for (int j = 0; j < N; j++) {
      Complex<T> b = baby[j][lane], jb = {T(j) * b.re, T(j) * b.im};
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        U value = input[segment * MINE + i][j];
        if constexpr (REAL) {
          sum[i].re += value * b.re; sum[i].im += value * b.im;
          if constexpr (MOMENTS) { moment[i].re += value * jb.re; moment[i].im += value * jb.im; }
        } else {
          sum[i].re += value.re * b.re; sum[i].re -= value.im * b.im;
          sum[i].im += value.re * b.im; sum[i].im += value.im * b.re;
          if constexpr (MOMENTS) {
            moment[i].re += value.re * jb.re; moment[i].re -= value.im * jb.im;
            moment[i].im += value.re * jb.im; moment[i].im += value.im * jb.re;
          }
        }
      }
    }
  Complex<double> total = {0, 0}, weighted = {0, 0}, side = ladder[LOG2<N>][lane];
  Complex<double> giant = ladder[TOP][lane] * power<LOG2<SEGMENTS>>(ladder + LOG2<N * MINE>, lane, segment);
#pragma unroll
  for (int i = 0; i < MINE; i++, giant = giant * side) {
    if ((segment * MINE + i) * N >= last) continue;  // likewise
    Complex<double> term = cast<double>(sum[i]) * giant;
    total = total + term;
    if constexpr (MOMENTS) {
      double at = double(start + (segment * MINE + i) * N);
      weighted = weighted + cast<double>(moment[i]) * giant + Complex<double>{at * term.re, at * term.im};
    }
  }
  scratch[0][segment][lane] = total;
  if constexpr (MOMENTS) scratch[1][segment][lane] = weighted;
  __syncthreads();
  if (segment > MOMENTS || first + lane >= modes) return;
  total = {0, 0};
  for (int g = 0; g < SEGMENTS; g++) total = total + scratch[segment][g][lane];
  if (chunks == 1) (segment ? second : out)[row * modes + first + lane] = cast<T>(total);
  else partial[(int64_t(cell) * (1 + MOMENTS) + segment) * modes + first + lane] = total;
}

template <class T> __global__ void __launch_bounds__(THREADS)
    add_chunks_kernel(const Complex<double>* partial, Complex<T>* out, Complex<T>* second, int64_t chunks,
                      int64_t modes, int64_t total, int64_t kinds) {
  int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index / modes, m = index % modes;
  if (index >= total) return;
  for (int64_t kind = 0; kind < kinds; kind++) {
    Complex<double> sum = {0, 0};
    for (int64_t c = 0; c < chunks; c++) sum = sum + partial[((row * chunks + c) * kinds + kind) * modes + m];
    (kind ? second : out)[index] = cast<T>(sum);
  }
}

// ---- One step of a state space model: a warp for each (b, h) -------------------------------------------------------
template <class T> struct Step {
  const Complex<T>* C;
  const T* u;
  const Complex<T>* state;
  T* y;
  Complex<T>* next;
  int64_t batch, H, M, channels, rank;
};

template <class T, class F>
__device__ void read_out(const Step<T>& p, int64_t b, int64_t h, F state) {  // y = 2 Re sum_m C s
  for (int64_t c = 0; c < p.channels; c++) {
    T sum = 0;
    for (int64_t m = threadIdx.x % WARP; m < p.M; m += WARP) {
      Complex<T> C = p.C[(c * p.H + h) * p.M + m], s = state(m);
      sum += C.re * s.re - C.im * s.im;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) p.y[(b * p.channels + c) * p.H + h] = 2 * sum;
  }
}

template <class T> __global__ void __launch_bounds__(THREADS)
    diag_step_kernel(Step<T> p, const Complex<T>* A, const Complex<T>* B) {
  int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / WARP, b = row / p.H, h = row % p.H;
  if (b >= p.batch) return;
  for (int64_t m = threadIdx.x % WARP; m < p.M; m += WARP) {
    Complex<T> s = A[h * p.M + m] * p.state[row * p.M + m], B_m = B[h * p.M + m];
    p.next[row * p.M + m] = {s.re + B_m.re * p.u[row], s.im + B_m.im * p.u[row]};
  }
  read_out(p, b, h, [&](int64_t m) { return p.next[row * p.M + m]; });
}

// x = E s - P (P^* s) + 2B u, next = D (x - P (Q x)). x has memory of its own, except for rank 1 at most: then all of x
// has been read before next, in its place, changes.
template <class T> __global__ void __launch_bounds__(THREADS)
    dplr_step_kernel(Step<T> p, const Complex<T>* D, const Complex<T>* E, const Complex<T>* P, const Complex<T>* Q,
                     const Complex<T>* B2, Complex<T>* x) {
  int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / WARP, b = row / p.H, h = row % p.H;
  if (b >= p.batch) return;
  const int lane = threadIdx.x % WARP;
  const int64_t at_h = h * p.M, at = row * p.M;
  for (int64_t m = lane; m < p.M; m += WARP) {
    Complex<T> s = E[at_h + m] * p.state[at + m], B_m = B2[at_h + m];
    x[at + m] = {s.re + B_m.re * p.u[row], s.im + B_m.im * p.u[row]};
  }
  auto subtract = [&](Complex<T>* from, int64_t r, T sum) {  // from -= P_r 2 sum
    for (int64_t m = lane; m < p.M; m += WARP) {
      Complex<T> P_m = P[(r * p.H + h) * p.M + m];
      from[at + m] = from[at + m] - Complex<T>{2 * sum * P_m.re, 2 * sum * P_m.im};
    }
  };
  for (int64_t r = 0; r < p.rank; r++) {
    T sum = 0;
    for (int64_t m = lane; m < p.M; m += WARP) {
      Complex<T> P_m = P[(r * p.H + h) * p.M + m], s = p.state[at + m];
      sum += P_m.re * s.re + P_m.im * s.im;
    }
    subtract(x, r, warp_sum(sum));
  }
  if (x != p.next) for (int64_t m = lane; m < p.M; m += WARP) p.next[at + m] = x[at + m];
  for (int64_t r = 0; r < p.rank; r++) {
    T sum = 0;
    for (int64_t m = lane; m < p.M; m += WARP) {
      Complex<T> Q_m = Q[(r * p.H + h) * p.M + m], s = x[at + m];
      sum += Q_m.re * s.re - Q_m.im * s.im;
    }
    subtract(p.next, r, warp_sum(sum));
  }
  for (int64_t m = lane; m < p.M; m += WARP) p.next[at + m] = D[at_h + m] * p.next[at + m];
  read_out(p, b, h, [&](int64_t m) { return p.next[at + m]; });
}

// ---- Launches -----------------------------------------------------------------------------------------------------
template <bool REAL, class T, class L>
void launch_vandermonde(L launch, const Complex<T>* v, const Complex<double>* x, typename Output<T, REAL>::type* out,
                        int64_t B, int64_t R, int64_t M, int64_t length) {
  constexpr int SMALL = SIDE<T>, LARGE = REAL ? 2 * SMALL : SMALL;  // complex sums would not fit into the registers
  const bool large = length > SMALL * SMALL;
  auto kernel = large ? vandermonde_kernel<REAL, T, LARGE / SHARE> : vandermonde_kernel<REAL, T, SMALL / SHARE>;
  int64_t blocks = B * R * (large ? pieces(length, LARGE * LARGE) : pieces(length, SMALL * SMALL));
  if (blocks) launch(kernel, blocks, POWER_THREADS, v, x, out, R, M, length);
}

template <bool REAL, class T> int64_t power_chunks(int64_t length) {
  return pieces(length, SIDE<T> * SIDE<T> / (REAL ? 1 : 2));
}

// partial: (B R, chunks, 1 or 2, M) unless there is one chunk; second: null, or the moments
template <bool REAL, class T, class L>
void launch_power_sums(L launch, const typename Output<T, REAL>::type* u, const Complex<double>* x, Complex<T>* out,
                       Complex<T>* second, Complex<double>* partial, int64_t B, int64_t R, int64_t M, int64_t length) {
  int64_t chunks = power_chunks<REAL, T>(length), total = B * R * M;
  if (!total) return;
  auto kernel = second ? power_sums_kernel<REAL, true, T> : power_sums_kernel<REAL, false, T>;
  if (chunks) launch(kernel, B * R * chunks * pieces(M, WARP), POWER_THREADS, u, x, out, second, partial, R, M, length);
  if (chunks != 1)
    launch(add_chunks_kernel<T>, pieces(total, THREADS), THREADS, partial, out, second, chunks, M, total,
           int64_t(second ? 2 : 1));
}

template <class T> int64_t step_blocks(const Step<T>& p) { return pieces(p.batch * p.H * WARP, THREADS); }

template <class T, class L> void launch_diag_step(L launch, Step<T> p, const Complex<T>* A, const Complex<T>* B) {
  if (p.batch * p.H > 0) launch(diag_step_kernel<T>, step_blocks(p), THREADS, p, A, B);
}

// x: the state's size, or p.next when the rank is 1 at most
template <class T, class L>
void launch_dplr_step(L launch, Step<T> p, const Complex<T>* D, const Complex<T>* E, const Complex<T>* P,
                      const Complex<T>* Q, const Complex<T>* B2, Complex<T>* x) {
  if (p.batch * p.H > 0) launch(dplr_step_kernel<T>, step_blocks(p), THREADS, p, D, E, P, Q, B2, x);
}

}}  // namespace s4nb::S4NB_ISA
