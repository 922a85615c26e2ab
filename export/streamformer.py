"""StreamFormer in PyTorch, with the parameter names of the reference implementation (Go2Heart/StreamFormer).

This is the definition that exported graphs are checked against, and the module that trains. It is the model of
"Learning Streaming Video Representation via Multitask Training" (arXiv 2504.20041): a SigLIP image encoder whose layers
begin with causal attention over time, through a gate.

Sizes in shape comments: S streams, T new frames, P past frames, N patches, H heads, D hidden, d head_dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values [S * N, H, P, d]


@dataclass(frozen=True)
class StreamFormerConfig:
    """Sizes of a StreamFormer; field names as in the reference's `config.json`."""

    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    patch_size: int = 16
    num_frames: int = 16  # length of the trained time embedding
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> StreamFormerConfig:
        """Read the reference's `config.json`.

        Args:
            values: the parsed file. Absent keys take the reference's defaults.
            where: what to call the file in messages.

        Raises:
            CheckpointError: another architecture, or sizes that do not fit together.
        """
        found = values.get("architectures") or []
        names = [*map(str, found if isinstance(found, list) else [found]), str(values.get("model_type", ""))]
        if not any("timesformer" in name.lower() or "streamformer" in name.lower() for name in names):
            other = next((name for name in names if name), "no architecture")
            raise CheckpointError(f"{where}: expected a StreamFormer (model_type 'timesformer'), found {other}")
        kind = values.get("attention_type", "divided_space_time")
        if kind != "divided_space_time":
            raise CheckpointError(
                f"{where}: attention_type is '{kind}'; only 'divided_space_time' keeps a temporal cache"
            )
        if not values.get("enable_causal_temporal", False):
            raise CheckpointError(
                f"{where}: enable_causal_temporal is not true; a bidirectional model cannot run on a stream"
            )
        if values.get("num_channels", 3) != 3:
            raise CheckpointError(f"{where}: num_channels is {values['num_channels']}; expected 3 (RGB)")
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        size = chosen.get("image_size", 224)
        chosen["image_size"] = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        for key in ("patch_size", "num_frames", "hidden_size", "num_hidden_layers", "num_attention_heads",
                    "intermediate_size", "image_size"):  # fmt: skip
            value = chosen.get(key, 1)
            numbers = value if key == "image_size" else (value,)
            if not all(type(number) is int and number > 0 for number in numbers):
                raise CheckpointError(f"{where}: {key} is {values.get(key)!r}; expected a positive integer")
        epsilon = chosen.get("layer_norm_eps", 1e-6)
        if not isinstance(epsilon, float | int) or not 0 < epsilon < 1:
            raise CheckpointError(f"{where}: layer_norm_eps is {epsilon!r}; expected a small number above 0")
        if not isinstance(chosen.get("qkv_bias", True), bool):
            raise CheckpointError(f"{where}: qkv_bias is {chosen['qkv_bias']!r}; expected true or false")
        config = cls(**chosen)
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"{where}: hidden_size {config.hidden_size} is not a multiple of"
                f" num_attention_heads {config.num_attention_heads}"
            )
        try:
            activation(config.hidden_act)
        except KeyError:
            raise CheckpointError(f"{where}: hidden_act '{config.hidden_act}' is unknown to transformers") from None
        return config

    def to_dict(self) -> dict[str, Any]:
        """The reference's `config.json`."""
        values = asdict(self)
        height, width = self.image_size
        values["image_size"] = height if height == width else [height, width]
        return {
            "architectures": ["TimesformerMultiTaskingModelSigLIP"],
            "model_type": "timesformer",
            "attention_type": "divided_space_time",
            "enable_causal_temporal": True,
            **values,
        }


def activation(kind: str) -> nn.Module:
    """The activation that `transformers` calls `kind`; that package is asked only for the rarer ones.

    Raises:
        KeyError: unknown there too.
    """
    if kind == "gelu":
        return nn.GELU()
    if kind == "gelu_pytorch_tanh":
        return nn.GELU(approximate="tanh")
    if kind == "silu":
        return nn.SiLU()
    from transformers.activations import ACT2FN

    if not isinstance(kind, str):
        raise KeyError(kind)
    module: nn.Module = ACT2FN[kind]
    return module


class StreamFormer(nn.Module):
    """Frames in, features out; remembers through `cache`.

    Args:
        config: sizes.
        lora_rank: rank of the low-rank updates on spatial attention, or 0 where they are absent or merged.
    """

    def __init__(self, config: StreamFormerConfig, lora_rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, lora_rank)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)

    def forward(
        self, frames: Tensor, cache: Cache | None = None, window: int | None = None, position: int = 0
    ) -> tuple[Tensor, Tensor, Cache]:
        """Encode T frames that follow those in `cache`.

        Args:
            frames: uint8 [S, T, height, width, 3], RGB.
            cache: keys and values of the frames before, oldest first; grows by T.
            window: frames that one frame attends to, itself included; None for all.
            position: index of the first of these frames since the start of the stream.

        Returns:
            features [S, T, N, D], pooled [S, T, D], and the new cache.
        """
        S, T = frames.shape[:2]
        x = self.embeddings(frames, position)  # [S, T, N, D]
        new_cache: Cache = []
        for index, layer in enumerate(self.encoder.layer):
            x, past = layer(x, cache[index] if cache else None, window)
            new_cache.append(past)
        features = self.post_layernorm(x)
        pooled = self.head(features.flatten(0, 1)).view(S, T, -1)
        return features, pooled, new_cache


class Embeddings(nn.Module):
    def __init__(self, config: StreamFormerConfig) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.patches, config.hidden_size))
        self.time_embeddings = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))

    def forward(self, frames: Tensor, position: int) -> Tensor:
        S, T = frames.shape[:2]
        pixels = (frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # [S * T, 3, h, w]
        x = self.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)  # [S * T, N, D]
        x = (x + self.position_embeddings).unflatten(0, (S, T))
        # what the reference's stepping code means by interpolating with 'nearest' beyond the trained length
        times = torch.arange(position, position + T).clamp(max=self.time_embeddings.shape[1] - 1)
        return x + self.time_embeddings[0, times][:, None]


class Encoder(nn.Module):
    def __init__(self, config: StreamFormerConfig, lora_rank: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, lora_rank) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Temporal attention through a gate, spatial attention, MLP; each residual, each with a norm before."""

    def __init__(self, config: StreamFormerConfig, lora_rank: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.temporal_layernorm = nn.LayerNorm(D, eps=eps)
        self.temporal_attention = Attention(config, lora_rank=0)
        self.temporal_dense = nn.Linear(D, D)
        self.temporal_attention_gating = nn.Parameter(torch.tensor(0.0))
        self.layernorm_before = nn.LayerNorm(D, eps=eps)
        self.attention = Attention(config, lora_rank)
        self.layernorm_after = nn.LayerNorm(D, eps=eps)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(D, config.intermediate_size)
        self.output = nn.Module()
        self.output.dense = nn.Linear(config.intermediate_size, D)
        self.act = activation(config.hidden_act)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, window: int | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, T, N, D = x.shape
        # over time: each patch attends to the same patch of the frames before
        normed = self.temporal_layernorm(x).transpose(1, 2).reshape(S * N, T, D)
        q, k, v = self.temporal_attention.project(normed)  # [S * N, H, T, d]
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        age = torch.arange(k.shape[2])[None] - torch.arange(k.shape[2] - T, k.shape[2])[:, None]  # [T, P + T]
        visible = age <= 0 if window is None else (age <= 0) & (age > -window)
        mixed = self.temporal_attention.mix(q, k, v, visible).view(S, N, T, D).transpose(1, 2)
        x = x + self.temporal_attention_gating.tanh() * self.temporal_dense(mixed)
        # over space: the patches of one frame attend to each other
        q, k_space, v_space = self.attention.project(self.layernorm_before(x).flatten(0, 1))
        x = x + self.attention.mix(q, k_space, v_space).view(S, T, N, D)
        x = x + self.output.dense(self.act(self.intermediate.dense(self.layernorm_after(x))))
        return x, (k, v)


class Attention(nn.Module):
    def __init__(self, config: StreamFormerConfig, lora_rank: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention = nn.Module()
        self.attention.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        self.output = nn.Module()
        self.output.dense = nn.Linear(D, D)
        self.lora_rank = lora_rank
        if lora_rank:
            self.attention.qkv_lora_a = nn.Linear(D, lora_rank, bias=False)
            self.attention.qkv_lora_b = nn.Linear(lora_rank, 3 * D, bias=False)
            self.output.dense_lora_a = nn.Linear(D, lora_rank, bias=False)
            self.output.dense_lora_b = nn.Linear(lora_rank, D, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> query, key, value [B, H, L, d]"""
        qkv = self.attention.qkv(x)
        if self.lora_rank:
            qkv = qkv + self.attention.qkv_lora_b(self.attention.qkv_lora_a(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """-> [B, L, D]"""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        projected = self.output.dense(x)
        if self.lora_rank:
            projected = projected + self.output.dense_lora_b(self.output.dense_lora_a(x))
        return projected


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: a learned probe attends to the patches of one frame."""

    def __init__(self, config: StreamFormerConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.probe = nn.Parameter(torch.randn(1, 1, D))
        self.attention = nn.MultiheadAttention(D, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(D, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, D)
        self.act = activation(config.hidden_act)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, N, D] -> pooled [B, D]"""
        probe = self.probe.expand(features.shape[0], -1, -1)
        x = self.attention(probe, features, features, need_weights=False)[0][:, 0]
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layernorm(x))))


class PatchProjections(nn.Module):
    """What a segmentation head of the reference sends every patch through; copies of parts of the pooling head."""

    def __init__(self, config: StreamFormerConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.w_v = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.head_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.head_mlp = nn.Module()
        self.head_mlp.fc1 = nn.Linear(D, config.intermediate_size)
        self.head_mlp.fc2 = nn.Linear(config.intermediate_size, D)
        self.act = activation(config.hidden_act)

    def forward(self, features: Tensor) -> Tensor:
        """features [..., N, D] -> [..., N, D]"""
        x = self.v_proj(self.w_v(features))
        return x + self.head_mlp.fc2(self.act(self.head_mlp.fc1(self.head_layernorm(x))))

    @classmethod
    def of_pooling(cls, head: PoolingHead, config: StreamFormerConfig) -> PatchProjections:
        """Those of the pooling head itself, for checkpoints without a segmentation head."""
        made = cls(config)
        D = config.hidden_size
        with torch.no_grad():
            made.w_v.weight.copy_(head.attention.in_proj_weight[2 * D :])
            made.w_v.bias.copy_(head.attention.in_proj_bias[2 * D :])
        made.v_proj, made.head_layernorm, made.head_mlp = head.attention.out_proj, head.layernorm, head.mlp
        return made


BASE = StreamFormerConfig(hidden_act="gelu_pytorch_tanh")
TINY = StreamFormerConfig(
    image_size=(64, 64),
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    hidden_act="gelu_pytorch_tanh",
)


def random_model(config: StreamFormerConfig, seed: int = 0) -> StreamFormer:
    """A model with random weights whose temporal gates are open, so that its memory matters."""
    generator = torch.Generator().manual_seed(seed)
    model = StreamFormer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("gating"):
                parameter.uniform_(0.4, 1.2, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                spread = 0.02 if "embeddings" in name and parameter.ndim == 3 else fan_in**-0.5
                parameter.normal_(0.0, spread, generator=generator)
    return model.eval()
