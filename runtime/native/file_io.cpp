#include "file_io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <system_error>

namespace framestep {
namespace {

std::string reason(int number) { return std::generic_category().message(number); }

constexpr size_t LONGEST_MARKED = 200;  // bytes of a name, whose limit is 255 with the mark

// The temporary sibling that takes the file's place once it is complete; removed if it never does.
class Sibling {
public:
    explicit Sibling(const std::filesystem::path& path) : path_(path), place_(path) {
        std::error_code error;
        const auto status = std::filesystem::status(path, error);
        if (std::filesystem::exists(status)) {
            // a device or a pipe must not be replaced, nor a link to a file
            if (!std::filesystem::is_regular_file(status)) fail(std::filesystem::is_directory(status) ? EISDIR : EEXIST);
            const auto behind_links = std::filesystem::canonical(path, error);
            if (!error) place_ = behind_links;
        }
        const std::string name = place_.filename().string().substr(0, LONGEST_MARKED);
        std::random_device random;
        do {  // not mkstemp, which ignores the umask
            name_ = place_.parent_path() / ("." + name + "." + std::to_string(random()));
            descriptor_ = open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        } while (descriptor_ < 0 && errno == EEXIST);
        if (descriptor_ < 0) fail(errno);
    }

    ~Sibling() {
        if (descriptor_ >= 0) close(descriptor_);
        if (!name_.empty()) unlink(name_.c_str());
    }

    void write(std::string_view piece) {
        while (!piece.empty()) {
            const ssize_t written = ::write(descriptor_, piece.data(), piece.size());
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) fail(errno);
            piece.remove_prefix(static_cast<size_t>(written));
        }
    }

    void put_in_place() {
        // before the rename: else a power cut may leave the new name and nothing in it
        if (fsync(descriptor_) != 0) fail(errno);
        const int descriptor = std::exchange(descriptor_, -1);
        if (close(descriptor) != 0) fail(errno);
        if (rename(name_.c_str(), place_.c_str()) != 0) fail(errno);
        name_.clear();
        const auto parent = place_.parent_path();
        const int folder = open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (folder < 0) return;  // the file is whole either way
        fsync(folder);
        close(folder);
    }

private:
    [[noreturn]] void fail(int number) {
        const std::string why = number == EEXIST ? "is a device or a pipe; name a file" : reason(number);
        throw Error(FS_ERROR_OUTPUT, path_.string() + ": cannot be written: " + why);
    }

    std::filesystem::path path_, place_, name_;  // as it was given, behind links, and until it is complete
    int descriptor_ = -1;
};

}  // namespace

InputFile::InputFile(const std::filesystem::path& path, fs_status code)
    : path_(path), code_(code), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) throw Error(code, path.string() + ": cannot be read: " + reason(errno));
}

InputFile::~InputFile() { close(descriptor_); }

size_t InputFile::read(void* data, size_t size) {
    size_t done = 0;
    while (done < size) {
        const ssize_t got = ::read(descriptor_, static_cast<char*>(data) + done, size - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw Error(code_, path_.string() + ": cannot be read: " + reason(errno));
        if (got == 0) break;
        done += static_cast<size_t>(got);
    }
    return done;
}

std::string InputFile::read_all() {
    struct stat status {};
    // a guess only: files without a size (a pipe, /proc) or that grow are read to their end all the same
    const off_t size = fstat(descriptor_, &status) == 0 ? status.st_size : 0;
    std::string content(static_cast<size_t>(std::max<off_t>(size, 0)) + 1, '\0');
    size_t done = 0;
    while ((done += read(content.data() + done, content.size() - done)) == content.size()) content.resize(2 * done);
    content.resize(done);
    return content;
}

MappedFile::MappedFile(const std::filesystem::path& path, fs_status code) : path_(path), code_(code) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (descriptor >= 0 && fstat(descriptor, &status) == 0 && status.st_size > 0) {
        size_ = static_cast<size_t>(status.st_size);
        data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    }
    const int number = S_ISDIR(status.st_mode) ? EISDIR : errno;
    if (descriptor >= 0) close(descriptor);
    if (descriptor < 0 || data_ == MAP_FAILED) throw Error(code, path.string() + ": cannot be read: " + reason(number));
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) munmap(data_, size_);
}

std::string_view MappedFile::bytes(uint64_t offset, uint64_t length) const {
    if (offset > size_ || length > size_ - offset) {
        throw Error(code_, path_.string() + ": ends at byte " + std::to_string(size_) + " inside a tensor; it is cut short");
    }
    return {static_cast<const char*>(data_) + offset, length};
}

void write_file(const std::filesystem::path& path, const std::vector<std::string_view>& pieces) {
    Sibling sibling(path);
    for (const std::string_view piece : pieces) sibling.write(piece);
    sibling.put_in_place();
}

}  // namespace framestep
