"""StreamChat in PyTorch: a decoder whose text sees the newest frames at every token, by cross-attention.

After "StreamChat: Chatting with Streaming Video" (arXiv 2412.08646); `docs/streamchat.md` says what is ours where the
paper is silent. This is the definition that exported step graphs are checked against, and the module that trains.

Frames and text are two paths. The frame path depends on no text and on no other frame, so what it gives for a frame is
computed once: keys and values for each layer that carries a cross block. The text path is Qwen2.5 with one more term in
those layers, which reads the visible frames through the weights of the layer's own self-attention.

The parameter names of Qwen2.5 (`model.`, `lm_head.`) and SigLIP (`vision_model.`) are Hugging Face's; new are
`adapter.` and `cross_blocks.`.

Sizes in shape comments: S streams, T tokens, M frames, N tokens of a frame, H query heads, G key and value heads,
D hidden, d head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from ..runtime.manifest import CROSS_POSITIONS
from .decoder import MLP, DecoderConfig, Linear, RMSNorm, SelfAttention, TextModel, cosines_and_sines, rotate
from .siglip import Siglip, SiglipConfig

FAMILY = "streamchat"  # also model_type in config.json
EVERY = 4  # layers from one cross block to the next, by default
GATE = 0.01  # of a new cross block
Visual = list[tuple[Tensor, Tensor]]  # for each cross block: rotated keys and values [S, G, rows, d]


@dataclass(frozen=True)
class StreamChatConfig:
    """Sizes of a StreamChat.

    Attributes:
        text: of the decoder.
        vision: of the vision tower.
        cross_layers: layers that carry a cross block, ascending.
        sections: pairs of numbers of a head that turn with time, row and column of a visual token.
        positions: of a visual token: "parallel", (t, t + row, t + column), or "literal", (t, row, column).
    """

    text: DecoderConfig
    vision: SiglipConfig
    cross_layers: tuple[int, ...]
    sections: tuple[int, ...]
    positions: str = "parallel"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> StreamChatConfig:
        """Read a `config.json`: Qwen2.5's keys, `vision_config`, `cross_layers`, `mrope_section`, `visual_positions`.

        Args:
            values: the parsed file.
            where: what to call it in messages.

        Raises:
            CheckpointError: another model, something that is not supported, or sizes that do not fit together.
        """
        if values.get("model_type") != FAMILY:
            raise CheckpointError(f"{where}: model_type is {values.get('model_type')!r}; expected '{FAMILY}'")
        text = DecoderConfig.from_dict({**values, "model_type": "qwen2"}, where)
        vision = values.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError(f"{where}: vision_config is {vision!r}; expected SigLIP's as an object")
        layers = values.get("cross_layers", list(default_cross_layers(text.num_hidden_layers)))
        check_cross_layers(layers, text.num_hidden_layers, where)
        sections = values.get("mrope_section", list(default_sections(text.head_dim)))
        fits = isinstance(sections, list) and len(sections) == 3 and all(type(n) is int and n > 0 for n in sections)
        if not fits or sum(sections) * 2 != text.head_dim:
            raise CheckpointError(
                f"{where}: mrope_section is {sections!r}; expected three numbers for time, row and column,"
                f" {text.head_dim // 2} in sum, half of head_dim {text.head_dim}"
            )
        positions = values.get("visual_positions", CROSS_POSITIONS[0])
        if positions not in CROSS_POSITIONS:
            expected = " or ".join(CROSS_POSITIONS)
            raise CheckpointError(f"{where}: visual_positions is {positions!r}; expected {expected}")
        tower = SiglipConfig.from_dict(vision, f"{where}: vision_config")
        if text.max_position_embeddings <= tower.side:
            raise CheckpointError(
                f"{where}: max_position_embeddings {text.max_position_embeddings} leaves no room for a frame's"
                f" {tower.side} rows"
            )
        return cls(text, tower, tuple(layers), tuple(sections), positions)

    @property
    def visual(self) -> DecoderConfig:
        """The decoder's sizes with the rotation of visual tokens."""
        return replace(self.text, rope=replace(self.text.rope, sections=self.sections))

    def position_ids(self, times: Tensor) -> Tensor:
        """Positions [M, 3, N] of the tokens of frames at times [M]."""
        rows, columns = np.indices((self.vision.side, self.vision.side)).reshape(2, -1)
        grid = torch.from_numpy(np.stack([np.zeros_like(rows), rows, columns]))  # [3, N]
        if self.positions == "literal":
            return grid + times[:, None, None] * torch.tensor([1, 0, 0])[:, None]
        return grid + times[:, None, None]


def default_cross_layers(layers: int) -> tuple[int, ...]:
    """Every fourth layer, from the first on."""
    return tuple(range(0, layers, EVERY))


def default_sections(head_dim: int) -> tuple[int, int, int]:
    """As Qwen2-VL splits a head: 16, 24 and 24 of 64 pairs."""
    time = head_dim // 8
    row = (head_dim // 2 - time) // 2
    return time, row, head_dim // 2 - time - row


def check_cross_layers(found: Any, layers: int, where: str) -> None:
    """Raises:
    CheckpointError: not an ascending list of some of the layers.
    """
    if (
        not isinstance(found, list | tuple)
        or not found
        or not all(type(n) is int and 0 <= n < layers for n in found)
        or list(found) != sorted(set(found))
    ):
        raise CheckpointError(
            f"{where}: cross_layers is {found!r}; expected an ascending list of layers from 0 to {layers - 1}"
        )


class Adapter(nn.Module):
    """From features of the vision tower to the decoder's size."""

    def __init__(self, config: StreamChatConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.vision.hidden_size, config.text.hidden_size)
        self.fc2 = Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CrossBlock(nn.Module):
    """What a layer with cross-attention has beside its own weights.

    Attributes:
        attention_gate: [D], what the cross-attention counts in the text path.
        norm, mlp, mlp_gate: of the frame path, from this block to the next; the last block has none.
    """

    def __init__(self, config: StreamChatConfig, last: bool) -> None:
        super().__init__()
        text = config.text
        self.attention_gate = nn.Parameter(torch.full((text.hidden_size,), GATE))
        if not last:
            self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
            self.mlp = MLP(text.hidden_size, text.intermediate_size, text.hidden_act)
            self.mlp_gate = nn.Parameter(torch.full((text.hidden_size,), GATE))


class StreamChat(nn.Module):
    """Text that sees frames. `forward` takes a whole sample, as training does; step graphs do it token by token."""

    def __init__(self, config: StreamChatConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.vision_model = Siglip(config.vision)
        self.adapter = Adapter(config)
        last = len(config.cross_layers) - 1
        self.cross_blocks = nn.ModuleList(CrossBlock(config, index == last) for index in range(last + 1))

    @property
    def head(self) -> Tensor:
        """The head's weight [V, D]."""
        return self.model.embed_tokens.weight if self.config.text.tie_word_embeddings else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [S, T, D] of tokens [S, T], in float32."""
        return self.model.embed_tokens(tokens).float()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] of what the last layer gave, after its norm."""
        return F.linear(x, self.head.float())

    def encode(self, frames: Tensor, times: Tensor) -> Visual:
        """The frame path.

        Args:
            frames: uint8 [M, height, width, 3], RGB.
            times: int64 [M], the position of text at the moment of each frame.

        Returns:
            For each cross block keys, rotated, and values, [M, G, N, d].
        """
        config = self.config.visual
        turn = cosines_and_sines(config, self.config.position_ids(times), torch.float32)
        v = self.adapter(self.vision_model(frames))  # [M, N, D]
        visual: Visual = []
        for block, index in zip(self.cross_blocks, self.config.cross_layers, strict=True):
            layer = self.model.layers[index]
            h = layer.input_layernorm(v)
            keys, values = (
                linear(h).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
            visual.append((rotate(keys, *turn), values))
            if block is not self.cross_blocks[-1]:
                v = v + block.mlp_gate.float() * block.mlp(block.norm(v))
        return visual

    def forward(self, tokens: Tensor, positions: Tensor, frames: Tensor, times: Tensor, visible: Tensor) -> Tensor:
        """Logits of a whole sample.

        Args:
            tokens: int64 [S, T].
            positions: int64 [S, T].
            frames: uint8 [S, M, height, width, 3], RGB.
            times: int64 [S, M]; see `encode`.
            visible: bool [S, T, M], the frames that each token sees; see `visible_frames`.

        Returns:
            Logits [S, T, V], float32.
        """
        S, T = tokens.shape
        encoded = self.encode(frames.flatten(0, 1), times.flatten())
        visual = [
            tuple(part.unflatten(0, (S, -1)).transpose(1, 2).flatten(2, 3) for part in pair) for pair in encoded
        ]  # keys and values [S, G, M * N, d]
        seen = visible.repeat_interleave(self.config.vision.patches, dim=2)  # [S, T, M * N]
        turn = cosines_and_sines(self.config.text, positions[:, None], torch.float32)
        causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril().expand(S, T, T)
        x = self.embed(tokens)
        crossed = dict(zip(self.config.cross_layers, zip(self.cross_blocks, visual, strict=True), strict=True))
        for index, layer in enumerate(self.model.layers):
            if index in crossed:
                block, (keys, values) = crossed[index]
                h = cross_attention(layer.self_attn, layer.input_layernorm(x), turn, keys, values, seen)
                x = x + block.attention_gate.float() * h
            x, _ = layer(x, turn, None, causal)
        return self.logits(self.model.norm(x))


def cross_attention(
    attention: SelfAttention, x: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, seen: Tensor
) -> Tensor:
    """What tokens x [S, T, D] read from frames through a layer's query and output projections.

    Args:
        keys, values: [S, G, rows, d].
        seen: bool [S, T, rows]; a token that sees nothing gets exactly 0.
    """
    S, T, _ = x.shape
    q = rotate(attention.q_proj(x).view(S, T, -1, attention.config.head_dim).transpose(1, 2), *turn)
    some = seen.any(dim=2, keepdim=True)  # [S, T, 1]
    h = F.scaled_dot_product_attention(q, keys, values, attn_mask=(seen | ~some)[:, None], enable_gqa=True)
    return attention.o_proj(h.transpose(1, 2).flatten(2)) * some


def visible_frames(first_tokens: npt.ArrayLike, tokens: int, window: int) -> npt.NDArray[np.bool_]:
    """The training mask: which frames each token sees, bool [T, M].

    A frame is seen from one token on, until `window` later ones are seen too.

    Args:
        first_tokens: [M], index of the first token that sees each frame, not descending; `tokens` or more for never.
        tokens: T.
        window: the most frames that a token sees.
    """
    first = np.asarray(first_tokens, np.int64)
    if (np.diff(first) < 0).any():
        raise ValueError("first_tokens: a frame is seen before an older one")
    newest = np.searchsorted(first, np.arange(tokens), side="right")[:, None]  # frames so far, [T, 1]
    index = np.arange(len(first))
    return (index < newest) & (index >= newest - window)
