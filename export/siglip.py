"""SigLIP's vision tower in PyTorch, with the parameter names of Hugging Face, and as part of a graph.

It is the tower of PaliGemma too: patches in, one feature a patch out, after the last layer norm and without pooling.

Folded in the graph: pixel mean, deviation and the division by 255 into the patch embedding, its bias into the position
embedding, the attention scale into the query projection, the value's bias through the output projection into that one's
bias; the key's bias into nothing, for it adds the same to a query's score with every patch.

Sizes in shape comments: S streams, N patches, H heads, D hidden, d head_dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from .decoder import Linear
from .graph import ACTIVATIONS, GraphBuilder
from .precision import Precision
from .streamformer import activation


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a vision tower; field names as in Hugging Face's `vision_config`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> SiglipConfig:
        """Read a `vision_config`.

        Args:
            values: the parsed object.
            where: what to call it in messages.

        Raises:
            CheckpointError: something that is not supported, or sizes that do not fit together.
        """
        sizes: dict[str, Any] = {"image_size": 224, "patch_size": 14}
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
                    "patch_size"):  # fmt: skip
            value = values.get(key, sizes.get(key))
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{where}: {key} is {value!r}; expected a positive integer")
            sizes[key] = value
        for key, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if sizes[key] % sizes[part]:
                raise CheckpointError(f"{where}: {key} {sizes[key]} is not a multiple of {part} {sizes[part]}")
        if values.get("num_channels", 3) != 3:
            raise CheckpointError(f"{where}: num_channels is {values['num_channels']!r}; expected 3 (RGB)")
        sizes["hidden_act"] = act = values.get("hidden_act", "gelu_pytorch_tanh")
        if act not in ACTIVATIONS:
            raise CheckpointError(
                f"{where}: hidden_act '{act}' is not supported; supported are {', '.join(ACTIVATIONS)}"
            )
        epsilon = values.get("layer_norm_eps", 1e-6)
        if isinstance(epsilon, bool) or not isinstance(epsilon, float | int) or not 0 < epsilon < 1:
            raise CheckpointError(f"{where}: layer_norm_eps is {epsilon!r}; expected a small number above 0")
        return cls(**sizes, layer_norm_eps=float(epsilon))

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "siglip_vision_model", **asdict(self)}


class LayerNorm(nn.LayerNorm):
    """Computes in the type of its input, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, p, stride=p)
        self.position_embedding = nn.Embedding(config.patches, config.hidden_size)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # [S, 3, height, width]
        conv = self.patch_embedding
        x = F.conv2d(pixels, conv.weight.float(), conv.bias.float(), conv.stride)
        return x.flatten(2).transpose(1, 2) + self.position_embedding.weight.float()


class Attention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.heads, D = config.num_attention_heads, config.hidden_size
        self.head_dim = D // self.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )  # [S, H, N, d]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nn.Module):
    """Frames in, a feature for each patch out. Every frame by itself."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, frames: Tensor) -> Tensor:
        """Features [S, N, D] of frames uint8 [S, height, width, 3], RGB."""
        x = self.embeddings(frames)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


def write_siglip(tower: Siglip, frame: str, precision: Precision, g: GraphBuilder) -> str:
    """Write the tower; features [S, N, D], float32, of the input `frame`, uint8 [S, height, width, 3]."""
    config = tower.config
    side, p, N = config.side, config.patch_size, config.patches
    with torch.no_grad():
        g.scope("siglip/patches")
        conv = tower.embeddings.patch_embedding
        weight = conv.weight.float()  # [D, 3, p, p]; (pixel / 255 - 0.5) / 0.5 = pixel * 2 / 255 - 1
        bias = conv.bias.float() - weight.sum((1, 2, 3))
        positions = tower.embeddings.position_embedding.weight.float() + bias  # [N, D]
        x = precision.narrow(g, g.node("Cast", frame, to=1))
        x = g.node("Reshape", x, g.constant([-1, side, p, side, p, 3]))
        x = g.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = g.node("Reshape", x, g.constant([-1, N, p * p * 3]))
        scaled = (weight * (2 / 255)).permute(0, 2, 3, 1).flatten(1)  # [D, p * p * 3]
        x = precision.widen(g, precision.of_pixels.linear(g, x, "siglip.patch_embedding", scaled))
        x = g.node("Add", x, g.weight("siglip.position_embedding", positions.numpy()))
        for index, layer in enumerate(tower.encoder.layers):
            name = f"siglip.layer{index}"
            g.scope(f"siglip/layer{index}")
            h = precision.narrow(g, _norm(g, x, f"{name}.norm1", layer.layer_norm1))
            x = g.node("Add", x, precision.widen(g, _attention(g, h, name, layer.self_attn, precision)))
            h = precision.narrow(g, _norm(g, x, f"{name}.norm2", layer.layer_norm2))
            x = g.node("Add", x, precision.widen(g, _mlp(g, h, name, layer.mlp, config.hidden_act, precision)))
        g.scope("siglip")
        return _norm(g, x, "siglip.post_norm", tower.post_layernorm)


def _mlp(g: GraphBuilder, x: str, name: str, mlp: MLP, activation: str, precision: Precision) -> str:
    """Beside integers So400m's inner layer of 4,304 has 4,352."""
    more, fc1, fc2 = precision.filling(mlp.fc1.out_features), mlp.fc1, mlp.fc2
    x = precision.linear(g, x, f"{name}.fc1", F.pad(fc1.weight, (0, 0, 0, more)), F.pad(fc1.bias, (0, more)))
    return precision.linear(g, g.activation(x, activation), f"{name}.fc2", F.pad(fc2.weight, (0, more)), fc2.bias)


def _norm(g: GraphBuilder, x: str, name: str, norm: nn.LayerNorm) -> str:
    weight, bias = (part.detach().float().numpy() for part in (norm.weight, norm.bias))
    return g.layer_norm(x, name, weight, bias, norm.eps)


def _attention(g: GraphBuilder, x: str, name: str, attention: Attention, precision: Precision) -> str:
    H, scale = attention.heads, attention.head_dim**-0.5
    q_proj, k_proj, v_proj, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    q = precision.linear(g, x, f"{name}.query", q_proj.weight.float() * scale, q_proj.bias.float() * scale)
    k = precision.linear(g, x, f"{name}.key", k_proj.weight)
    v = precision.linear(g, x, f"{name}.value", v_proj.weight)
    h = g.node("Attention", q, k, v, name="attention", q_num_heads=H, kv_num_heads=H, scale=1.0)
    bias = out.bias.float() + out.weight.float() @ v_proj.bias.float()
    return precision.linear(g, h, f"{name}.output", out.weight, bias)
