#include "parallel.hpp"

#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace efface {
namespace {

// State of one call of run_in_parallel, shared by its threads.
struct Team {
    const std::function<void(std::size_t)>& work;
    std::size_t size;
    std::atomic<std::size_t> next{0};
};

extern "C" void efface_team_member(void* data) {
    auto& team = *static_cast<Team*>(data);
    const std::size_t worker = team.next.fetch_add(1);
    if (worker < team.size) {
        team.work(worker);
    }
}

// The function that a compiler calls for `#pragma omp parallel`. It is part of libgomp's stable interface, and the
// runtimes of LLVM and Intel provide it too. It is looked up at run time instead of linked, because it must belong to
// the runtime that the process has already loaded.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel find_openmp() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_THREAD__)
    // A failed lookup is repeated at the next call, because PyTorch can be imported later.
    static std::atomic<void*> found{nullptr};
    static const pid_t origin = getpid();
    if (getpid() != origin) {
        return nullptr;
    }
    void* symbol = found.load();
    if (symbol == nullptr) {
        symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        found.store(symbol);
    }
    return reinterpret_cast<OpenMpParallel>(symbol);
#else
    return nullptr;
#endif
}

}  // namespace

void run_in_parallel(int threads, const std::function<void(std::size_t)>& work) {
    if (threads <= 1) {
        work(0);
        return;
    }
    Team team{.work = work, .size = static_cast<std::size_t>(threads)};
    if (const OpenMpParallel parallel = find_openmp()) {
        parallel(efface_team_member, &team, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(team.size);
    try {
        for (std::size_t worker = 1; worker < team.size; ++worker) {
            others.emplace_back(efface_team_member, &team);
        }
    } catch (const std::system_error&) {
        // no more threads are available: those that were started and this one do the work
    }
    efface_team_member(&team);
    for (auto& thread : others) {
        thread.join();
    }
}

}  // namespace efface
