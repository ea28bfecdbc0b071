// What every vector backend provides, and the table in which the dispatcher finds it. Internal.
#pragma once

#include <cstdint>

#include "row_pass.hpp"

namespace efface::kernels {

// One row. `scratch` holds at least `vocabulary` values of the accumulation type (float, or double for fp64).
struct Row {
    void* logits;
    const void* reference;  // distribution pass only
    std::int64_t vocabulary;
    std::int64_t target;
    double softcap;
    double reference_softcap;
    double shift;
    bool gradient;
    void* scratch;
    void* reference_scratch;  // distribution pass only
};

struct Table {
    double (*logprob[4])(const Row&);                                           // by Element
    void (*divergence[4][4])(const Row&, double* divergence, double* entropy);  // by Element of policy and reference
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
