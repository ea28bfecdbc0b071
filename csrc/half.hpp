// Half-precision values as they lie in memory, and their conversion one at a time (the vector backends convert many).
// Included before any instruction-set pragma; `static` keeps a copy in each translation unit.
#pragma once

#include <cstdint>

namespace efface {

struct Bf16 {
    std::uint16_t bits;
};

struct Fp16 {
    std::uint16_t bits;
};

}  // namespace efface
