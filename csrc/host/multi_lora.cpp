// PagePool and plan() for Python. The interpreter's lock is kept: calls take microseconds.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "host/multi_lora.h"
#include "host/page_pool.h"
#include "host/planner.h"

namespace py = pybind11;

namespace lk {
namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style>;

// Converts by hand: for two lists of some hundred numbers, pybind11's own way takes longer than
// planning.
std::vector<int64_t> integers(const char* argument, const py::handle& values) {
  // A tuple, as an item's __index__ could change a list.
  const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(values.ptr()));
  if (!items) {
    PyErr_Clear();
    throw py::type_error(std::string(argument) + ": expected a sequence of ints, got " +
                         py::repr(values).cast<std::string>());
  }
  std::vector<int64_t> result(static_cast<size_t>(PyTuple_GET_SIZE(items.ptr())));
  for (size_t i = 0; i < result.size(); ++i) {
    PyObject* item = PyTuple_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i));
    int overflow = 0;
    result[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (result[i] != -1 || (!overflow && !PyErr_Occurred())) continue;
    const std::string message = std::string(argument) + "[" + std::to_string(i) + "]: expected " +
                                (overflow ? "an int of 64 bits" : "an int") + ", got ";
    PyErr_Clear();
    const std::string got = py::repr(item).cast<std::string>();
    if (overflow) throw py::value_error(message + got);
    throw py::type_error(message + got);
  }
  return result;
}

// What Python sees of a plan: the buffer and views of it.
struct PythonPlan {
  PlanLayout layout;
  std::vector<int64_t> slots;
  std::vector<uint64_t> generations;
  Int32Array buffer;

  Int32Array part(int64_t start, std::vector<py::ssize_t> shape) const {
    return Int32Array(std::move(shape), buffer.data() + start, buffer);
  }
};

Int32Array plan_buffer(int64_t size, const py::object& out) {
  if (out.is_none()) return Int32Array(size);
  if (py::isinstance<Int32Array>(out)) {
    auto array = py::reinterpret_borrow<Int32Array>(out);
    if (array.ndim() == 1 && array.size() == size && array.writeable()) return array;
  }
  std::string got = py::str(py::type::of(out).attr("__name__"));
  if (py::isinstance<py::array>(out)) {
    const auto array = py::reinterpret_borrow<py::array>(out);
    got = std::string(py::str(array.dtype())) + " of shape " +
          std::string(py::str(out.attr("shape")));
    if (!array.writeable()) got += ", read-only";
    if (!(array.flags() & py::array::c_style)) got += ", with gaps";
  }
  throw py::value_error("out: expected a writable contiguous int32 array of shape (" +
                        std::to_string(size) + ",), got " + got);
}

PythonPlan plan(const PagePool& pool, const py::object& slots, const py::object& tokens,
                int64_t tile_capacity, int64_t page_capacity, int64_t tile_rows,
                const py::object& out) {
  const Planner planner(pool, integers("slots", slots), integers("tokens", tokens),
                        {tile_capacity, page_capacity, tile_rows});
  PythonPlan result{planner.layout(), planner.slots(), planner.generations(),
                    plan_buffer(planner.layout().size, out)};
  planner.write(result.buffer.mutable_data());
  return result;
}

void pin(PagePool& pool, const py::object& slots, const py::object& generations) {
  if (generations.is_none()) return pool.pin(integers("slots", slots));
  const std::vector<int64_t> expected = integers("generations", generations);
  const std::vector<uint64_t> numbers(expected.begin(), expected.end());
  pool.pin(integers("slots", slots), &numbers);
}

void bind_pool(py::module_& m) {
  using Reader = PagePool::Reader;
  py::class_<PagePool>(m, "PagePool", R"(Which of num_pages pages belong to which adapter.

Pages are numbered 0 .. num_pages-1, the same in every module of a model; an adapter has a slot and one page
or more. Freed slots and pages are used again, the last one first. Thread-safe. A refused call changes nothing.
ValueError: num_pages is not in 1 .. 2^31-1; everywhere below also: a slot that is not loaded.)")
      .def(py::init<int64_t>(), py::arg("num_pages"))
      .def(
          "load",
          [](PagePool& pool, int64_t pages, bool adjacent) {
            PagePool::Loaded loaded = pool.load(pages, adjacent);
            return py::make_tuple(loaded.slot, std::move(loaded.pages));
          },
          py::arg("pages"), py::arg("adjacent") = false,
          "(slot, its page numbers) for a new adapter of so many pages; adjacent: each page "
          "follows "
          "the one before. RuntimeError: fewer are free, or not side by side. ValueError: pages < "
          "1.")
      .def("evict", &PagePool::evict, py::arg("slot"),
           "Frees a slot and its pages. RuntimeError: it is pinned.")
      .def("pin", &pin, py::arg("slots"), py::arg("generations") = py::none(),
           "Keeps adapters from eviction until unpinned as often; all of the slots or none. "
           "RuntimeError: a slot no longer holds the load of its generation, if these are given.")
      .def(
          "unpin",
          [](PagePool& pool, const py::object& slots) { pool.unpin(integers("slots", slots)); },
          py::arg("slots"),
          "Takes back a pin of each; of all or none. ValueError: one has no pin left.")
      .def(
          "generation",
          [](const PagePool& pool, int64_t slot) { return Reader(pool).generation(slot); },
          py::arg("slot"), "The number of the load that filled the slot; no two loads share one.")
      .def(
          "pages", [](const PagePool& pool, int64_t slot) { return Reader(pool).pages(slot); },
          py::arg("slot"), "Its page numbers, in order of rank.")
      .def(
          "pins", [](const PagePool& pool, int64_t slot) { return Reader(pool).pins(slot); },
          py::arg("slot"), "How often it is pinned.")
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("free_pages",
                             [](const PagePool& pool) { return Reader(pool).free_pages(); })
      .def_property_readonly("loaded_slots",
                             [](const PagePool& pool) { return Reader(pool).loaded_slots(); });
}

void bind_plan(py::module_& m) {
  using P = PythonPlan;
  py::class_<P>(m, "BatchPlan", R"(Which row of a batch has which adapter: the result of plan().

buffer is one int32 array; tiles, page_ids, tile_of_row and rows are views of it that start at the elements
offsets = (tiles, page_ids, tile_of_row, rows), multiples of 4.)")
      .def_readonly("buffer", &P::buffer)
      .def_property_readonly("offsets",
                             [](const P& p) {
                               const PlanLayout& l = p.layout;
                               return py::make_tuple(l.tiles, l.page_ids, l.tile_of_row, l.rows);
                             })
      .def_property_readonly(
          "tiles", [](const P& p) { return p.part(p.layout.tiles, {p.layout.tile_count, 4}); },
          "[tile_count, 4]: slot, row0, rows, page0. rows == 0: padding.")
      .def_property_readonly(
          "page_ids", [](const P& p) { return p.part(p.layout.page_ids, {p.layout.page_count}); },
          "[page_count]: the pages of each slot that has rows, from page0 of its tiles.")
      .def_property_readonly(
          "tile_of_row", [](const P& p) { return p.part(p.layout.tile_of_row, {p.layout.M}); },
          "[M]: -1 where a row has no adapter.")
      .def_property_readonly(
          "rows", [](const P& p) { return p.part(p.layout.rows, {p.layout.row_count}); },
          "[row_count]: row numbers by slot, ascending within a slot.")
      .def_property_readonly("M", [](const P& p) { return p.layout.M; })
      .def_property_readonly("sequences", [](const P& p) { return p.layout.sequences; })
      .def_property_readonly("row_count", [](const P& p) { return p.layout.row_count; })
      .def_property_readonly("tile_count", [](const P& p) { return p.layout.tile_count; })
      .def_property_readonly("page_count", [](const P& p) { return p.layout.page_count; })
      .def_property_readonly("tile_rows", [](const P& p) { return p.layout.tile_rows; })
      .def_readonly("slots", &P::slots, "The slots that have rows, ascending.")
      .def_readonly("generations", &P::generations, "Their generations, for PagePool.pin.");
}

}  // namespace

void bind_multi_lora(py::module_& m) {
  bind_pool(m);
  bind_plan(m);
  m.def(
      "plan", &plan, py::arg("pool"), py::arg("slots"), py::arg("tokens"),
      py::arg("tile_capacity") = 0, py::arg("page_capacity") = 0, py::arg("tile_rows") = 0,
      py::arg("out") = py::none(),
      R"(The BatchPlan of a batch: sequence i is the next tokens[i] rows, for the adapter in slots[i]; -1: for none.

Rows are sorted by slot and cut into tiles of tile_rows: 16, 32, 64 or 128, by default the smallest that holds
the most rows of any adapter, at most 128. A capacity fixes the size of tiles or page_ids, filled up with zeros,
and that of rows, to M: so that a CUDA graph can be replayed with another batch of M rows and the same
tile_rows. Written into out, a one-dimensional int32 array, if there is one.

ValueError: a slot that is not loaded; a negative count; not one count per slot; more than 2^31-1 rows; a
capacity that is too small; another tile_rows; an out that does not fit. TypeError: not sequences of ints.)");
}

}  // namespace lk
