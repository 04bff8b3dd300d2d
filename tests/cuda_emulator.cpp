// Runs the CUDA kernels on a CPU, thread by thread: each thread of a block is a fiber that runs until its next barrier.
// The order of blocks and threads is forward or reverse; a kernel that lacks a barrier gives different results. Known
// limits: one thread at a time (no weak memory), shared memory is whatever the block before left, float arithmetic is
// the host's.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

enum State { RUNNING, AT_BARRIER, IN_SHUFFLE, DONE };
struct Index { unsigned x; };
struct Fiber { ucontext_t context; State state; int line, turn; double slot[2]; std::unique_ptr<char[]> stack; };

constexpr int WARP = 32, STACK = 1 << 16;
Index thread, block;
bool backwards = false;
std::vector<Fiber> fibers;
ucontext_t scheduler;
void (*body)(void*);
void* body_argument;

void wait(State state, int line) {
  Fiber& me = fibers[thread.x];
  me.state = state;
  me.line = line;
  swapcontext(&me.context, &scheduler);
}

template <class T> T shuffle_xor(T value, int far) {
  unsigned me = thread.x;
  int turn = fibers[me].turn ^= 1;  // two slots: a lane may be one shuffle ahead of another
  std::memcpy(&fibers[me].slot[turn], &value, sizeof value);
  wait(IN_SHUFFLE, 0);
  std::memcpy(&value, &fibers[me ^ far].slot[turn], sizeof value);
  return value;
}

void enter() {
  body(body_argument);
  wait(DONE, 0);
}

// A warp runs as far as it can, shuffles included, before the next one starts: warps get as far apart as may be.
void run_warp(int first) {
  for (bool together = true; together;) {
    for (int i = 0; i < WARP; i++) {
      thread.x = first + (backwards ? WARP - 1 - i : i);
      if (fibers[thread.x].state == RUNNING) swapcontext(&scheduler, &fibers[thread.x].context);
    }
    for (int i = 0; i < WARP; i++) together = together && fibers[first + i].state == IN_SHUFFLE;
    for (int i = 0; together && i < WARP; i++) fibers[first + i].state = RUNNING;
  }
}

// Threads that wait at a barrier go on once all that have not ended are there, at one and the same line.
void release(int threads) {
  int line = 0;
  for (int t = 0; t < threads; t++) {
    if (fibers[t].state == DONE) continue;
    if (fibers[t].state != AT_BARRIER) throw std::runtime_error("threads wait for others that never come");
    if (line && fibers[t].line != line) throw std::runtime_error("threads of a block wait at different barriers");
    line = fibers[t].line;
  }
  for (int t = 0; t < threads; t++)
    if (fibers[t].state == AT_BARRIER) fibers[t].state = RUNNING;
}

void run_block(int threads) {
  for (int t = 0; t < threads; t++) {
    Fiber& f = fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    makecontext(&f.context, enter, 0);
    f.state = RUNNING;
    f.turn = 0;
  }
  for (bool alive = true; alive;) {
    for (int w = 0; w < threads; w += WARP) run_warp(backwards ? threads - WARP - w : w);
    alive = false;
    for (int t = 0; t < threads; t++) alive = alive || fibers[t].state != DONE;
    if (alive) release(threads);
  }
}

struct Launch {
  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, A... arguments) const {
    auto call = [&] { kernel(P(arguments)...); };
    body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    body_argument = &call;
    while (int(fibers.size()) < threads) fibers.push_back(Fiber{{}, DONE, 0, 0, {}, std::make_unique<char[]>(STACK)});
    for (int64_t b = 0; b < blocks; b++) {
      block.x = unsigned(backwards ? blocks - 1 - b : b);
      run_block(threads);
    }
  }
};

}  // namespace emulator

#define S4NB_ISA emulated
#define __global__
#define __device__
#define __shared__ static
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __syncthreads() emulator::wait(emulator::AT_BARRIER, __LINE__)
#define __shfl_xor_sync(mask, value, far) emulator::shuffle_xor(value, far)
#define threadIdx emulator::thread
#define blockIdx emulator::block
inline void sincospi(double x, double* s, double* c) { *s = std::sin(M_PI * x); *c = std::cos(M_PI * x); }
using std::exp;

#include "cuda_dplr.cuh"
#include "cuda_powers.cuh"

using namespace s4nb::emulated;
using I = int64_t;
static std::string message;

template <class F> const char* guarded(F f) {  // null, or what went wrong
  try { f(emulator::Launch()); return nullptr; }
  catch (const std::exception& e) { return (message = e.what()).c_str(); }
}

template <class T> struct Emulated {
  using C = Complex<T>;
  using Z = Complex<double>;
  static const char* cauchy(C* v, C* z, C* w, C* out, I B, I R, I M, I L, I rows, bool pairs) {
    return guarded([&](auto launch) { launch_cauchy(launch, Cauchy<T>{v, z, w, {B, R, M, L}, pairs, rows}, out); });
  }
  static const char* cauchy_backward(C* grad, C* v, C* z, C* w, C* dv, C* dz, C* dw, I B, I R, I M, I L, I rows,
                                     bool pairs) {
    return guarded([&](auto launch) {
      Cauchy<T> a = {v, z, w, {B, R, M, L}, pairs, rows};
      std::vector<double> partial(size_t(Split::of(a.s).doubles(a.s)), NAN);
      std::vector<Z> of_row(size_t(B * L), Z{NAN, NAN});
      launch_cauchy_backward(launch, a, grad, partial.data(), dv, dw);
      launch_cauchy_nodes(launch, a, grad, of_row.data(), dz);
    });
  }
  static const char* spectrum(Z* v, Z* w, C* sums, C* out, I H, I rows, I columns, I M, I L) {
    return guarded([&](auto launch) {
      Dplr a = {v, w, H, rows, columns, M, L};
      std::vector<Ends> ends(size_t(H * rows * columns), Ends{NAN, NAN});
      launch_spectrum(launch, a, sums, out, a.fused() ? nullptr : ends.data());
    });
  }
  static const char* spectrum_backward(C* grad, C* sums, Z* v, Z* w, Z* dv, Z* dw, I H, I rows, I columns, I M, I L) {
    return guarded([&](auto launch) {
      Dplr a = {v, w, H, rows, columns, M, L};
      std::vector<double> partial(size_t(Split::of(a.shape()).doubles(a.shape())), NAN);
      launch_spectrum_backward(launch, a, grad, sums, partial.data(), dv, dw);
    });
  }
  static const char* vandermonde(C* v, Z* x, void* out, I B, I R, I M, I L, bool pairs) {
    return guarded([&](auto launch) {
      if (pairs) launch_vandermonde<true>(launch, v, x, static_cast<T*>(out), B, R, M, L);
      else launch_vandermonde<false>(launch, v, x, static_cast<C*>(out), B, R, M, L);
    });
  }
  static const char* power_sums(void* u, Z* x, C* out, C* second, I B, I R, I M, I L, bool real) {
    return guarded([&](auto launch) {
      std::vector<Z> partial(size_t(2 * B * R * M * (1 + L)), Z{NAN, NAN});
      if (real) launch_power_sums<true>(launch, static_cast<T*>(u), x, out, second, partial.data(), B, R, M, L);
      else launch_power_sums<false>(launch, static_cast<C*>(u), x, out, second, partial.data(), B, R, M, L);
    });
  }
  static const char* diag_step(C* A, C* B, C* c, T* u, C* state, T* y, C* next, I batch, I H, I M, I channels) {
    return guarded(
        [&](auto launch) { launch_diag_step(launch, Step<T>{c, u, state, y, next, batch, H, M, channels, 0}, A, B); });
  }
  static const char* dplr_step(C* D, C* E, C* P, C* Q, C* B2, C* c, T* u, C* state, T* y, C* next, I batch, I H, I M,
                               I channels, I rank) {
    return guarded([&](auto launch) {
      std::vector<C> x(size_t(batch * H * M), C{T(NAN), T(NAN)});
      launch_dplr_step(launch, Step<T>{c, u, state, y, next, batch, H, M, channels, rank}, D, E, P, Q, B2,
                       rank > 1 ? x.data() : next);
    });
  }
};

// Kernels of the emulator's own tests: a right one, one that lacks a barrier, one where half of the threads wait while
// the others have ended (which CUDA allows), and one that hangs.
template <int KIND> void test_kernel(double* x, int n) {
  static double shared[64];
  int t = int(threadIdx.x);
  shared[t] = x[t];
  if (KIND != 1) __syncthreads();
  double sum = shared[(t + 1) % n] + shared[(t + n - 1) % n];
  if (KIND == 2 && t % 2) __syncthreads();
  if (KIND == 3) { if (t % 2) __syncthreads(); else __shfl_xor_sync(~0u, sum, 1); }
  x[t] = sum;
}

extern "C" {
void run_backwards(bool yes) { emulator::backwards = yes; }
const char* test_barrier(int kind, double* x) {
  void (*kernels[])(double*, int) = {test_kernel<0>, test_kernel<1>, test_kernel<2>, test_kernel<3>};
  return guarded([&](auto launch) { launch(kernels[kind], 1, 64, x, 64); });
}
#define OPS(T, twice)                                                                              \
  const void* op_##twice(int i) {                                                                  \
    const void* table[] = {(void*)Emulated<T>::cauchy,      (void*)Emulated<T>::cauchy_backward,   \
                           (void*)Emulated<T>::spectrum,    (void*)Emulated<T>::spectrum_backward, \
                           (void*)Emulated<T>::vandermonde, (void*)Emulated<T>::power_sums,        \
                           (void*)Emulated<T>::diag_step,   (void*)Emulated<T>::dplr_step};        \
    return table[i];                                                                               \
  }
OPS(float, float)
OPS(double, double)
}
