// What every vector backend provides, and the table in which the dispatcher finds it. Internal.
#pragma once

#include <cstdint>

#include "row_pass.hpp"

namespace efface::kernels {

// One row of the row pass. `scratch` has room for `vocabulary` floats or more; fp64 rows do not use it.
struct Row {
    void* logits;
    std::int64_t vocabulary;
    std::int64_t target;
    double softcap;
    bool gradient;
    float* scratch;
    std::int64_t ahead;  // bytes from this row to the one that the thread likely reads next, or 0
};

// One row of the distribution pass, with scratch as above for each model.
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

// nullptr where the backend was not compiled. Data, not functions: reading a pointer runs no instruction of the
// backend.
extern const Table* const portable_table;
extern const Table* const avx2_table;
extern const Table* const avx512_table;
extern const Table* const neon_table;

}  // namespace efface::kernels
