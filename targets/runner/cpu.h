// What this machine's CPU can do, and how many cores this process has.
#pragma once

#include <elf.h>

#include <set>
#include <string>
#include <vector>

namespace mx {

#if defined(__x86_64__)
constexpr int kElfMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr int kElfMachine = EM_AARCH64;
#else
#error "mxrun runs on x86-64 and aarch64"
#endif

// The CPU's features as Linux names them in /proc/cpuinfo.
std::set<std::string> cpu_features();

// The numbers of the CPUs that this process may use.
std::vector<int> usable_cpus();

// The physical cores among them.
int physical_cores();

}  // namespace mx
