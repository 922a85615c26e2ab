#include "preprocess.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"
#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A resize is separable: down first, as most of the frame is gone after that, then across, four rows at a time while
// they are in the cache. Computed in floats, and compiled once for each set of instructions.

#define FRAMESTEP_INLINE [[gnu::always_inline]] inline

namespace framestep {
namespace {

constexpr uint8_t LETTERBOX_GREY = 128;
constexpr int ROWS_AT_ONCE = 4;

// Each output sample is a weighted sum of input samples.
struct Filter {
    int taps = 0;                // of the output sample that has most
    std::vector<int> starts;     // first input sample of each output sample
    std::vector<int> counts;     // input samples of each output sample
    std::vector<float> weights;  // [outputs, taps], zero from `counts` on
};

// How frames of one size are resized.
struct Plan {
    int height = 0, width = 0;                     // of the frame
    int top = 0, left = 0, rows = 0, columns = 0;  // what the frame covers of the output
    int first_column = 0, span = 0;                // the frame's columns that are read
    Filter down, across;
    uint64_t last_used = 0;
};

// Rows on their way. Four at a time: they share each weight that is read.
struct Scratch {
    std::vector<float> grey;                            // [span]
    std::array<std::vector<float>, ROWS_AT_ONCE> tall;  // [span, 3]: resized rows, columns still the frame's
    std::array<std::vector<float>, ROWS_AT_ONCE> wide;  // [columns, 3]: both resized
};

struct Layout {
    int64_t height, width, top, left;
};

int64_t half_to_even(int64_t value) {
    const int64_t floor = value >> 1;
    return value & 1 ? floor + (floor & 1) : floor;
}

// Size of the whole resized frame, and where the model's window lies in it.
Layout layout_of(int64_t frame_height, int64_t frame_width, int64_t height, int64_t width, Resize mode) {
    if (mode == Resize::stretch) return {height, width, 0, 0};
    int64_t new_height = height, new_width = width;
    const bool wider = frame_width * height >= frame_height * width;
    if (wider == (mode == Resize::crop)) {
        new_width = std::max<int64_t>(1, frame_width * height / frame_height);
    } else {
        new_height = std::max<int64_t>(1, frame_height * width / frame_width);
    }
    return {new_height, new_width, half_to_even(new_height - height), half_to_even(new_width - width)};
}

// Resizing `size` samples to `new_size`, for the output samples first..first + count. The filter is Pillow's: a
// triangle of half-width max(1, size / new_size) about each output's centre, normalised.
Filter make_filter(int size, int64_t new_size, int64_t first, int count) {
    const double scale = static_cast<double>(size) / static_cast<double>(new_size);
    const double support = std::max(scale, 1.0);
    Filter filter;
    std::vector<double> exact;  // all outputs' weights, one after the other
    for (int i = 0; i < count; ++i) {
        const double centre = (static_cast<double>(first + i) + 0.5) * scale;
        const int start = static_cast<int>(std::max(std::floor(centre - support + 0.5), 0.0));
        const int stop = static_cast<int>(std::min(std::floor(centre + support + 0.5), static_cast<double>(size)));
        const size_t begin = exact.size();
        double sum = 0;
        for (int sample = start; sample < stop; ++sample) {
            exact.push_back(std::max(1 - std::abs(sample + 0.5 - centre) / support, 0.0));
            sum += exact.back();
        }
        for (size_t k = begin; k < exact.size(); ++k) exact[k] /= sum;
        while (exact.back() == 0) exact.pop_back();  // half of all weights where the size stays
        filter.starts.push_back(start);
        filter.counts.push_back(static_cast<int>(exact.size() - begin));
        filter.taps = std::max(filter.taps, filter.counts.back());
    }
    filter.weights.resize(static_cast<size_t>(count) * static_cast<size_t>(filter.taps));
    auto from = exact.begin();
    for (int i = 0; i < count; ++i, from += filter.counts[i - 1]) {
        std::copy(from, from + filter.counts[i], filter.weights.begin() + int64_t{i} * filter.taps);
    }
    return filter;
}

using Four = float __attribute__((vector_size(16)));

FRAMESTEP_INLINE Four load(const float* from) {
    Four four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

FRAMESTEP_INLINE void store(float* to, Four four) { std::memcpy(to, &four, sizeof four); }

FRAMESTEP_INLINE Four blue_for_red(Four pixel) {
#ifdef __clang__
    return __builtin_shufflevector(pixel, pixel, 2, 1, 0, 3);
#else
    using Places = int32_t __attribute__((vector_size(16)));
    return __builtin_shuffle(pixel, Places{2, 1, 0, 3});
#endif
}

// out[i] = sum over k < count of weights[k] * rows[k * stride + i] (+ out[i]). `count` is known at compile time, so
// that each sum stays in a register. x86 needs to be told how to widen bytes; elsewhere the compiler finds out.
using WeightedRows = void (*)(const uint8_t* rows, int64_t stride, const float* weights, int64_t size, float* out);

template <int count, bool add>
struct Baseline {
    static void run(const uint8_t* rows, int64_t stride, const float* weights, int64_t size, float* __restrict out) {
        for (int64_t i = 0; i < size; ++i) {
            float sum = add ? out[i] : 0.0F;
            for (int k = 0; k < count; ++k) sum += weights[k] * static_cast<float>(rows[k * stride + i]);
            out[i] = sum;
        }
    }
};

#if defined(__x86_64__)
#define FRAMESTEP_AVX2 __attribute__((target("avx2,fma")))
#define FRAMESTEP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))

// The numbers that do not fill a vector.
void weighted_rest(int count, bool add, const uint8_t* rows, int64_t stride, const float* weights, int64_t size,
                   float* out) {
    for (int64_t i = 0; i < size; ++i) {
        float sum = add ? out[i] : 0.0F;
        for (int k = 0; k < count; ++k) sum += weights[k] * static_cast<float>(rows[k * stride + i]);
        out[i] = sum;
    }
}

// The next output row adds a few rows below these, which the processor does not foresee: it waited for them half the
// time that a frame took.
FRAMESTEP_INLINE void fetch_ahead(const uint8_t* rows, int64_t stride, int count) {
    const auto address = reinterpret_cast<uintptr_t>(rows);  // not a pointer: it may lie beyond the frame
    for (int k = count; k < count + 3; ++k) {
        __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<uintptr_t>(k * stride)));
    }
}

template <int count, bool add>
struct Avx2 {
    FRAMESTEP_AVX2 static void run(const uint8_t* rows, int64_t stride, const float* weights, int64_t size,
                                   float* out) {
        int64_t i = 0;
        for (; i + 8 <= size; i += 8) {
            fetch_ahead(rows + i, stride, count);
            __m256 sum = add ? _mm256_loadu_ps(out + i) : _mm256_setzero_ps();
            for (int k = 0; k < count; ++k) {
                const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + k * stride + i));
                const __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[k]), numbers, sum);
            }
            _mm256_storeu_ps(out + i, sum);
        }
        weighted_rest(count, add, rows + i, stride, weights, size - i, out + i);
    }
};

template <int count, bool add>
struct Avx512 {
    FRAMESTEP_AVX512 static void run(const uint8_t* rows, int64_t stride, const float* weights, int64_t size,
                                     float* out) {
        const __mmask16 all = 0xFFFF;  // gcc warns of uninitialised vectors in the forms without a mask
        int64_t i = 0;
        for (; i + 16 <= size; i += 16) {
            fetch_ahead(rows + i, stride, count);
            __m512 sum = add ? _mm512_loadu_ps(out + i) : _mm512_setzero_ps();
            for (int k = 0; k < count; ++k) {
                const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + k * stride + i));
                const __m512 numbers = _mm512_maskz_cvtepi32_ps(all, _mm512_maskz_cvtepu8_epi32(all, bytes));
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]), numbers, sum);
            }
            _mm512_storeu_ps(out + i, sum);
        }
        weighted_rest(count, add, rows + i, stride, weights, size - i, out + i);
    }
};
#endif

constexpr int MOST_ROWS = 8;

// By number of rows, from 1.
template <template <int, bool> class Kernel>
struct Kernels {
    static constexpr WeightedRows first[MOST_ROWS] = {
        Kernel<1, false>::run, Kernel<2, false>::run, Kernel<3, false>::run, Kernel<4, false>::run,
        Kernel<5, false>::run, Kernel<6, false>::run, Kernel<7, false>::run, Kernel<8, false>::run};
    static constexpr WeightedRows further[MOST_ROWS] = {
        Kernel<1, true>::run, Kernel<2, true>::run, Kernel<3, true>::run, Kernel<4, true>::run,
        Kernel<5, true>::run, Kernel<6, true>::run, Kernel<7, true>::run, Kernel<8, true>::run};
};

// One output row in the frame's columns.
template <template <int, bool> class Kernel>
FRAMESTEP_INLINE void resize_down(const Plan& plan, int row, const Picture& picture, int channels, float* out) {
    const Filter& filter = plan.down;
    const float* weights = filter.weights.data() + int64_t{row} * filter.taps;
    const uint8_t* rows = picture.data + filter.starts[row] * picture.stride + int64_t{plan.first_column} * channels;
    const int64_t size = int64_t{plan.span} * channels;
    int left = filter.counts[row], part = std::min(left, MOST_ROWS);
    Kernels<Kernel>::first[part - 1](rows, picture.stride, weights, size, out);
    while ((left -= part) > 0) {
        rows += part * picture.stride, weights += part;
        part = std::min(left, MOST_ROWS);
        Kernels<Kernel>::further[part - 1](rows, picture.stride, weights, size, out);
    }
}

// Four rows. A pixel is loaded together with the first number of the next one, which the next store overwrites.
template <bool swap>
FRAMESTEP_INLINE void resize_across(const Plan& plan, Scratch& scratch) {
    const float* tall[ROWS_AT_ONCE];
    float* wide[ROWS_AT_ONCE];
    for (int row = 0; row < ROWS_AT_ONCE; ++row)
        tall[row] = scratch.tall[row].data(), wide[row] = scratch.wide[row].data();
    const int64_t columns = plan.columns, first = plan.first_column, taps = plan.across.taps;
    const int* starts = plan.across.starts.data();
    const float* weights = plan.across.weights.data();
    for (int64_t column = 0; column < columns; ++column, weights += taps) {
        const int64_t from = 3 * (starts[column] - first);
        Four sums[ROWS_AT_ONCE] = {};
        for (int64_t k = 0; k < taps; ++k) {
            for (int row = 0; row < ROWS_AT_ONCE; ++row) sums[row] += weights[k] * load(tall[row] + from + 3 * k);
        }
        for (int row = 0; row < ROWS_AT_ONCE; ++row) {
            store(wide[row] + 3 * column, swap ? blue_for_red(sums[row]) : sums[row]);
        }
    }
}

// Weights are positive and sum to one: 0..255 without clipping.
FRAMESTEP_INLINE void round(const float* numbers, int64_t size, uint8_t* __restrict out) {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<uint8_t>(static_cast<int>(numbers[i] + 0.5F));
}

FRAMESTEP_INLINE void repeat_three_times(const float* numbers, int64_t size, float* __restrict out) {
    for (int64_t i = 0; i < size; ++i) out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = numbers[i];
}

template <template <int, bool> class Kernel>
FRAMESTEP_INLINE void resize_rows(const Plan& plan, const Picture& picture, Scratch& scratch, uint8_t* out,
                                  int64_t stride) {
    for (int first = 0; first < plan.rows; first += ROWS_AT_ONCE) {
        const int rows = std::min(ROWS_AT_ONCE, plan.rows - first);
        for (int row = 0; row < rows; ++row) {
            if (picture.format == PixelFormat::grey) {
                resize_down<Kernel>(plan, first + row, picture, 1, scratch.grey.data());
                repeat_three_times(scratch.grey.data(), plan.span, scratch.tall[row].data());
            } else {
                resize_down<Kernel>(plan, first + row, picture, 3, scratch.tall[row].data());
            }
        }
        if (picture.format == PixelFormat::bgr) {
            resize_across<true>(plan, scratch);
        } else {
            resize_across<false>(plan, scratch);
        }
        for (int row = 0; row < rows; ++row) {
            round(scratch.wide[row].data(), 3 * int64_t{plan.columns}, out + (first + row) * stride);
        }
    }
}

using ResizeRows = void (*)(const Plan&, const Picture&, Scratch&, uint8_t*, int64_t);

void resize_baseline(const Plan& plan, const Picture& picture, Scratch& scratch, uint8_t* out, int64_t stride) {
    resize_rows<Baseline>(plan, picture, scratch, out, stride);
}

#if defined(__x86_64__)
FRAMESTEP_AVX2 void resize_avx2(const Plan& plan, const Picture& picture, Scratch& scratch, uint8_t* out,
                                int64_t stride) {
    resize_rows<Avx2>(plan, picture, scratch, out, stride);
}

FRAMESTEP_AVX512 void resize_avx512(const Plan& plan, const Picture& picture, Scratch& scratch, uint8_t* out,
                                    int64_t stride) {
    resize_rows<Avx512>(plan, picture, scratch, out, stride);
}
#endif

ResizeRows resize_with(Simd simd) {
#if defined(__x86_64__)
    if (simd == Simd::avx512) return resize_avx512;
    if (simd == Simd::avx2) return resize_avx2;
#endif
    (void)simd;
    return resize_baseline;
}

void check(const Picture& picture) {
    auto fail = [](const std::string& what) { throw Error(FS_ERROR_FRAME, "frame: expected " + what); };
    const int64_t row_bytes = int64_t{picture.width} * (picture.format == PixelFormat::grey ? 1 : 3);
    if (picture.height < 1 || picture.width < 1 || picture.height > MAX_FRAME_SIDE || picture.width > MAX_FRAME_SIDE) {
        fail("height and width from 1 to " + std::to_string(MAX_FRAME_SIDE) + ", found " +
             std::to_string(picture.height) + " x " + std::to_string(picture.width));
    }
    if (picture.stride < row_bytes) {
        fail("a stride of at least " + std::to_string(row_bytes) + " bytes, found " + std::to_string(picture.stride));
    }
    if (picture.data == nullptr) fail("pixels, found a null pointer");
}

// A frame of the output's size is copied.
void copy(const Picture& picture, uint8_t* out) {
    const int64_t width = picture.width;
    for (int64_t row = 0; row < picture.height; ++row) {
        const uint8_t* from = picture.data + row * picture.stride;
        uint8_t* to = out + row * width * 3;
        if (picture.format == PixelFormat::rgb) {
            std::memcpy(to, from, static_cast<size_t>(width) * 3);
        } else if (picture.format == PixelFormat::bgr) {
            for (int64_t i = 0; i < width; ++i)
                to[3 * i] = from[3 * i + 2], to[3 * i + 1] = from[3 * i + 1], to[3 * i + 2] = from[3 * i];
        } else {
            for (int64_t i = 0; i < width; ++i) to[3 * i] = to[3 * i + 1] = to[3 * i + 2] = from[i];
        }
    }
}

}  // namespace

struct Preprocess::Impl {
    int height, width;
    Resize mode;
    ResizeRows resize;
    std::array<Plan, 4> plans;
    Scratch scratch;
    uint64_t frames = 0;

    const Plan& plan_for(int frame_height, int frame_width) {
        ++frames;
        Plan* oldest = &plans[0];
        for (Plan& plan : plans) {
            if (plan.height == frame_height && plan.width == frame_width) {
                plan.last_used = frames;
                return plan;
            }
            if (plan.last_used < oldest->last_used) oldest = &plan;
        }
        Plan plan = make_plan(frame_height, frame_width);
        make_room(plan);
        plan.last_used = frames;
        return *oldest = std::move(plan);
    }

    Plan make_plan(int frame_height, int frame_width) const {
        const Layout layout = layout_of(frame_height, frame_width, height, width, mode);
        Plan plan;
        plan.height = frame_height, plan.width = frame_width;
        plan.rows = static_cast<int>(std::min<int64_t>(layout.height, height));
        plan.columns = static_cast<int>(std::min<int64_t>(layout.width, width));
        plan.top = static_cast<int>(std::max<int64_t>(-layout.top, 0));
        plan.left = static_cast<int>(std::max<int64_t>(-layout.left, 0));
        plan.down = make_filter(frame_height, layout.height, std::max<int64_t>(layout.top, 0), plan.rows);
        plan.across = make_filter(frame_width, layout.width, std::max<int64_t>(layout.left, 0), plan.columns);
        plan.first_column = plan.across.starts.front();
        plan.span = plan.across.starts.back() + plan.across.counts.back() - plan.first_column;
        return plan;
    }

    void make_room(const Plan& plan) {
        auto grow = [](std::vector<float>& row, size_t size) { row.resize(std::max(row.size(), size)); };
        const auto span = static_cast<size_t>(plan.span);
        grow(scratch.grey, span);
        // beyond a row's end: weights of zero, and the fourth number of the last pixel
        for (auto& row : scratch.tall) grow(row, 3 * (span + static_cast<size_t>(plan.across.taps)) + 1);
        for (auto& row : scratch.wide) grow(row, 3 * static_cast<size_t>(plan.columns) + 1);
    }
};

Simd fastest_simd() {
#if defined(__x86_64__)
    if (has_avx2()) return has_avx512() ? Simd::avx512 : Simd::avx2;
#endif
    return Simd::baseline;
}

Preprocess::Preprocess(int height, int width, Resize mode, Simd simd) {
    if (height < 1 || width < 1 || height > MAX_FRAME_SIDE || width > MAX_FRAME_SIDE) {
        throw Error(FS_ERROR_BUNDLE, "frame: height and width should be from 1 to " + std::to_string(MAX_FRAME_SIDE));
    }
    impl_ = std::make_unique<Impl>(Impl{height, width, mode, resize_with(simd), {}, {}, 0});
}

Preprocess::~Preprocess() = default;
Preprocess::Preprocess(Preprocess&&) noexcept = default;
Preprocess& Preprocess::operator=(Preprocess&&) noexcept = default;

void Preprocess::fit(const Picture& picture, uint8_t* out) {
    check(picture);
    Impl& impl = *impl_;
    if (picture.height == impl.height && picture.width == impl.width) return copy(picture, out);
    const Plan& plan = impl.plan_for(picture.height, picture.width);
    const int64_t stride = int64_t{impl.width} * 3;
    if (plan.rows != impl.height || plan.columns != impl.width) {
        std::memset(out, LETTERBOX_GREY, static_cast<size_t>(impl.height) * static_cast<size_t>(stride));
    }
    impl.resize(plan, picture, impl.scratch, out + plan.top * stride + int64_t{plan.left} * 3, stride);
}

}  // namespace framestep
