"""TensorRT-RTX takes StreamChat's FP16 graphs, ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import streamchat_models

trt = pytest.importorskip("tensorrt_rtx")

from framestep.export.streamchat_checkpoint import read_streamchat_checkpoint  # noqa: E402
from framestep.export.streamchat_export import StreamChatOptions, write_bundle  # noqa: E402
from framestep.runtime.bundle import Bundle, BundleWriter  # noqa: E402

BLOCKS, LAYERS = len(streamchat_models.CROSS), streamchat_models.LAYERS
SIZES = {"S": (1, 1, 2), "T": (1, 16, 32)}
# KV-cache layers, attention layers
NATIVE = {
    "frame": (2 * BLOCKS, streamchat_models.VISION["num_hidden_layers"]),
    "decoder": (3 * LAYERS, LAYERS + BLOCKS),
    "rebase": (LAYERS, 0),
    "rebase_frames": (BLOCKS, 0),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("tensorrt")
    checkpoint = read_streamchat_checkpoint(str(streamchat_models.save(folder, max_position_embeddings=512)))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, StreamChatOptions("fp16", window=3, rate=2.0, capacity=64))
    return Bundle.open(folder / "out.bundle")


@pytest.mark.parametrize("name", NATIVE)
def test_fp16_graphs_build_with_native_caches_and_fused_attention(bundle, name) -> None:
    graph = bundle.manifest.graphs[name]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.file(graph.file))), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    kinds = Counter(network.get_layer(i).type for i in range(network.num_layers))
    found = kinds[trt.LayerType.KV_CACHE_UPDATE], kinds[trt.LayerType.ATTENTION_INPUT]
    assert found == NATIVE[name]
    shapes = {port.name: port.shape for port in graph.inputs}
    states = {state.name: state.shape for state in bundle.manifest.states}
    shapes |= {use.input: states[use.state] for use in graph.states}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        item = network.get_input(index)
        profile.set_shape(item.name, *[[SIZES.get(n, (n, n, n))[i] for n in shapes[item.name]] for i in range(3)])
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
