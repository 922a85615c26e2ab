"""Reading StreamFormer checkpoints, in each of the forms in which they are found.

- a folder (or Hugging Face hub id) with `config.json` and `model.safetensors`, sharded or not;
- a training checkpoint: `.pt`, `.pth` or `.bin` whose `model` entry holds the backbone under `timesformer.`, task heads
  and the text encoder beside it, with a `config.json` next to it;
- a module in memory, such as the reference implementation's in a notebook.

Every weight is accounted for. Nothing is unpickled except tensors and plain containers.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import CheckpointError, first_line
from .streamformer import PatchProjections, StreamFormer, StreamFormerConfig

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BESIDE_BACKBONE = ("text_encoder.", "task_heads.", "logit_scale", "logit_bias")
WRAPPERS = ("module.", "_orig_mod.")  # before every key: of DistributedDataParallel and torch.compile
MOST_LISTED = 5  # weights that a message names


@dataclass(frozen=True)
class TaskHead:
    """A task head of a training checkpoint.

    Attributes:
        logit_scale: a logarithm; None where the head has none.
        projections: of a segmentation head; None for the others.
    """

    logit_scale: float | None
    logit_bias: float | None
    projections: PatchProjections | None


@dataclass
class Checkpoint:
    """A StreamFormer and what stood beside it.

    Attributes:
        model: the backbone with its weights, in evaluation mode, float32.
        heads: task heads by name; empty for published checkpoints.
    """

    model: StreamFormer
    origin: str
    heads: dict[str, TaskHead] = field(default_factory=dict)


def read_checkpoint(source: str, config: Path | None = None) -> Checkpoint:
    """Read a checkpoint from a folder, a file or a hub id.

    Args:
        source: path, or a hub id such as `StreamFormer/streamformer-timesformer`.
        config: path of `config.json` where it does not lie beside the weights.

    Raises:
        CheckpointError: nothing there, damaged, of another architecture, or weights that do not fit the config.
    """
    path = find_checkpoint(source, ["config.json", "*.safetensors*"])
    files = weight_files(path)
    if any(file.suffix not in (*TORCH_SUFFIXES, ".safetensors") for file in files):
        raise CheckpointError(f"{path}: not a checkpoint; expected a folder, .safetensors, {', '.join(TORCH_SUFFIXES)}")
    config_path = config or (path if path.is_dir() else path.parent) / "config.json"
    values = read_json(config_path, hint="give it with --config" if config is None else "")
    sizes = StreamFormerConfig.from_dict(values, str(config_path))
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(read_weights(file))
    return _checkpoint(sizes, weights, source)


def checkpoint_of(model: nn.Module, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A StreamFormer that is in memory, as it would be read from its file.

    Args:
        model: the backbone, or the whole model in training with its task heads: the reference implementation's, or one
            whose weights have the same names. It stays as it is, on whatever device; float32 weights on the CPU are
            shared with it, not copied.
        config: what `config.json` would hold; None for `model.config`.

    Raises:
        CheckpointError: no config, another architecture, or weights that do not fit the config.
    """
    where = type(model).__name__
    if config is None:
        found = getattr(_unwrapped(model), "config", None)
        to_dict = getattr(found, "to_dict", None)
        config = to_dict() if callable(to_dict) else found
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: has no config that says its sizes; give what config.json would hold as config")
    sizes = StreamFormerConfig.from_dict(dict(config), f"{where}.config")
    return _checkpoint(sizes, {key: value.detach().cpu() for key, value in model.state_dict().items()}, where)


def _unwrapped(model: nn.Module) -> nn.Module:
    for name in WRAPPERS:
        inner = getattr(model, name.removesuffix("."), None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model


def _checkpoint(sizes: StreamFormerConfig, weights: dict[str, Tensor], where: str) -> Checkpoint:
    while wrapper := next(
        (name for name in WRAPPERS if weights and all(key.startswith(name) for key in weights)), None
    ):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    backbone, heads = _split(weights, where)
    task_heads = {name: _task_head(name, sizes, found, where) for name, found in heads.items()}
    return Checkpoint(_load(sizes, backbone, where), where, task_heads)


def find_checkpoint(source: str, patterns: list[str]) -> Path:
    """The file or folder `source`, or what the hub has under that name.

    Args:
        source: path or hub id.
        patterns: files to take from the hub.

    Raises:
        CheckpointError: nothing there.
    """
    path = Path(source)
    if path.exists():
        return path
    looks_like_a_path = source.startswith((".", "/", "~")) or path.suffix in (*TORCH_SUFFIXES, ".safetensors")
    if looks_like_a_path or not HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: no such checkpoint file or folder")
    return _download(source, patterns)


def _download(hub_id: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{hub_id}: no such folder, and to read it from the hub huggingface-hub is needed:"
                              " pip install 'framestep[export]'") from None  # fmt: skip
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of many libraries
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub did not give it ({first_line(error)});"
            " check the name and the network, or download it and give the folder"
        ) from error


def weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: weight_map should map weights to file names")
        shards = sorted({path / name for name in names.values()})
        for shard in shards:
            if shard.parent != path or not shard.is_file():
                raise CheckpointError(f"{shard}: missing, but {index} names it as a shard")
        if shards:
            return shards
    found = [file for file in entries if file.suffix in (*TORCH_SUFFIXES, ".safetensors")]
    if len(found) == 1:
        return found
    names = ", ".join(file.name for file in found) or "none"
    hint = "give the file itself" if found else "give the checkpoint's own folder"
    raise CheckpointError(f"{path}: expected model.safetensors or one .pt/.pth file, found {names}; {hint}")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing" + (f"; {hint}" if hint else "")) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with path.open("rb"):  # whose error says what is wrong where the reader's does not
                return load_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from None
    try:
        # the reference's training script stores its command-line arguments too
        with torch.serialization.safe_globals([argparse.Namespace]):
            # files from before PyTorch 1.6 are no zip archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global:?) (?!GLOBAL)([\w.]+)", str(error))
        what = f"it names {found[1]}" if found else "it is not PyTorch's"
        raise CheckpointError(f"{path}: refused, a pickle that holds more than weights ({what})") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint") from None
    weights = content
    if isinstance(content, dict):  # "module" is what DeepSpeed calls it
        weights = content.get("model", content.get("module", content))
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
        raise CheckpointError(f"{where}: unexpected keys beside the backbone: {listing(strays)}")
    return backbone, heads


def _load(config: StreamFormerConfig, weights: dict[str, Tensor], where: str) -> StreamFormer:
    weights = {key: value for key, value in weights.items() if not key.endswith(".attention.mask")}
    ranks = {value.shape[0] for key, value in weights.items() if key.endswith("_lora_a.weight")}
    with torch.device("meta"):
        model = StreamFormer(config, lora_rank=max(ranks, default=0))
    fill(model, weights, where)
    return model.eval()


def _task_head(name: str, config: StreamFormerConfig, weights: dict[str, Tensor], where: str) -> TaskHead:
    numbers: dict[str, float] = {}
    for key in ("logit_scale", "logit_bias"):
        if (value := weights.pop(key, None)) is not None:
            if value.numel() != 1:
                shape = list(value.shape)
                raise CheckpointError(f"{where}: task_heads.{name}.{key} has shape {shape}; expected one number")
            numbers[key] = float(value)
    if not weights:
        return TaskHead(numbers.get("logit_scale"), numbers.get("logit_bias"), None)
    with torch.device("meta"):
        projections = PatchProjections(config)
    fill(projections, weights, f"{where}: task head {name}")
    return TaskHead(numbers.get("logit_scale"), numbers.get("logit_bias"), projections.eval())


def fill(module: nn.Module, weights: dict[str, Tensor], where: str, dtype: torch.dtype | None = torch.float32) -> None:
    """Load weights into a module, every one accounted for, as `dtype`; None for what they are stored in."""
    expected = module.state_dict()
    problems = []
    if missing := [key for key in expected if key not in weights]:
        problems.append(f"missing {listing(missing)}")
    if unexpected := [key for key in weights if key not in expected]:
        problems.append(f"unexpected {listing(unexpected)}")
    if wrong := list(misshaped(expected, weights)):
        problems.append(f"wrong shape {listing(wrong)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the config: " + "; ".join(problems))
    weights = {key: value if dtype is None else value.to(dtype) for key, value in weights.items()}
    if bad := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{where}: NaN or infinity in {listing(bad)}")
    module.load_state_dict(weights, assign=True)


def misshaped(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> Iterator[str]:
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            yield f"{key} (expected {list(value.shape)}, found {list(weights[key].shape)})"


def listing(keys: list[str]) -> str:
    rest = f" and {len(keys) - MOST_LISTED} more" if len(keys) > MOST_LISTED else ""
    return ", ".join(keys[:MOST_LISTED]) + rest
