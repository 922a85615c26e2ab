"""Language decoders in PyTorch, with the parameter names of Hugging Face: Qwen2, Qwen2.5, Qwen2.5-VL, Llama.

This is the definition that exported step graphs are checked against. Weights stay in the type that the checkpoint has;
each layer widens its own while it computes, so that a model takes no more memory than its file.

Sizes in shape comments: S streams, T new tokens, P past tokens, H query heads, G key and value heads, D hidden,
d head_dim, R rows of position ids (1, or 3 for time, row and column), V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from .streamformer import activation

Cache = list[tuple[Tensor, Tensor]]  # per layer: rotated keys and values [S, G, P, d]
FAMILIES = {  # model_type in config.json -> family
    "qwen2": "qwen2",
    "llama": "llama",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "llava_qwen": "streamformer_videoqa",
    "llava_llama": "streamformer_videoqa",
    "llava": "streamformer_videoqa",
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        sections: frequencies that turn with time, row and column (multimodal); empty where all turn with one position.
        scaling: "default", "linear" (frequencies divided by `factor`) or "llama3" (only the slow ones are).
        factor, low_factor, high_factor, original_positions: of the scaling.
    """

    theta: float
    sections: tuple[int, ...] = ()
    scaling: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192

    @property
    def rows(self) -> int:
        """Rows of position ids."""
        return len(self.sections) or 1

    def frequencies(self, head_dim: int) -> npt.NDArray[np.float64]:
        """Radians per position, [d / 2]."""
        frequencies = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "llama3":
            turns = self.original_positions * frequencies / (2 * math.pi)
            kept = np.clip((turns - self.low_factor) / (self.high_factor - self.low_factor), 0.0, 1.0)
            return frequencies * (kept + (1 - kept) / self.factor)
        return frequencies

    def table(self, head_dim: int, positions: int) -> npt.NDArray[np.float64]:
        """Cosines and sines of positions 0, 1, ...: [positions, d], first the cosines."""
        angles = np.arange(positions, dtype=np.float64)[:, None] * self.frequencies(head_dim)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; field names as in Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool
    rope: Rope

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> DecoderConfig:
        """Read Hugging Face's `config.json`, where the text model's keys may lie under `text_config`.

        Args:
            values: the parsed file.
            where: what to call the file in messages.

        Raises:
            CheckpointError: another architecture, something that is not supported, or sizes that do not fit together.
        """
        kind = values.get("model_type")
        if kind not in FAMILIES:
            raise CheckpointError(f"{where}: model_type is {kind!r}; supported decoders are {', '.join(FAMILIES)}")
        text = values.get("text_config") or {}
        if not isinstance(text, dict):
            raise CheckpointError(f"{where}: text_config is {text!r}; expected an object")
        # older files have the text model's keys beside vision_config; a nested one wins, but the head is the whole's
        values = {**values, **text, **{key: values[key] for key in ("tie_word_embeddings",) if key in values}}
        qwen = "qwen" in kind
        for key in ("mlp_bias", *(() if qwen else ("attention_bias",)), "use_sliding_window"):
            if values.get(key):
                raise CheckpointError(f"{where}: {key} is {values[key]!r}; such decoders are not supported")
        sizes: dict[str, int] = {}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = values.get(key)
            if value is None and key == "num_key_value_heads":
                value = sizes["num_attention_heads"]
            if value is None and key == "head_dim":
                value = sizes["hidden_size"] // sizes["num_attention_heads"]
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{where}: {key} is {value!r}; expected a positive integer")
            sizes[key] = value
        for key, part in (("num_attention_heads", "num_key_value_heads"), ("head_dim", "")):
            divisor = sizes.get(part, 2)
            if sizes[key] % divisor:
                raise CheckpointError(f"{where}: {key} {sizes[key]} is not a multiple of {part or 'two'} {divisor}")
        epsilon = values.get("rms_norm_eps", 1e-6)
        if not isinstance(epsilon, float | int) or not 0 < epsilon < 1:
            raise CheckpointError(f"{where}: rms_norm_eps is {epsilon!r}; expected a small number above 0")
        act = values.get("hidden_act", "silu")
        try:
            activation(act)
        except (KeyError, TypeError):
            raise CheckpointError(f"{where}: hidden_act '{act}' is unknown to transformers") from None
        tied = values.get("tie_word_embeddings", False)
        rope = _rope(values, sizes["head_dim"], sizes["max_position_embeddings"], where)
        if rope.sections and FAMILIES[kind] != "qwen2_5_vl":
            raise CheckpointError(f"{where}: mrope_section in a {kind}; only qwen2_5_vl has multimodal positions")
        if not rope.sections and kind.startswith("qwen2_5_vl"):
            raise CheckpointError(f"{where}: mrope_section is missing; a {kind} needs it")
        return cls(
            **sizes,
            rms_norm_eps=float(epsilon),
            hidden_act=act,
            tie_word_embeddings=bool(tied),
            qkv_bias=qwen,
            rope=rope,
        )


def _rope(values: dict[str, Any], head_dim: int, positions: int, where: str) -> Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` of older files."""
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: rope_parameters is {found!r}; expected an object")
    theta = found.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    sections = found.get("mrope_section")
    if kind == "mrope" or sections is not None:
        if not isinstance(sections, list) or len(sections) != 3 or sum(sections) * 2 != head_dim:
            raise CheckpointError(
                f"{where}: mrope_section is {sections!r}; expected three numbers, {head_dim // 2} in sum"
            )
        kind = "default" if kind == "mrope" else kind
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"{where}: rope_type '{kind}' is not supported; supported are default, linear, llama3, mrope"
        )
    numbers = {
        "rope_theta": theta,
        "factor": found.get("factor", 1.0),
        "low_freq_factor": found.get("low_freq_factor", 1.0),
        "high_freq_factor": found.get("high_freq_factor", 4.0),
        "original_max_position_embeddings": found.get("original_max_position_embeddings", positions),
    }
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, float | int) or not 0 < number < math.inf:
            raise CheckpointError(f"{where}: {key} is {number!r}; expected a number above 0")
    theta, factor, low, high, original = numbers.values()
    if kind == "llama3" and low >= high:
        raise CheckpointError(f"{where}: low_freq_factor {low} should be below high_freq_factor {high}")
    return Rope(float(theta), tuple(sections or ()), kind, float(factor), float(low), float(high), int(original))


class Linear(nn.Linear):
    """Computes in the type of its input, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden, d = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * d, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * d, hidden, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, T, _ = x.shape
        q, k, v = (
            linear(x).view(S, T, -1, self.config.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *turn), rotate(k, *turn)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        return self.o_proj(h.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, present = self.self_attn(self.input_layernorm(x), turn, past, mask)
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x)), present


class TextModel(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A decoder with a growing cache."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The head's weight [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [S, T, D] of tokens [S, T], in float32."""
        return self.model.embed_tokens(tokens).float()

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, cache: Cache | None = None, visible: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """One step.

        Args:
            embeddings: [S, T, D], of text or of anything else.
            position_ids: [S, R, T].
            cache: of the tokens so far; None at the beginning.
            visible: bool [S, P], which tokens of the cache may be seen; None for all.

        Returns:
            Logits [S, T, V], and the cache with the new tokens.
        """
        S, T, _ = embeddings.shape
        past = 0 if cache is None else cache[0][0].shape[2]
        turn = cosines_and_sines(self.config, position_ids, embeddings.dtype)
        mask = torch.ones(S, T, past, dtype=torch.bool) if visible is None else visible[:, None].expand(S, T, past)
        mask = torch.cat([mask, torch.ones(T, T, dtype=torch.bool).tril().expand(S, T, T)], dim=2)
        x, present = embeddings, []
        for index, layer in enumerate(self.model.layers):
            x, pair = layer(x, turn, None if cache is None else cache[index], mask)
            present.append(pair)
        return self.logits(self.model.norm(x)), present

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] of what the last layer gave, after its norm."""
        return F.linear(x, self.head.to(x.dtype))


def cosines_and_sines(config: DecoderConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far position ids [S, R, T] turn each pair of numbers of a head: two tensors [S, T, d / 2]."""
    frequencies = torch.from_numpy(config.rope.frequencies(config.head_dim))
    angles = position_ids[..., None].double() * frequencies  # [S, R, T, d / 2]
    sections = list(config.rope.sections) or [config.head_dim // 2]
    parts = [part[:, row] for row, part in enumerate(angles.split(sections, dim=-1))]
    angles = torch.cat(parts, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [S, H, T, d] by cosines and sines [S, T, d / 2]: number i is paired with number i + d / 2."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
