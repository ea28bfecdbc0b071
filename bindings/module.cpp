// efface_native: the border between Python and csrc. Checks dtype, dimension and contiguity, lends
// NumPy buffers as spans, releases the GIL; no logic of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <stdexcept>
#include <string>

#include "packer.hpp"

namespace py = pybind11;

namespace {

// A 1-D C-contiguous array of exactly dtype T; nothing is converted, so no hidden copy is made or written to.
void check_vector(const py::array& array, const py::dtype& dtype, const char* name) {
    if (!array.dtype().equal(dtype)) {
        throw py::type_error("`" + std::string(name) + "`: expected dtype " + std::string(py::str(dtype)) + ", got " +
                             std::string(py::str(array.dtype())));
    }
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != array.itemsize())) {
        throw py::value_error("`" + std::string(name) + "`: expected a contiguous 1-D array, got " +
                              std::to_string(array.ndim()) + " dimension(s)" + (array.ndim() == 1 ? ", strided" : ""));
    }
}

template <typename T>
std::span<const T> view(const py::array& array, const char* name) {
    check_vector(array, py::dtype::of<T>(), name);
    return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <typename T>
std::span<T> buffer(py::array& array, const char* name) {
    check_vector(array, py::dtype::of<T>(), name);
    if (!array.writeable()) {
        throw py::value_error("`" + std::string(name) + "`: expected a writeable array, got a read-only one");
    }
    return {static_cast<T*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

// The tuple keeps its arrays alive. Anything but an array is refused: a conversion would make a temporary, and a
// span of it would outlive it.
template <typename T>
std::span<const T> entry(const py::tuple& arrays, std::size_t i, const char* name) {
    const py::object item = arrays[i];
    if (!py::isinstance<py::array>(item)) {
        throw py::type_error("`" + std::string(name) + "`: expected a NumPy array, got " +
                             std::string(py::str(py::type::of(item))));
    }
    return view<T>(py::reinterpret_borrow<py::array>(item), name);
}

efface::TokenStore token_store(const py::tuple& arrays, const char* name) {
    if (arrays.size() != 3) {
        throw py::value_error("`" + std::string(name) + "`: expected (ids, offsets, label_starts), got " +
                              std::to_string(arrays.size()) + " entries");
    }
    return {entry<std::int32_t>(arrays, 0, "ids"), entry<std::int64_t>(arrays, 1, "offsets"),
            entry<std::int64_t>(arrays, 2, "label_starts")};
}

py::tuple measure(const py::tuple& forget, const py::tuple& retain, const py::array& roles,
                  const py::array& sequences) {
    const auto f = token_store(forget, "forget");
    const auto r = token_store(retain, "retain");
    const efface::Choice choice{view<std::int8_t>(roles, "roles"), view<std::int64_t>(sequences, "sequences")};
    efface::PackSize size{};
    {
        py::gil_scoped_release release;
        size = efface::measure(f, r, choice);
    }
    return py::make_tuple(size.sequences, size.tokens, size.rows);
}

void pack(const py::tuple& forget, const py::tuple& retain, const py::array& roles, const py::array& sequences,
          py::array input_ids, py::array position_ids, py::array cu_seqlens, py::array label_rows, py::array targets,
          py::array row_offsets) {
    const auto f = token_store(forget, "forget");
    const auto r = token_store(retain, "retain");
    const efface::Choice choice{view<std::int8_t>(roles, "roles"), view<std::int64_t>(sequences, "sequences")};
    const efface::PackBuffers buffers{
        buffer<std::int64_t>(input_ids, "input_ids"),   buffer<std::int64_t>(position_ids, "position_ids"),
        buffer<std::int32_t>(cu_seqlens, "cu_seqlens"), buffer<std::int64_t>(label_rows, "label_rows"),
        buffer<std::int64_t>(targets, "targets"),       buffer<std::int64_t>(row_offsets, "row_offsets")};
    py::gil_scoped_release release;
    efface::pack(f, r, choice, buffers);
}

}  // namespace

// std::invalid_argument becomes ValueError by pybind11's own translation.
PYBIND11_MODULE(efface_native, m) {
    m.doc() = "efface's C++ core: packed batches.";
    m.def("measure", &measure, py::arg("forget"), py::arg("retain"), py::arg("roles"), py::arg("sequences"),
          R"(Return (sequences, tokens, label rows) of the packed batch of the chosen sequences.

forget, retain: token stores (ids int32, offsets int64, label_starts int64).
roles: int8 (S), 0 forget, 1 retain. sequences: int64 (S), indices into the store of the role.
Raises ValueError for an inconsistent store, an unknown role, an index out of range, a sequence
without labels, or 2^31 tokens and more; TypeError for another dtype.)");
    m.def("pack", &pack, py::arg("forget"), py::arg("retain"), py::arg("roles"), py::arg("sequences"), py::kw_only(),
          py::arg("input_ids"), py::arg("position_ids"), py::arg("cu_seqlens"), py::arg("label_rows"),
          py::arg("targets"), py::arg("row_offsets"),
          R"(Fill the caller's buffers with the packed batch. Nothing is written if anything is refused.

input_ids, position_ids: int64 (T). cu_seqlens: int32 (S + 1). label_rows, targets: int64 (N).
row_offsets: int64 (S + 1). The extents are those that `measure` returns. Raises as `measure` does.)");
}
