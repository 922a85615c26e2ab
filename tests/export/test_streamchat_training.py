"""StreamChat's PyTorch module: a whole sample at once, under the training mask; and making a checkpoint to train from."""

from __future__ import annotations

import json
import shutil

import decoder_models
import golden
import numpy as np
import pytest
import streamchat_models
import torch
from safetensors.torch import load_file, save_file
from streamchat_oracle import Oracle

from framestep.export.streamchat import visible_frames
from framestep.export.streamchat_checkpoint import create_streamchat, read_streamchat_checkpoint
from framestep.export.streamchat_export import StreamChatOptions, export_streamchat
from framestep.runtime.errors import CheckpointError, OutputError

TOKENS, FIRSTS = 9, (0, 2, 2, 5, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return streamchat_models.save(tmp_path_factory.mktemp("streamchat"))


def sample() -> tuple[np.ndarray, ...]:
    """tokens [T], positions [T], frames, times [M], visible [T, M]"""
    tokens = np.random.default_rng(0).integers(0, decoder_models.VOCABULARY, TOKENS)
    positions = np.arange(TOKENS) + np.where(np.arange(TOKENS) > 4, 3, 0)
    times = positions[np.minimum(FIRSTS, TOKENS - 1)]
    return tokens, positions, streamchat_models.random_frames(len(FIRSTS)), times, visible_frames(FIRSTS, TOKENS, 2)


def test_the_training_mask_shows_the_newest_frames():
    seen = [np.flatnonzero(row).tolist() for row in visible_frames(FIRSTS, TOKENS, 2)]
    assert seen == [[0], [0], [1, 2], [1, 2], [1, 2], [2, 3], [2, 3], [2, 3], [2, 3]]
    with pytest.raises(ValueError, match="before an older one"):
        visible_frames([3, 1], 5, 2)


def test_a_whole_sample_equals_the_oracle(checkpoint):
    model = read_streamchat_checkpoint(str(checkpoint)).model
    tokens, positions, frames, times, visible = sample()
    visible[0] = False
    arrays = (tokens, positions, frames, times, visible)
    with torch.inference_mode():
        found = model(*(torch.from_numpy(np.stack([array, array])) for array in arrays))
    expected = Oracle(checkpoint).logits(*arrays)
    golden.assert_close(found.numpy(), np.stack([expected, expected]))


def test_it_trains_as_it_stands(checkpoint):
    model = read_streamchat_checkpoint(str(checkpoint)).model.train()
    arrays = [torch.from_numpy(array[None]) for array in sample()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        logits = model(*arrays)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], arrays[0][0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # keys' biases add the same to a query's score with every key of text
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not [name for name in still if "k_proj.bias" not in name]
    assert losses[-1] < 0.7 * losses[0]


def test_a_new_checkpoint_has_copies_of_the_ffns_and_small_gates(tmp_path):
    decoder_models.save(streamchat_models.siglip(), tmp_path / "siglip")
    decoder_models.save(streamchat_models.qwen(num_hidden_layers=6), tmp_path / "qwen")
    decoder_models.save_tokenizer(tmp_path / "qwen", states=False)
    made = create_streamchat(str(tmp_path / "siglip"), str(tmp_path / "qwen"), tmp_path / "new")
    weights, old = load_file(made / "model.safetensors"), load_file(tmp_path / "qwen" / "model.safetensors")
    config = json.loads((made / "config.json").read_text("utf-8"))
    assert config["cross_layers"] == [0, 4]
    assert config["mrope_section"] == [2, 3, 3]
    for part in ("gate", "up", "down"):
        copied, source = f"cross_blocks.0.mlp.{part}_proj.weight", f"model.layers.0.mlp.{part}_proj.weight"
        assert torch.equal(weights[copied], old[source])
    assert torch.equal(weights["cross_blocks.0.norm.weight"], old["model.layers.0.post_attention_layernorm.weight"])
    gates = {name: float(value.abs().max()) for name, value in weights.items() if name.endswith("_gate")}
    assert set(gates) == {f"cross_blocks.{k}.{name}" for k, name in
                          ((0, "attention_gate"), (0, "mlp_gate"), (1, "attention_gate"))}  # fmt: skip
    assert all(0 < gate <= 0.01 + 1e-9 for gate in gates.values())
    checkpoint = read_streamchat_checkpoint(str(made))
    assert checkpoint.tokenizer is not None
    assert checkpoint.stop == (2,)


def test_one_number_is_a_gate_for_all_channels(checkpoint, tmp_path):
    folders = [shutil.copytree(checkpoint.parent, tmp_path / name) / "streamchat" for name in ("one", "many")]
    for folder, shape in zip(folders, ((), (64,)), strict=True):
        streamchat_models.change_weights(
            folder, lambda name, value, shape=shape: torch.full(shape, 0.5) if name.endswith("_gate") else value
        )
    one, many = (read_streamchat_checkpoint(str(folder)).model.state_dict() for folder in folders)
    assert all(torch.equal(one[name], many[name]) for name in many)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", ""])
def test_the_tower_of_a_paligemma_serves_too(tmp_path, prefix):
    decoder_models.save(streamchat_models.siglip(), tmp_path / "siglip")
    decoder_models.save(streamchat_models.qwen(), tmp_path / "qwen")
    weights = load_file(tmp_path / "siglip" / "model.safetensors")
    plain = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    folder = tmp_path / "paligemma"
    folder.mkdir()
    others = {
        "language_model.model.embed_tokens.weight": torch.zeros(4, 4),
        "multi_modal_projector.linear.bias": torch.zeros(4),
    }
    save_file({**{prefix + name: value for name, value in plain.items()}, **others}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "paligemma", "vision_config": streamchat_models.VISION})
    )
    made = create_streamchat(str(folder), str(tmp_path / "qwen"), tmp_path / "new")
    found = load_file(made / "model.safetensors")
    assert torch.equal(found["vision_model.post_layernorm.weight"], plain["post_layernorm.weight"])


BAD_CONFIGS = {
    "cross_layers": [
        ([0, 9], "cross_layers is [0, 9]; expected an ascending list of layers from 0 to 3"),
        ([2, 0], "cross_layers is [2, 0]; expected an ascending list"),
        ([], "cross_layers is []; expected an ascending list"),
        ("all", "cross_layers is 'all'; expected an ascending list"),
    ],
    "mrope_section": [
        ([2, 3, 4], "mrope_section is [2, 3, 4]; expected three numbers for time, row and column, 8 in sum")
    ],
    "num_key_value_heads": [(3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3")],
    "visual_positions": [("flat", "visual_positions is 'flat'; expected parallel or literal")],
    "vision_config": [
        (None, "vision_config is None; expected SigLIP's as an object"),
        (
            {**streamchat_models.VISION, "num_attention_heads": 3},
            "hidden_size 32 is not a multiple of num_attention_heads 3",
        ),
        ({**streamchat_models.VISION, "patch_size": 16}, "image_size 28 is not a multiple of patch_size 16"),
    ],
    "model_type": [("qwen2", "model_type is 'qwen2'; expected 'streamchat'")],
}


@pytest.mark.parametrize("key, value, message", [(key, *pair) for key, pairs in BAD_CONFIGS.items() for pair in pairs])
def test_configs_that_do_not_fit_are_told_in_one_line(checkpoint, tmp_path, key, value, message):
    values = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**values, key: value}), "utf-8")
    with pytest.raises(CheckpointError) as raised:
        read_streamchat_checkpoint(str(tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_weight_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["cross_blocks.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing cross_blocks.0.mlp.up_proj.weight"):
        read_streamchat_checkpoint(str(folder))


def test_creation_refuses_other_models_and_folders_that_exist(checkpoint, tmp_path):
    siglip, qwen = (str(checkpoint.parent / name) for name in ("siglip", "qwen"))
    with pytest.raises(OutputError, match="exists already"):
        create_streamchat(siglip, qwen, checkpoint)
    with pytest.raises(CheckpointError, match="model_type is 'siglip_vision_model'; StreamChat is made of a qwen2"):
        create_streamchat(siglip, siglip, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"cross_layers is \[7\]"):
        create_streamchat(siglip, qwen, tmp_path / "new", (7,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"window": 4, "rate": 5.0},
            "--window: 4 is less than one second of video at 5 frames a second; expected at least 5",
        ),
        ({"rate": 0.0}, "--rate: expected frames a second above 0, found 0"),
        ({"precision": "int8"}, "--precision: expected fp32, fp16, w8, w4, fp16+w4, found 'int8'"),
        ({"capacity": 0}, "--capacity: expected 1 to 32768 tokens"),
        ({"chunk": 0}, "--chunk: expected at least 1 token"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(checkpoint, tmp_path, options, message):
    with pytest.raises(CheckpointError) as raised:
        export_streamchat(read_streamchat_checkpoint(str(checkpoint)), tmp_path / "b", StreamChatOptions(**options))
    assert str(raised.value).startswith(message)
    assert not list(tmp_path.iterdir())
