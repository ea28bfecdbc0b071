// Shared code of the fuzz programs: conversion of input bytes to numbers, and a main that generates or replays inputs.
//
// Each program is one .cpp file here that defines LLVMFuzzerTestOneInput:
//   with libFuzzer:  clang++ -std=c++20 -fsanitize=fuzzer,address,undefined -Icsrc csrc/fuzz/NAME.cpp csrc/*.cpp -ldl
//   as a program:    g++ -std=c++20 -DEFFACE_REPLAY -Icsrc csrc/fuzz/NAME.cpp csrc/*.cpp -ldl -lpthread
//                    ./a.out 10          runs deterministic random inputs for 10 seconds
//                    ./a.out FILE ...    replays inputs that the fuzzer found
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

// Reads the bytes of the input as numbers; returns zeros after the end.
class Bytes {
  public:
    Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
    std::uint8_t next() {
        if (at_ >= size_) {
            return 0;
        }
        const std::uint8_t byte = data_[at_];
        ++at_;
        return byte;
    }
    std::int64_t below(std::int64_t bound) {
        const std::int64_t high = next();
        return (high * 256 + next()) % bound;
    }
    double logit() {
        const double coarse = (next() - 128) / 6.0;
        return coarse + next() / 1024.0;
    }

  private:
    const std::uint8_t* data_;
    std::size_t size_;
    std::size_t at_ = 0;
};

// Aborts with a message if `holds` is false, as the sanitizers do.
inline void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "%s\n", what);
        std::abort();
    }
}

}  // namespace fuzz

#ifdef EFFACE_REPLAY
int main(int count, char** arguments) {
    const std::string first = count > 1 ? arguments[1] : "5";
    if (first.find_first_not_of("0123456789") != std::string::npos) {
        for (int i = 1; i < count; ++i) {
            std::ifstream file(arguments[i], std::ios::binary);
            const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
        }
        return 0;
    }
    std::mt19937 random(0);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::stoi(first));
    long inputs = 0;
    for (; std::chrono::steady_clock::now() < end; ++inputs) {
        std::vector<std::uint8_t> bytes(16 + random() % 2048);
        std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::uint8_t>(random()); });
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%s: %ld inputs, no difference\n", arguments[0], inputs);
    return 0;
}
#endif
