"""Checkpoints in each form in which they are found, and what is said about bad ones."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file

from framestep.export import checkpoint_of, export_streamformer, read_checkpoint
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import CheckpointError


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_file(golden.CHECKPOINT / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to damage."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden.CHECKPOINT / name, target / name)
    return target


def outputs(checkpoint) -> torch.Tensor:
    frames = torch.from_numpy(golden.load()["frames"][None, :4])
    with torch.no_grad():
        return checkpoint.model(frames)[1]


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_published_checkpoint_gives_the_golden_outputs():
    arrays = golden.load()
    checkpoint = read_checkpoint(str(golden.CHECKPOINT))
    with torch.no_grad():
        features, pooled, _ = checkpoint.model(torch.from_numpy(arrays["frames"][None, :16]))
    golden.assert_close(features[0].numpy(), arrays["full_last_hidden_state"], 1e-5)
    golden.assert_close(pooled[0].numpy(), arrays["full_pooler_output"], 1e-5)


def test_sharded_checkpoint_is_the_same(folder, weights):
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(outputs(read_checkpoint(str(folder))), outputs(read_checkpoint(str(golden.CHECKPOINT))))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
            r"model-2\.safetensors: missing, but",
        ),
        ({"weight_map": {"a": "../outside.safetensors"}}, r"outside\.safetensors: missing, but"),  # it is there
        ({"weight_map": ["model-1.safetensors"]}, "weight_map should map weights to file names"),
        ({"weight_map": {"a": 1}}, "weight_map should map weights to file names"),
        ({}, "weight_map should map weights to file names"),
    ],
)
def test_an_index_of_shards_that_does_not_fit_is_named(folder, index, message):
    shutil.copyfile(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(folder))


def training_content(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    model = {f"timesformer.{key}": value for key, value in weights.items()}
    model["timesformer.encoder.layer.0.temporal_attention.attention.mask"] = torch.ones(16, 16)
    model["logit_scale"], model["logit_bias"] = torch.tensor(2.3), torch.tensor(-2.0)
    model["text_encoder.text_model.final_layer_norm.weight"] = torch.ones(4)
    model["task_heads.SSV2.logit_scale"] = torch.tensor(3.0)
    model["task_heads.SSV2.logit_bias"] = torch.tensor(-4.0)
    model["task_heads.SSV2.text_encoder.text_model.final_layer_norm.weight"] = torch.ones(4)
    model["task_heads.TaskVIS.head.probe"] = weights["head.probe"]
    return {"model": model, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("give", ["file", "folder", "config"])
def test_training_checkpoint_is_the_same(tmp_path, weights, suffix, give):
    file = tmp_path / f"checkpoint-3{suffix}"
    torch.save(training_content(weights), file)
    config = tmp_path / ("config.json" if give != "config" else "other.json")
    shutil.copyfile(golden.CHECKPOINT / "config.json", config)
    source = tmp_path if give == "folder" else file
    checkpoint = read_checkpoint(str(source), config if give == "config" else None)
    assert torch.equal(outputs(checkpoint), outputs(read_checkpoint(str(golden.CHECKPOINT))))
    assert sorted(checkpoint.heads) == ["SSV2"]  # TaskVIS holds a copy of the pooling head alone
    assert checkpoint.heads["SSV2"].logit_scale == 3.0
    assert checkpoint.heads["SSV2"].projections is None


class InMemory(torch.nn.Module):
    """As the reference implementation's: the backbone under `timesformer`, and a config of `transformers`' kind."""

    def __init__(self, values: dict[str, object]) -> None:
        super().__init__()
        self.timesformer = read_checkpoint(str(golden.CHECKPOINT)).model
        self.config = SimpleNamespace(to_dict=lambda: values)


@pytest.fixture
def in_memory() -> InMemory:
    return InMemory(json.loads((golden.CHECKPOINT / "config.json").read_text()))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel, torch.compile])
def test_a_model_in_memory_is_the_same_and_stays_as_it_is(in_memory, wrap):
    in_memory.train()
    found = checkpoint_of(wrap(in_memory.to(torch.float64)))
    torch.testing.assert_close(outputs(found), outputs(read_checkpoint(str(golden.CHECKPOINT))), rtol=0, atol=0)
    assert (found.origin, found.model.training) in [
        (name, False) for name in ("InMemory", "DataParallel", "OptimizedModule")
    ]
    assert in_memory.training and next(in_memory.parameters()).dtype == torch.float64


def test_a_model_in_memory_becomes_a_bundle(in_memory, tmp_path):
    report = export_streamformer(checkpoint_of(in_memory.timesformer), str(tmp_path / "mine.bundle"))
    assert report.difference < golden.TOLERANCE
    assert Bundle.open(tmp_path / "mine.bundle").manifest.origin.checkpoint == "StreamFormer"


def test_a_model_in_memory_needs_a_config_that_fits(in_memory):
    in_memory.config = None
    with pytest.raises(CheckpointError, match="^InMemory: has no config that says its sizes; give what config.json"):
        checkpoint_of(in_memory)
    with pytest.raises(CheckpointError, match="^InMemory.config: expected a StreamFormer"):
        checkpoint_of(in_memory, {"model_type": "vit"})
    with pytest.raises(CheckpointError, match="^Linear: the weights do not fit the config: missing"):
        checkpoint_of(torch.nn.Linear(2, 2), json.loads((golden.CHECKPOINT / "config.json").read_text()))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_file_of_a_wrapped_model_is_the_same(folder, weights, prefix):
    save_file({prefix + key: value for key, value in weights.items()}, folder / "model.safetensors")
    torch.testing.assert_close(
        outputs(read_checkpoint(str(folder))), outputs(read_checkpoint(str(golden.CHECKPOINT))), rtol=0, atol=0
    )


def test_merged_lora_is_the_same(folder, weights):
    for key in [key for key in weights if "_lora_a" in key]:
        base = key.replace("_lora_a", "")
        weights[base] = weights[base] + weights.pop(key.replace("_lora_a", "_lora_b")) @ weights.pop(key)
    save_file(weights, folder / "model.safetensors")
    expected = outputs(read_checkpoint(str(golden.CHECKPOINT)))
    assert torch.allclose(outputs(read_checkpoint(str(folder))), expected, atol=1e-5)


def test_every_misfit_is_listed_in_one_error(folder, weights):
    del weights["post_layernorm.bias"]
    weights["head.extra"] = torch.zeros(1)
    weights["head.probe"] = torch.zeros(1, 1, 95)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(str(folder))
    message = str(error.value)
    assert "missing post_layernorm.bias" in message
    assert "unexpected head.extra" in message
    assert "head.probe (expected [1, 1, 96], found [1, 1, 95])" in message
    assert "\n" not in message


def test_half_of_a_lora_is_missing_weights(folder, weights):
    del weights["encoder.layer.1.attention.output.dense_lora_b.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing encoder.layer.1.attention.output.dense_lora_b.weight"):
        read_checkpoint(str(folder))


def test_unknown_keys_beside_the_backbone_are_named(tmp_path, weights):
    content = training_content(weights)
    content["model"]["decoder.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="unexpected keys beside the backbone: decoder.weight"):
        read_checkpoint(str(tmp_path / "x.pt"), golden.CHECKPOINT / "config.json")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"weights": {"a": torch.zeros(1)}, "epoch": 3}, "the keys weights, epoch"),
        ({"model": {"epoch": 3}}, "the keys model"),
        ({}, "an empty dictionary"),
        ([torch.zeros(1)], "a list"),
    ],
)
def test_a_training_checkpoint_without_weights_says_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"x.pt: expected weights under the key 'model', found {found}$"):
        read_checkpoint(str(tmp_path / "x.pt"), golden.CHECKPOINT / "config.json")


class Harmful:
    def __reduce__(self):
        return (print, ("run while loading",))


def test_a_pickle_that_is_not_weights_is_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"model": Harmful()}))
    torch.save({"model": Harmful()}, tmp_path / "y.pt")
    for name, why in (("x.pt", "is not PyTorch's"), ("y.pt", r"names (builtins\.)?print")):
        with pytest.raises(CheckpointError, match=rf"{name}: refused, .* \(it {why}\)"):
            read_checkpoint(str(tmp_path / name), golden.CHECKPOINT / "config.json")
    assert "run while loading" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 100, 100_000])
def test_a_truncated_checkpoint_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_checkpoint(str(folder))


def test_a_truncated_training_checkpoint_is_named(tmp_path, weights):
    torch.save(training_content(weights), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="x.pt: damaged"):
        read_checkpoint(str(tmp_path / "x.pt"), golden.CHECKPOINT / "config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "expected a StreamFormer .* found ViTModel"),
        ({"attention_type": "space_only"}, "attention_type is 'space_only'"),
        ({"enable_causal_temporal": False}, "enable_causal_temporal is not true"),
        ({"num_attention_heads": 5}, "hidden_size 96 is not a multiple of num_attention_heads 5"),
        ({"hidden_act": "gloo"}, "hidden_act 'gloo'"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(folder))


def test_weights_that_are_not_finite_are_named(folder, weights):
    weights["post_layernorm.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity in post_layernorm.bias"):
        read_checkpoint(str(folder))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pt: no such checkpoint"):
        read_checkpoint(str(tmp_path / "nowhere.pt"))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing; give it with --config"):
        read_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or one .pt/.pth file, found none"):
        read_checkpoint(str(folder))


def test_a_hub_id_is_downloaded(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = read_checkpoint("StreamFormer/streamformer-timesformer")
    assert checkpoint.origin == "StreamFormer/streamformer-timesformer"
    assert asked == {"StreamFormer/streamformer-timesformer": ["config.json", "*.safetensors*"]}


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    import huggingface_hub

    def snapshot_download(name, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="StreamFormer/nothing: no such folder, and the hub") as error:
        read_checkpoint("StreamFormer/nothing")
    assert "\n" not in str(error.value)
