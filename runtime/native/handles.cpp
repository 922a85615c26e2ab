#include "handles.h"

#include <mutex>
#include <string>

#include "error.h"

namespace framestep {
namespace {

constexpr uint64_t COUNT_MASK = (uint64_t{1} << 28) - 1;
constexpr uint64_t PLACE_MASK = (uint64_t{1} << 32) - 1;

}  // namespace

uint64_t Handles::add(Kind kind, std::shared_ptr<Session> session) {
    const std::lock_guard guard(lock_);
    size_t place = 0;
    while (place < entries_.size() && entries_[place].session != nullptr) ++place;
    if (place == entries_.size()) entries_.emplace_back();
    Entry& entry = entries_[place];
    entry.count = (entry.count + 1) & COUNT_MASK;
    entry.session = std::move(session);
    entry.handle = kind << 60 | entry.count << 32 | (place + 1);
    return entry.handle;
}

std::shared_ptr<Session> Handles::find(Kind kind, uint64_t handle) {
    const std::shared_lock guard(lock_);
    const size_t place = (handle & PLACE_MASK) - 1;
    if (handle == 0 || handle >> 60 != kind || place >= entries_.size() || entries_[place].handle != handle ||
        entries_[place].session == nullptr) {
        const char* what = kind == session_kind ? "session" : "stream";
        throw Error(FS_ERROR_HANDLE, std::string("not an open ") + what + ": it was closed, or is no " + what + " at all");
    }
    return entries_[place].session;
}

void Handles::remove(uint64_t handle) {
    std::shared_ptr<Session> last;  // freed after the lock
    const std::lock_guard guard(lock_);
    for (Entry& entry : entries_) {
        if (entry.handle == handle && entry.session != nullptr) last = std::move(entry.session);
    }
}

void Handles::remove_all(const std::shared_ptr<Session>& session) {
    const std::lock_guard guard(lock_);
    for (Entry& entry : entries_) {
        if (entry.session == session) entry.session.reset();  // the caller holds one more
    }
}

Handles& handles() {
    static auto& all = *new Handles;  // never freed: other threads may still call while the process ends
    return all;
}

std::shared_ptr<Session> session_of(fs_session session) { return handles().find(Handles::session_kind, session); }
std::shared_ptr<Session> stream_of(fs_stream stream) { return handles().find(Handles::stream_kind, stream); }

}  // namespace framestep
