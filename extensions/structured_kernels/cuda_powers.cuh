// Vandermonde sums, their transpose, and single steps of state space models, in CUDA.
#pragma once
#include "cuda_common.cuh"

namespace s4nb { namespace S4NB_ISA {

// ---- Sums of powers ------------------------------------------------------------------------------------------------
// l = k SIDE + j: e^{xl} = giant_k baby_j, tables of SIDE entries for 32 modes at a time, by chains of products in
// double from two exponentials for each mode and block. A block of 256 threads sees SIDE^2 positions.
constexpr int POWER_THREADS = 256, SEGMENTS = POWER_THREADS / WARP;
template <class T> constexpr int SIDE = sizeof(T) == 4 ? 64 : 32;

__device__ inline Complex<double> exponential(Complex<double> x, double n) {
  if (n == 0) return {1, 0};  // for an infinite x, too
  double size = exp(x.re * n), s, c;
  sincos(x.im * n, &s, &c);
  return {size * c, size * s};
}

__device__ inline Complex<double> power(Complex<double> z, int n) {
  Complex<double> p = {1, 0};
  for (; n; n /= 2, z = z * z) if (n % 2) p = p * z;
  return p;
}

// e^x and e^{x start} of 32 modes; beyond the last mode zeros, so that they add nothing.
__device__ inline void two_exponentials(Complex<double> (&table)[2][WARP], const Complex<double>* x, int64_t first,
                                        int64_t modes, int64_t start) {
  if (threadIdx.x < 2 * WARP) {
    int m = threadIdx.x % WARP, which = threadIdx.x / WARP;
    table[which][m] =
        first + m < modes ? exponential(x[first + m], which ? double(start) : 1.0) : Complex<double>{0, 0};
  }
}

template <class T, bool REAL> struct Output { using type = T; };
template <class T> struct Output<T, false> { using type = Complex<T>; };

template <bool REAL, class T> __global__ void __launch_bounds__(POWER_THREADS)
    vandermonde_kernel(const Complex<T>* v, const Complex<double>* x, typename Output<T, REAL>::type* out,
                       int64_t numerators, int64_t modes, int64_t L) {
  constexpr int N = SIDE<T>, TILE = N / 16, PAD = 8, WIDE = 16 / int(sizeof(Complex<T>));  // WIDE: numbers in 16 bytes
  __shared__ Complex<double> of_mode[2][WARP];
  __shared__ __align__(16) Complex<T> baby[WARP][N + PAD], giant[WARP][N + PAD];
  const int t = threadIdx.x, left = t / 16 * TILE, right = t % 16;
  const int64_t tiles = pieces(L, N * N), start = blockIdx.x % tiles * (N * N),
                row = blockIdx.x / tiles;  // row: (b, r)
  const int64_t last = least(N * N, L - start);
  v += row * modes;
  x += row / numerators * modes;
  auto column = [&](int j) { return j / WIDE * 16 * WIDE + right * WIDE + j % WIDE; };
  Complex<T> sum[TILE][TILE] = {};
  for (int64_t first = 0; first < modes; first += WARP) {
    two_exponentials(of_mode, x, first, modes, start);
    __syncthreads();  // and the tables of the modes before have been used
    {
      const int m = t / SEGMENTS, s = t % SEGMENTS;
      Complex<double> z = of_mode[0][m], V = {0, 0};
      if (first + m < modes) V = cast<double>(v[first + m]);
      if (REAL) V = V + V;
      Complex<double> leap = power(z, SEGMENTS), side = power(leap, N / SEGMENTS), entry = power(z, s);
      for (int j = s; j < N; j += SEGMENTS, entry = entry * leap) baby[m][j] = cast<T>(entry);
      leap = power(side, SEGMENTS);
      entry = V * of_mode[1][m] * power(side, s);
      for (int k = s; k < N && k * N < last; k += SEGMENTS, entry = entry * leap) giant[m][k] = cast<T>(entry);
    }
    __syncthreads();
    const int here = int(least(WARP, modes - first));
    if (left * N < last)
#pragma unroll 2
      for (int m = 0; m < here; m++) {
        Complex<T> a[TILE], b[TILE];
#pragma unroll
        for (int i = 0; i < TILE; i++) { a[i] = giant[m][left + i]; b[i] = baby[m][column(i)]; }
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
      int64_t l = (left + i) * N + column(j);
      if (l < last) {
        if constexpr (REAL) out[row * L + start + l] = sum[i][j].re;
        else out[row * L + start + l] = sum[i][j];
      }
    }
}

// The transpose: block = (row, chunk of SIDE giants, 32 modes); a thread owns a mode and SIDE / 8 giants (half as many
// for complex u). MOMENTS: also sum_l l u_l e^{xl}. One chunk: the result is written; several: a pair of doubles each.
template <bool REAL, bool MOMENTS, class T> __global__ void __launch_bounds__(POWER_THREADS)
    power_sums_kernel(const typename Output<T, REAL>::type* u, const Complex<double>* x, Complex<T>* out,
                      Complex<T>* second, Complex<double>* partial, int64_t numerators, int64_t modes, int64_t L) {
  constexpr int N = SIDE<T>, GIANTS = REAL ? N : N / 2, MINE = GIANTS / SEGMENTS;
  using U = typename Output<T, REAL>::type;
  __shared__ Complex<double> of_mode[2][WARP];
  __shared__ __align__(16) U input[GIANTS][N];
  __shared__ Complex<T> baby[N][WARP];
  __shared__ Complex<double> scratch[1 + MOMENTS][SEGMENTS][WARP];
  const int t = threadIdx.x, lane = t % WARP, segment = t / WARP;
  const int64_t tiles = pieces(modes, WARP), chunks = pieces(L, GIANTS * N), first = blockIdx.x % tiles * WARP;
  const int64_t cell = blockIdx.x / tiles, row = cell / chunks, start = cell % chunks * (GIANTS * N);
  const int64_t last = least(GIANTS * N, L - start);
  two_exponentials(of_mode, x + row / numerators * modes, first, modes, start);
  for (int i = t; i < GIANTS * N; i += POWER_THREADS) input[i / N][i % N] = i < last ? u[row * L + start + i] : U{};
  __syncthreads();
  Complex<double> z = of_mode[0][lane], leap = power(z, SEGMENTS), side = power(leap, N / SEGMENTS),
                  entry = power(z, segment);
  for (int j = segment; j < N; j += SEGMENTS, entry = entry * leap)  // powers beyond the last position may be infinite
    baby[j][lane] = j < last ? cast<T>(entry) : Complex<T>{0, 0};
  __syncthreads();
  Complex<T> sum[MINE] = {}, moment[MINE] = {};
  if (segment * MINE * N < last)
#pragma unroll(MOMENTS ? 2 : 4)
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
  Complex<double> total = {0, 0}, weighted = {0, 0}, giant = of_mode[1][lane] * power(side, segment * MINE);
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
  else partial[(cell * (1 + MOMENTS) + segment) * modes + first + lane] = total;
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
  int64_t blocks = B * R * pieces(length, SIDE<T> * SIDE<T>);
  if (blocks) launch(vandermonde_kernel<REAL, T>, blocks, POWER_THREADS, v, x, out, R, M, length);
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
