"""A float32 bundle and video in; a quantized bundle that runs on integers, and a report, out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest

import framestep
from framestep.calibration.calibrate import CalibrationOptions, calibrate
from framestep.calibration.clips import Clip
from framestep.calibration.errors import CalibrationError
from framestep.calibration.integer import INTEGER_OPERATORS, optimised_graph
from framestep.calibration.quantize import quantize
from framestep.export.labelling import LabelOptions, label_bundle
from framestep.export.linears import linears
from framestep.export.rewriting import initializer, set_initializer
from framestep.runtime.bundle import Bundle, BundleWriter
from framestep.runtime.errors import BundleError, StateError
from framestep.runtime.session import Session
from framestep.runtime.sources import open_source


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    found = []
    for seed in (3, 4):
        with open_source(f"synthetic:seed={seed},frames=40,width=64,height=64") as source:
            found.append(Clip(f"synthetic {seed}", np.stack([frame.rgb for frame in source])))
    return found


@pytest.fixture(scope="module")
def quantized(golden_bundle, clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "all.bundle"
    options = CalibrationOptions(("int8", "fp16", "fp16+int8"), keep_float=True, drift_frames=120)
    return path, calibrate(Bundle.open(golden_bundle), clips, clips, path, options)


def step_all(path, clip: Clip, precision: str) -> np.ndarray:
    with framestep.load(path, precision=precision, outputs=("pooled",)) as session, session.open_stream() as stream:
        return np.stack([stream.step(rgb)["pooled"] for rgb in clip.frames])


def test_every_quantized_linear_layer_is_an_integer_product(golden_bundle, quantized) -> None:
    path, report = quantized
    bundle = Bundle.open(path)
    float_layers = {
        name: len(linears(onnx.load(golden_bundle / f"{name}.onnx"))) for name in ("backbone", "patch_label")
    }
    for name, count in float_layers.items():
        kinds = Counter(
            node.op_type for node in optimised_graph(bundle.file(bundle.manifest.graphs[name].file)).graph.node
        )
        assert sum(kinds[kind] for kind in INTEGER_OPERATORS) == count
        assert kinds["Gemm"] == 0
    assert {item.graph: item.integer for item in report.integer_products} == float_layers
    assert all(not item.in_float for item in report.integer_products)


def test_the_default_optimisers_would_leave_products_in_float(quantized) -> None:
    bundle = Bundle.open(quantized[0])
    file = bundle.file(bundle.manifest.graphs["backbone"].file)
    kinds = Counter(node.op_type for node in optimised_graph(file, disabled=()).graph.node)
    assert sum(kinds[kind] for kind in INTEGER_OPERATORS) < len(quantized[1].layers) - 4


@pytest.mark.parametrize("precision", ["int8", "fp16+int8"])
def test_each_linear_layer_has_explicit_quantizers_of_its_own(quantized, precision) -> None:
    bundle = Bundle.open(quantized[0])
    model = onnx.load(bundle.file(bundle.manifest.at(precision).graphs["backbone"].file))
    makers = {node.output[0]: node for node in model.graph.node}
    uses = Counter(name for node in model.graph.node for name in node.input)
    kind = {item.name: item.data_type for item in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 36
    for node in products:
        left, right = makers[node.input[0]], makers[node.input[1]]
        assert left.op_type == right.op_type == "DequantizeLinear"
        quantizer = makers[left.input[0]]
        assert quantizer.op_type == "QuantizeLinear"
        assert uses[left.output[0]] == uses[quantizer.output[0]] == 1
        # what TensorRT asks for: INT8, symmetric; weights by output channel
        assert kind[right.input[0]] == onnx.TensorProto.INT8
        assert not initializer(model, left.input[2]).any()
        assert initializer(model, right.input[1]).shape == (initializer(model, right.input[0]).shape[1],)
        # and FP16 begins behind the product: sums of integers are larger than it holds
        assert kind[left.input[1]] == kind[right.input[1]] == onnx.TensorProto.FLOAT
        assert initializer(model, left.input[1]) == initializer(model, quantizer.input[1]).astype(np.float32)
        if precision == "fp16+int8":
            (reader,) = [other for other in model.graph.node if node.output[0] in other.input]
            assert reader.op_type == "Cast"
            assert reader.attribute[0].i == onnx.TensorProto.FLOAT16


def test_weights_are_rounded_by_channel_to_half_a_step(golden_bundle, quantized) -> None:
    exact = onnx.load(golden_bundle / "backbone.onnx")
    bundle = Bundle.open(quantized[0])
    model = onnx.load(bundle.file(bundle.manifest.graphs["backbone"].file))
    name = "layer1.mlp.fc1.weight"
    weight, scale = initializer(exact, name), initializer(model, f"{name}.scale")
    rounded = initializer(model, f"{name}.int8").astype(np.float32) * scale
    np.testing.assert_allclose(scale, np.abs(weight).max(0) / 127, rtol=1e-6)
    assert (np.abs(rounded - weight) <= scale / 2 + 1e-7).all()


def test_precisions_agree_with_float_over_a_stream(golden_bundle, quantized, clips) -> None:
    path, report = quantized
    expected = step_all(golden_bundle, clips[0], "auto")
    for precision, least in (("fp32", 0.999999), ("int8", 0.99), ("fp16", 0.99999), ("fp16+int8", 0.99)):
        found = step_all(path, clips[0], precision)
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > least, precision
    measured = {item.precision: item.cosine for item in report.accuracy}
    assert measured["fp16"] > measured["int8"] > 0.99


def test_auto_takes_int8_on_a_cpu_and_never_fp16(quantized, golden_bundle, clips, tmp_path) -> None:
    with framestep.load(quantized[0], device="cpu") as session:
        assert session.precision == "int8"
        assert "int8" in session.engine_choice
    options = CalibrationOptions(("fp16",), keep_float=True, drift_frames=0)
    calibrate(Bundle.open(golden_bundle), clips, clips, tmp_path / "half.bundle", options)
    with framestep.load(tmp_path / "half.bundle", device="cpu") as session:
        assert session.precision == "fp32"


def test_a_precision_that_is_not_there_is_refused(quantized, golden_bundle) -> None:
    with pytest.raises(BundleError, match=r"precision 'int8' is not in this bundle; it has fp32"):
        framestep.load(golden_bundle, precision="int8")


def test_half_precision_halves_the_state(quantized) -> None:
    manifest = Bundle.open(quantized[0]).manifest
    bytes_of = {p: sum(state.bytes_per_stream() for state in manifest.at(p).states) for p in manifest.precisions}
    assert bytes_of["fp16"] == bytes_of["fp16+int8"] == bytes_of["fp32"] / 2
    assert bytes_of["int8"] == bytes_of["fp32"]


def test_a_saved_state_fits_its_own_precision_alone(quantized, clips, tmp_path) -> None:
    path = quantized[0]
    with framestep.load(path, precision="int8") as session, session.open_stream() as stream:
        for rgb in clips[0].frames[:20]:
            stream.step(rgb)
        stream.save_state(tmp_path / "int8.state")
        expected = stream.step(clips[0].frames[20])["pooled"]
    with framestep.load(path, precision="int8") as session, session.open_stream() as stream:
        stream.load_state(tmp_path / "int8.state")
        np.testing.assert_array_equal(stream.step(clips[0].frames[20])["pooled"], expected)
    with framestep.load(path, precision="fp32") as session, session.open_stream() as stream:
        with pytest.raises(StateError, match="another model, precision or window"):
            stream.load_state(tmp_path / "int8.state")


def test_one_precision_is_a_third_of_the_size_and_keeps_no_float_weights(golden_bundle, clips, tmp_path) -> None:
    before = Bundle.open(golden_bundle)
    calibrate(before, clips, clips, tmp_path / "int8.bundle", CalibrationOptions(drift_frames=0))
    after = Bundle.open(tmp_path / "int8.bundle").manifest
    assert after.precisions == ("int8",)
    assert "backbone.bin" not in after.files
    weights = after.files["int8.bin"].bytes
    assert weights < 0.30 * before.manifest.files["backbone.bin"].bytes


def test_the_report_tells_by_layer_by_age_and_by_precision(quantized) -> None:
    path, _ = quantized
    values = json.loads((path / "report.json").read_text())
    assert [item["precision"] for item in values["accuracy"]] == ["int8", "fp16", "fp16+int8"]
    assert len(values["layers"]) == 40
    noise = [item["decibels"] for item in values["layers"]]
    assert noise == sorted(noise) and noise[0] > 10
    assert [group["first"] for group in values["drift"][0]["groups"]] == [0, 16, 50, 100]
    text = (path / "report.md").read_text()
    assert "| fp16+int8 |" in text and "by age of the stream" in text
    assert {"report.json", "report.md"} <= set(Bundle.open(path).manifest.files)


def test_labels_survive_and_agreement_is_reported(golden_bundle, clips, tmp_path) -> None:
    import shutil

    from safetensors.numpy import save_file

    shutil.copytree(golden_bundle, tmp_path / "labelled.bundle")
    rows = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    numbers = {"logit_scale": np.array(1.0, np.float32), "logit_bias": np.array(0.0, np.float32)}
    save_file(
        {"text_embeddings": rows / np.linalg.norm(rows, axis=1, keepdims=True), **numbers}, tmp_path / "e.safetensors"
    )
    options = LabelOptions(("a", "b", "c"), text_embeddings=tmp_path / "e.safetensors")
    bundle = label_bundle(Bundle.open(tmp_path / "labelled.bundle"), options)
    labelled = [replace(clip, truth=np.zeros(len(clip.frames), np.int64)) for clip in clips]
    report = calibrate(bundle, clips, labelled, tmp_path / "int8.bundle", CalibrationOptions(drift_frames=60))
    assert report.accuracy[0].agreement is not None and report.accuracy[0].agreement > 0.8
    assert report.accuracy[0].accuracy is not None
    with framestep.load(tmp_path / "int8.bundle", outputs=("scores", "patch_scores")) as session:
        assert session.labels == ("a", "b", "c")
        assert session.open_stream().step(clips[0].frames[0])["patch_scores"].shape == (3, 4, 4)


def test_layers_stay_in_float_until_the_budget_is_kept(golden_bundle, clips, tmp_path) -> None:
    bundle = Bundle.open(golden_bundle)
    plain = calibrate(bundle, clips, clips, tmp_path / "plain.bundle", CalibrationOptions(drift_frames=0))
    wanted = 1 - 0.5 * (1 - plain.accuracy[0].cosine)  # half the error
    options = CalibrationOptions(min_cosine=wanted, drift_frames=0)
    report = calibrate(bundle, clips, clips, tmp_path / "mixed.bundle", options)
    assert 0 < len(report.kept) < 20
    assert report.accuracy[0].cosine >= wanted
    assert report.kept == [item.layer for item in report.layers if item.graph == "backbone"][: len(report.kept)]
    fewer = [trial for trial in report.trials if len(trial.kept) == len(report.kept) - 1]
    assert fewer and fewer[0].reached < wanted
    assert report.integer_products[0].quantized == 36 - len(report.kept)
    assert report.integer_products[0].integer == 36 - len(report.kept)


def test_an_accuracy_out_of_reach_says_what_was_reached(golden_bundle, clips, tmp_path) -> None:
    options = CalibrationOptions(min_cosine=1.0, drift_frames=0)
    with pytest.raises(
        CalibrationError, match=r"--min-cosine 1: not reached; the best was 0\.99\d* with 18 of 36 layers"
    ):
        calibrate(Bundle.open(golden_bundle), clips, clips, tmp_path / "q.bundle", options)
    assert not list(tmp_path.iterdir())


def test_a_budget_for_layers_is_refused_where_none_becomes_int8(golden_bundle, clips, tmp_path) -> None:
    options = CalibrationOptions(("fp16", "fp32+kv8"), min_cosine=0.9)
    with pytest.raises(CalibrationError, match=r"--min-cosine: .* fp16, fp32\+kv8 has none; leave it out"):
        calibrate(Bundle.open(golden_bundle), clips, clips, tmp_path / "q.bundle", options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"max_drop": float("nan")}, "--max-drop: expected 0 to 100, found nan"),
        ({"max_drop": -1}, "--max-drop: expected 0 to 100, found -1"),
        ({"min_cosine": 1.5}, "--min-cosine: expected -1 to 1, found 1.5"),
        ({"max_drop": 1, "min_cosine": 0.9}, "--max-drop and --min-cosine: give one of them"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_first(golden_bundle, clips, tmp_path, budget, message) -> None:
    with pytest.raises(CalibrationError, match=f"^{message}$"):
        calibrate(Bundle.open(golden_bundle), clips, clips, tmp_path / "q.bundle", CalibrationOptions(**budget))
    assert not list(tmp_path.iterdir())


def test_a_quantized_bundle_is_not_quantized_again(golden_bundle, clips, tmp_path) -> None:
    bundle = Bundle.open(golden_bundle)
    calibrate(bundle, clips, clips, tmp_path / "q.bundle", CalibrationOptions(drift_frames=0))
    with pytest.raises(CalibrationError, match="is quantized already"):
        calibrate(Bundle.open(tmp_path / "q.bundle"), clips, clips, tmp_path / "r.bundle", CalibrationOptions())


def test_an_overflow_in_fp16_is_named(golden_bundle, clips, tmp_path) -> None:
    bundle = Bundle.open(golden_bundle)
    model = onnx.load(bundle.file("backbone.onnx"))
    for name in ("layer1.mlp.fc1.weight", "layer1.mlp.fc1.bias"):
        set_initializer(model, name, initializer(model, name) * 60000)
    set_initializer(model, "layer1.mlp.fc2.weight", initializer(model, "layer1.mlp.fc2.weight") / 60000)
    with BundleWriter(tmp_path / "large.bundle") as writer:
        onnx.save(model, writer.folder / "backbone.onnx", save_as_external_data=True, location="backbone.bin")
        graphs = {"backbone": bundle.manifest.graphs["backbone"]}
        writer.finish(replace(bundle.manifest, graphs=graphs))
    options = CalibrationOptions(("fp16",), drift_frames=0)
    with pytest.raises(
        CalibrationError, match=r"fp16: NaN or infinity at.*backbone reaches .* in layer1/layer1\.mlp\.fc1"
    ):
        calibrate(Bundle.open(tmp_path / "large.bundle"), clips, clips, tmp_path / "half.bundle", options)


def test_kept_layers_get_the_exact_value_where_others_share_their_input(golden_bundle) -> None:
    from framestep.calibration.observe import Activation

    model = onnx.load(golden_bundle / "backbone.onnx")
    one = Activation(1.0, 1.0, np.ones(1, np.float32), np.ones((1, 1), np.float32))
    activations = {linear.input: one for linear in linears(model)}
    quantize(model, activations, keep=("layer0.temporal.key",))
    node = next(node for node in model.graph.node if node.name.endswith("layer0.temporal.key.MatMul"))
    assert node.input[0] == "layer0/layer0.temporal_norm"


def test_a_label_graph_that_shares_weights_shares_them_quantized_too(quantized) -> None:
    with Session(Bundle.open(quantized[0]), outputs=("pooled",)) as session:
        bundle = session.bundle
    tensors = {}
    for name in ("backbone", "patch_label"):
        model = onnx.load(bundle.file(bundle.manifest.graphs[name].file), load_external_data=False)
        tensors[name] = {
            item.name: {entry.key: entry.value for entry in item.external_data} for item in model.graph.initializer
        }
    shared = "pooling.value.weight.int8"
    assert tensors["backbone"][shared] == tensors["patch_label"][shared]
