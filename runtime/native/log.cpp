#include "log.h"

#include <cstdio>
#include <mutex>

namespace framestep {
namespace {

std::mutex lock;
fs_log_callback receiver = nullptr;
void* receivers_own = nullptr;

}  // namespace

void log_to(fs_log_callback callback, void* user) {
    std::lock_guard guard(lock);
    receiver = callback;
    receivers_own = user;
}

void log(fs_log_level level, const std::string& message) noexcept {
    fs_log_callback callback;
    void* user;
    {
        std::lock_guard guard(lock);
        callback = receiver;
        user = receivers_own;
    }
    if (callback != nullptr) {
        callback(level, message.c_str(), user);
    } else {
        static const char* const names[] = {"", "info", "warning", "error"};
        std::fprintf(stderr, "framestep: %s: %s\n", names[level], message.c_str());
    }
}

}  // namespace framestep
