// Running one function on several threads at once.
#pragma once

#include <cstddef>
#include <functional>

namespace efface {

// Calls work(worker) with worker = 0 .. threads − 1, each at most once, at the same time as far as there are threads;
// at least one runs. So work must share out a queue, not count on its number. `work` must not throw.
//
// Where the process has an OpenMP runtime already (PyTorch's), its team does the work. A second pool of threads would
// sit on the cores on which that runtime's idle workers spin, and on two cores that made the GEMMs between the passes
// slower by up to a third. Without OpenMP, and in a forked child, where no runtime's team survives, threads live for
// one call.
void run_in_parallel(int threads, const std::function<void(std::size_t)>& work);

}  // namespace efface
