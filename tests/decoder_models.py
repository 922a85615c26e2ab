"""Small random decoders of `transformers`, as checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from framestep.export.streamformer import StreamFormerConfig, random_model

VOCABULARY = 320
IMAGE, VISION_START, VISION_END = 300, 301, 302
STATES = ("</Silence>", "</Standby>", "</Response>")
LAYOUT = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32, "mm_patch_merge_type": "spatial_unpad"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    return _shaken(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes})))


def llama(**changes: Any) -> LlamaForCausalLM:
    return _shaken(LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})))


def qwen2_5_vl(window_size: int = 56) -> Qwen2_5_VLForConditionalGeneration:
    """Windows of 4 x 4 patches; of three layers of the tower the second attends to all."""
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_heads": 2,
        "window_size": window_size,
        "out_hidden_size": SIZES["hidden_size"],
        "fullatt_block_indexes": [1],
    }
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, video_token_id=303, **tokens)
    return _shaken(Qwen2_5_VLForConditionalGeneration(config))


def save(model: Any, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_tokenizer(folder: Path, words: int = 290, states: bool = True) -> None:
    """A tokenizer of whole words, `w0`, `w1`, ..., with Streamo's three tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(words)}, unk_token="w0"))
    if states:
        tokenizer.add_special_tokens(list(STATES))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_videoqa(folder: Path, decoder: Any, projector: dict[str, torch.Tensor], **keys: Any) -> Path:
    """A VideoQA checkpoint in the reference's layout: the decoder's weights, the projector's beside them."""
    folder.mkdir()
    weights = {key: value.clone() for key, value in decoder.state_dict().items()}
    save_file({**weights, **projector}, folder / "model.safetensors")
    kind = "llava_llama" if isinstance(decoder, LlamaForCausalLM) else "llava_qwen"
    values = {**decoder.config.to_dict(), "model_type": kind, **keys}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


def projector_weights(hidden: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (hidden, 32), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    weights = {f"model.mm_projector.{key}": shape for key, shape in shapes.items()}
    weights["model.image_newline"] = (hidden,)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in weights.items()}


def save_streamformer_videoqa(
    folder: Path,
    decoder: Any,
    tower: StreamFormerConfig,
    own_weights: bool = True,
    make: Any = random_model,
    **keys: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A VideoQA checkpoint beside its StreamFormer: that model, and the projector's weights."""
    model = make(tower)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(tower.to_dict()), "utf-8")
    save_file(weights, folder / "tower" / "model.safetensors")
    projector = projector_weights(decoder.config.hidden_size)
    inside = {f"model.vision_tower.vision_tower.{key}": value for key, value in weights.items()} if own_weights else {}
    keys = {**LAYOUT, "mm_vision_tower": str(folder / "tower"), **keys}
    save_videoqa(folder / "checkpoint", decoder, {**projector, **inside}, **keys)
    return model, projector


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each 32, 64 or 128 inputs of an output, as many as divide its inputs, in 127 steps to their largest one."""
    outputs, inputs = weight.shape
    block = next((size for size in (128, 64, 32) if inputs % size == 0), inputs)
    blocks = weight.reshape(outputs, -1, block)
    step = blocks.abs().amax(2, keepdim=True) / 127
    return (torch.round(blocks / step) * step).reshape(outputs, inputs)


def round_streamformer(model: Any) -> None:
    """Round every linear layer's weight, in place, of a StreamFormer whose dense layers behind temporal attention are
    the identity: these, and values' biases, which have to be zero, go through other weights before they are rounded."""
    with torch.no_grad():
        for layer in model.encoder.layer:
            for attention in (layer.temporal_attention, layer.attention):
                for linear in (attention.attention.qkv, attention.output.dense):
                    linear.weight.copy_(rounded(linear.weight))
            for linear in (layer.intermediate.dense, layer.output.dense):
                linear.weight.copy_(rounded(linear.weight))
        pooling, D = model.head.attention, model.config.hidden_size
        pooling.in_proj_weight[D:] = rounded(pooling.in_proj_weight[D:])  # the query is a constant
        for linear in (pooling.out_proj, model.head.mlp.fc1, model.head.mlp.fc2):
            linear.weight.copy_(rounded(linear.weight))


def unfolded_streamformer(config: StreamFormerConfig) -> Any:
    """A random one that can be rounded; see `round_streamformer`."""
    model, D = random_model(config), config.hidden_size
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.temporal_dense.weight.copy_(torch.eye(D))
            for attention in (layer.temporal_attention, layer.attention):
                attention.attention.qkv.bias[-D:] = 0
        model.head.attention.in_proj_bias[-D:] = 0
    return model


def _shaken(model: Any) -> Any:
    """Weights so large that logits tell layers, positions and biases apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "bias" not in name:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            else:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    return model.eval()
