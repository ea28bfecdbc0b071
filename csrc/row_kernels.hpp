// Internal interface between the dispatcher and the vector backends: the table of functions that each backend provides.
#pragma once

#include <cstdint>

#include "row_pass.hpp"

namespace efface::kernels {

// One row of the row pass. `scratch` has room for at least `vocabulary` floats; fp64 rows do not use it.
struct Row {
    void* logits;
    std::int64_t vocabulary;
    std::int64_t target;
    double softcap;
    bool gradient;
    float* scratch;
    std::int64_t ahead;  // bytes from this row to the row that the thread will probably process next, or 0
};

// One row of the distribution pass, with scratch memory as above for each model.
struct RowPair {
    const void* logits;
    const void* residual;  // or null
    const void* reference;
    const void* reference_residual;  // or null
    std::int64_t vocabulary;
    std::int64_t target;
    double softcap;
    double reference_softcap;
    double shift;
    void* into;  // or null
    Element into_element;
    float* scratch;
    float* reference_scratch;
};

struct Table {
    double (*logprob[4])(const Row&);  // by Element
    // by Element of policy and reference
    void (*divergence[4][4])(const RowPair&, double* divergence, double* entropy);
    void (*exp)(float* values, std::int64_t count);
    void (*tanh)(float* values, std::int64_t count);
};

// nullptr if the backend was not compiled. These are data and not functions, so that reading them executes no
// instruction of the backend.
extern const Table* const portable_table;
extern const Table* const avx2_table;
extern const Table* const avx512_table;
extern const Table* const neon_table;

}  // namespace efface::kernels
