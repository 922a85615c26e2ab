"""TensorRT-RTX takes the FP16 decoder, ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import decoder_models
import pytest

trt = pytest.importorskip("tensorrt_rtx")

from framestep.export.decoder_checkpoint import read_decoder_checkpoint  # noqa: E402
from framestep.export.decoder_export import DecoderOptions, write_bundle  # noqa: E402
from framestep.runtime.bundle import Bundle, BundleWriter  # noqa: E402

LAYERS = 2
SIZES = {"S": (1, 1, 2), "T": (1, 16, 32)}
# KV-cache layers, attention layers
NATIVE = {"decoder": (3 * LAYERS, LAYERS), "rebase": (LAYERS, 0), "embed": (0, 0), "vision": (0, 3)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("tensorrt")
    decoder_models.save(decoder_models.qwen2_5_vl(), folder / "checkpoint")
    checkpoint = read_decoder_checkpoint(str(folder / "checkpoint"))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, DecoderOptions("fp16", capacity=64, frame_size=(56, 84)))
    return Bundle.open(folder / "out.bundle")


@pytest.mark.parametrize("name", NATIVE)
def test_fp16_graphs_build_with_native_caches_for_one_token_and_many(bundle, name) -> None:
    graph = bundle.manifest.graphs[name]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    path: Path = bundle.file(graph.file)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
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
