// Half-precision values as they lie in memory. half.inl converts them one at a time, the vector backends many.
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
