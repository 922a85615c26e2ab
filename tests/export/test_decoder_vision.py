"""Qwen2.5-VL against `transformers`: what the tower sees, and what the decoder makes of several pictures."""

from __future__ import annotations

import inspect
from pathlib import Path

import decoder_models
import golden
import numpy as np
import pytest
import torch
from decoder_models import IMAGE, VISION_END, VISION_START
from transformers import Qwen2VLImageProcessor

from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.export.decoder_replay import EXACT_LEVEL, DecoderRun
from framestep.export.precision import Precision
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import FramestepError
from framestep.runtime.session import Session

SIZE = (84, 112)


def export(model: object, folder: Path, size: tuple[int, int] | None, precision: str = "fp32") -> Bundle:
    if not (folder / "checkpoint").exists():
        decoder_models.save(model, folder / "checkpoint")
    checkpoint = read_decoder_checkpoint(str(folder / "checkpoint"))
    path = folder / f"{size}.bundle"
    options = DecoderOptions(precision, capacity=64, frame_size=size)
    return Bundle.open(export_decoder(checkpoint, path, options).path)


def processed(frames: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the processor makes of frames: patches and the grid of each frame."""
    pixels = frames[0].shape[0] * frames[0].shape[1]
    processor = Qwen2VLImageProcessor(size={"shortest_edge": pixels, "longest_edge": pixels})
    found = processor([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, frames[0].shape[0] // 14, frames[0].shape[1] // 14]] * len(frames)
    return found["pixel_values"], found["image_grid_thw"]


def random_frames(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8))


@pytest.fixture(scope="module")
def model():
    return decoder_models.qwen2_5_vl()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


# one window; windows of equal size; short ones at the right, below, and at both
@pytest.mark.parametrize("size", [(56, 56), (112, 168), (56, 84), (84, 56), (140, 84)], ids=str)
def test_what_is_seen_is_that_of_transformers(model, folder, size):
    bundle = export(model, folder, size)
    assert bundle.manifest.grid == (size[0] // 28, size[1] // 28)
    frames = random_frames(3, size)
    with torch.inference_mode():
        expected = model.model.visual(*processed(frames)).pooler_output.numpy()
    with Session(bundle, streams=3, outputs=("visual",)) as session:
        streams = [session.open_stream() for _ in frames]
        results = session.step(dict(zip(streams, frames, strict=True)))
    found = np.concatenate([results[stream]["visual"] for stream in streams])
    golden.assert_close(found, expected)


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_beside_integer_weights_the_tower_has_eight_bits(tmp_path, precision):
    model = decoder_models.qwen2_5_vl()
    tower = model.model.visual
    with torch.no_grad():
        for block in tower.blocks:
            block.attn.qkv.bias[-32:] = 0  # it goes through the output's weights before these are rounded
    bundle = export(model, tmp_path, SIZE, precision)
    linears = [part for part in tower.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 3 * 5 + 2
    with torch.no_grad():
        for linear in linears:
            linear.weight.copy_(decoder_models.rounded(linear.weight))
        (frame,) = random_frames(1, SIZE)
        expected = tower(*processed([frame])).pooler_output.numpy()
    golden.assert_close(DecoderRun(bundle, EXACT_LEVEL).see(frame)[0], expected)
    with Session(bundle, outputs=("visual",)) as session, session.open_stream() as stream:
        found = stream.step(frame)["visual"]
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_a_tower_that_sees_something_else_is_not_kept(tmp_path, monkeypatch):
    def write(self, g, name, weight, *stored):
        return original(self, g, name, weight * 2 if name == "merger.fc1" else weight, *stored)

    original = Precision._weight
    monkeypatch.setattr(Precision, "_weight", write)
    with pytest.raises(FramestepError, match=r"not kept, .* against PyTorch in what it sees .* in w8"):
        export(decoder_models.qwen2_5_vl(), tmp_path, SIZE, "w8")


@pytest.mark.parametrize("chunk", [100, 9, 1])
def test_logits_over_several_pictures_are_those_of_transformers(model, folder, chunk):
    bundle = (
        export(model, folder, SIZE)
        if not (folder / f"{SIZE}.bundle").exists()
        else Bundle.open(folder / f"{SIZE}.bundle")
    )
    frames = random_frames(2, SIZE)
    rows, columns = bundle.manifest.grid
    generator = np.random.default_rng(1)
    picture = [VISION_START, *[IMAGE] * (rows * columns), VISION_END]
    text = [generator.integers(0, 290, count).tolist() for count in (5, 4, 7)]
    tokens = np.array([[*text[0], *picture, *text[1], *picture, *text[2]]])
    pixels, grids = processed(frames)
    ids, kinds = torch.from_numpy(tokens), torch.from_numpy((tokens == IMAGE).astype(np.int64))
    with torch.inference_mode():
        given = {"mm_token_type_ids": kinds, "image_grid_thw": grids}
        taken = inspect.signature(model.model.get_rope_index).parameters  # early versions look at the tokens themselves
        given = {name: value for name, value in given.items() if name in taken}
        positions, _ = model.model.get_rope_index(ids, **given)
        expected = model(ids, pixel_values=pixels, **given).logits[0].numpy()
    run = DecoderRun(bundle)
    embeddings = run.embed(tokens)
    with Session(bundle, outputs=("visual",)) as session, session.open_stream() as stream:
        embeddings[tokens == IMAGE] = np.concatenate([stream.step(frame)["visual"] for frame in frames])
    position_ids = positions.permute(1, 0, 2).numpy()
    assert len(np.unique(position_ids[0], axis=1).T) > tokens.shape[1] / 2  # rows and columns turn on their own
    for at in range(0, tokens.shape[1], chunk):
        stop = min(at + chunk, tokens.shape[1])
        logits = run.step(embeddings[:, at:stop], position_ids[:, :, at:stop], at, np.arange(64) < at)
        golden.assert_close(logits, expected[stop - 1])
