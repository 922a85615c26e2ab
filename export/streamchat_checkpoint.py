"""StreamChat checkpoints: reading them, and making one of a SigLIP and a Qwen2.5.

A folder as Hugging Face writes it: `config.json`, safetensors (sharded or not), `tokenizer.json`. Qwen2.5's and
SigLIP's weights have the names that they have there; `docs/streamchat.md` lists the others. Every weight is accounted
for, and stays in the type that it is stored in.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import CheckpointError, OutputError
from ..runtime.manifest import CROSS_POSITIONS
from .checkpoint import fill, find_checkpoint, read_json, read_weights, weight_files
from .decoder_checkpoint import FILES, build, read_stop, read_tokenizer, read_tokens
from .streamchat import FAMILY, GATE, CrossBlock, StreamChat, StreamChatConfig, default_cross_layers

VISION_PREFIXES = ("model.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_tower.",
                   "vision_model.", "")  # fmt: skip
VISION_PARTS = ("embeddings.patch_embedding.", "embeddings.position_embedding.", "encoder.", "post_layernorm.")
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt")
SPREAD = 0.02  # standard deviation of a new adapter's weights, as of Qwen2.5's


@dataclass
class StreamChatCheckpoint:
    """A StreamChat and what stood beside it.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`, or None where the checkpoint has none.
        tokens: ids of special tokens by what they are for.
        stop: tokens that end an answer.
    """

    origin: str
    model: StreamChat
    tokenizer: Any
    tokens: dict[str, int]
    stop: tuple[int, ...]


def is_streamchat(source: str) -> bool:
    """Whether a checkpoint is a StreamChat, by its `config.json`.

    Raises:
        CheckpointError: nothing there.
    """
    config = find_checkpoint(source, ["config.json"]) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == FAMILY


def read_streamchat_checkpoint(source: str) -> StreamChatCheckpoint:
    """Read a checkpoint from a folder or a hub id.

    Raises:
        CheckpointError: nothing there, damaged, not supported, or weights that do not fit the config.
    """
    folder = find_checkpoint(source, FILES)
    values = read_json(folder / "config.json")
    config = StreamChatConfig.from_dict(values, str(folder / "config.json"))
    weights = dict(_weights(folder))
    if config.text.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for key, value in weights.items():
        if key.endswith("_gate") and value.numel() == 1:  # one number for all channels
            weights[key] = value.reshape(1).repeat(config.text.hidden_size)
    model = build(StreamChat, config)
    fill(model, weights, source, None)
    tokenizer = read_tokenizer(folder, config.text)
    return StreamChatCheckpoint(
        source, model, tokenizer, read_tokens(values, tokenizer, config.text), read_stop(folder, values, config.text)
    )


def create_streamchat(
    siglip: str,
    qwen: str,
    folder: Path,
    cross_layers: tuple[int, ...] | None = None,
    positions: str = CROSS_POSITIONS[0],
) -> Path:
    """Make a checkpoint to train from: V-FFNs are copies of the layers' FFNs, gates small, the adapter random.

    Args:
        siglip: folder or hub id of a SigLIP or a PaliGemma.
        qwen: folder or hub id of a Qwen2.5.
        folder: where to write; it must not exist.
        cross_layers: layers that get a cross block; None for every fourth from the first on.
        positions: of visual tokens, "parallel" or "literal".

    Returns:
        The folder.

    Raises:
        CheckpointError: nothing there, other models, or choices that do not fit them.
        OutputError: the folder cannot be written.
    """
    if folder.exists():
        raise OutputError(f"{folder}: exists already; choose another name")
    eyes, text = find_checkpoint(siglip, FILES), find_checkpoint(qwen, FILES)
    values = read_json(text / "config.json")
    if values.get("model_type") != "qwen2":
        raise CheckpointError(f"{qwen}: model_type is {values.get('model_type')!r}; StreamChat is made of a qwen2")
    found = read_json(eyes / "config.json")
    vision = found.get("vision_config", found)
    values |= {
        "architectures": ["StreamChat"],
        "model_type": FAMILY,
        "vision_config": vision,
        "visual_positions": positions,
        "cross_layers": list(default_cross_layers(_layers(values)) if cross_layers is None else cross_layers),
    }
    config = StreamChatConfig.from_dict(values, str(folder / "config.json"))
    values |= {"vision_config": config.vision.to_dict(), "mrope_section": list(config.sections)}
    weights = dict(_weights(text))
    if config.text.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights |= dict(_vision_weights(eyes))
    dtype = weights["model.embed_tokens.weight"].dtype if "model.embed_tokens.weight" in weights else torch.float32
    weights |= {name: value.to(dtype) for name, value in _new_weights(config, weights)}
    fill(build(StreamChat, config), weights, f"{siglip} and {qwen}", None)
    _write(folder, values, weights, text)
    return folder


def _layers(values: dict[str, Any]) -> int:
    found = values.get("num_hidden_layers")
    return found if type(found) is int else 0


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        for key, value in read_weights(file).items():
            if not key.endswith(".rotary_emb.inv_freq"):
                yield key, value


def _vision_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tower of a SigLIP or a PaliGemma; its pooling head and all else are left out."""
    for key, value in _weights(folder):
        for prefix in VISION_PREFIXES:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith(VISION_PARTS):
                yield f"vision_model.{name}", value
                break


def _new_weights(config: StreamChatConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = config.text.hidden_size
    for name, inputs in (("fc1", config.vision.hidden_size), ("fc2", hidden)):
        yield f"adapter.{name}.weight", SPREAD * torch.randn(hidden, inputs, generator=generator)
        yield f"adapter.{name}.bias", torch.zeros(hidden)
    last = len(config.cross_layers) - 1
    for index, layer in enumerate(config.cross_layers):
        old, new = f"model.layers.{layer}", f"cross_blocks.{index}"
        copies = {"norm.weight": f"{old}.post_attention_layernorm.weight"}
        copies |= {f"mlp.{part}_proj.weight": f"{old}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        with torch.device("meta"):
            names = [name for name, _ in CrossBlock(config, index == last).named_parameters()]
        for name in names:
            if name not in copies:
                yield f"{new}.{name}", torch.full((hidden,), GATE)
            elif copies[name] in weights:  # what is missing is told with the others
                yield f"{new}.{name}", weights[copies[name]].clone()


def _write(folder: Path, values: dict[str, Any], weights: dict[str, Tensor], text: Path) -> None:
    """Into a temporary sibling, which is renamed."""
    from huggingface_hub import save_torch_state_dict

    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        save_torch_state_dict(weights, partial)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        for name in COPIED:
            if (text / name).is_file():
                shutil.copyfile(text / name, partial / name)
        partial.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
