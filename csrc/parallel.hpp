// Execution of one function on several threads.
#pragma once

#include <cstddef>
#include <functional>

namespace efface {

// Calls work(worker) with worker = 0 .. threads − 1, each at most once and at least one of them, concurrently on the
// available threads. Since some calls can be missing, `work` must take its items from a shared queue and not divide
// them by the worker's number. `work` must not throw.
//
// If the process has loaded an OpenMP runtime (PyTorch's), its threads do the work: additional threads would compete
// for the cores with the idle, spinning workers of that runtime. The gain is small: the whole NPO loss took 1.030 times
// as long as its GEMMs with the OpenMP threads, and 1.037 times with its own threads (N 1024, D 1024, V 32000, bf16, 2
// cores of an EPYC 9004, medians of 13 interleaved rounds, 2026-11-21). Without OpenMP, and in a forked child, where
// the threads of the runtime do not exist, threads are created for each call.
void run_in_parallel(int threads, const std::function<void(std::size_t)>& work);

}  // namespace efface
