"""Small random StreamChats, made of a SigLIP and a Qwen2.5 of `transformers`, as checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoder_models
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from framestep.export.streamchat_checkpoint import create_streamchat

LAYERS, CROSS = 4, (0, 2)
SIDE, PATCHES = 28, 4  # pixels and patches of a frame
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}


def siglip() -> SiglipVisionModel:
    return decoder_models._shaken(SiglipVisionModel(SiglipVisionConfig(**VISION)))


def qwen(**changes: Any) -> Any:
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 32768, "rope_theta": 1e6}
    return decoder_models.qwen2(**{**sizes, **changes})


def save(folder: Path, cross: tuple[int, ...] = CROSS, positions: str = "parallel", **changes: Any) -> Path:
    """A checkpoint whose frames matter: gates and what is new are random and large."""
    decoder_models.save(siglip(), folder / "siglip")
    decoder_models.save(qwen(**changes), folder / "qwen")
    made = create_streamchat(str(folder / "siglip"), str(folder / "qwen"), folder / "streamchat", cross, positions)
    generator = torch.Generator().manual_seed(1)
    change_weights(
        made,
        lambda name, value: (
            value + 0.3 * torch.randn(value.shape, generator=generator)
            if name.startswith(("adapter.", "cross_blocks."))
            else value
        ),
    )
    return made


def change_weights(folder: Path, change: Any) -> None:
    """Rewrite a checkpoint, each weight being `change(name, value)`."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(name, value) for name, value in weights.items()}, folder / "model.safetensors")


def random_frames(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, SIDE, SIDE, 3]; each of one colour with noise, so that they differ."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (count, 1, 1, 3))
    noise = generator.integers(-60, 60, (count, SIDE, SIDE, 3))
    return (colours + noise).clip(0, 255).astype(np.uint8)
