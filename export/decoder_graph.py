"""Decoders as step graphs.

Three graphs: `embed` (tokens to embeddings), `decoder` (embeddings and caches to the logits of the last token) and
`rebase` (which writes the cached keys anew for other positions). One decoder graph serves any number of new tokens.

A layer has three states: `key` and `value`, which attention reads, and `raw_key`, the keys before rotation, which only
`rebase` reads: what it writes is what a step at the new positions would have written, bit for bit, however often.

Folded: the attention scale into the query projection and its bias. That also keeps FP16 products of queries and keys
with large biases (Qwen2) in range. In FP16 the sum that runs through the layers stays in float32 for the same reason.

`TextWriter` writes the layers one by one, for graphs that have something in between.

Sizes in shape comments: S streams, T new tokens, C capacity in tokens, H query heads, G key and value heads, D hidden,
d head_dim, R rows of position ids, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.manifest import STREAMS, TOKENS, Graph, Port, State, StateUse
from .block_quantize import quantize_blocks
from .decoder import MLP, Decoder, DecoderConfig, Layer, SelfAttention
from .graph import GraphBuilder
from .precision import Precision

Array = npt.NDArray[np.generic]


def write_embed(table: Tensor, precision: Precision, builder: GraphBuilder, extra: Tensor | None = None) -> Graph:
    """Write the graph from tokens [S, T] to their embeddings [S, T, D], float32.

    With integer weights the table is INT8, whatever the other weights are: a step reads few rows of it. With FP16
    products it is FP16.

    Args:
        table: [V, D].
        extra: the embedding of one more token, [D], whose id is the size of the vocabulary.
    """
    g, D = builder, table.shape[1]
    name = "embed_tokens"
    if extra is not None:
        table, name = torch.cat([table, extra[None].to(table.dtype)]), "embed_tokens_and_one"
    tokens = g.input("tokens", "int64", [STREAMS, TOKENS])
    if not precision.integer_table:
        x = precision.widen(g, g.node("Gather", g.weight(f"{name}.weight", precision.array(table)), tokens, axis=0))
    else:
        integers, scales = quantize_blocks(table.detach(), 8)
        rows = g.node("Gather", g.weight(f"{name}.weight", integers), tokens, axis=0)
        scale = g.node("Gather", g.weight(f"{name}.scale", scales), tokens, axis=0)
        # spelled out: a blocked DequantizeLinear wants as many scales as its shape says before it runs
        rows = g.node("Reshape", g.node("Cast", rows, to=1), g.constant([0, 0, scales.shape[1], -1]))
        x = g.node("Mul", rows, g.node("Unsqueeze", scale, g.constant([3])))
        x = g.node("Reshape", x, g.constant([0, 0, D]))
    g.output(x, "embeddings", "float32", [STREAMS, TOKENS, D])
    return Graph(
        g.file,
        (Port("tokens", "tokens", "int64", (STREAMS, TOKENS)),),
        (Port("embeddings", "output", "float32", (STREAMS, TOKENS, D)),),
    )


def write_decoder(
    decoder: Decoder, capacity: int, positions: int, precision: Precision, builder: GraphBuilder
) -> tuple[Graph, list[State]]:
    """Write the step graph.

    Args:
        decoder: the checkpoint.
        capacity: tokens that the cache holds.
        positions: position ids go from 0 to `positions` - 1.
        precision: of weights, products and states.
        builder: takes the nodes.
    """
    writer = TextWriter(builder, decoder.config, capacity, positions, precision)
    x = writer.embeddings
    for index, layer in enumerate(decoder.model.layers):
        x = writer.layer(x, index, layer)
    logits = writer.head(x, decoder.model.norm, decoder.head)
    return Graph(builder.file, writer.ports, (logits,), tuple(writer.uses)), writer.states


class TextWriter:
    """Writes a decoder's layers into a graph.

    Attributes:
        ports: the graph's inputs.
        embeddings: the first of them, which enters the first layer, [S, T, D], float32.
        turn: cosines and sines of the new tokens, [S, T, d / 2].
        states, uses: of the layers written so far.
    """

    def __init__(
        self,
        g: GraphBuilder,
        config: DecoderConfig,
        capacity: int,
        positions: int,
        precision: Precision,
        group: str | None = None,
    ) -> None:
        self.g, self.config, self.capacity, self.precision = g, config, capacity, precision
        self.ports: tuple[Port, ...] = (
            Port("embeddings", "embeddings", "float32", (STREAMS, TOKENS, config.hidden_size)),
            Port("position_ids", "position_ids", "int64", (STREAMS, config.rope.rows, TOKENS), group),
            Port("write_index", "write_index", "int64", (STREAMS,), group),
            Port("slot_mask", "slot_mask", "bool", (STREAMS, capacity), group),
        )
        names = [g.input(port.name, port.dtype, port.shape) for port in self.ports]
        self.embeddings, position_ids, self._write_index, slot_mask = names
        self.states: list[State] = []
        self.uses: list[StateUse] = []
        g.scope("positions")
        self.turn = write_turn(g, config, position_ids, positions, precision)
        g.scope("mask")
        self._mask = _mask(g, self.embeddings, self._write_index, slot_mask, capacity)

    def layer(self, x: str, index: int, layer: Layer) -> str:
        """Self-attention over the cache, then the MLP; x [S, T, D], float32, as what it returns."""
        g, config, precision = self.g, self.config, self.precision
        name = f"layer{index}"
        g.scope(name)
        attention = layer.self_attn
        h = precision.narrow(g, write_norm(g, x, f"{name}.input_norm", layer.input_layernorm))
        scaled = scaled_query(attention)
        projections = {"query": scaled, "key": _weights(attention.k_proj), "value": _weights(attention.v_proj)}
        q, k, v = (
            split_heads(g, precision.linear(g, h, f"{name}.{part}", *w), config.head_dim)
            for part, w in projections.items()
        )  # [S, H or G, T, d]
        self._update(f"decoder.{name}.raw_key", k)
        q, k = (g.node("RotaryEmbedding", rows, *self.turn) for rows in (q, k))
        keys, values = self._update(f"decoder.{name}.key", k), self._update(f"decoder.{name}.value", v)
        h = g.node("Attention", q, keys, values, self._mask, name="attention", scale=1.0)
        h = precision.linear(g, join_heads(g, h, config), f"{name}.output", attention.o_proj.weight)
        x = g.node("Add", x, precision.widen(g, h))

        h = precision.narrow(g, write_norm(g, x, f"{name}.mlp_norm", layer.post_attention_layernorm))
        return g.node("Add", x, precision.widen(g, write_mlp(g, h, name, layer.mlp, precision, config.hidden_act)))

    def head(self, x: str, norm: nn.Module, weight: Tensor) -> Port:
        """The logits of the last token, by the head's weight [V, D]."""
        g, config, precision = self.g, self.config, self.precision
        g.scope("head")
        x = g.node("Gather", x, g.constant(-1), axis=1, name="last")  # [S, D]
        x = precision.narrow(g, write_norm(g, x, "norm", norm))
        if precision.bits is None and config.tie_word_embeddings:  # the very bytes of the embedding table
            x = g.node("Gemm", x, g.weight("embed_tokens.weight", precision.array(weight)), name="head", transB=1)
        elif precision.even_outputs and config.vocab_size % 2:
            x = precision.linear(g, x, "head", F.pad(weight.detach(), (0, 0, 0, 1)))
            x = g.node("Slice", x, g.constant([0]), g.constant([config.vocab_size]), g.constant([1]))
        else:
            x = precision.linear(g, x, "head", weight)
        port = Port("logits", "output", "float32", (STREAMS, config.vocab_size))
        g.output(precision.widen(g, x), port.name, port.dtype, port.shape)
        return port

    def _update(self, name: str, new: str) -> str:
        """Write new rows [S, G, T, d] into the state `name` from `write_index` on."""
        g, dtype = self.g, self.precision.dtype
        shape = (STREAMS, self.config.num_key_value_heads, self.capacity, self.config.head_dim)
        past = g.input(f"{name}.past", dtype, shape)
        update = f"{name.split('.')[-1]}_update"
        present = g.node("TensorScatter", past, new, self._write_index, name=update, axis=2, mode="linear")
        self.states.append(State(name, "linear", shape, 2, self.capacity, 1, dtype))
        self.uses.append(StateUse(name, f"{name}.past", f"{name}.present"))
        return g.output(present, f"{name}.present", dtype, shape)


def write_rebase(
    config: DecoderConfig,
    capacity: int,
    positions: int,
    precision: Precision,
    builder: GraphBuilder,
    group: str | None = None,
) -> Graph:
    """Write the graph that turns the raw keys of every slot to `slot_positions` [S, R, C] and replaces the keys."""
    g, R, C = builder, config.rope.rows, capacity
    shape = (STREAMS, config.num_key_value_heads, C, config.head_dim)
    port = Port("slot_positions", "slot_positions", "int64", (STREAMS, R, C), group)
    slot_positions = g.input(port.name, port.dtype, port.shape)
    cos, sin = write_turn(g, config, slot_positions, positions, precision)
    uses = []
    for index in range(config.num_hidden_layers):
        raw, key = f"decoder.layer{index}.raw_key", f"decoder.layer{index}.key"
        raw_past, past = (g.input(f"{name}.past", precision.dtype, shape) for name in (raw, key))
        turned = g.node("RotaryEmbedding", raw_past, cos, sin, name=f"layer{index}/rotate")
        present = g.node("TensorScatter", past, turned, name=f"layer{index}/key_update", axis=2, mode="linear")
        g.output(present, f"{key}.present", precision.dtype, shape)
        uses += [StateUse(raw, f"{raw}.past"), StateUse(key, f"{key}.past", f"{key}.present")]
    return Graph(g.file, (port,), (), tuple(uses))


def write_turn(
    g: GraphBuilder, config: DecoderConfig, position_ids: str, positions: int, precision: Precision
) -> tuple[str, str]:
    """Cosines and sines [S, T, d / 2] of position ids [S, R, T], from a table made in float64 and rounded once."""
    half = config.head_dim // 2
    table = config.rope.table(config.head_dim, positions)
    first, cosines, sines = 0, [], []
    for row, size in enumerate(config.rope.sections or (half,)):
        columns = np.r_[first : first + size, half + first : half + first + size]
        part = g.weight(
            f"rotation{first}to{first + size}", np.ascontiguousarray(table[:, columns].astype(precision.dtype))
        )
        ids = g.node("Gather", position_ids, g.constant(row), axis=1)  # [S, T]
        both = g.node("Gather", part, ids, axis=0)  # [S, T, 2 * size]
        cosines.append(_columns(g, both, 0, size))
        sines.append(_columns(g, both, size, 2 * size))
        first += size
    if len(cosines) == 1:
        return cosines[0], sines[0]
    return g.node("Concat", *cosines, axis=-1, name="cosines"), g.node("Concat", *sines, axis=-1, name="sines")


def _columns(g: GraphBuilder, x: str, first: int, stop: int) -> str:
    return g.node("Slice", x, g.constant([first]), g.constant([stop]), g.constant([2]))


def _mask(g: GraphBuilder, embeddings: str, write_index: str, slot_mask: str, capacity: int) -> str:
    """Which slots each new token sees, bool [S, 1, T, C].

    It sees the slots of `slot_mask` that this step does not write, and those of the new tokens up to itself.
    """
    slots = g.weight("slots", np.arange(capacity, dtype=np.int64))
    length = g.node("Gather", g.node("Shape", embeddings), g.constant(1), axis=0)
    rows = g.node("Range", g.constant(0), length, g.constant(1))  # [T]
    age = g.node(
        "Sub", slots, g.node("Unsqueeze", write_index, g.constant([1]))
    )  # [S, C], slots after the first new one
    new = g.node("And", g.node("GreaterOrEqual", age, g.constant(0)), g.node("Less", age, length))
    old = g.node("And", slot_mask, g.node("Not", new))
    causal = g.node(
        "LessOrEqual", g.node("Unsqueeze", age, g.constant([1])), g.node("Unsqueeze", rows, g.constant([1]))
    )
    seen = g.node("And", g.node("Unsqueeze", new, g.constant([1])), causal)  # [S, T, C]
    mask = g.node("Or", g.node("Unsqueeze", old, g.constant([1])), seen)
    return g.node("Unsqueeze", mask, g.constant([1]), name="mask")


def write_norm(g: GraphBuilder, x: str, name: str, norm: nn.Module) -> str:
    weight = norm.weight.detach().float().numpy()
    return g.node("RMSNormalization", x, g.weight(f"{name}.weight", weight), name=name, axis=-1, epsilon=norm.epsilon)


def write_mlp(
    g: GraphBuilder, x: str, name: str, mlp: MLP, precision: Precision, act: str, down: Tensor | None = None
) -> str:
    """SwiGLU of x [S, T, D], in the type of products.

    Args:
        down: weight of the last projection; None for the module's own.
    """
    gate = precision.linear(g, x, f"{name}.gate", mlp.gate_proj.weight)
    up = precision.linear(g, x, f"{name}.up", mlp.up_proj.weight)
    h = g.node("Mul", g.activation(gate, act), up)
    return precision.linear(g, h, f"{name}.down", mlp.down_proj.weight if down is None else down)


def split_heads(g: GraphBuilder, x: str, head_dim: int) -> str:
    """[S, T, heads * d] to [S, heads, T, d]."""
    return g.node("Transpose", g.node("Reshape", x, g.constant([0, 0, -1, head_dim])), perm=[0, 2, 1, 3])


def join_heads(g: GraphBuilder, x: str, config: DecoderConfig) -> str:
    """[S, H, T, d] to [S, T, H * d]."""
    width = config.num_attention_heads * config.head_dim
    return g.node("Reshape", g.node("Transpose", x, perm=[0, 2, 1, 3]), g.constant([0, 0, width]))


def scaled_query(attention: SelfAttention) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the query projection, with the attention scale."""
    return _scaled(attention.q_proj, attention.config.head_dim**-0.5)


def _weights(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _scaled(linear: nn.Linear, scale: float) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        return linear.weight.float() * scale, None if linear.bias is None else linear.bias.float() * scale
