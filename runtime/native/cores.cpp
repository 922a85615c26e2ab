#include "cores.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

namespace framestep {
namespace {

// Text of a small file; "" where it cannot be read.
std::string read(const std::string& path) {
    std::ifstream file(path);
    std::ostringstream text;
    if (file) text << file.rdbuf();
    return text.str();
}

// A quota and the period of it, as processors' worth of time; `most` where there is none.
int processors_of(const std::string& quota, const std::string& period, int most) {
    long long time = 0, of = 0;
    if (std::sscanf(quota.c_str(), "%lld", &time) != 1 || std::sscanf(period.c_str(), "%lld", &of) != 1) return most;
    return time <= 0 || of <= 0 ? most : static_cast<int>(std::min<long long>(time / of, most));
}

// Of a group and those that it lies in.
template <class Quota>
int least_upwards(const std::string& mount, std::string path, int most, const Quota& quota) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    for (;;) {
        most = std::min(most, quota(mount + path));
        if (path.empty()) return most;
        path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
    }
}

int within_quotas(int most, const std::string& root) {
    std::istringstream lines(read(root + "/proc/self/cgroup"));
    for (std::string line; std::getline(lines, line);) {
        const size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        const std::string groups = root + "/sys/fs/cgroup";
        if (controllers.empty()) {  // version 2
            most = least_upwards(groups, path, most, [&](const std::string& folder) {
                std::istringstream text(read(folder + "/cpu.max"));
                std::string quota, period;
                text >> quota >> period;
                return processors_of(quota, period, most);
            });
        } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
            most = least_upwards(groups + "/" + controllers, path, most, [&](const std::string& folder) {
                return processors_of(read(folder + "/cpu.cfs_quota_us"), read(folder + "/cpu.cfs_period_us"), most);
            });
        }
    }
    return most;
}

}  // namespace

std::vector<int> usable_processors() {
    std::vector<int> processors;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
            if (CPU_ISSET(processor, &set)) processors.push_back(processor);
        }
    } else {
        for (unsigned processor = 0; processor < std::max(1u, std::thread::hardware_concurrency()); ++processor) {
            processors.push_back(static_cast<int>(processor));
        }
    }
    return processors;
}

int default_threads(const std::vector<int>& processors, const std::string& root) {
    std::set<std::string> cores;
    for (const int processor : processors) {
        const std::string number = std::to_string(processor);
        const std::string siblings = read(root + "/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list");
        cores.insert(siblings.empty() ? number : siblings);
    }
    return std::max(1, within_quotas(static_cast<int>(cores.size()), root));
}

}  // namespace framestep
