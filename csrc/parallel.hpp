// Running one function on several threads at once.
#pragma once

#include <cstddef>
#include <functional>

namespace efface {

// Calls work(worker) with worker = 0 .. threads − 1, each at most once, at the same time as far as there are threads;
// at least one runs. So work must share out a queue, not count on its number. `work` must not throw.
//
// Where the process has an OpenMP runtime already (PyTorch's), its team does the work: threads of our own would share
// the cores with that runtime's idle, spinning workers. The gain is small: the whole NPO loss took 1.030 times the bare
// GEMMs with the team and 1.037 with threads of its own (N 1024, D 1024, V 32000, bf16, 2 cores of an EPYC 9004,
// medians of 13 interleaved rounds, 2026-11-21). Without OpenMP, and in a forked child, where no runtime's team
// survives, threads live for one call.
void run_in_parallel(int threads, const std::function<void(std::size_t)>& work);

}  // namespace efface
