"""Resizing against PyTorch's own antialiased interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestep.runtime.manifest import FrameSpec
from framestep.runtime.preprocess import Preprocess


def reference(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def resized(rgb: np.ndarray, spec: FrameSpec) -> np.ndarray:
    out = np.full((spec.height, spec.width, 3), 7, np.uint8)
    Preprocess(spec)(rgb, out)
    return out


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_stretch_equals_the_reference(height, width):
    rgb = noise(height, width)
    assert np.abs(resized(rgb, FrameSpec(64, 48, "stretch")) - reference(rgb, 64, 48)).max() <= 0.51


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1280, 720), (180, 320), (100, 90), (224, 500), (37, 40)])
def test_crop_resizes_the_short_side_and_takes_the_centre(height, width):
    rgb = noise(height, width)
    if width >= height:
        new = (224, 224 * width // height)
        left = round((new[1] - 224) / 2)
        expected = reference(rgb, *new)[:, left : left + 224]
    else:
        new = (224 * height // width, 224)
        top = round((new[0] - 224) / 2)
        expected = reference(rgb, *new)[top : top + 224]
    assert np.abs(resized(rgb, FrameSpec(224, 224)) - expected).max() <= 0.51


def test_letterbox_keeps_the_whole_frame_between_grey_bars():
    rgb = noise(180, 320)
    out = resized(rgb, FrameSpec(224, 224, "letterbox"))
    assert np.abs(out[49:175] - reference(rgb, 126, 224)).max() <= 0.51
    assert (out[:49] == 128).all()
    assert (out[175:] == 128).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_sliver_is_letterboxed_to_one_line(turned):
    rgb = noise(300, 1) if turned else noise(1, 300)
    out = resized(rgb, FrameSpec(64, 64, "letterbox"))
    if turned:
        out, rgb = out.transpose(1, 0, 2), rgb.transpose(1, 0, 2)
    assert np.abs(out[32] - reference(np.ascontiguousarray(rgb), 1, 64)[0]).max() <= 0.51
    assert (np.delete(out, 32, axis=0) == 128).all()


def test_a_rectangular_model_takes_a_frame_of_its_shape_without_a_crop():
    rgb = noise(180, 320)
    out = resized(rgb, FrameSpec(144, 256))
    assert np.abs(out - reference(rgb, 144, 256)).max() <= 0.51
    assert Preprocess(FrameSpec(144, 256)).region(180, 320) == (0, 0, 180, 320)


def test_a_frame_of_the_models_size_is_not_touched():
    rgb = noise(64, 64)
    assert np.array_equal(resized(rgb, FrameSpec(64, 64)), rgb)


def test_frames_that_are_views_are_read_rightly():
    rgb = noise(120, 200)
    bgr_reversed = np.ascontiguousarray(rgb[..., ::-1])[..., ::-1]
    padded = noise(140, 260)
    padded[5:125, 7:207] = rgb
    expected = resized(rgb, FrameSpec(64, 64))
    assert np.array_equal(resized(bgr_reversed, FrameSpec(64, 64)), expected)
    assert np.array_equal(resized(padded[5:125, 7:207], FrameSpec(64, 64)), expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (FrameSpec(224, 224, "crop"), (0, 280, 720, 720)),
        (FrameSpec(224, 224, "stretch"), (0, 0, 720, 1280)),
        (FrameSpec(224, 224, "letterbox"), (-280, 0, 1280, 1280)),
    ],
)
def test_region_tells_what_the_model_sees(spec, expected):
    assert Preprocess(spec).region(720, 1280) == pytest.approx(expected, abs=1.0)
