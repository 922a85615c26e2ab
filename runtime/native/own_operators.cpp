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

// The inputs of a graph that are float32 states of a kind, with one row in a slot.
std::set<std::string> states_of(const Graph& graph, const Manifest& manifest, const std::string& kind) {
    std::set<std::string> found;
    for (const StateUse& use : graph.states) {
        const auto state = std::find_if(manifest.states.begin(), manifest.states.end(),
                                        [&](const State& one) { return one.name == use.state; });
        if (state->kind == kind && state->rows_per_slot == 1 && state->dtype == FS_FLOAT32) found.insert(use.input);
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
            const std::filesystem::path path = folder_ / tensor.location;
            if (path.lexically_normal().parent_path() != folder_.lexically_normal()) {
                throw Error(FS_ERROR_BUNDLE, path.string() + ": a graph's weights lie outside its bundle");
            }
            if (file == nullptr) file = std::make_unique<MappedFile>(path, FS_ERROR_BUNDLE);
            found = file->bytes(tensor.offset, tensor.length);
        }
        if (found.size() == length) return found;
        throw Error(FS_ERROR_BUNDLE, folder_.string() + ": a graph's constant has " + std::to_string(found.size()) +
                                         " bytes in the place of " + std::to_string(length) + "; export the bundle again");
    }

private:
    std::filesystem::path folder_;
    std::map<std::string, std::unique_ptr<MappedFile>> files_;
};

std::shared_ptr<const PackedMatrix> pack(const BlockProduct& product, Constants& constants) {
    const auto count = static_cast<uint64_t>(product.inputs) * static_cast<uint64_t>(product.outputs);
    const auto outputs = static_cast<uint64_t>(product.outputs);
    const auto floats = [&](const OnnxTensor& tensor, uint64_t numbers) {  // copied, for they may lie anywhere
        const std::string_view bytes = constants.bytes(tensor, numbers * sizeof(float));
        std::vector<float> values(numbers);
        std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(values.data()));
        return values;
    };
    BlockMatrix matrix;
    matrix.bits = product.bits;
    matrix.inputs = product.inputs;
    matrix.outputs = product.outputs;
    matrix.block = product.block;
    const std::string_view integers = constants.bytes(product.integers, product.bits == 8 ? count : (count + 1) / 2);
    matrix.integers = reinterpret_cast<const uint8_t*>(integers.data());
    const std::vector<float> scales = floats(product.scales, count / static_cast<uint64_t>(product.block));
    matrix.scales = scales.data();
    std::vector<float> bias;
    if (product.bias) bias = floats(*product.bias, outputs);
    matrix.bias = product.bias ? bias.data() : nullptr;
    return std::make_shared<const PackedMatrix>(matrix);
}

}  // namespace

struct OwnOperators::Impl {
    // Where the three constants of a matrix lie; graphs that name the same bytes share one.
    using Stored = std::tuple<std::string, uint64_t, std::string, uint64_t, std::string, uint64_t>;

    explicit Impl(const Ort& ort)
        : ort(ort), ring(own_operator<RingKernel>(ort, nullptr)), cache(own_operator<CacheKernel>(ort, nullptr)),
          product(own_operator<ProductsKernel>(ort, &products)) {}

    std::shared_ptr<const PackedMatrix> packed(const BlockProduct& product, Constants& constants) {
        const OnnxTensor bias = product.bias.value_or(OnnxTensor());
        if (product.integers.location.empty() || product.scales.location.empty() || !bias.raw.empty()) {
            return pack(product, constants);
        }
        auto& matrix = matrices[{product.integers.location, product.integers.offset, product.scales.location,
                                 product.scales.offset, bias.location, bias.offset}];
        if (matrix == nullptr) matrix = pack(product, constants);
        return matrix;
    }

    const Ort& ort;
    ProductsKernel::Shared products;
    std::map<Stored, std::shared_ptr<const PackedMatrix>> matrices;
    OwnOperator<RingKernel> ring;
    OwnOperator<CacheKernel> cache;
    OwnOperator<ProductsKernel> product;
    OrtCustomOpDomain* domain = nullptr;
};

OwnOperators::OwnOperators(const Ort& ort) : impl_(std::make_unique<Impl>(ort)) {
    const std::string what = "ONNX Runtime could not take an operator";
    ort.check(ort.CreateCustomOpDomain(OWN_DOMAIN, &impl_->domain), what);
    const OrtCustomOp* const all[] = {&impl_->ring, &impl_->cache, &impl_->product};
    for (const OrtCustomOp* own : all) ort.check(ort.CustomOpDomain_Add(impl_->domain, own), what);
}

OwnOperators::~OwnOperators() {
    if (impl_->domain != nullptr) impl_->ort.ReleaseCustomOpDomain(impl_->domain);
}

OrtCustomOpDomain* OwnOperators::domain() const { return impl_->domain; }

DerivedGraph OwnOperators::derive(const Bundle& bundle, const Manifest& manifest, const Graph& graph) {
    const std::filesystem::path path = bundle.path / graph.file;
    const std::string model = InputFile(path, FS_ERROR_BUNDLE).read_all();
    try {
        OnnxGraph onnx(model);
        const size_t rings = takes_frames(graph) ? replace_ring_attention(onnx, states_of(graph, manifest, "ring")) : 0;
        const size_t caches = replace_cached_attention(onnx, states_of(graph, manifest, "linear"));
        size_t products = 0;
        if (fastest_block_kernels() != nullptr) {
            Constants constants(path.parent_path());
            for (const auto& group : replace_block_products(onnx, impl_->products.size())) {
                PackedProducts packed;
                for (const BlockProduct& product : group) packed.push_back(impl_->packed(product, constants));
                products += packed.size();
                impl_->products.push_back(std::move(packed));
            }
        }
        return {onnx.write(), rings + caches + products};
    } catch (const ProtobufDamaged&) {
        return {};  // ONNX Runtime says why
    }
}

}  // namespace framestep
