"""Reading decoder checkpoints, `framestep export` of them, and what it says of bad ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import decoder_models
import dialogue_models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from framestep.apps.cli import app
from framestep.apps.inspect import describe
from framestep.apps.run_options import RunOptions, plan_run
from framestep.export import decoder_export
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.export.labelling import LabelOptions, label_bundle
from framestep.export.vision import VisionConfig
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import CheckpointError, FramestepError
from framestep.runtime.text import LabelError


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")


@pytest.fixture
def pictured(tmp_path) -> Path:
    return decoder_models.save(decoder_models.qwen2_5_vl(), tmp_path / "pictured")


def change(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")


def test_the_command_line_knows_the_family(pictured, tmp_path):
    decoder_models.save_tokenizer(pictured)
    out = tmp_path / "out.bundle"
    options = ["--capacity", "64", "--frame-size", "56x84", "--precision", "w8", "--rate", "1"]
    result = CliRunner().invoke(app, ["export", str(pictured), "-o", str(out), *options])
    assert "over 14 tokens" in result.output, result.exception
    manifest = Bundle.open(out).manifest
    language = manifest.language
    assert (manifest.family, manifest.precision, manifest.rate, manifest.grid) == ("qwen2_5_vl", "w8", 1.0, (2, 3))
    assert (manifest.frame.height, manifest.frame.width, manifest.frame.resize) == (56, 84, "letterbox")
    assert {state.kind for state in manifest.states} == {"linear"}
    assert (language.visual, language.positions, language.chunk, language.stop) == ("visual", 512, 64, (2,))
    states = {"silence": 290, "standby": 291, "response": 292}
    assert language.tokens == {"image": 300, "vision_start": 301, "vision_end": 302, **states}
    assert manifest.files[language.tokenizer].bytes > 0


@pytest.mark.parametrize(
    "states, capacity, note",
    [
        (
            True,
            512,
            r"\nnote: the cache of 512 tokens holds no dialogue: the system prompt takes \d+, a turn \d+; export",
        ),
        (
            False,
            64,
            r"\nnote: the checkpoint has no tokens for silence, standby and response: the model answers questions",
        ),
        (None, 64, r"\nnote: the checkpoint has no tokenizer.json: the bundle can neither read nor write"),
    ],
)
def test_an_export_tells_what_keeps_a_model_from_a_dialogue(pictured, tmp_path, states, capacity, note):
    if states is not None:
        dialogue_models.byte_tokenizer(states).save(str(pictured / "tokenizer.json"))
    options = ["--capacity", str(capacity), "--frame-size", "28x56", "-o", str(tmp_path / "out.bundle")]
    result = CliRunner().invoke(app, ["export", str(pictured), *options])
    assert re.search(note, result.stdout)
    assert result.stdout.count("\n") == 2


@pytest.mark.parametrize("capacity, often", [(1600, True), (1000, False)])
def test_an_export_tells_of_a_cache_whose_positions_run_out_in_every_turn(pictured, tmp_path, capacity, often):
    dialogue_models.byte_tokenizer().save(str(pictured / "tokenizer.json"))
    values = json.loads((pictured / "config.json").read_text("utf-8"))["text_config"]
    change(pictured, text_config={**values, "max_position_embeddings": 1600})
    options = ["--capacity", str(capacity), "--frame-size", "28x56", "-o", str(tmp_path / "out.bundle")]
    result = CliRunner().invoke(app, ["export", str(pictured), *options])
    notes = re.findall(
        r"^note: the cache of 1600 tokens .* \(1600\): .* in every turn; with --capacity (\d+) ", result.stdout, re.M
    )
    assert bool(notes) == often
    found = []
    for room in map(int, [capacity, *notes]):
        again = ["--force", *options, "--capacity", str(room), "--json"]
        assert CliRunner().invoke(app, ["export", str(pictured), *again]).exit_code == 0
        source = "synthetic:frames=60,fps=1,width=56,height=28"
        talk = CliRunner().invoke(app, ["chat", str(tmp_path / "out.bundle"), "-s", source, "--json"])
        found.append(json.loads(talk.stdout)["rebased"])
    assert found[0] > 20 and found[1] < 10 if often else found[0] < 10


def test_older_files_have_flat_configs_and_other_prefixes(pictured, tmp_path):
    """As the hub's Qwen2.5-VL and Streamo are stored."""
    values = json.loads((pictured / "config.json").read_text("utf-8"))
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    weights = load_file(pictured / "model.safetensors")
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    moved = {}
    for key, value in weights.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), "")
        moved[names.get(prefix, "") + key.removeprefix(prefix)] = value
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({**text, **values, "model_type": "qwen2_5_vl"}), "utf-8")
    save_file(moved, old / "model.safetensors")
    first, second = read_decoder_checkpoint(str(pictured)), read_decoder_checkpoint(str(old))
    assert first.decoder.config == second.decoder.config
    for name, weight in first.decoder.state_dict().items():
        assert torch.equal(weight, second.decoder.state_dict()[name])
    for name, weight in first.vision.state_dict().items():
        assert torch.equal(weight, second.vision.state_dict()[name])


def test_shards_are_one_checkpoint_and_weights_stay_as_they_are_stored(tmp_path):
    model = decoder_models.qwen2().to(torch.bfloat16)
    folder = decoder_models.save(model, tmp_path / "sharded", shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    read = read_decoder_checkpoint(str(folder)).decoder
    assert {weight.dtype for weight in read.parameters()} == {torch.bfloat16}
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported decoders are qwen2"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive integer"),
        ({"use_sliding_window": True}, "use_sliding_window is True; such decoders are not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1; expected a number above 0"),
        ({"rope_parameters": {"mrope_section": [8, 8, 8]}}, "mrope_section is .*; expected three numbers, 8 in sum"),
        ({"rope_parameters": {"mrope_section": [2, 3, 3]}}, "only qwen2_5_vl has multimodal positions"),
        ({"hidden_act": "sine"}, "hidden_act 'sine' is unknown"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"quantized already \(quant_method awq\); export .* --precision w8",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a small number"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"vocab_size": 300}, "wrong shape model.embed_tokens.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(checkpoint, keys, message):
    change(checkpoint, **keys)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_decoder_checkpoint(str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("patch_size", 15, "window_size 56 is not a multiple of patch_size 15"),
        ("depth", 0, "vision_config.depth is 0; expected a positive integer"),
        ("out_hidden_size", 32, "out_hidden_size 32 is not the decoder's hidden_size 64"),
        ("num_heads", 3, "hidden_size 32 is not a multiple of four times num_heads 3"),
        ("fullatt_block_indexes", 1, "fullatt_block_indexes is 1; expected a list"),
    ],
)
def test_a_vision_config_that_does_not_fit_is_refused(pictured, key, value, message):
    values = json.loads((pictured / "config.json").read_text("utf-8"))
    change(pictured, vision_config={**values["vision_config"], key: value})
    with pytest.raises(CheckpointError, match=message):
        read_decoder_checkpoint(str(pictured))


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    decoder_models.save_tokenizer(checkpoint, words=decoder_models.VOCABULARY)
    with pytest.raises(CheckpointError, match="the tokenizer does not belong to the weights: it has 323 tokens"):
        read_decoder_checkpoint(str(checkpoint))


def test_a_checkpoint_without_streamos_tokens_has_none(checkpoint):
    decoder_models.save_tokenizer(checkpoint, states=False)
    assert read_decoder_checkpoint(str(checkpoint)).tokens == {}


@pytest.mark.parametrize("options, message", [
    (("--capacity", 513), "--capacity: expected 14 to 512 tokens, as many as there are positions, found 513"),
    (("--capacity", 13), "--capacity: expected 14 to 512 tokens, as many as there are positions, found 13"),
    (("--chunk", 0), "--chunk: expected at least 1 token, found 0"),
    (("--precision", "int8"), "--precision: expected fp32, fp16, w8, w4, fp16+w4, found 'int8'"),
    (("--frame-size", "56x80"), "--frame-size: expected multiples of 28 pixels, found 56x80"),
    (("--window", 8), "--window: a qwen2_5_vl has no ring of frames"),
    (("--rate", -1), "--rate: expected frames a second above 0, found -1"),
    (("--image-size", 56), "--image-size: only a StreamFormer has it"),
    (("--vision-tower", "x/y"), "--vision-tower: a qwen2_5_vl has none to choose"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_in_one_line(pictured, tmp_path, options, message):
    result = CliRunner().invoke(app, ["export", str(pictured), "-o", str(tmp_path / "out.bundle"), *map(str, options)])
    assert isinstance(result.exception, CheckpointError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out.bundle").exists()


def test_a_bundle_that_disagrees_is_not_kept(checkpoint, tmp_path, monkeypatch):
    read = read_decoder_checkpoint(str(checkpoint))
    write = decoder_export.write_decoder

    def damaged(decoder, *arguments):
        turned = replace(decoder.config.rope, theta=500.0)
        monkeypatch.setattr(decoder, "config", replace(decoder.config, rope=turned))
        written = write(decoder, *arguments)
        monkeypatch.undo()
        return written

    monkeypatch.setattr(decoder_export, "write_decoder", damaged)
    with pytest.raises(FramestepError, match="not kept, the bundle has a relative error of"):
        export_decoder(read, tmp_path / "out.bundle", DecoderOptions(capacity=64))
    assert not (tmp_path / "out.bundle").exists()


def test_the_frame_is_the_largest_within_the_references_pixels(pictured):
    config = read_decoder_checkpoint(str(pictured)).vision.config
    assert isinstance(config, VisionConfig)
    height, width = config.default_frame()
    assert (height, width) == (224, 420)  # what the reference's rounding makes of 16:9
    assert height * width <= 100_352
    assert np.all(np.array([height, width]) % config.unit == 0)


def test_other_commands_say_what_a_decoder_bundle_is(checkpoint, pictured, tmp_path):
    decoder_models.save_tokenizer(pictured)
    bundles = {}
    for name, folder in (("blind", checkpoint), ("seeing", pictured)):
        size = (56, 84) if name == "seeing" else None
        options = DecoderOptions(capacity=64, frame_size=size)
        bundles[name] = export_decoder(read_decoder_checkpoint(str(folder)), tmp_path / name, options).path
    (tmp_path / "labels.txt").write_text("a cat\n", "utf-8")
    seeing, blind = (Bundle.open(bundles[name]) for name in ("seeing", "blind"))
    told = describe(seeing)["language"]
    assert (told["capacity"], told["positions"], told["chunk"], told["decides"]) == (64, 512, 64, True)
    assert told["frames"] is None
    assert describe(blind)["language"]["decides"] is False
    with pytest.raises(FramestepError, match="a qwen2 sees no frames"):
        plan_run(RunOptions(bundle=blind.path, sources=("synthetic",), engine="auto", device="auto"), blind.manifest)
    assert plan_run(
        RunOptions(bundle=seeing.path, sources=("synthetic",), engine="auto", device="auto"), seeing.manifest
    ).fetched == ("visual",)
    with pytest.raises(LabelError, match="a qwen2_5_vl scores no labels"):
        label_bundle(seeing, LabelOptions(("a cat",), text_embeddings=tmp_path / "none"))
    result = CliRunner().invoke(app, ["calibrate", str(seeing.path), "-v", "synthetic", "-o", str(tmp_path / "int8")])
    assert "has a decoder; choose its precision when it is exported" in str(result.exception)
