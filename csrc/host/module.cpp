// _host: what Python asks of the native library besides the ops: which ISAs there are, which one
// runs, how it was built (through the C interface in cpu/api.h); and the page pool and planner of
// many adapters in one batch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "cpu/table.h"
#include "host/multi_lora.h"

namespace py = pybind11;

namespace {

// The compiled ISAs in the order of the library's list, or only those that this CPU supports.
std::vector<std::string> isa_list(bool supported_only) {
  std::vector<std::string> names;
  for (int i = 0; i < lk_isa_count(); ++i) {
    if (!supported_only || lk_isa_supported(i)) names.emplace_back(lk_isa_name(i));
  }
  return names;
}

std::string quoted(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

void isa_set(const std::optional<std::string>& name) {
  const int status = lk_isa_set(name ? name->c_str() : nullptr);
  if (status == 0) return;
  std::string message = "name: expected ";
  message += status == 1 ? "a known ISA (" + quoted(isa_list(false)) + ", or '' for automatic)"
                         : "an ISA that this CPU supports (" + quoted(isa_list(true)) + ")";
  throw py::value_error(message + ", got '" + *name + "'");
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "ISA and build introspection of the native library; page pool and batch planner.";
  m.def("isa_active", &lk_isa_active, "Name of the ISA whose kernels run now.");
  m.def("isa_set", &isa_set, py::arg("name"),
        "Use the kernels of this ISA from now on, in the whole process; None or '' chooses the "
        "best one the CPU supports. ValueError: unknown name, or not supported by this CPU.");
  m.def("isa_names", [] { return isa_list(false); }, "Names of all ISAs that were compiled.");
  m.def(
      "isa_supported", [] { return isa_list(true); },
      "Names of the compiled ISAs that this CPU supports.");
  m.def(
      "int8_set", [](bool on) { lk_int8_set(on); }, py::arg("on"),
      "Whether operators called by this thread round activations to int8.");
  m.def(
      "exact_set", [](bool on) { lk_exact_set(on); }, py::arg("on"),
      "Whether all activations are multiplied exactly, in the whole process.");
  m.def("exact", [] { return lk_exact_active() != 0; }, "Whether they are.");
  m.def(
      "pairs", [] { return lk_pairs() != 0; },
      "Whether the kernels in use multiply pairs of bfloat16 numbers.");
  m.def("int8_kernels", &lk_int8_kernels, "Name of the int8 kernels that can run, or None.");
  m.def(
      "kernel_set",
      [](const std::string& name) {
        if (lk_kernel_set(name.c_str()) != 0) throw py::value_error("unknown kernel " + name);
      },
      py::arg("name"), "Asks for one kernel of the frozen base; '' for the fastest again.");
  m.def(
      "kernel_names",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < lk_kernel_count(); ++i) names.emplace_back(lk_kernel_name(i));
        return names;
      },
      "Names of the kernels that multiply by the frozen base, those for few rows first.");
  m.def(
      "crossovers",
      [](bool pairs) {
        const auto of = [](const lk::Crossovers& at) {
          return std::make_tuple(at.gemv, at.skinny, at.amx);
        };
        const lk::KernelTable& table = *lk_kernels();
        return pairs ? std::make_pair(of(table.forward_pairs), of(table.dx_pairs))
                     : std::make_pair(of(table.forward), of(table.dx));
      },
      py::arg("pairs"),
      "For the ISA in use, of y and of dx: the rows up to which the first and the second of "
      "kernel_names() are the fastest ones, and from which the last one is; with `pairs` those of "
      "products of bfloat16 numbers.");
  m.def("build_info", &lk_build_info, "How the library was built: compiler, flags, ISAs.");
  lk::bind_multi_lora(m);
}
