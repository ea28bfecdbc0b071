// Counter-based random numbers: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A draw is a pure function of (seed, stream, round, index). It does not depend on state or on the order of draws, and
// is the same on every platform. NumPy's Philox is the same function; the tests compare with it.
#pragma once

#include <array>
#include <cstdint>

namespace efface {

__extension__ using Wide = unsigned __int128;

class CounterRandom {
  public:
    CounterRandom(std::uint64_t seed, std::uint64_t stream, std::uint64_t round)
        : key_{seed, stream}, round_(round), block_(philox(0, 0)) {}

    // Returns a uniform draw from 0 .. bound - 1, without bias (Lemire, "Fast random integer generation in an
    // interval", 2019).
    std::uint64_t below(std::uint64_t index, std::uint64_t bound) {
        if (index / 4 != at_) {
            at_ = index / 4;
            block_ = philox(at_, 0);
        }
        Wide product = static_cast<Wide>(block_[index % 4]) * bound;
        if (static_cast<std::uint64_t>(product) < bound) {
            const std::uint64_t biased = (0 - bound) % bound;
            // On average one in 2^64 / bound draws is rejected. Each further attempt uses a block of its own.
            for (std::uint64_t attempt = 1; static_cast<std::uint64_t>(product) < biased; ++attempt) {
                product = static_cast<Wide>(philox(index, attempt)[0]) * bound;
            }
        }
        return static_cast<std::uint64_t>(product >> 64);
    }

  private:
    using Block = std::array<std::uint64_t, 4>;

    [[nodiscard]] Block philox(std::uint64_t index, std::uint64_t attempt) const {
        Block c{index, round_, attempt, 0};
        std::uint64_t k0 = key_[0];
        std::uint64_t k1 = key_[1];
        for (int i = 0; i < 10; ++i) {
            const Wide a = static_cast<Wide>(0xD2E7470EE14C6C93U) * c[0];
            const Wide b = static_cast<Wide>(0xCA5A826395121157U) * c[2];
            c = {static_cast<std::uint64_t>(b >> 64) ^ c[1] ^ k0, static_cast<std::uint64_t>(b),
                 static_cast<std::uint64_t>(a >> 64) ^ c[3] ^ k1, static_cast<std::uint64_t>(a)};
            k0 += 0x9E3779B97F4A7C15U;
            k1 += 0xBB67AE8584CAA73BU;
        }
        return c;
    }

    std::array<std::uint64_t, 2> key_;
    std::uint64_t round_;
    std::uint64_t at_ = 0;
    Block block_;
};

}  // namespace efface
