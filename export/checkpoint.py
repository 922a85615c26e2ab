"""Reading StreamFormer checkpoints, in each of the forms in which they are found.

- a folder (or Hugging Face hub id) with `config.json` and `model.safetensors`, sharded or not;
- a training checkpoint: `.pt` or `.pth` whose `model` entry holds the backbone under `timesformer.`, task heads and the
  text encoder beside it, with a `config.json` next to it.

Every weight is accounted for. Nothing is unpickled except tensors and plain containers.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import CheckpointError
from .streamformer import StreamFormer, StreamFormerConfig

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEAD_PROJECTIONS = ("w_v.weight", "w_v.bias", "v_proj.weight", "v_proj.bias", "head_layernorm.weight")
BESIDE_BACKBONE = ("text_encoder.", "task_heads.", "logit_scale", "logit_bias")


@dataclass
class Checkpoint:
    """A StreamFormer and what stood beside it.

    Attributes:
        model: the backbone with its weights, in evaluation mode, float32.
        heads: weights of each task head by its name, keys without the `task_heads.NAME.` prefix. Empty for published
            checkpoints.
        origin: where it was read from, for the manifest.
    """

    model: StreamFormer
    origin: str
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def read_checkpoint(source: str, config: Path | None = None) -> Checkpoint:
    """Read a checkpoint from a folder, a file or a hub id.

    Args:
        source: path, or a hub id such as `StreamFormer/streamformer-timesformer`.
        config: path of `config.json` where it does not lie beside the weights.

    Raises:
        CheckpointError: nothing there, damaged, of another architecture, or weights that do not fit the config.
    """
    path = Path(source)
    if not path.exists():
        if path.suffix in (".pt", ".pth", ".safetensors") or not HUB_ID.fullmatch(source):
            raise CheckpointError(f"{source}: no such checkpoint file or folder")
        path = _download(source)
    files = _weight_files(path)
    config_path = config or (path if path.is_dir() else path.parent) / "config.json"
    values = _read_json(config_path, hint="give it with --config" if config is None else "")
    sizes = StreamFormerConfig.from_dict(values, str(config_path))
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(_read_weights(file))
    backbone, heads = _split(weights, source)
    return Checkpoint(_load(sizes, backbone, source), source, heads)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{hub_id}: no such folder, and to read it from the hub huggingface-hub is needed:"
                              " pip install 'framestep[export]'") from None  # fmt: skip
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "*.safetensors*"]))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub did not give it ({reason});"
            " check the name and the network, or download it and give the folder"
        ) from error


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted({path / name for name in _read_json(index).get("weight_map", {}).values()})
        for shard in shards:
            if shard.parent != path or not shard.is_file():
                raise CheckpointError(f"{shard}: missing, but {index} names it as a shard")
        if shards:
            return shards
    found = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth", ".safetensors"))
    if len(found) == 1:
        return found
    names = ", ".join(file.name for file in found) or "none"
    raise CheckpointError(
        f"{path}: expected model.safetensors or one .pt/.pth file, found {names}; give the file itself"
    )


def _read_json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing" + (f"; {hint}" if hint else "")) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from None
    try:
        # the reference's training script stores its command-line arguments too
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: refused, a pickle that holds more than weights ({reason})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint ({reason})") from None
    weights = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: expected weights under the key 'model', found {_describe(content)}")
    return {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return "the keys " + ", ".join(map(str, list(content)[:8])) if content else "an empty dictionary"
    return f"a {type(content).__name__}"


def _split(weights: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Backbone weights without their prefix, and the task heads."""
    prefix = "timesformer."
    if not any(key.startswith(prefix) for key in weights):
        return {key: value for key, value in weights.items() if key not in BESIDE_BACKBONE}, {}
    backbone: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    strays = []
    for key, value in weights.items():
        if key.startswith(prefix):
            backbone[key.removeprefix(prefix)] = value
        elif key.startswith("task_heads."):
            _, name, rest = key.split(".", 2)
            if not rest.startswith(("text_encoder.", "head.")):  # copies of modules found elsewhere
                heads.setdefault(name, {})[rest] = value
        elif not key.startswith(BESIDE_BACKBONE):
            strays.append(key)
    if strays:
        raise CheckpointError(f"{where}: unexpected keys beside the backbone: {_listing(strays)}")
    return backbone, heads


def _load(config: StreamFormerConfig, weights: dict[str, Tensor], where: str) -> StreamFormer:
    weights = {key: value for key, value in weights.items() if not key.endswith(".attention.mask")}
    ranks = {value.shape[0] for key, value in weights.items() if key.endswith("_lora_a.weight")}
    with torch.device("meta"):
        model = StreamFormer(config, lora_rank=max(ranks, default=0))
    expected = model.state_dict()
    problems = []
    if missing := [key for key in expected if key not in weights]:
        problems.append(f"missing {_listing(missing)}")
    if unexpected := [key for key in weights if key not in expected]:
        problems.append(f"unexpected {_listing(unexpected)}")
    if misshaped := list(_misshaped(expected, weights)):
        problems.append(f"wrong shape {_listing(misshaped)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the config: " + "; ".join(problems))
    weights = {key: value.to(torch.float32) for key, value in weights.items()}
    if bad := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{where}: NaN or infinity in {_listing(bad)}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _misshaped(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> Iterator[str]:
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            yield f"{key} (expected {list(value.shape)}, found {list(weights[key].shape)})"


def _listing(keys: list[str], most: int = 20) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
