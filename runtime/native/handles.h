// Which numbers are sessions and streams.
#pragma once

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "session.h"

namespace framestep {

// A number has the place in the table, a count of how often that place was given out, and its kind: one that was closed
// never comes back (not before 2^28 others took its place).
class Handles {
public:
    enum Kind : uint64_t { session_kind = 1, stream_kind = 2 };

    uint64_t add(Kind kind, std::shared_ptr<Session> session);
    // Throws Error(FS_ERROR_HANDLE): not an open one of this kind.
    std::shared_ptr<Session> find(Kind kind, uint64_t handle);
    void remove(uint64_t handle);
    // A session's handle, and those of its streams.
    void remove_all(const std::shared_ptr<Session>& session);

private:
    struct Entry {
        std::shared_ptr<Session> session;
        uint64_t handle = 0;
        uint64_t count = 0;
    };

    std::shared_mutex lock_;
    std::vector<Entry> entries_;
};

Handles& handles();  // of this process
std::shared_ptr<Session> session_of(fs_session session);
std::shared_ptr<Session> stream_of(fs_stream stream);

}  // namespace framestep
