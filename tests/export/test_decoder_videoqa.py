"""VideoQA with StreamFormer against a plain composition of StreamFormer, projector and `transformers`."""

from __future__ import annotations

import decoder_models
import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import framestep
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.export.decoder_replay import EXACT_LEVEL, DecoderRun
from framestep.export.precision import Precision
from framestep.export.streamformer import StreamFormer, StreamFormerConfig
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import CheckpointError, FramestepError
from framestep.runtime.onnx_files import weight_blocks

SMALL = StreamFormerConfig((48, 48), 16, 8, 32, 2, 2, 64)  # 3 x 3 patches
EVEN = StreamFormerConfig((64, 64), 16, 8, 32, 2, 2, 64)


def reference(features: torch.Tensor, weights: dict[str, torch.Tensor], side: int, pooling: str, newline: str):
    """Embeddings of a clip's features [T, N, 32], as the reference puts them into the text."""
    w = {key.removeprefix("model.mm_projector."): value for key, value in weights.items()}
    x = F.linear(F.gelu(F.linear(features, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])
    x = x.transpose(1, 2).unflatten(2, (side, side))  # [T, D, side, side]
    if pooling == "bilinear":
        x = F.interpolate(x, size=[-(-side // 2)] * 2, mode="bilinear")
    else:
        x = {"average": F.avg_pool2d, "max": F.max_pool2d}[pooling](x, 2)
    end = w["model.image_newline"]
    rows = []
    for frame in x.permute(0, 2, 3, 1):  # [rows, columns, D]
        for row in frame:
            rows += [*row, end] if newline == "grid" else [*row]
        rows += [end] if newline == "frame" else []
    return torch.stack(rows + ([end] if newline == "one_token" else []))


CASES = [
    ("qwen2", EVEN, "average", "no_token"),
    ("llama", SMALL, "bilinear", "grid"),
    ("llama", SMALL, "max", "frame"),
    ("qwen2", EVEN, "max", "one_token"),
]


@pytest.mark.parametrize("kind, tower, pooling, newline", CASES, ids=lambda value: str(value)[:9])
def test_answers_while_frames_arrive_are_those_of_a_plain_composition(tmp_path, kind, tower, pooling, newline):
    decoder = getattr(decoder_models, kind)()
    model, projector = decoder_models.save_streamformer_videoqa(
        tmp_path, decoder, tower, kind == "llama", mm_spatial_pool_mode=pooling, mm_newline_position=newline
    )
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    options = DecoderOptions(capacity=96, window=4)
    bundle = Bundle.open(export_decoder(checkpoint, tmp_path / "out.bundle", options).path)
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (7, *tower.image_size, 3), np.uint8)
    seen, features, cache = [], [], None
    with framestep.load(bundle.path, outputs=("visual",)) as session, session.open_stream() as stream:
        for index, frame in enumerate(frames):
            seen.append(stream.step(frame)["visual"])
            with torch.inference_mode():
                new, _, cache = model(torch.from_numpy(frame)[None, None], cache, 4, index)
            features.append(new[0, 0])
            if index not in (2, 6):
                continue
            before, question = (generator.integers(0, 290, (1, count)) for count in (4, 6))
            clip = np.concatenate(seen[-4:])
            run = DecoderRun(bundle)
            if newline == "one_token":
                clip = np.concatenate([clip, run.embed(np.array([[bundle.manifest.language.tokens["newline"]]]))[0]])
            embeddings = np.concatenate([run.embed(before), clip[None], run.embed(question)], axis=1)
            length = embeddings.shape[1]
            logits = run.step(embeddings, np.arange(length)[None, None], 0, np.zeros(96, bool))
            with torch.inference_mode():
                table = decoder.get_input_embeddings()
                visual = reference(torch.stack(features[-4:]), projector, tower.grid[0], pooling, newline)
                inputs = torch.cat(
                    [table(torch.from_numpy(before)), visual[None], table(torch.from_numpy(question))], dim=1
                )
                expected = decoder(inputs_embeds=inputs).logits[0, -1].numpy()
            golden.assert_close(logits, expected)


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_beside_integer_weights_what_sees_has_eight_bits(tmp_path, precision):
    keys = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
    model, weights = decoder_models.save_streamformer_videoqa(
        tmp_path, decoder_models.qwen2(), EVEN, make=decoder_models.unfolded_streamformer, **keys
    )
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    options = DecoderOptions(precision, capacity=96, window=2)
    bundle = Bundle.open(export_decoder(checkpoint, tmp_path / "out.bundle", options).path)
    blocks = {graph: weight_blocks(bundle.file(f"{graph}.onnx")) for graph in ("backbone", "projector")}
    assert sum(blocks["backbone"].values()) == 2 * 10 + 5
    assert sum(blocks["projector"].values()) == 2
    decoder_models.round_streamformer(model)
    weights |= {key: decoder_models.rounded(value) for key, value in weights.items() if key.endswith(".weight")}
    frames = np.random.default_rng(0).integers(0, 256, (4, *EVEN.image_size, 3), np.uint8)
    with torch.inference_mode():
        features, _, _ = model(torch.from_numpy(frames)[None], None, 2, 0)
        expected = [reference(one[None], weights, 4, "average", "grid").numpy() for one in features[0]]
    run = DecoderRun(bundle, EXACT_LEVEL)
    for position, (frame, wanted) in enumerate(zip(frames, expected, strict=True)):
        golden.assert_close(run.see(frame, position)[0], wanted)
    with framestep.load(bundle.path, outputs=("visual",)) as session, session.open_stream() as stream:
        found = [stream.step(frame)["visual"] for frame in frames]
    error = np.linalg.norm(np.stack(found) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03  # the inputs of products are rounded too


@pytest.mark.parametrize("layer", ["layer1.temporal.key", "projector1"])
def test_a_tower_that_sees_something_else_is_not_kept(tmp_path, monkeypatch, layer):
    def write(self, g, name, weight, *stored):
        return original(self, g, name, weight * (-4) if name == layer else weight, *stored)

    original = Precision._weight
    monkeypatch.setattr(Precision, "_weight", write)
    decoder_models.save_streamformer_videoqa(tmp_path, decoder_models.qwen2(), EVEN)
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    with pytest.raises(FramestepError, match=r"not kept, .* against PyTorch in what it sees .* in w8"):
        export_decoder(checkpoint, tmp_path / "out.bundle", DecoderOptions("w8", capacity=96, window=4))


def test_the_tower_is_found_or_asked_for(tmp_path):
    decoder_models.save_streamformer_videoqa(
        tmp_path, decoder_models.qwen2(), EVEN, mm_vision_tower="checkpoints/streamformer-all"
    )
    with pytest.raises(CheckpointError, match="'checkpoints/streamformer-all', which is not here; .* --vision-tower"):
        read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "tower"))
    assert isinstance(checkpoint.tower.model, StreamFormer)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"mm_projector_type": "pooler"}, "mm_projector_type is 'pooler'; expected linear or mlp2x_gelu"),
        ({"mm_spatial_pool_mode": "median"}, "mm_spatial_pool_mode is 'median'; expected average, max, bilinear"),
        ({"mm_newline_position": "row"}, "mm_newline_position is 'row'; expected grid"),
        ({"mm_hidden_size": 48}, "wrong shape mm_projector.0.weight"),
        ({"mm_projector_type": "linear"}, "unexpected mm_projector.2"),
    ],
)
def test_a_projector_that_is_not_supported_is_refused(tmp_path, keys, message):
    decoder_models.save_streamformer_videoqa(tmp_path, decoder_models.qwen2(), EVEN, **keys)
    with pytest.raises(CheckpointError, match=message):
        read_decoder_checkpoint(str(tmp_path / "checkpoint"))
