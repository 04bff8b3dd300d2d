// The loops of the CPU ops, without torch: compiled once for each instruction set (S4NB_ISA) with that set's flags.
// Nothing here may come from a C++ library template: the linker could hand an AVX-512 copy of it to everybody.
#include "cpu_cauchy.h"
#include "cpu_dplr.h"
#include "cpu_powers.h"
#include "cpu_steps.h"

namespace s4nb { namespace S4NB_ISA {

template <class T> constexpr Kernels<T> kernels() {
  return {cauchy<T>, cauchy_collect<T>, cauchy_chain<T>, cauchy_nodes<T>, dplr<T>, dplr_collect<T>, dplr_chain<T>,
          vandermonde<T>, power_sums<T>, diag_step<T>, dplr_step<T>};
}

#define S4NB_TEXT(x) #x
#define S4NB_NAME(x) S4NB_TEXT(x)
__attribute__((visibility("hidden"))) extern const InstructionSet kernels_here;
const InstructionSet kernels_here = {S4NB_NAME(S4NB_ISA), kernels<float>(), kernels<double>()};

}}  // namespace s4nb::S4NB_ISA
