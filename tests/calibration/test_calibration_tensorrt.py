"""TensorRT-RTX takes the FP16 and the FP16+INT8 graphs of the base model, ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

trt = pytest.importorskip("tensorrt_rtx")

from framestep.calibration.observe import Activation  # noqa: E402
from framestep.calibration.quantize import quantize  # noqa: E402
from framestep.export.graph import GraphBuilder, WeightFile  # noqa: E402
from framestep.export.half import centre_pixels, to_half  # noqa: E402
from framestep.export.linears import linears, read_graph  # noqa: E402
from framestep.export.streamformer import BASE, random_model  # noqa: E402
from framestep.export.streamformer_graph import write_backbone  # noqa: E402

WINDOW = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    weights = WeightFile(folder / "backbone.bin")
    builder = GraphBuilder("backbone", weights)
    write_backbone(random_model(BASE), WINDOW, BASE.image_size, builder, "backbone.onnx")
    builder.save(folder / "backbone.onnx")
    weights.close()
    return folder / "backbone.onnx"


@pytest.mark.parametrize("precision", ["fp16", "fp16+int8"])
def test_the_base_model_builds_for_sm86(base, tmp_path, precision) -> None:
    model = read_graph(base)
    centre_pixels(model)
    if "int8" in precision:
        seen = Activation(8.0, 8.0, np.ones(1, np.float32), np.ones((1, 1), np.float32))
        quantized = quantize(model, {linear.input: seen for linear in linears(model)})
        assert len(quantized) == 12 * 10 + 6
    states = [
        item.name for item in (*model.graph.input, *model.graph.output) if item.name.endswith(("past", "present"))
    ]
    to_half(model, states)
    path = tmp_path / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.bin")

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = Counter(network.get_layer(i).type for i in range(network.num_layers))
    if "int8" in precision:
        assert kinds[trt.LayerType.QUANTIZE] == len(quantized)
        assert kinds[trt.LayerType.DEQUANTIZE] == 2 * len(quantized)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        item = network.get_input(index)
        sizes = [tuple(streams if size == -1 else size for size in item.shape) for streams in (1, 1, 2)]
        profile.set_shape(item.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0.5 * (tmp_path / "graph.bin").stat().st_size
