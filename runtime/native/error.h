// The one error that crosses this library's code; api.cpp turns it into a status and a message.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <utility>

#include "framestep.h"

namespace framestep {

// A message is one line: what is wrong, where (file, key, expected and found) and what to do.
struct Error : std::exception {
    Error(fs_status code, std::string message) : code(code), message(std::move(message)) {}
    const char* what() const noexcept override { return message.c_str(); }

    fs_status code;
    std::string message;
};

// "1 stream", "2 streams".
inline std::string counted(size_t number, const std::string& noun) {
    return std::to_string(number) + " " + noun + (number == 1 ? "" : "s");
}

}  // namespace framestep
