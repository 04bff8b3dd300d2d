// The CPU ops of s4nb for torch, on LibTorch's stable ABI: one library serves torch 2.10 and later. Checks, memory and
// threads are here; the loops are in cpu_kernels.cpp, compiled for several instruction sets, of which the best is taken.
#include "cpu_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

namespace s4nb {
namespace base { extern const InstructionSet kernels_here; }
#ifdef S4NB_AVX2
namespace avx2 { extern const InstructionSet kernels_here; }
#endif
#ifdef S4NB_AVX512
namespace avx512 { extern const InstructionSet kernels_here; }
#endif

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// S4NB_ISA in the environment asks for less than the machine has, for tests and comparisons.
const InstructionSet& choose() {
  const char* asked = std::getenv("S4NB_ISA");
  [[maybe_unused]] auto may = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
#ifdef S4NB_AVX512
  if (may("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return avx512::kernels_here;
#endif
#ifdef S4NB_AVX2
  if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels_here;
#endif
  return base::kernels_here;
}
const InstructionSet& here() { static const InstructionSet& best = choose(); return best; }
template <class T> const Kernels<T>& kernels();
template <> const Kernels<float>& kernels() { return here().single; }
template <> const Kernels<double>& kernels() { return here().twice; }

bool is_complex(ScalarType t) { return t == ScalarType::ComplexFloat || t == ScalarType::ComplexDouble; }
bool is_double(ScalarType t) { return t == ScalarType::ComplexDouble || t == ScalarType::Double; }
ScalarType real_of(ScalarType t) { return is_double(t) ? ScalarType::Double : ScalarType::Float; }
ScalarType complex_of(ScalarType t) { return is_double(t) ? ScalarType::ComplexDouble : ScalarType::ComplexFloat; }

Sizes shape(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }
int64_t numel(const Sizes& s) { int64_t n = 1; for (int64_t i : s) n *= i; return n; }

std::string text(const Sizes& sizes) {
  std::string s = "(";
  for (int64_t n : sizes) s += std::to_string(n) + ", ";
  return s + ")";
}

void check(const char* op, const char* name, const Tensor& t, ScalarType type, const Sizes& sizes) {
  STD_TORCH_CHECK(t.scalar_type() == type, "s4nb::", op, ": the dtype of ", name, " does not go with the others");
  STD_TORCH_CHECK(shape(t) == sizes, "s4nb::", op, ": the shape of ", name, " is ", text(shape(t)), "; beside the others it has to be ", text(sizes));
  STD_TORCH_CHECK(t.is_contiguous(), "s4nb::", op, ": ", name, " has to be contiguous");
}
void check_complex(const char* op, const char* name, const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(is_complex(t.scalar_type()), "s4nb::", op, ": ", name, " has to be complex64 or complex128");
  STD_TORCH_CHECK(t.dim() == dims, "s4nb::", op, ": ", name, " has to have ", dims, " dimensions");
  STD_TORCH_CHECK(t.is_contiguous(), "s4nb::", op, ": ", name, " has to be contiguous");
}

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
Tensor make(const Sizes& sizes, ScalarType type) {  // a direct call: new_empty would go through the dispatcher again
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class F> void over(int64_t n, double work_of_one, const F& f) {  // in parallel, pieces of 50 000 operations at least
  int64_t grain = std::max<int64_t>(1, int64_t(5e4 / std::max(work_of_one, 1.0)));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; i++) f(i); });
}
int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class F> auto by_type(bool twice, const F& f) { return twice ? f(double()) : f(float()); }

// ---- Cauchy sums -----------------------------------------------------------------------------------------------------
constexpr int64_t CHUNK = 8 * TILE;  // nodes of one task

template <class T> bool imaginary(const T* z, int64_t n) {
  for (int64_t i = 0; i < n; i++) if (z[2 * i] != 0) return false;
  return true;
}

template <class T> CauchyArgs<T> cauchy_args(const Tensor& v, const Tensor& z, const Tensor& w, bool pairs) {
  CauchyArgs<T> a = {};
  a.v = data<T>(v); a.z = data<T>(z); a.w = data<T>(w);
  a.B = v.size(0); a.R = v.size(1); a.M = v.size(2); a.L = z.size(1); a.Z = z.size(0);
  a.pairs = pairs; a.imaginary = imaginary(a.z, a.Z * a.L);
  return a;
}

void check_cauchy(const char* op, const Tensor& v, const Tensor& z, const Tensor& w) {
  check_complex(op, "v", v, 3);
  check_complex(op, "z", z, 2);
  check(op, "w", w, v.scalar_type(), {v.size(0), v.size(2)});
  check(op, "z", z, v.scalar_type(), {z.size(0) == 1 ? 1 : v.size(0), z.size(1)});
}

Tensor cauchy(Tensor v, Tensor z, Tensor w, bool pairs) {
  check_cauchy("cauchy", v, z, w);
  Sizes sizes = {v.size(0), v.size(1), z.size(1)};
  Tensor out = make(sizes, v.scalar_type());
  by_type(is_double(v.scalar_type()), [&](auto t) {
    using T = decltype(t);
    CauchyArgs<T> a = cauchy_args<T>(v, z, w, pairs);
    a.out = data<T>(out);
    if (!numel(sizes)) return;
    int64_t n = pieces(a.L, CHUNK);
    over(a.B * n, double(std::min(a.L, CHUNK)) * a.M * (2 + a.R), [&](int64_t i) {
      kernels<T>().cauchy(a, i / n, i % n * CHUNK, std::min(a.L, (i % n + 1) * CHUNK));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cauchy_backward(Tensor grad, Tensor v, Tensor z, Tensor w, bool pairs, bool need_z) {
  check_cauchy("cauchy_backward", v, z, w);
  check("cauchy_backward", "grad", grad, v.scalar_type(), {v.size(0), v.size(1), z.size(1)});
  Tensor dv = make(shape(v), v.scalar_type()), dw = make(shape(w), v.scalar_type());
  Tensor dz = make(need_z ? shape(z) : Sizes{0}, v.scalar_type());
  by_type(is_double(v.scalar_type()), [&](auto t) {
    using T = decltype(t);
    CauchyArgs<T> a = cauchy_args<T>(v, z, w, pairs);
    a.grad = data<T>(grad); a.dv = data<T>(dv); a.dw = data<T>(dw); a.dz = data<T>(dz);
    int64_t n = std::max<int64_t>(1, pieces(a.L, CHUNK)), width = a.M * (2 * a.R + 2);
    std::vector<double> sums(size_t(n * a.B * width) + 1);  // never without memory
    a.sums = sums.data();
    over(a.B * n, double(std::min(a.L, CHUNK)) * a.M * (3 + 2 * a.R), [&](int64_t i) {
      int64_t b = i / n, c = i % n;
      kernels<T>().cauchy_collect(a, b, c * CHUNK, std::min(a.L, (c + 1) * CHUNK), a.sums + (c * a.B + b) * width);
    });
    over(a.B, double(n * width), [&](int64_t b) { kernels<T>().cauchy_chain(a, b, n); });
    if (need_z && a.Z && a.L)
      over(a.Z * pieces(a.L, 64), 64.0 * a.B / a.Z * a.M * (4 + 2 * a.R), [&](int64_t i) {
        int64_t m = pieces(a.L, 64);
        kernels<T>().cauchy_nodes(a, i / m, i % m * 64, std::min(a.L, (i % m + 1) * 64));
      });
  });
  return std::make_tuple(dv, dz, dw);
}

// ---- the spectrum of a DPLR kernel -----------------------------------------------------------------------------------
std::vector<double> nodes(int64_t L) {
  std::vector<double> y(size_t((L + 1) / 2));
  const double step = 3.14159265358979323846 / double(L);
  for (size_t k = 0; k < y.size(); k++) y[k] = 2 * std::tan(step * double(k));
  return y;
}

template <class T> DplrArgs<T> dplr_args(const Tensor& v, const Tensor& w, const std::vector<double>& y, int64_t L) {
  DplrArgs<T> a = {};
  a.v = data<double>(v); a.w = data<double>(w); a.y = y.data();
  a.H = v.size(0); a.I = v.size(1); a.J = v.size(2); a.M = v.size(3); a.K = int64_t(y.size()); a.F = L / 2 + 1;
  return a;
}

void check_dplr(const char* op, const Tensor& v, const Tensor& w, int64_t L) {
  check_complex(op, "v", v, 4);
  check(op, "v", v, ScalarType::ComplexDouble, shape(v));
  check(op, "w", w, ScalarType::ComplexDouble, {v.size(0), v.size(3)});
  STD_TORCH_CHECK(v.size(1) > 0 && v.size(2) > 0 && L > 0, "s4nb::", op, ": v has to have the low-rank numerators and L to be positive");
}

std::tuple<Tensor, Tensor> dplr_spectrum(Tensor v, Tensor w, int64_t L, bool single) {
  check_dplr("dplr_spectrum", v, w, L);
  ScalarType type = single ? ScalarType::ComplexFloat : ScalarType::ComplexDouble;
  Tensor spectrum = make({v.size(0), v.size(1) - 1, v.size(2) - 1, L / 2 + 1}, type);
  Tensor sums = make({v.size(0), v.size(1), v.size(2), (L + 1) / 2}, type);
  std::vector<double> y = nodes(L);
  by_type(!single, [&](auto t) {
    using T = decltype(t);
    DplrArgs<T> a = dplr_args<T>(v, w, y, L);
    a.spectrum = data<T>(spectrum); a.sums = data<T>(sums);
    int64_t n = pieces(a.K, CHUNK);
    over(a.H * n, double(std::min(a.K, CHUNK)) * a.M * (2 + a.I * a.J), [&](int64_t i) {
      kernels<T>().dplr(a, i / n, i % n * CHUNK, std::min(a.K, (i % n + 1) * CHUNK));
    });
  });
  return std::make_tuple(spectrum, sums);
}

std::tuple<Tensor, Tensor> dplr_spectrum_backward(Tensor grad, Tensor sums, Tensor v, Tensor w, int64_t L) {
  const char* op = "dplr_spectrum_backward";
  check_dplr(op, v, w, L);
  check(op, "grad", grad, sums.scalar_type(), {v.size(0), v.size(1) - 1, v.size(2) - 1, L / 2 + 1});
  check(op, "sums", sums, grad.scalar_type(), {v.size(0), v.size(1), v.size(2), (L + 1) / 2});
  Tensor dv = make(shape(v), v.scalar_type()), dw = make(shape(w), v.scalar_type());
  std::vector<double> y = nodes(L);
  by_type(is_double(grad.scalar_type()), [&](auto t) {
    using T = decltype(t);
    DplrArgs<T> a = dplr_args<T>(v, w, y, L);
    a.grad = data<T>(grad); a.sums = data<T>(sums); a.dv = data<double>(dv); a.dw = data<double>(dw);
    int64_t n = pieces(a.K, CHUNK), width = a.M * (2 * a.I * a.J + 2);
    std::vector<double> partial(size_t(n * a.H * width) + 1);
    a.partial = partial.data();
    over(a.H * n, double(std::min(a.K, CHUNK)) * a.M * (3 + 2 * a.I * a.J), [&](int64_t i) {
      int64_t h = i / n, c = i % n;
      kernels<T>().dplr_collect(a, h, c * CHUNK, std::min(a.K, (c + 1) * CHUNK), a.partial + (c * a.H + h) * width);
    });
    over(a.H, double(n * width), [&](int64_t h) { kernels<T>().dplr_chain(a, h, n); });
  });
  return std::make_tuple(dv, dw);
}

// ---- powers ----------------------------------------------------------------------------------------------------------
Tensor vandermonde(Tensor v, Tensor x, int64_t L, bool pairs) {
  check_complex("vandermonde", "v", v, 3);
  check("vandermonde", "x", x, ScalarType::ComplexDouble, {v.size(0), v.size(2)});
  STD_TORCH_CHECK(L >= 0, "s4nb::vandermonde: L is ", L, "; give 0 or more");
  ScalarType type = v.scalar_type();
  Sizes sizes = {v.size(0), v.size(1), L};
  Tensor out = make(sizes, pairs ? real_of(type) : type);
  by_type(is_double(type), [&](auto t) {
    using T = decltype(t);
    PowerArgs<T> a = {};
    a.v = data<T>(v); a.x = data<double>(x); a.out = data<T>(out);
    a.B = v.size(0); a.R = v.size(1); a.M = v.size(2); a.L = L; a.pairs = pairs;
    if (numel(sizes)) over(a.B, double(a.R) * L * a.M, [&](int64_t b) { kernels<T>().vandermonde(a, b); });
  });
  return out;
}

std::tuple<Tensor, Tensor> power_sums(Tensor u, Tensor x, bool moments) {
  STD_TORCH_CHECK(u.dim() == 3 && x.dim() == 2, "s4nb::power_sums: u has to have 3 dimensions, x 2");
  ScalarType type = u.scalar_type();
  STD_TORCH_CHECK(is_complex(type) || type == real_of(type), "s4nb::power_sums: u has to be float32, float64, complex64 or complex128");
  check("power_sums", "u", u, type, {x.size(0), u.size(1), u.size(2)});
  check("power_sums", "x", x, ScalarType::ComplexDouble, shape(x));
  Sizes sizes = {u.size(0), u.size(1), x.size(1)};
  Tensor out = make(sizes, complex_of(type)), second = make(moments ? sizes : Sizes{0}, complex_of(type));
  by_type(is_double(type), [&](auto t) {
    using T = decltype(t);
    PowerArgs<T> a = {};
    a.u = data<T>(u); a.x = data<double>(x); a.out = data<T>(out); a.moments = moments ? data<T>(second) : nullptr;
    a.B = u.size(0); a.R = u.size(1); a.M = x.size(1); a.L = u.size(2); a.complex_input = is_complex(type);
    if (numel(sizes)) over(a.B, double(a.R) * a.L * a.M * (moments ? 2 : 1), [&](int64_t b) { kernels<T>().power_sums(a, b); });
  });
  return std::make_tuple(out, second);
}

// ---- one step --------------------------------------------------------------------------------------------------------
struct Step {
  Tensor y, next;
  Step(const char* op, const Tensor& B, const Tensor& C, const Tensor& u, const Tensor& state) {
    check_complex(op, "state", state, 3);
    check_complex(op, "C", C, 3);
    ScalarType type = state.scalar_type();
    int64_t b = state.size(0), h = state.size(1), m = state.size(2);
    check(op, "B", B, type, {h, m});
    check(op, "C", C, type, {C.size(0), h, m});
    check(op, "u", u, real_of(type), {b, h});
    y = make({b, C.size(0), h}, real_of(type));
    next = make({b, h, m}, type);
  }
  template <class T> StepArgs<T> args(const Tensor& B, const Tensor& C, const Tensor& u, const Tensor& state) const {
    StepArgs<T> a = {};
    a.B = data<T>(B); a.C = data<T>(C); a.u = data<T>(u); a.state = data<T>(state); a.y = data<T>(y); a.next = data<T>(next);
    a.batch = state.size(0); a.H = state.size(1); a.M = state.size(2); a.channels = C.size(0);
    return a;
  }
};

template <class T> void run_steps(const StepArgs<T>& a, void (*step)(const StepArgs<T>&, int64_t, int64_t), int64_t work) {
  int64_t grain = std::max<int64_t>(1, 100000 / std::max<int64_t>(1, a.batch * a.M * work));
  torch::stable::parallel_for(0, a.H, grain, [&](int64_t begin, int64_t end) { step(a, begin, end); });
}

std::tuple<Tensor, Tensor> diag_step(Tensor A, Tensor B, Tensor C, Tensor u, Tensor state) {
  Step s("diag_step", B, C, u, state);
  check("diag_step", "A", A, state.scalar_type(), shape(B));
  by_type(is_double(state.scalar_type()), [&](auto t) {
    using T = decltype(t);
    StepArgs<T> a = s.args<T>(B, C, u, state);
    a.A = data<T>(A);
    run_steps(a, kernels<T>().diag_step, 1 + a.channels);
  });
  return std::make_tuple(s.y, s.next);
}

std::tuple<Tensor, Tensor> dplr_step(Tensor D, Tensor E, Tensor P, Tensor Q, Tensor B2, Tensor C, Tensor u, Tensor state) {
  Step s("dplr_step", B2, C, u, state);
  ScalarType type = state.scalar_type();
  check("dplr_step", "D", D, type, shape(B2));
  check("dplr_step", "E", E, type, shape(B2));
  check_complex("dplr_step", "P", P, 3);
  check("dplr_step", "P", P, type, {P.size(0), B2.size(0), B2.size(1)});
  check("dplr_step", "Q", Q, type, shape(P));
  by_type(is_double(type), [&](auto t) {
    using T = decltype(t);
    StepArgs<T> a = s.args<T>(B2, C, u, state);
    a.D = data<T>(D); a.E = data<T>(E); a.P = data<T>(P); a.Q = data<T>(Q); a.rank = P.size(0);
    run_steps(a, kernels<T>().dplr_step, 2 + 3 * a.rank + a.channels);
  });
  return std::make_tuple(s.y, s.next);
}

}  // namespace
}  // namespace s4nb

#ifndef S4NB_SOURCES
#define S4NB_SOURCES "unknown"
#endif
extern "C" __attribute__((visibility("default"))) const char* s4nb_sources() { return S4NB_SOURCES; }
extern "C" __attribute__((visibility("default"))) const char* s4nb_instruction_set() { return s4nb::here().name; }

STABLE_TORCH_LIBRARY_IMPL(s4nb, CPU, m) {
  m.impl("cauchy", TORCH_BOX(&s4nb::cauchy));
  m.impl("cauchy_backward", TORCH_BOX(&s4nb::cauchy_backward));
  m.impl("dplr_spectrum", TORCH_BOX(&s4nb::dplr_spectrum));
  m.impl("dplr_spectrum_backward", TORCH_BOX(&s4nb::dplr_spectrum_backward));
  m.impl("vandermonde", TORCH_BOX(&s4nb::vandermonde));
  m.impl("power_sums", TORCH_BOX(&s4nb::power_sums));
  m.impl("diag_step", TORCH_BOX(&s4nb::diag_step));
  m.impl("dplr_step", TORCH_BOX(&s4nb::dplr_step));
}
