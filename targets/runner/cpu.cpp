#include "cpu.h"

#include <sched.h>

#include <fstream>
#include <sstream>
#include <utility>

#ifdef __aarch64__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mx {

#ifdef __aarch64__

// From the kernel and not from /proc/cpuinfo, which under an emulator is that of another machine.
std::set<std::string> cpu_features() {
    constexpr std::pair<unsigned long, const char*> kFirst[] = {
        {HWCAP_FP, "fp"},           {HWCAP_ASIMD, "asimd"},     {HWCAP_AES, "aes"},
        {HWCAP_SHA2, "sha2"},       {HWCAP_CRC32, "crc32"},     {HWCAP_ATOMICS, "atomics"},
        {HWCAP_FPHP, "fphp"},       {HWCAP_ASIMDHP, "asimdhp"}, {HWCAP_ASIMDRDM, "asimdrdm"},
        {HWCAP_ASIMDDP, "asimddp"}, {HWCAP_ASIMDFHM, "asimdfhm"}, {HWCAP_SVE, "sve"}};
    constexpr std::pair<unsigned long, const char*> kSecond[] = {
        {HWCAP2_SVE2, "sve2"}, {HWCAP2_I8MM, "i8mm"}, {HWCAP2_SVEI8MM, "svei8mm"},
        {HWCAP2_BF16, "bf16"}};
    std::set<std::string> found;
    for (const auto& [bit, name] : kFirst) {
        if ((getauxval(AT_HWCAP) & bit) != 0) found.insert(name);
    }
    for (const auto& [bit, name] : kSecond) {
        if ((getauxval(AT_HWCAP2) & bit) != 0) found.insert(name);
    }
    return found;
}

#else

std::set<std::string> cpu_features() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind("flags", 0) != 0) continue;
        std::istringstream words(line.substr(line.find(':') + 1));
        std::set<std::string> found;
        for (std::string word; words >> word;) found.insert(word);
        return found;
    }
    return {};
}

#endif

std::vector<int> usable_cpus() {
    std::vector<int> found;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
        }
    }
    return found.empty() ? std::vector<int>{0} : found;
}

int physical_cores() {
    std::set<std::string> siblings;
    for (const int cpu : usable_cpus()) {
        const std::string name = std::to_string(cpu);
        std::ifstream file("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
        std::string text;
        siblings.insert(std::getline(file, text) ? text : name);
    }
    return static_cast<int>(siblings.size());
}

}  // namespace mx
