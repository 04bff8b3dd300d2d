// The CUDA ops of s4nb for torch, on LibTorch's stable ABI: one library serves torch 2.10 and later. Checks and memory
// are here; the kernels are in the files cuda_*.cuh. All run on torch's current stream; nothing waits.
#define S4NB_ISA cuda
#ifndef USE_CUDA
#define USE_CUDA  // torch's header then declares how to get the current stream
#endif
#include "cuda_dplr.cuh"
#include "cuda_powers.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

namespace s4nb { namespace cuda { namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

bool is_complex(ScalarType t) { return t == ScalarType::ComplexFloat || t == ScalarType::ComplexDouble; }
bool is_double(ScalarType t) { return t == ScalarType::ComplexDouble || t == ScalarType::Double; }
ScalarType real_of(ScalarType t) { return is_double(t) ? ScalarType::Double : ScalarType::Float; }
ScalarType complex_of(ScalarType t) { return is_double(t) ? ScalarType::ComplexDouble : ScalarType::ComplexFloat; }

// One call of an op: its checks, the tensors it makes, the device and the stream it runs on.
struct Call {
  const char* op;
  const Tensor& on;  // all tensors have to lie where this one does
  torch::stable::accelerator::DeviceGuard guard;
  Call(const char* op, const Tensor& on) : op(op), on(on), guard(on.get_device_index()) {}

  void check(const char* name, const Tensor& t, ScalarType type, const Sizes& sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == type, "s4nb::", op, ": the dtype of ", name, " does not go with the others");
    STD_TORCH_CHECK(Sizes(t.sizes().begin(), t.sizes().end()) == sizes, "s4nb::", op, ": the shape of ", name,
                    " does not go with the others");
    STD_TORCH_CHECK(t.is_contiguous(), "s4nb::", op, ": ", name, " has to be contiguous");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == on.get_device_index(), "s4nb::", op, ": ", name,
                    " lies on another device");
  }
  void check_complex(const char* name, const Tensor& t, int64_t dims) const {
    STD_TORCH_CHECK(is_complex(t.scalar_type()), "s4nb::", op, ": ", name, " has to be complex64 or complex128");
    STD_TORCH_CHECK(t.dim() == dims, "s4nb::", op, ": ", name, " has to have ", dims, " dimensions");
    check(name, t, t.scalar_type(), Sizes(t.sizes().begin(), t.sizes().end()));
  }
  Tensor make(const Sizes& sizes, ScalarType type) const { return torch::stable::new_empty(on, sizes, type); }

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, A... arguments) const {
    STD_TORCH_CHECK(blocks <= 2147483647, "s4nb::", op, ": too large, it takes ", blocks, " blocks of threads");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    kernel<<<unsigned(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(P(arguments)...);
    cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "s4nb::", op, ": no launch on the GPU (", cudaGetErrorName(error), ": ",
                    cudaGetErrorString(error), ")");
  }
};

// Kernels are launched through this: a copy of Call would move its device guard.
struct Launch {
  const Call& call;
  template <class K, class... A> void operator()(K kernel, int64_t blocks, int threads, A... arguments) const {
    call(kernel, blocks, threads, arguments...);
  }
};

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <class T> Complex<T>* numbers(const Tensor& t) { return data<Complex<T>>(t); }
template <class F> void by_type(ScalarType t, const F& f) { if (is_double(t)) f(double()); else f(float()); }

// ---- Cauchy sums ---------------------------------------------------------------------------------------------------
void check_cauchy(const Call& call, const Tensor& v, const Tensor& z, const Tensor& w) {
  call.check_complex("v", v, 3);
  call.check_complex("z", z, 2);
  call.check("w", w, v.scalar_type(), {v.size(0), v.size(2)});
  call.check("z", z, v.scalar_type(), {z.size(0) == 1 ? 1 : v.size(0), z.size(1)});
}

template <class T> Cauchy<T> sizes_of(const Tensor& v, const Tensor& z, const Tensor& w, bool pairs) {
  return {numbers<T>(v), numbers<T>(z), numbers<T>(w), {v.size(0), v.size(1), v.size(2), z.size(1)}, pairs, z.size(0)};
}

Tensor cauchy(Tensor v, Tensor z, Tensor w, bool pairs) {
  Call call("cauchy", v);
  check_cauchy(call, v, z, w);
  Tensor out = call.make({v.size(0), v.size(1), z.size(1)}, v.scalar_type());
  by_type(v.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch_cauchy(Launch{call}, sizes_of<T>(v, z, w, pairs), numbers<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cauchy_backward(Tensor grad, Tensor v, Tensor z, Tensor w, bool pairs, bool need_z) {
  Call call("cauchy_backward", v);
  check_cauchy(call, v, z, w);
  ScalarType type = v.scalar_type();
  call.check("grad", grad, type, {v.size(0), v.size(1), z.size(1)});
  Tensor dv = call.make({v.size(0), v.size(1), v.size(2)}, type), dw = call.make({w.size(0), w.size(1)}, type);
  Tensor dz = call.make(need_z ? Sizes{z.size(0), z.size(1)} : Sizes{0}, type);
  by_type(type, [&](auto t) {
    using T = decltype(t);
    Cauchy<T> a = sizes_of<T>(v, z, w, pairs);
    Tensor partial = call.make(Sizes{Split::of(a.s).doubles(a.s)}, ScalarType::Double);
    launch_cauchy_backward(Launch{call}, a, numbers<T>(grad), data<double>(partial), numbers<T>(dv), numbers<T>(dw));
    if (!need_z) return;
    Tensor of_row = call.make(Sizes{a.s.rows, a.s.nodes}, ScalarType::ComplexDouble);
    launch_cauchy_nodes(Launch{call}, a, numbers<T>(grad), numbers<double>(of_row), numbers<T>(dz));
  });
  return std::make_tuple(dv, dz, dw);
}

// ---- the spectrum of a DPLR kernel ---------------------------------------------------------------------------------
Dplr check_dplr(const Call& call, const Tensor& v, const Tensor& w, int64_t L) {
  call.check_complex("v", v, 4);
  call.check("v", v, ScalarType::ComplexDouble, {v.size(0), v.size(1), v.size(2), v.size(3)});
  call.check("w", w, ScalarType::ComplexDouble, {v.size(0), v.size(3)});
  STD_TORCH_CHECK(v.size(1) > 0 && v.size(2) > 0 && L > 0, "s4nb::", call.op,
                  ": v has to have the low-rank numerators and L to be positive");
  return {numbers<double>(v), numbers<double>(w), v.size(0), v.size(1), v.size(2), v.size(3), L};
}

std::tuple<Tensor, Tensor> dplr_spectrum(Tensor v, Tensor w, int64_t L, bool single) {
  Call call("dplr_spectrum", v);
  Dplr a = check_dplr(call, v, w, L);
  ScalarType type = single ? ScalarType::ComplexFloat : ScalarType::ComplexDouble;
  Tensor spectrum = call.make({a.H, a.I - 1, a.J - 1, L / 2 + 1}, type),
         sums = call.make({a.H, a.I, a.J, (L + 1) / 2}, type);
  Tensor ends = call.make({a.fused() ? 0 : 2 * a.H * a.I * a.J}, ScalarType::Double);
  by_type(type, [&](auto t) {
    using T = decltype(t);
    launch_spectrum(Launch{call}, a, numbers<T>(sums), numbers<T>(spectrum), a.fused() ? nullptr : data<Ends>(ends));
  });
  return std::make_tuple(spectrum, sums);
}

std::tuple<Tensor, Tensor> dplr_spectrum_backward(Tensor grad, Tensor sums, Tensor v, Tensor w, int64_t L) {
  Call call("dplr_spectrum_backward", v);
  Dplr a = check_dplr(call, v, w, L);
  call.check_complex("grad", grad, 4);
  call.check("grad", grad, grad.scalar_type(), {a.H, a.I - 1, a.J - 1, L / 2 + 1});
  call.check("sums", sums, grad.scalar_type(), {a.H, a.I, a.J, (L + 1) / 2});
  Tensor dv = call.make({a.H, a.I, a.J, a.M}, v.scalar_type()), dw = call.make({a.H, a.M}, v.scalar_type());
  Tensor partial = call.make({Split::of(a.shape()).doubles(a.shape())}, ScalarType::Double);
  by_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch_spectrum_backward(Launch{call}, a, numbers<T>(grad), numbers<T>(sums), data<double>(partial),
                             numbers<double>(dv), numbers<double>(dw));
  });
  return std::make_tuple(dv, dw);
}

// ---- powers --------------------------------------------------------------------------------------------------------
Tensor vandermonde(Tensor v, Tensor x, int64_t L, bool pairs) {
  Call call("vandermonde", v);
  call.check_complex("v", v, 3);
  call.check("x", x, ScalarType::ComplexDouble, {v.size(0), v.size(2)});
  STD_TORCH_CHECK(L >= 0, "s4nb::vandermonde: L is negative");
  ScalarType type = v.scalar_type();
  int64_t B = v.size(0), R = v.size(1), M = v.size(2);
  Tensor out = call.make({B, R, L}, pairs ? real_of(type) : type);
  by_type(type, [&](auto t) {
    using T = decltype(t);
    if (pairs) launch_vandermonde<true>(Launch{call}, numbers<T>(v), numbers<double>(x), data<T>(out), B, R, M, L);
    else launch_vandermonde<false>(Launch{call}, numbers<T>(v), numbers<double>(x), numbers<T>(out), B, R, M, L);
  });
  return out;
}

std::tuple<Tensor, Tensor> power_sums(Tensor u, Tensor x, bool moments) {
  Call call("power_sums", u);
  ScalarType type = u.scalar_type();
  STD_TORCH_CHECK(u.dim() == 3 && x.dim() == 2, "s4nb::power_sums: u has to have 3 dimensions, x 2");
  STD_TORCH_CHECK(is_complex(type) || type == real_of(type),
                  "s4nb::power_sums: u has to be float32, float64, complex64 or complex128");
  int64_t B = u.size(0), R = u.size(1), M = x.size(1), L = u.size(2);
  call.check("u", u, type, {B, R, L});
  call.check("x", x, ScalarType::ComplexDouble, {B, M});
  Tensor out = call.make({B, R, M}, complex_of(type)),
         second = call.make(moments ? Sizes{B, R, M} : Sizes{0}, complex_of(type));
  by_type(type, [&](auto t) {
    using T = decltype(t);
    auto run = [&](auto real, auto* input) {
      constexpr bool REAL = decltype(real)::value;
      int64_t chunks = power_chunks<REAL, T>(L);
      Tensor partial = call.make(Sizes{chunks > 1 ? B * R * chunks * (1 + moments) * M : 0}, ScalarType::ComplexDouble);
      launch_power_sums<REAL>(Launch{call}, input, numbers<double>(x), numbers<T>(out),
                              moments ? numbers<T>(second) : nullptr, numbers<double>(partial), B, R, M, L);
    };
    if (is_complex(type)) run(std::false_type(), numbers<T>(u));
    else run(std::true_type(), data<T>(u));
  });
  return std::make_tuple(out, second);
}

// ---- one step ------------------------------------------------------------------------------------------------------
struct Stepped { Tensor y, next; };

Stepped check_step(const Call& call, const Tensor& B, const Tensor& C, const Tensor& u, const Tensor& state) {
  call.check_complex("state", state, 3);
  ScalarType type = state.scalar_type();
  int64_t b = state.size(0), h = state.size(1), m = state.size(2);
  call.check("B", B, type, {h, m});
  call.check_complex("C", C, 3);
  call.check("C", C, type, {C.size(0), h, m});
  call.check("u", u, real_of(type), {b, h});
  return {call.make({b, C.size(0), h}, real_of(type)), call.make({b, h, m}, type)};
}

template <class T>
Step<T> arguments_of(const Stepped& s, const Tensor& C, const Tensor& u, const Tensor& state, int64_t rank) {
  return {numbers<T>(C), data<T>(u),    numbers<T>(state), data<T>(s.y), numbers<T>(s.next),
          state.size(0), state.size(1), state.size(2),     C.size(0),    rank};
}

std::tuple<Tensor, Tensor> diag_step(Tensor A, Tensor B, Tensor C, Tensor u, Tensor state) {
  Call call("diag_step", state);
  Stepped s = check_step(call, B, C, u, state);
  call.check("A", A, state.scalar_type(), {state.size(1), state.size(2)});
  by_type(state.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch_diag_step(Launch{call}, arguments_of<T>(s, C, u, state, 0), numbers<T>(A), numbers<T>(B));
  });
  return std::make_tuple(s.y, s.next);
}

std::tuple<Tensor, Tensor> dplr_step(Tensor D, Tensor E, Tensor P, Tensor Q, Tensor B2, Tensor C, Tensor u,
                                     Tensor state) {
  Call call("dplr_step", state);
  Stepped s = check_step(call, B2, C, u, state);
  ScalarType type = state.scalar_type();
  Sizes of_mode = {state.size(1), state.size(2)};
  call.check("D", D, type, of_mode);
  call.check("E", E, type, of_mode);
  call.check_complex("P", P, 3);
  call.check("P", P, type, {P.size(0), of_mode[0], of_mode[1]});
  call.check("Q", Q, type, {P.size(0), of_mode[0], of_mode[1]});
  Tensor x = P.size(0) > 1 ? call.make({state.size(0), state.size(1), state.size(2)}, type) : s.next;
  by_type(type, [&](auto t) {
    using T = decltype(t);
    launch_dplr_step(Launch{call}, arguments_of<T>(s, C, u, state, P.size(0)), numbers<T>(D), numbers<T>(E),
                     numbers<T>(P), numbers<T>(Q), numbers<T>(B2), numbers<T>(x));
  });
  return std::make_tuple(s.y, s.next);
}

}}}  // namespace s4nb::cuda

#ifndef S4NB_SOURCES
#define S4NB_SOURCES "unknown"
#endif
extern "C" __attribute__((visibility("default"))) const char* s4nb_sources() { return S4NB_SOURCES; }

STABLE_TORCH_LIBRARY_IMPL(s4nb, CUDA, m) {
  m.impl("cauchy", TORCH_BOX(&s4nb::cuda::cauchy));
  m.impl("cauchy_backward", TORCH_BOX(&s4nb::cuda::cauchy_backward));
  m.impl("dplr_spectrum", TORCH_BOX(&s4nb::cuda::dplr_spectrum));
  m.impl("dplr_spectrum_backward", TORCH_BOX(&s4nb::cuda::dplr_spectrum_backward));
  m.impl("vandermonde", TORCH_BOX(&s4nb::cuda::vandermonde));
  m.impl("power_sums", TORCH_BOX(&s4nb::cuda::power_sums));
  m.impl("diag_step", TORCH_BOX(&s4nb::cuda::diag_step));
  m.impl("dplr_step", TORCH_BOX(&s4nb::cuda::dplr_step));
}
