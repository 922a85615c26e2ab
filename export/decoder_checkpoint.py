"""Reading checkpoints with a language decoder: Qwen2, Llama, Qwen2.5-VL (Streamo is one), StreamFormer's VideoQA.

A folder or hub id as Hugging Face writes it: `config.json`, safetensors (sharded or not), and where there is one a
tokenizer. Every weight is accounted for, and stays in the type that it is stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.counted import counted
from ..runtime.errors import CheckpointError, first_line
from .checkpoint import Checkpoint, fill, find_checkpoint, read_checkpoint, read_json, read_weights, weight_files
from .decoder import FAMILIES, Decoder, DecoderConfig
from .projector import Projector, ProjectorConfig
from .streamformer import StreamFormer, StreamFormerConfig
from .vision import VisionConfig, VisionTower

FILES = ["*.json", "*.safetensors", "tokenizer.model"]
# what a token is for -> how tokenizers call it
SPECIAL_TOKENS = {
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "image": "<|image_pad|>",
    "vision_end": "<|vision_end|>",
    "silence": "</Silence>",
    "standby": "</Standby>",
    "response": "</Response>",
}
# module -> how its weights begin in the files; the longest first
PREFIXES = {
    "tower": ("model.vision_tower.vision_tower.",),
    "projector": ("model.mm_projector.", "model.image_newline"),
    "vision": ("model.visual.", "visual."),
    "decoder": ("model.language_model.", "model.", "lm_head."),
}


@dataclass
class DecoderCheckpoint:
    """A decoder and what stood beside it.

    Attributes:
        family: one of the values of `FAMILIES`.
        vision: the vision tower of a Qwen2.5-VL.
        projector, tower: of a VideoQA model: from the features of a StreamFormer to embeddings.
        tokenizer: a `tokenizers.Tokenizer`, or None where the checkpoint has none.
        tokens: ids of special tokens by what they are for.
        stop: tokens that end an answer.
    """

    family: str
    origin: str
    decoder: Decoder
    vision: VisionTower | None
    projector: Projector | None
    tower: Checkpoint | None
    tokenizer: Any
    tokens: dict[str, int]
    stop: tuple[int, ...]

    @property
    def chat(self) -> str:
        """The chat format that it was trained with; see `runtime/chat_format.py`."""
        if "turn_start" in self.tokens and "turn_end" in self.tokens:
            return "streamo" if all(state in self.tokens for state in ("silence", "standby", "response")) else "chatml"
        return "vicuna" if self.family == "streamformer_videoqa" else "plain"


def is_decoder(source: str) -> bool:
    """Whether a checkpoint is of one of the families here, by its `config.json`.

    Raises:
        CheckpointError: nothing there.
    """
    config = find_checkpoint(source, ["config.json"]) / "config.json"
    return config.is_file() and read_json(config).get("model_type") in FAMILIES


def read_decoder_checkpoint(source: str, vision_tower: str | None = None) -> DecoderCheckpoint:
    """Read a checkpoint from a folder or a hub id.

    Args:
        vision_tower: of a VideoQA model: folder or hub id of its StreamFormer; None for what its config names.

    Raises:
        CheckpointError: nothing there, damaged, not supported, weights that do not fit the config, or a tokenizer that
            does not fit the weights.
    """
    folder = find_checkpoint(source, FILES)
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    config = DecoderConfig.from_dict(values, where)
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise CheckpointError(
            f"{where}: the weights are quantized already (quant_method {method}); export the checkpoint that they were"
            " made from, with --precision w8, w4 or fp16+w4"
        )
    family = FAMILIES[values["model_type"]]
    weights: dict[str, dict[str, Tensor]] = {module: {} for module in PREFIXES}
    for file in weight_files(folder):
        for key, value in read_weights(file).items():
            _sort(key, value, weights, source)
    decoder = build(Decoder, config)
    if config.tie_word_embeddings:
        weights["decoder"].pop("lm_head.weight", None)
    fill(decoder, weights["decoder"], source, None)
    vision = projector = tower = None
    if family == "qwen2_5_vl" and (values.get("vision_config") or weights["vision"]):
        vision = build(VisionTower, _vision_config(folder, values, config, where))
        fill(vision, weights.pop("vision"), source, None)
    if family == "streamformer_videoqa":
        projector = build(Projector, ProjectorConfig.from_dict(values, where))
        if "image_newline" not in projector.state_dict():  # checkpoints keep one that nothing uses
            weights["projector"].pop("image_newline", None)
        fill(projector, weights.pop("projector"), source, None)
        tower = _tower(values, vision_tower, weights.pop("tower"), source)
    elif vision_tower is not None:
        raise CheckpointError(f"--vision-tower: a {values['model_type']} has none to choose")
    strays = [key for module, found in weights.items() if module != "decoder" for key in found]
    if strays:
        others = f" and {counted(len(strays) - 1, 'other')}" if len(strays) > 1 else ""
        raise CheckpointError(f"{source}: a {values['model_type']} does not have {strays[0]}{others}")
    tokenizer = read_tokenizer(folder, config)
    tokens = read_tokens(values, tokenizer, config)
    if family == "streamformer_videoqa":  # its tokenizer may have marks around pictures, which it was not trained with
        tokens = {name: token for name, token in tokens.items() if name not in ("vision_start", "image", "vision_end")}
    stop = read_stop(folder, values, config)
    return DecoderCheckpoint(family, source, decoder, vision, projector, tower, tokenizer, tokens, stop)


def _sort(key: str, value: Tensor, weights: dict[str, dict[str, Tensor]], source: str) -> None:
    """Put a weight to those of its module, under the name that it has there."""
    if key.endswith((".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")):
        return
    for module, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            if module == "decoder":
                name = key if prefix == "lm_head." else f"model.{name}"
            elif module == "projector":
                name = key.removeprefix("model.")
            weights[module][name] = value
            return
    raise CheckpointError(f"{source}: unexpected weight {key}")


def build(kind: Any, config: Any) -> Any:
    """A module without memory for its weights, which `fill` then brings."""
    with torch.device("meta"):
        module: nn.Module = kind(config)
    return module.eval()


def _vision_config(folder: Path, values: dict[str, Any], config: DecoderConfig, where: str) -> VisionConfig:
    processor = folder / "preprocessor_config.json"
    found = values.get("vision_config")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: vision_config is {found!r}; expected an object")
    vision = VisionConfig.from_dict(found, read_json(processor) if processor.is_file() else {}, where)
    if vision.out_hidden_size != config.hidden_size:
        raise CheckpointError(
            f"{where}: vision_config.out_hidden_size {vision.out_hidden_size} is not the decoder's hidden_size"
            f" {config.hidden_size}"
        )
    return vision


def _tower(values: dict[str, Any], given: str | None, weights: dict[str, Tensor], source: str) -> Checkpoint:
    """The StreamFormer of a VideoQA checkpoint: its own weights where it holds them, else those of the tower itself."""
    name = given or str(values.get("mm_vision_tower", values.get("vision_tower", "")))
    if given is None and not Path(name).exists():
        raise CheckpointError(
            f"{source}: its config names the vision tower '{name}', which is not here;"
            " give the StreamFormer's folder or hub id with --vision-tower"
        )
    if weights:
        config = find_checkpoint(name, ["config.json"]) / "config.json"
        model = build(StreamFormer, StreamFormerConfig.from_dict(read_json(config), str(config)))
        fill(model, {key: value for key, value in weights.items() if not key.endswith(".attention.mask")}, source)
        tower = Checkpoint(model, source)
    else:
        tower = read_checkpoint(name)
    if tower.model.config.hidden_size != values.get("mm_hidden_size"):
        raise CheckpointError(
            f"{name}: hidden_size {tower.model.config.hidden_size} is not the projector's mm_hidden_size"
            f" {values.get('mm_hidden_size')}"
        )
    return tower


def read_tokenizer(folder: Path, config: DecoderConfig) -> Any:
    """A `tokenizers.Tokenizer`; None where the checkpoint has none.

    Raises:
        CheckpointError: damaged, or not of these weights.
    """
    tokenizer = _open_tokenizer(folder)
    size = 0 if tokenizer is None else tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer does not belong to the weights: it has {size} tokens, the model"
            f" {config.vocab_size}"
        )
    return tokenizer


def _open_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        path = folder / "tokenizer.model"
        if path.is_file():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # the parsers raise errors of their own kinds
        raise CheckpointError(f"{path}: damaged tokenizer ({first_line(error)})") from None
    return None


def read_tokens(values: dict[str, Any], tokenizer: Any, config: DecoderConfig) -> dict[str, int]:
    """Ids of special tokens by what they are for, as far as the checkpoint has them."""
    found = {}
    if tokenizer is not None:
        found = {name: tokenizer.token_to_id(text) for name, text in SPECIAL_TOKENS.items()}
    text = values.get("text_config") or {}
    for name, key in (("image", "image_token_id"), ("vision_start", "vision_start_token_id"),
                      ("vision_end", "vision_end_token_id")):  # fmt: skip
        if found.get(name) is None:
            found[name] = values.get(key, text.get(key))
    if "llama" in values["model_type"] or values["model_type"] == "llava":
        found["begin"] = values.get("bos_token_id")
    return {name: token for name, token in found.items() if type(token) is int and 0 <= token < config.vocab_size}


def read_stop(folder: Path, values: dict[str, Any], config: DecoderConfig) -> tuple[int, ...]:
    """Tokens that end an answer."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
    tokens = found if isinstance(found, list) else [found]
    return tuple(token for token in tokens if type(token) is int and 0 <= token < config.vocab_size)
