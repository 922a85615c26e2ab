"""Ranges come from steps with live memory."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from golden import CHECKPOINT
from onnxruntime.quantization.calibrate import HistogramCollector

from framestep.calibration.clips import Clip
from framestep.calibration.entropy import entropy_threshold
from framestep.calibration.errors import CalibrationError
from framestep.calibration.observe import METHODS, observe
from framestep.calibration.smooth import smooth
from framestep.export.checkpoint import read_checkpoint
from framestep.export.half import centre_pixels
from framestep.export.linears import linears
from framestep.export.rewriting import initializer, set_initializer
from framestep.runtime.bundle import Bundle
from framestep.runtime.session import Session

WINDOW = 16


def clip(frames: int, seed: int = 0) -> Clip:
    rng = np.random.default_rng(seed)
    return Clip(f"noise {seed}", rng.integers(0, 256, (frames, 64, 64, 3), np.uint8))


def read_models(bundle: Bundle) -> dict:
    return {name: onnx.load(bundle.file(bundle.manifest.graphs[name].file)) for name in ("backbone", "patch_label")}


def test_ranges_are_those_of_plain_pytorch_with_its_memory_filled(golden_bundle) -> None:
    bundle = Bundle.open(golden_bundle)
    clips = [clip(24), clip(20, 1)]
    seen = observe(bundle, read_models(bundle), clips, "minmax")["backbone"]
    model = read_checkpoint(str(CHECKPOINT)).model
    largest = {}

    def note(name: str):
        def hook(module, inputs, output) -> None:
            largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

        return hook

    for index, layer in enumerate(model.encoder.layer):
        layer.temporal_layernorm.register_forward_hook(note(f"layer{index}/layer{index}.temporal_norm"))
        layer.layernorm_after.register_forward_hook(note(f"layer{index}/layer{index}.mlp_norm"))
    with torch.inference_mode():
        for item in clips:
            model(torch.from_numpy(item.frames)[None], None, WINDOW, 0)
    assert largest
    for name, value in largest.items():
        assert seen[name].amax == pytest.approx(value, rel=1e-3)


def test_an_empty_memory_gives_other_ranges(golden_bundle) -> None:
    bundle = Bundle.open(golden_bundle)
    models = {"backbone": read_models(bundle)["backbone"]}
    whole = clip(24)
    live = observe(bundle, models, [whole], "minmax")["backbone"]
    single = [Clip(str(i), whole.frames[i : i + 1]) for i in range(24)]  # a reset before each frame
    empty = observe(bundle, models, single, "minmax")["backbone"]
    name = next(linear.input for linear in linears(models["backbone"]) if linear.name == "layer2.temporal.output")
    assert live[name].amax != pytest.approx(empty[name].amax, rel=0.05)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "minmax"])
def test_histogram_methods_cut_outliers_off(golden_bundle, method) -> None:
    bundle = Bundle.open(golden_bundle)
    models = {"backbone": read_models(bundle)["backbone"]}
    seen = observe(bundle, models, [clip(24)], method, percentile=99.0)["backbone"]
    cut = [item for item in seen.values() if item.amax < 0.999 * item.largest]
    assert len(cut) > len(seen) / 2
    assert all(0 < item.amax <= item.largest * 1.01 for item in seen.values())


@pytest.mark.parametrize("seed", range(4))
def test_the_entropy_threshold_is_that_of_onnxruntime(seed) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 1, 4000), rng.normal(0, 6, 60), rng.gamma(2, 0.5, 900)]).astype(np.float32)
    collector = HistogramCollector("entropy", True, 512, 128, 99.9, "same")
    for part in np.split(values[:4800], 3):  # later parts reach further: the histogram grows
        collector.collect({"x": part})
    low, high, counts, edges = collector.compute_entropy()["x"]
    lowest, highest = collector.histogram_dict["x"][2:4]
    found = entropy_threshold(counts, edges, float(lowest), float(highest))
    assert found < float(max(abs(lowest), abs(highest)))
    assert found == pytest.approx(float(max(abs(low), abs(high))), rel=1e-6)


def test_nan_in_an_activation_names_the_layer(golden_bundle) -> None:
    bundle = Bundle.open(golden_bundle)
    models = {"backbone": read_models(bundle)["backbone"]}
    weight = initializer(models["backbone"], "layer1.mlp.fc1.weight")
    weight[3, 5] = np.nan
    set_initializer(models["backbone"], "layer1.mlp.fc1.weight", weight)
    with pytest.raises(CalibrationError, match=r"step 0: NaN or infinity enters layer1\.mlp\.fc2"):
        observe(bundle, models, [clip(8)], "minmax")


def test_a_layer_that_sees_only_zeros_is_refused(golden_bundle) -> None:
    bundle = Bundle.open(golden_bundle)
    models = {"backbone": read_models(bundle)["backbone"]}
    for name in ("layer1.mlp_norm.weight", "layer1.mlp_norm.bias"):
        set_initializer(models["backbone"], name, np.zeros(96, np.float32))
    with pytest.raises(CalibrationError, match=r"only zeros enter layer1\.mlp\.fc1"):
        observe(bundle, models, [clip(8)], "minmax")


def test_centred_pixels_and_smoothing_change_nothing_but_ranges(golden_bundle, tmp_path) -> None:
    from framestep.runtime.bundle import BundleWriter

    bundle = Bundle.open(golden_bundle)
    models = read_models(bundle)
    frames = clip(20)
    before = observe(bundle, models, [frames], "minmax")
    pixels = centre_pixels(models["backbone"])
    assert pixels is not None
    model = models["backbone"]
    # an outlier channel, and the columns that take it back
    for name in ("layer0.mlp_norm.weight", "layer0.mlp_norm.bias"):
        value = initializer(model, name)
        value[7] *= 50
        set_initializer(model, name, value)
    weight = initializer(model, "layer0.mlp.fc1.weight")
    weight[7] /= 50
    set_initializer(model, "layer0.mlp.fc1.weight", weight)
    outlying = observe(bundle, models, [frames], "minmax")["backbone"]
    changed = smooth(model, outlying)
    assert changed == 10  # three norms a layer and the pooling head's; the last norm's output is an output of the graph
    after = observe(bundle, models, [frames], "minmax")
    norm = "layer0/layer0.mlp_norm"
    assert after["backbone"][norm].amax < 0.2 * outlying[norm].amax
    assert after["backbone"][pixels].amax <= 128
    for name in ("layer0/Gelu", "layer2/Gelu"):
        assert after["backbone"][name].amax == pytest.approx(before["backbone"][name].amax, rel=1e-3)
    with BundleWriter(tmp_path / "changed.bundle") as writer:
        onnx.save(model, writer.folder / "backbone.onnx", save_as_external_data=True, location="backbone.bin")
        manifest = bundle.manifest
        from dataclasses import replace

        writer.finish(replace(manifest, graphs={"backbone": manifest.graphs["backbone"]}))
    with Session(bundle) as left, Session(Bundle.open(tmp_path / "changed.bundle")) as right:
        old, new = left.open_stream(), right.open_stream()
        for rgb in frames.frames:
            np.testing.assert_allclose(new.step(rgb)["features"], old.step(rgb)["features"], atol=2e-3)
