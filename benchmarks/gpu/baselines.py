"""The step as one would write it in PyTorch, to compare with: with a cache that grows, and with a ring.

Both take the weights of `export.streamformer.StreamFormer` and run one stream in one dtype.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...export.streamformer import StreamFormer


class GrowingStep(nn.Module):
    """Keys and values of all frames so far, put together anew for each frame.

    Args:
        model: whose weights are copied.
        dtype: of weights and cache.
        device: where to run.
    """

    def __init__(self, model: StreamFormer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(device, dtype)
        self.config = model.config
        self.cache: list[tuple[Tensor, Tensor]] = []  # keys and values [N, H, frames, d] of each layer

    def fill(self, frames: int) -> None:
        """A cache of so many random frames."""
        weight = self.model.post_layernorm.weight
        shape = (self.config.patches, self.config.num_attention_heads, frames, self.config.head_dim)
        self.cache = [
            (weight.new_empty(shape).normal_(), weight.new_empty(shape).normal_())
            for _ in range(self.config.num_hidden_layers)
        ]

    def forward(self, frame: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """frame uint8 [1, height, width, 3], position [1] -> features [1, N, D], pooled [1, D]; `cache` stays"""
        x = embed(self.model, frame, position)
        for layer, (keys, values) in zip(self.model.encoder.layer, self.cache, strict=True):
            q, k, v = layer.temporal_attention.project(layer.temporal_layernorm(x).transpose(0, 1))
            keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
            mixed = layer.temporal_attention.mix(q, keys, values).transpose(0, 1)
            x = rest_of_layer(layer, x, mixed)
        return finish(self.model, x)


class RingStep(nn.Module):
    """Keys and values in a ring that is allocated once; the mask hides slots without a frame."""

    def __init__(self, model: StreamFormer, window: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(device, dtype)
        config = model.config
        shape = (config.patches, config.num_attention_heads, window, config.head_dim)
        for index in range(config.num_hidden_layers):
            for part in ("keys", "values"):
                self.register_buffer(f"{part}{index}", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("slots", torch.arange(window, device=device))
        self.window = window

    def forward(self, frame: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """frame uint8 [1, height, width, 3], position [1] -> features [1, N, D], pooled [1, D]"""
        x = embed(self.model, frame, position)
        slot, visible = position % self.window, self.slots <= position  # [1], [W]
        for index, layer in enumerate(self.model.encoder.layer):
            q, k, v = layer.temporal_attention.project(layer.temporal_layernorm(x).transpose(0, 1))
            keys, values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
            keys.index_copy_(2, slot, k)
            values.index_copy_(2, slot, v)
            mixed = layer.temporal_attention.mix(q, keys, values, visible[None]).transpose(0, 1)
            x = rest_of_layer(layer, x, mixed)
        return finish(self.model, x)


def embed(model: StreamFormer, frame: Tensor, position: Tensor) -> Tensor:
    """[1, N, D]"""
    embeddings = model.embeddings
    weight = embeddings.position_embeddings
    pixels = (frame.permute(0, 3, 1, 2).to(weight.dtype) / 255 - 0.5) / 0.5
    x = embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2) + weight
    time = position.clamp(max=embeddings.time_embeddings.shape[1] - 1)
    embedded: Tensor = x + embeddings.time_embeddings[0].index_select(0, time)[:, None]
    return embedded


def rest_of_layer(layer: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """What follows the attention over time."""
    x = x + layer.temporal_attention_gating.tanh() * layer.temporal_dense(mixed)
    q, k, v = layer.attention.project(layer.layernorm_before(x))
    x = x + layer.attention.mix(q, k, v)
    return x + layer.output.dense(layer.act(layer.intermediate.dense(layer.layernorm_after(x))))


def finish(model: StreamFormer, x: Tensor) -> tuple[Tensor, Tensor]:
    features = F.layer_norm(
        x, x.shape[-1:], model.post_layernorm.weight, model.post_layernorm.bias, model.post_layernorm.eps
    )
    return features, model.head(features)
