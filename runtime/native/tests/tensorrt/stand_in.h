// What the stand-ins and the rehearsal say to each other.
#pragma once

#include <cstddef>

extern "C" {

using StandInWork = void (*)(void* argument);

long stand_in_count(const char* name);  // calls so far: "launch", "wait", "upload", "download", "copy", "enqueue", …
size_t stand_in_held();                 // pieces of memory, captured graphs and contexts that were not given back
void stand_in_lose(int now);            // the device, or have it back
size_t stand_in_free(size_t bytes);     // memory that is left from now on; what it was
void stand_in_put(StandInWork work, void* argument);  // on the stream
int stand_in_on_device(const void* place, size_t bytes);
}
