#include "own_operators.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "cache_operator.h"
#include "file_io.h"
#include "product_operator.h"
#include "protobuf.h"
#include "ring_operator.h"

namespace framestep {
namespace {

// The inputs of a graph that are states of a kind and a type, with one row in a slot.
std::set<std::string> states_of(const Graph& graph, const Manifest& manifest, const std::string& kind, fs_dtype dtype) {
    std::set<std::string> found;
    for (const StateUse& use : graph.states) {
        const auto state = std::find_if(manifest.states.begin(), manifest.states.end(),
                                        [&](const State& one) { return one.name == use.state; });
        if (state->kind == kind && state->rows_per_slot == 1 && state->dtype == dtype) found.insert(use.input);
    }
    return found;
}

bool takes_frames(const Graph& graph) {
    return std::any_of(graph.inputs.begin(), graph.inputs.end(), [](const Port& port) { return port.role == "position"; });
}

// The constants of one graph, some of which lie in files beside it.
class Constants {
public:
    explicit Constants(std::filesystem::path folder) : folder_(std::move(folder)) {}

    std::string_view bytes(const OnnxTensor& tensor, uint64_t length) {
        std::string_view found = tensor.raw;
        if (!tensor.location.empty()) {
            auto& file = files_[tensor.location];
            const std::filesystem::path location = std::filesystem::path(tensor.location).lexically_normal();
            if (location.is_absolute() || *location.begin() == "..") {
                throw Error(FS_ERROR_BUNDLE, folder_.string() + ": a graph's weights lie outside its bundle, in '" +
                                                 tensor.location + "'; export the bundle again");
            }
            if (file == nullptr) file = std::make_unique<MappedFile>(folder_ / location, FS_ERROR_BUNDLE);
            found = file->bytes(tensor.offset, tensor.length == 0 ? length : tensor.length);
        }
        if (found.size() == length) return found;
        throw Error(FS_ERROR_BUNDLE, (folder_ / tensor.location).string() + ": a graph's constant has " +
                                         std::to_string(found.size()) + " bytes in the place of " + std::to_string(length) +
                                         "; export the bundle again");
    }

private:
    std::filesystem::path folder_;
    std::map<std::string, std::unique_ptr<MappedFile>> files_;
};

// Copied, for they may lie anywhere; empty for none.
std::vector<float> floats(const std::optional<OnnxTensor>& tensor, int64_t numbers, Constants& constants) {
    if (!tensor) return {};
    const std::string_view bytes = constants.bytes(*tensor, static_cast<uint64_t>(numbers) * sizeof(float));
    std::vector<float> values(static_cast<size_t>(numbers));
    std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(values.data()));
    return values;
}

uint64_t numbers(const ConstantProduct& product) {
    return static_cast<uint64_t>(product.inputs) * static_cast<uint64_t>(product.outputs);
}

// Borrows the bias.
Epilogue epilogue(const ConstantProduct& product, const std::vector<float>& bias) {
    return {bias.empty() ? nullptr : bias.data(), product.gelu};
}

template <class Matrix>
std::shared_ptr<const Matrix> pack(const ConstantProduct& product, Constants& constants) {
    const std::vector<float> bias = floats(product.bias, product.outputs, constants);
    return std::make_shared<const Matrix>(constants.bytes(product.matrix, numbers(product) * sizeof(float)), product.inputs,
                                          product.outputs, product.transposed, epilogue(product, bias));
}

template <>
std::shared_ptr<const IntegerMatrix> pack(const ConstantProduct& product, Constants& constants) {
    const std::vector<float> bias = floats(product.bias, product.outputs, constants);
    const std::vector<float> scales = floats(product.scales, product.outputs, constants);
    return std::make_shared<const IntegerMatrix>(constants.bytes(product.matrix, numbers(product)), product.inputs,
                                                 product.outputs, product.input_scale, scales.data(),
                                                 epilogue(product, bias));
}

template <>
std::shared_ptr<const PackedMatrix> pack(const ConstantProduct& product, Constants& constants) {
    const uint64_t count = numbers(product);
    BlockMatrix matrix;
    matrix.bits = product.bits;
    matrix.inputs = product.inputs;
    matrix.outputs = product.outputs;
    matrix.block = product.block;
    const std::string_view integers = constants.bytes(product.matrix, product.bits == 8 ? count : (count + 1) / 2);
    matrix.integers = reinterpret_cast<const uint8_t*>(integers.data());
    const std::vector<float> bias = floats(product.bias, product.outputs, constants);
    const std::vector<float> scales =
        floats(product.scales, static_cast<int64_t>(count) / product.block, constants);
    matrix.scales = scales.data();
    matrix.bias = bias.empty() ? nullptr : bias.data();
    return std::make_shared<const PackedMatrix>(matrix);
}

// The matrices of a session in the layout of their kernels.
template <class Matrix>
class Packings {
public:
    std::vector<PackedProducts<Matrix>> products;  // of one x each

    // Returns how many.
    size_t add(const std::vector<std::vector<ConstantProduct>>& groups, Constants& constants) {
        size_t count = 0;
        for (const auto& group : groups) {
            PackedProducts<Matrix> packed;
            for (const ConstantProduct& product : group) packed.push_back(one(product, constants));
            count += packed.size();
            products.push_back(std::move(packed));
        }
        return count;
    }

private:
    // Where the constants of a matrix lie, and how they are to be read; graphs that say the same share one.
    using Place = std::pair<std::string, uint64_t>;
    using Stored = std::tuple<Place, Place, Place, int64_t, int64_t, bool, int64_t, int, bool, float>;

    std::shared_ptr<const Matrix> one(const ConstantProduct& product, Constants& constants) {
        const OnnxTensor scales = product.scales.value_or(OnnxTensor()), bias = product.bias.value_or(OnnxTensor());
        if (product.matrix.location.empty() || !scales.raw.empty() || !bias.raw.empty()) {
            return pack<Matrix>(product, constants);
        }
        const auto place = [](const OnnxTensor& tensor) { return Place(tensor.location, tensor.offset); };
        auto& matrix = matrices_[{place(product.matrix), place(scales), place(bias), product.inputs, product.outputs,
                                  product.transposed, product.block, product.bits, product.gelu, product.input_scale}];
        if (matrix == nullptr) matrix = pack<Matrix>(product, constants);
        return matrix;
    }

    std::map<Stored, std::shared_ptr<const Matrix>> matrices_;
};

}  // namespace

struct OwnOperators::Impl {
    explicit Impl(const Ort& ort)
        : ort(ort), ring(own_operator<RingKernel<float>>(ort, nullptr)),
          integer_ring(own_operator<RingKernel<int8_t>>(ort, nullptr)), cache(own_operator<CacheKernel>(ort, nullptr)),
          block_product(own_operator<BlockProductsKernel>(ort, &blocks.products)),
          float_product(own_operator<FloatProductsKernel>(ort, &float32.products)),
          bfloat16_product(own_operator<Bfloat16ProductsKernel>(ort, &bfloat16.products)),
          integer_product(own_operator<IntegerProductsKernel>(ort, &integers.products)) {}

    const Ort& ort;
    Packings<PackedMatrix> blocks;
    Packings<FloatMatrix> float32;
    Packings<Bfloat16Matrix> bfloat16;
    Packings<IntegerMatrix> integers;
    OwnOperator<RingKernel<float>> ring;
    OwnOperator<RingKernel<int8_t>> integer_ring;
    OwnOperator<CacheKernel> cache;
    OwnOperator<BlockProductsKernel> block_product;
    OwnOperator<FloatProductsKernel> float_product;
    OwnOperator<Bfloat16ProductsKernel> bfloat16_product;
    OwnOperator<IntegerProductsKernel> integer_product;
    OrtCustomOpDomain* domain = nullptr;
};

OwnOperators::OwnOperators(const Ort& ort) : impl_(std::make_unique<Impl>(ort)) {
    const std::string what = "ONNX Runtime could not take an operator";
    ort.check(ort.CreateCustomOpDomain(OWN_DOMAIN, &impl_->domain), what);
    const OrtCustomOp* const all[] = {&impl_->ring,          &impl_->integer_ring,  &impl_->cache,
                                      &impl_->block_product, &impl_->float_product, &impl_->bfloat16_product,
                                      &impl_->integer_product};
    for (const OrtCustomOp* own : all) ort.check(ort.CustomOpDomain_Add(impl_->domain, own), what);
}

OwnOperators::~OwnOperators() {
    if (impl_->domain != nullptr) impl_->ort.ReleaseCustomOpDomain(impl_->domain);
}

OrtCustomOpDomain* OwnOperators::domain() const { return impl_->domain; }

bool OwnOperators::has_bfloat16() const { return !impl_->bfloat16.products.empty(); }

DerivedGraph OwnOperators::derive(const Bundle& bundle, const Manifest& manifest, const Graph& graph, bool bfloat16) {
    const std::filesystem::path path = bundle.path / graph.file;
    const std::string model = InputFile(path, FS_ERROR_BUNDLE).read_all();
    try {
        OnnxGraph onnx(model);
        ReplacedRings rings;
        if (takes_frames(graph)) {
            rings = replace_ring_attention(
                onnx, {states_of(graph, manifest, "ring", FS_FLOAT32), states_of(graph, manifest, "ring", FS_INT8)});
        }
        const size_t caches = replace_cached_attention(onnx, states_of(graph, manifest, "linear", FS_FLOAT32));
        size_t products = 0;
        Constants constants(bundle.path);  // by the names that the manifest lists, as ONNX Runtime is told to
        if (fastest_block_kernels() != nullptr) {
            products += impl_->blocks.add(replace_block_products(onnx, impl_->blocks.products.size()), constants);
        }
        if (integer_kernels() != nullptr) {
            products += impl_->integers.add(replace_integer_products(onnx, impl_->integers.products.size()), constants);
        }
        if (bfloat16) {
            products += impl_->bfloat16.add(replace_float_products(onnx, impl_->bfloat16.products.size(), true), constants);
        } else if (float_kernels() != nullptr) {
            products += impl_->float32.add(replace_float_products(onnx, impl_->float32.products.size(), false), constants);
        }
        return {onnx.write(), rings.floats + rings.integers + caches + products, 2 * rings.integers};
    } catch (const ProtobufDamaged&) {
        return {};  // ONNX Runtime says why
    }
}

}  // namespace framestep
