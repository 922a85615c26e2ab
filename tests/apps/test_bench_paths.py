"""The measured paths against the model's own definition, and how they keep time."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from framestep.apps.bench.paths import FramestepPath, PathSpec, frame_at
from framestep.apps.bench.pytorch_paths import (
    CompiledRing,
    GrowingCache,
    WholeClip,
    bidirectional_difference,
    plain_bidirectional,
)
from framestep.export.checkpoint import read_checkpoint


def spec(name: str, bundle: Path) -> PathSpec:
    return PathSpec(name, str(bundle), str(golden.CHECKPOINT), "auto", "cpu", 1)


def test_paths_with_a_past_give_the_reference_outputs(golden_bundle: Path) -> None:
    reference = golden.load()
    growing, clip = GrowingCache(spec("a", golden_bundle)), WholeClip(spec("b", golden_bundle), causal=True)
    for index in range(16):  # inside the window
        features, pooled = growing.step(reference["frames"][index])
        golden.assert_close(features, reference["last_hidden_state"][index])
        golden.assert_close(pooled, reference["pooler_output"][index])
    features, _ = clip._encode(reference["frames"][:16])
    golden.assert_close(features, reference["last_hidden_state"][15])


def test_growing_cache_remembers_beyond_the_window(golden_bundle: Path) -> None:
    reference = golden.load()
    path = GrowingCache(spec("a", golden_bundle))
    for index in range(24):
        features, _ = path.step(reference["frames"][index])
    golden.assert_close(features, reference["last_hidden_state"][23])
    assert float(np.abs(features - reference["window_last_hidden_state"][23]).max()) > golden.TOLERANCE


def test_eager_step_of_the_compiled_ring_gives_the_window_outputs(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # the compiler's own time is not for a test
    reference = golden.load()
    path = CompiledRing(spec("a", golden_bundle))
    path.reset()
    for index in range(20):
        features, _ = path.step(reference["frames"][index])
    golden.assert_close(features, reference["window_last_hidden_state"][19])


def test_bidirectional_agrees_with_its_definition_and_differs_from_causal(golden_bundle: Path) -> None:
    reference = golden.load()
    path = WholeClip(spec("a", golden_bundle), causal=False)
    assert bidirectional_difference(path, reference["frames"][:4]) < golden.TOLERANCE
    model = read_checkpoint(str(golden.CHECKPOINT)).model
    features, _ = plain_bidirectional(model, torch.from_numpy(reference["frames"][:4]))
    first = features[0].float().numpy()  # sees its future
    assert float(np.abs(first - reference["last_hidden_state"][0]).max()) > 10 * golden.TOLERANCE


def test_bidirectional_definition_of_one_frame_is_the_reference(golden_bundle: Path) -> None:
    reference = golden.load()
    model = read_checkpoint(str(golden.CHECKPOINT)).model
    features, pooled = plain_bidirectional(model, torch.from_numpy(reference["frames"][:1]))
    golden.assert_close(features[0].float().numpy(), reference["last_hidden_state"][0])
    golden.assert_close(pooled[0].float().numpy(), reference["pooler_output"][0])


def test_setting_the_clock_far_ahead_changes_nothing_but_the_clock(golden_bundle: Path) -> None:
    near, far = FramestepPath(spec("framestep", golden_bundle)), FramestepPath(spec("framestep", golden_bundle))
    for index in range(32):  # the ring is full of frames beyond the trained length
        near.step(frame_at(near.manifest, index))
        far.step(frame_at(far.manifest, index))
    far._filled = True
    far.seek(4096, float("inf"))  # the same slot of 16 as 32
    rgb = frame_at(near.manifest, 99)
    expected, found = near.step(rgb), far.step(rgb)
    assert near.stream.position == 33
    assert far.stream.position == 4097
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
