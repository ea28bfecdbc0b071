// Python bindings of csrc, the extension module efface_native. The bindings check dtype, dimension and contiguity, pass
// NumPy buffers as spans without copying them, and release the GIL. They contain no other logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common_prefix.hpp"
#include "packer.hpp"
#include "planner.hpp"
#include "refuse.hpp"
#include "row_pass.hpp"
#include "token_store.hpp"

namespace py = pybind11;

namespace {

using efface::quoted;

// Throws unless the array is 1-D, contiguous and of exactly this dtype. Nothing is converted, so that results are never
// written to a hidden copy.
void check_vector(const py::array& array, const py::dtype& dtype, const char* name) {
    if (!array.dtype().equal(dtype)) {
        throw py::type_error(quoted(name) + ": expected dtype " + std::string(py::str(dtype)) + ", got " +
                             std::string(py::str(array.dtype())));
    }
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != array.itemsize())) {
        throw py::value_error(quoted(name) + ": expected a contiguous 1-D array, got " + std::to_string(array.ndim()) +
                              " dimension(s)" + (array.ndim() == 1 ? ", strided" : ""));
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
        throw py::value_error(quoted(name) + ": expected a writeable array, got a read-only one");
    }
    return {static_cast<T*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

// Refuses everything that is not an array: a conversion would create a temporary, which the returned span would
// outlive.
template <typename T>
std::span<const T> entry(const py::tuple& arrays, std::size_t i, const char* name) {
    const py::object item = arrays[i];
    if (!py::isinstance<py::array>(item)) {
        throw py::type_error(quoted(name) + ": expected a NumPy array, got " +
                             std::string(py::str(py::type::of(item))));
    }
    return view<T>(py::reinterpret_borrow<py::array>(item), name);
}

// Python names of the values of an enum, in the order in which error messages list them.
template <typename Value>
using Name = std::pair<std::string_view, Value>;

constexpr Name<efface::RetainSampling> samplings[] = {{"random", efface::RetainSampling::random},
                                                      {"cycle", efface::RetainSampling::cycle},
                                                      {"paired", efface::RetainSampling::paired}};
constexpr Name<efface::Element> elements[] = {{"bfloat16", efface::Element::bf16},
                                              {"float16", efface::Element::fp16},
                                              {"float32", efface::Element::fp32},
                                              {"float64", efface::Element::fp64}};
// `best` first, then from slowest to fastest
constexpr Name<efface::Backend> backends[] = {{"best", efface::Backend::best},
                                              {"portable", efface::Backend::portable},
                                              {"avx2", efface::Backend::avx2},
                                              {"avx512", efface::Backend::avx512},
                                              {"neon", efface::Backend::neon}};

// Returns the value that `name` has in the table. The error for an unknown name puts `quote` around each name.
template <typename Value, std::size_t N>
Value named(const Name<Value> (&names)[N], std::string_view name, const char* argument, const char* quote = "") {
    for (const auto& [known, value] : names) {
        if (known == name) {
            return value;
        }
    }
    std::string message = quoted(argument) + ": expected ";
    for (std::size_t i = 0; i < N; ++i) {
        message.append(i == 0 ? "" : i + 1 < N ? ", " : " or ").append(quote).append(names[i].first).append(quote);
    }
    throw py::value_error(message.append(", got ").append(quote).append(name).append(quote));
}

// A token store together with the arrays that its spans refer to.
struct LentStore {
    LentStore(std::string name, const py::iterable& chunks) : store(std::move(name), spans(chunks)) {}

    std::vector<py::tuple> arrays;  // declared before `store`, whose construction fills it
    efface::TokenStore store;

  private:
    std::vector<efface::TokenChunk> spans(const py::iterable& chunks) {
        std::vector<efface::TokenChunk> out;
        for (const py::handle chunk : chunks) {
            if (!py::isinstance<py::tuple>(chunk) || py::len(chunk) != 3) {
                throw py::type_error("`chunks`: expected tuples (ids, offsets, label_starts), got " +
                                     std::string(py::str(py::type::of(chunk))));
            }
            const auto& kept = arrays.emplace_back(py::reinterpret_borrow<py::tuple>(chunk));
            out.push_back({entry<std::int32_t>(kept, 0, "ids"), entry<std::int64_t>(kept, 1, "offsets"),
                           entry<std::int64_t>(kept, 2, "label_starts")});
        }
        return out;
    }
};

std::vector<const efface::TokenStore*> stores_of(const std::vector<const LentStore*>& lent) {
    std::vector<const efface::TokenStore*> stores;
    for (const LentStore* one : lent) {
        if (one == nullptr) {
            throw py::type_error("`stores`: expected TokenStore, got None");
        }
        stores.push_back(&one->store);
    }
    return stores;
}

py::tuple measure(const std::vector<const LentStore*>& lent, const py::array& roles, const py::array& sequences,
                  bool share, bool last_tokens) {
    const auto stores = stores_of(lent);
    const efface::Choice choice{view<std::int8_t>(roles, "roles"), view<std::int64_t>(sequences, "sequences")};
    efface::PackSize size{};
    {
        py::gil_scoped_release release;
        size = efface::measure(stores, choice, {.share = share, .last_tokens = last_tokens});
    }
    return py::make_tuple(size.sequences, size.tokens, size.rows, size.path_tokens, efface::storage_words(size));
}

py::tuple tuple_of(const std::vector<std::int64_t>& values) {
    py::tuple out(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        // py::tuple's accessor would be slow for batches of hundreds of sequences. PyTuple_SET_ITEM steals the
        // reference.
        PyTuple_SET_ITEM(out.ptr(), static_cast<py::ssize_t>(i), PyLong_FromLongLong(values[i]));
    }
    return out;
}

py::tuple pack(const std::vector<const LentStore*>& lent, const py::array& roles, const py::array& sequences,
               py::array storage, bool share, bool last_tokens) {
    const auto stores = stores_of(lent);
    const efface::Choice choice{view<std::int8_t>(roles, "roles"), view<std::int64_t>(sequences, "sequences")};
    const auto words = buffer<std::int64_t>(storage, "storage");
    efface::PackedLengths packed;
    {
        py::gil_scoped_release release;
        packed = efface::pack(stores, choice, words, {.share = share, .last_tokens = last_tokens});
    }
    const py::tuple lengths = tuple_of(packed.lengths);
    // One tuple for both if nothing is shared or left out, so that such batches cost what they did without sharing.
    const py::tuple segment_lengths =
        packed.segment_lengths == packed.lengths ? lengths : tuple_of(packed.segment_lengths);
    return py::make_tuple(lengths, segment_lengths, tuple_of(packed.row_offsets), packed.forget_sequences);
}

// Moves a vector's memory into a NumPy array without a copy. The memory is freed with the array.
template <typename T>
py::array given_away(std::vector<T>&& values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    const std::vector<T>& kept = *owned;
    const py::capsule free(owned.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(kept.size()), kept.data(), free);
}

py::array prefix_lengths(const LentStore& store, const py::array& prefix) {
    const auto tokens = view<std::int32_t>(prefix, "prefix");
    std::vector<std::int64_t> lengths;
    {
        py::gil_scoped_release release;
        lengths = efface::prefix_lengths(store.store, tokens);
    }
    return given_away(std::move(lengths));
}

py::array pair_prefix_lengths(const LentStore& one, const LentStore& other) {
    std::vector<std::int64_t> lengths;
    {
        py::gil_scoped_release release;
        lengths = efface::pair_prefix_lengths(one.store, other.store);
    }
    return given_away(std::move(lengths));
}

py::dict plan_epoch(const py::array& forget_lengths, const py::array& retain_lengths, const py::array& alternates,
                    std::int64_t pairs_per_step, std::int64_t token_budget, std::int64_t shared_tokens,
                    std::int64_t world_size, std::uint64_t seed, std::uint64_t epoch,
                    const std::string& retain_sampling, bool drop_last) {
    const auto forget = view<std::int64_t>(forget_lengths, "forget_lengths");
    const auto retain = view<std::int64_t>(retain_lengths, "retain_lengths");
    const auto alternate = view<std::int64_t>(alternates, "alternates");
    const efface::EpochSettings settings{.pairs_per_step = pairs_per_step,
                                         .token_budget = token_budget,
                                         .shared_tokens = shared_tokens,
                                         .world_size = world_size,
                                         .seed = seed,
                                         .epoch = epoch,
                                         .retain_sampling = named(samplings, retain_sampling, "retain_sampling", "'"),
                                         .drop_last = drop_last};
    efface::EpochPlan plan;
    {
        py::gil_scoped_release release;
        plan = efface::plan_epoch(forget, retain, alternate, settings);
    }
    py::dict out;
    out["forget"] = given_away(std::move(plan.forget));
    out["retain"] = given_away(std::move(plan.retain));
    out["roles"] = given_away(std::move(plan.roles));
    out["sequences"] = given_away(std::move(plan.sequences));
    out["batch_offsets"] = given_away(std::move(plan.batch_offsets));
    out["batch_tokens"] = given_away(std::move(plan.batch_tokens));
    out["step_offsets"] = given_away(std::move(plan.step_offsets));
    out["over_budget"] = plan.over_budget;
    return out;
}

// Converts the address of a tensor's elements, which the caller keeps alive; 0 becomes null.
void* address_of(std::uintptr_t address) { return reinterpret_cast<void*>(address); }  // NOLINT

efface::Logits make_logits(std::uintptr_t address, const std::string& dtype, std::int64_t rows, std::int64_t vocabulary,
                           std::int64_t stride, double softcap, std::uintptr_t residual) {
    return {.data = address_of(address),
            .element = named(elements, dtype, "dtype"),
            .rows = rows,
            .vocabulary = vocabulary,
            .stride = stride,
            .softcap = softcap,
            .residual = address_of(residual)};
}

// Checks `into` and returns the matrix that receives the derivative; a null destination if `into` is None.
efface::Destination destination_of(const std::optional<efface::Logits>& into, const efface::Logits& logits) {
    if (!into) {
        return {};
    }
    if (into->data == nullptr && logits.rows > 0) {
        throw py::value_error("`into`: expected an address, or None for no derivative, got null");
    }
    if (into->softcap != 0 || into->residual != nullptr) {
        throw py::value_error("`into`: expected neither softcap nor residual, got at least one of them");
    }
    if (into->stride >= 0 && into->stride < into->vocabulary && into->rows > 1) {
        throw py::value_error("`into`: expected rows that do not overlap, stride >= " +
                              std::to_string(into->vocabulary) + ", got " + std::to_string(into->stride));
    }
    if (into->rows != logits.rows || into->vocabulary != logits.vocabulary) {
        throw py::value_error("`into`: expected " + std::to_string(logits.rows) + " x " +
                              std::to_string(logits.vocabulary) + ", the shape of `logits`, got " +
                              std::to_string(into->rows) + " x " + std::to_string(into->vocabulary));
    }
    return {.data = into->data, .element = into->element, .stride = into->stride};
}

// Checks an output vector of a pass: `rows` entries, float64 for fp64 logits and float32 for all others.
void* output(py::array& array, const efface::Logits& logits, const char* name) {
    const bool wide = logits.element == efface::Element::fp64;
    void* data = wide ? static_cast<void*>(buffer<double>(array, name).data())
                      : static_cast<void*>(buffer<float>(array, name).data());
    if (array.size() != logits.rows) {
        throw py::value_error(quoted(name) + ": expected " + std::to_string(logits.rows) + " entries, got " +
                              std::to_string(array.size()));
    }
    return data;
}

void row_pass(const efface::Logits& logits, const py::array& targets, bool gradient, py::array logprobs,
              const std::optional<efface::Logits>& reference, std::optional<py::array> reference_logprobs, int threads,
              const std::string& backend) {
    const efface::Logits frozen = reference.value_or(efface::Logits{});
    const auto labels = view<std::int64_t>(targets, "targets");
    void* out = output(logprobs, logits, "logprobs");
    void* reference_out = nullptr;
    if (reference) {
        if (!reference_logprobs) {
            throw py::type_error("`reference_logprobs`: expected an array with `reference_logits`, got None");
        }
        reference_out = output(*reference_logprobs, frozen, "reference_logprobs");
    }
    const efface::Execution execution{.threads = threads, .backend = named(backends, backend, "backend")};
    py::gil_scoped_release release;
    efface::row_pass(logits, labels, gradient, out, frozen, reference_out, execution);
}

void distribution_pass(const efface::Logits& logits, const efface::Logits& reference, const py::array& targets,
                       double shift, const std::optional<efface::Logits>& into, py::array divergence, py::array entropy,
                       int threads, const std::string& backend) {
    const auto labels = view<std::int64_t>(targets, "targets");
    const auto destination = destination_of(into, logits);
    void* divergence_out = output(divergence, logits, "divergence");
    void* entropy_out = output(entropy, logits, "entropy");
    const efface::Execution execution{.threads = threads, .backend = named(backends, backend, "backend")};
    py::gil_scoped_release release;
    efface::distribution_pass(logits, reference, labels, shift, destination, divergence_out, entropy_out, execution);
}

}  // namespace

// pybind11 translates std::invalid_argument to ValueError.
PYBIND11_MODULE(efface_native, m) {
    m.doc() = "C++ core of efface: planning of epochs, packing of batches, and the passes of the losses on CPUs.";
    py::class_<LentStore>(m, "TokenStore",
                          R"(Token sequences in chunks of NumPy arrays, which are kept alive and never copied.

name: name of the store in error messages.
chunks: tuples (ids int32, offsets int64, label_starts int64). Sequence i of a chunk is ids[offsets[i]:offsets[i + 1]];
its tokens from label_starts[i] on, counted within the sequence, are labels.
Raises TypeError for another dtype, and ValueError for another layout or arrays whose lengths do not match.)")
        .def(py::init<std::string, const py::iterable&>(), py::arg("name"), py::arg("chunks"))
        .def("__len__", [](const LentStore& lent) { return lent.store.size(); });
    py::class_<efface::Logits>(m, "Logits",
                               R"(Descriptor of a matrix of logits, whose memory the caller keeps alive.

address: address of the first element. dtype: bfloat16, float16, float32 or float64.
stride: elements from one row to the next.
softcap: z becomes cap * tanh(z / cap) before anything else; 0 for no cap.
residual: address of a matrix of the same dtype, shape and stride that is added to the elements before the cap; 0 for
none.
Raises ValueError for another dtype. All other checks are made by the passes.)")
        .def(py::init(&make_logits), py::arg("address"), py::arg("dtype"), py::arg("rows"), py::arg("vocabulary"),
             py::arg("stride"), py::arg("softcap") = 0.0, py::arg("residual") = 0);
    m.def("measure", &measure, py::arg("stores"), py::arg("roles"), py::arg("sequences"), py::kw_only(),
          py::arg("share") = false, py::arg("last_tokens") = true,
          R"(Return (sequences, tokens, label rows, path tokens, words of storage) of the packed batch.

stores: TokenStores in the order of the roles: forget, retain and, optionally, alternate.
roles: int8 (S), 0 forget, 1 retain, 2 alternate. sequences: int64 (S), indices into the store of the role.
share: store the tokens that a sequence shares with an earlier one from the first token on once. Each sequence stores at
least one token. Path tokens is the length of all paths together, 0 if no token is shared.
last_tokens: False to leave out the last token of each sequence, which predicts nothing.
Raises ValueError for an inconsistent store, a role without a store, an index out of range, a sequence without labels,
or 2^31 tokens or more; TypeError for another dtype.)");
    m.def("pack", &pack, py::arg("stores"), py::arg("roles"), py::arg("sequences"), py::arg("storage"), py::kw_only(),
          py::arg("share") = false, py::arg("last_tokens") = true,
          R"(Write the packed batch, and return (lengths, segment_lengths, row_offsets, forget_sequences).

lengths (S) has all tokens of each sequence, segment_lengths (S) those that are stored for it. Both and row_offsets
(S + 1) are tuples; forget_sequences is the number of forget and alternate sequences.

storage: int64, with the number of words that `measure` returns for the same arguments. Its parts, each starting at a
new word, are input_ids, position_ids int64 (T), label_rows, targets int64 (N), sequences int64 (S), cu_seqlens
int32 (S + 1), roles int8 (S) and, if tokens are shared, paths int32 (E) and cu_paths int32 (S + 1).
Raises the errors of `measure`, and ValueError for a storage of another size. After an error nothing was written.)");
    m.def("prefix_lengths", &prefix_lengths, py::arg("store"), py::arg("prefix"),
          R"(Return the length of the longest common prefix of each sequence with `prefix`: int64 (sequences).

prefix: int32. Only the common beginnings are read. Raises ValueError for an inconsistent store.)");
    m.def("pair_prefix_lengths", &pair_prefix_lengths, py::arg("one"), py::arg("other"),
          R"(Return the length of the longest common prefix of sequence i of both stores, for each i: int64 (sequences).

Only the common beginnings are read. Raises ValueError for stores of different sizes, or an inconsistent store.)");
    m.def("plan_epoch", &plan_epoch, py::arg("forget_lengths"), py::arg("retain_lengths"), py::arg("alternates"),
          py::kw_only(), py::arg("pairs_per_step"), py::arg("token_budget"), py::arg("shared_tokens"),
          py::arg("world_size"), py::arg("seed"), py::arg("epoch"), py::arg("retain_sampling"), py::arg("drop_last"),
          R"(Return the plan of an epoch as a dict of int64 arrays (roles: int8) and the count `over_budget`.

forget, retain: the sequences of the pairs, in order. Micro-batch b consists of roles and sequences
batch_offsets[b]:batch_offsets[b + 1] and has batch_tokens[b] tokens. Step k consists of the micro-batches
step_offsets[k]:step_offsets[k + 1]; rank r processes every world_size-th of them, starting with r.
Arguments are those of efface.batching.plan_epoch; all lengths are int64, and `alternates` is empty if there are none.
shared_tokens: tokens that each micro-batch with sequences has once. Lengths do not include them, batch_tokens do.
Raises ValueError for lengths, counts or sets from which no plan can be made.)");
    m.def("row_pass", &row_pass, py::arg("logits"), py::arg("targets"), py::kw_only(), py::arg("gradient"),
          py::arg("logprobs"), py::arg("reference_logits") = py::none(), py::arg("reference_logprobs") = py::none(),
          py::arg("threads") = 1, py::arg("backend") = "best",
          R"(Write the log-probabilities of the targets; with `gradient`, overwrite the logits by softmax - onehot.

reference_logits: None, or Logits with at most as many rows, of any dtype and vocabulary, which are only read.
Residuals are not supported.
targets: int64 (rows). logprobs: float32 (rows), float64 for float64 logits; reference_logprobs likewise.
threads: upper bound; the result does not depend on it. backend: best, portable, avx2, avx512 or neon.
Raises ValueError for shapes that do not match, a target outside the vocabulary, or a backend that this machine does not
support.)");
    m.def("distribution_pass", &distribution_pass, py::arg("logits"), py::arg("reference_logits"), py::arg("targets"),
          py::kw_only(), py::arg("shift"), py::arg("into"), py::arg("divergence"), py::arg("entropy"),
          py::arg("threads") = 1, py::arg("backend") = "best",
          R"(Write KL(q || p) and the entropy of q, and write p - q into a matrix.

p is the softmax of `logits`. q is the softmax of `reference_logits` with the target's logit lowered by `shift`.
The other arguments are those of `row_pass`; both logits have the same rows and vocabulary.
into: matrix for p - q, or None: Logits of the same rows and vocabulary without softcap and residual. It can be the
logits themselves, separate memory, or the memory of the reference if each row begins where the reference's row begins
and the dtype is not wider.)");
    m.def(
        "backends",
        [] {
            py::list names;
            for (const auto& [name, backend] : backends) {
                if (backend != efface::Backend::best && efface::supported(backend)) {
                    names.append(name);
                }
            }
            return names;
        },
        "Return the vector backends that this machine supports; `best` selects the last of them.");
    m.def(
        "exp_in_place",
        [](py::array values, const std::string& backend) {
            efface::exp_in_place(buffer<float>(values, "values"), named(backends, backend, "backend"));
        },
        py::arg("values"), py::arg("backend") = "best",
        "Replace float32 values by their exp, as computed by the passes.");
    m.def(
        "tanh_in_place",
        [](py::array values, const std::string& backend) {
            efface::tanh_in_place(buffer<float>(values, "values"), named(backends, backend, "backend"));
        },
        py::arg("values"), py::arg("backend") = "best",
        "Replace float32 values by their tanh, as computed by the passes.");
}
