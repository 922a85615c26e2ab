"""The figures of the accuracy report, from frames of which all is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

import framestep
from framestep.calibration import calibrate as calibrate_module
from framestep.calibration.calibrate import CalibrationOptions
from framestep.calibration.clips import Clip
from framestep.calibration.compare import Comparison, compare
from framestep.calibration.errors import CalibrationError
from framestep.calibration.observe import Activation
from framestep.calibration.report import Accuracy, Drift
from framestep.calibration.sensitivity import LayerNoise, layer_noise
from framestep.runtime.bundle import Bundle

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"


def at(precision: str) -> Bundle:
    whole = Bundle.open(STEPS)
    return Bundle(STEPS, whole.manifest.at(precision))


def found(cosine: np.ndarray, **changes) -> Comparison:
    values = {"agrees": None, "reference_hits": None, "hits": None, "reference_ms": 2.0, "ms": 1.0}
    return Comparison(age=np.arange(len(cosine)), cosine=cosine, **{**values, **changes})


def hits(right: int, of: int = 200) -> np.ndarray:
    return np.arange(of) < right


def test_two_precisions_are_compared_frame_by_frame_and_afresh_with_every_clip() -> None:
    rng = np.random.default_rng(0)
    clips = [
        Clip(str(count), rng.integers(0, 256, (count, 64, 64, 3), np.uint8), rng.integers(0, 3, count))
        for count in (12, 5)
    ]
    steps = {}
    for precision in ("fp32", "int8"):
        with framestep.load(STEPS, precision=precision, outputs=("pooled", "scores")) as session:
            streams = []
            for clip in clips:
                with session.open_stream() as stream:
                    streams += [stream.step(rgb) for rgb in clip.frames]
        steps[precision] = streams
    exact, rounded = (np.stack([step["pooled"] for step in steps[precision]]) for precision in steps)
    best, second = (np.array([step["scores"].argmax() for step in steps[precision]]) for precision in steps)
    truth = np.concatenate([clip.truth for clip in clips])

    comparison = compare(at("fp32"), at("int8"), clips)
    assert comparison.age.tolist() == [*range(12), *range(5)]
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    np.testing.assert_allclose(comparison.cosine, (exact * rounded).sum(axis=1) / lengths, atol=1e-6)
    assert comparison.cosine.min() < 1 - 1e-6
    assert np.array_equal(comparison.agrees, best == second)
    assert np.array_equal(comparison.reference_hits, best == truth)
    assert np.array_equal(comparison.hits, second == truth)
    assert compare(at("fp32"), at("int8"), [clips[0], Clip("no truth", clips[1].frames)]).hits is None


def test_accuracy_is_told_in_shares_of_the_frames() -> None:
    cosine = np.linspace(0.98, 1.0, 200)
    comparison = found(cosine, agrees=hits(150), reference_hits=hits(190), hits=hits(180))
    told = Accuracy.of("int8", comparison, at("int8"), at("fp32"), timed=True)
    assert (told.frames, told.cosine, told.lowest_cosine) == (200, 0.99, 0.98)
    assert (told.agreement, told.reference_accuracy, told.accuracy) == (0.75, 0.95, 0.9)
    assert comparison.drop == 5.0  # to the last bit: a limit of 5 allows it
    assert (told.reference_ms, told.ms) == (2.0, 1.0)
    assert told.bytes < told.reference_bytes
    untimed = Accuracy.of("int8", found(cosine), at("int8"), at("fp32"), timed=False)
    assert (untimed.reference_ms, untimed.ms, untimed.agreement, untimed.accuracy) == (None, None, None, None)
    assert found(cosine).drop is None


def test_drift_is_told_by_age() -> None:
    cosine = 1 - 1e-5 * np.arange(1150)
    drift = Drift.of("int8", found(cosine, agrees=np.arange(1150) >= 75))
    assert [(group.first, group.frames) for group in drift.groups] == [
        (0, 16), (16, 34), (50, 50), (100, 150), (250, 250), (500, 250), (750, 250), (1000, 150),
    ]  # fmt: skip
    assert [group.cosine for group in drift.groups[:3]] == pytest.approx([0.999925, 0.999675, 0.999255], abs=1e-6)
    assert [group.agreement for group in drift.groups[:4]] == [0, 0, 0.5, 1]
    # frames 50 to 149 and 1000 to 1099
    assert (drift.early_cosine, drift.late_cosine) == pytest.approx((0.999005, 0.989505), abs=1e-6)
    assert (drift.early_agreement, drift.late_agreement) == (0.75, 1)
    assert drift.slope == pytest.approx(-0.01)


def test_drift_of_a_short_stream_is_told_of_what_there_is() -> None:
    cosine = np.where(np.arange(130) < 30, 0.5, 1.0)
    drift = Drift.of("int8", found(cosine))
    assert [(group.first, group.frames) for group in drift.groups] == [(0, 16), (16, 34), (50, 50), (100, 30)]
    assert (drift.early_cosine, drift.late_cosine, drift.slope) == (1.0, 1.0, 0.0)  # its last hundred frames
    assert (drift.early_agreement, drift.groups[0].agreement) == (None, None)


@pytest.mark.parametrize(("max_drop", "kept"), [(5.25, 0), (4.75, 1), (2.25, 3), (0.0, 5)])
def test_max_drop_leaves_the_fewest_layers_in_float_that_lose_no_more(monkeypatch, max_drop, kept) -> None:
    asked = choose(monkeypatch, max_drop)
    assert asked[-1].kept == tuple(f"layer{number}" for number in range(kept))
    assert -asked[-1].reached <= max_drop


def test_a_drop_that_cannot_be_kept_is_an_error_with_what_was_reached(monkeypatch) -> None:
    with pytest.raises(CalibrationError, match="--max-drop -1: not reached; the best was 0 with 5 of 10 layers"):
        choose(monkeypatch, -1.0)


def choose(monkeypatch, max_drop: float) -> list:
    """The trials with ten layers, the noisiest first, where so many points are lost with so many in float."""
    lost = {0: 5.0, 1: 4.5, 2: 2.5, 3: 2.0, 4: 1.0, 5: 0.0}
    quantized = []

    def write(folder, bundle, models, seen, kept, options):
        quantized.append(len(kept))
        return at("fp32").manifest, []

    def comparison(reference, other, clips):
        return found(np.ones(200), reference_hits=hits(180), hits=hits(180 - round(2 * lost[quantized[-1]])))

    monkeypatch.setattr(calibrate_module, "_write", write)
    monkeypatch.setattr(calibrate_module, "compare", comparison)
    noise = [LayerNoise("backbone", f"layer{number}", 10.0 + number, 1.0, 1.0) for number in range(10)]
    noise.insert(0, LayerNoise("patch_label", "projection", 1.0, 1.0, 1.0))  # no budget sees what it gives
    options = CalibrationOptions(max_drop=max_drop)
    trials, compared = calibrate_module._choose(at("fp32"), {}, {}, noise, [], options, lambda line: None)
    assert set(compared) == {("int8", trial.kept) for trial in trials}
    return trials


def test_the_noise_of_a_layer_is_that_of_rounding_its_input_and_its_weight() -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (20_000, 8)).astype(np.float32)
    # one is 127 steps of a column; what lies half-way between two of them is half a step off
    half_way = np.eye(8) + 0.5 / 127 * np.roll(np.eye(8), 1, axis=0)
    weights = {"exact": np.eye(8), "rounded": half_way, "cut": np.eye(8)}
    inputs = {"exact": "whole", "rounded": "whole", "cut": "narrow"}
    nodes = [helper.make_node("MatMul", [inputs[name], f"{name}.weight"], [name], name=name) for name in weights]
    tensors = [numpy_helper.from_array(value.astype(np.float32), f"{name}.weight") for name, value in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    seen = {
        "whole": Activation(amax=1.0, largest=1.0, channels=np.ones(8), rows=rows),
        "narrow": Activation(amax=0.5, largest=1.0, channels=np.ones(8), rows=rows),
    }
    noise = layer_noise({"backbone": model}, {"backbone": seen})
    assert [item.layer for item in noise] == ["cut", "rounded", "exact"]  # the noisiest first
    # the signal has 1/3, rounding 1/12 of a square step, a weight half a step off 1/4 of 1/3, cutting at 1/2 has 1/24
    expected = [10 * np.log10(ratio) for ratio in (8, 2 * 127**2, 4 * 127**2)]
    assert [item.decibels for item in noise] == pytest.approx(expected, abs=0.15)
    assert [(item.amax, item.largest) for item in noise] == [(0.5, 1.0), (1.0, 1.0), (1.0, 1.0)]
