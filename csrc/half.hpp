// Half-precision values as stored in memory. half.inl converts single values; the vector backends convert vectors.
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
