"""StreamChat as step graphs that share state.

- `frame` takes one frame to the keys and values of every cross block, and writes them into one slot of their rings.
- `decoder` is the decoder of `decoder_graph`, which in some layers first reads the rings, under a mask of their slots.
- `rebase_frames` turns the keys of frames back by a number of positions; `rebase` is the decoder's, for text.

The rings have one slot more than frames that text may see: the one that a frame is written into while text is decoded.

Folded: what counts of a V-FFN (its gate) into its last projection. What counts of cross-attention cannot be folded, for
its projection belongs to self-attention too. Such weights are stored once, under one initializer for each use: a shared
one would keep ONNX Runtime from fusing integer weights with their product.

Sizes in shape comments: S streams, T new tokens, F slots for frames, N tokens of a frame, H query heads, G key and
value heads, D hidden, d head_dim.
"""

from __future__ import annotations

import numpy as np
import torch

from ..runtime.manifest import STREAMS, Graph, Port, State, StateUse
from .decoder_graph import (
    TextWriter,
    join_heads,
    scaled_query,
    split_heads,
    write_mlp,
    write_norm,
    write_turn,
)
from .graph import GraphBuilder
from .precision import Precision
from .siglip import write_siglip
from .streamchat import StreamChat

TEXT, VISUAL = "decoder", "visual"  # groups of states


def write_frame(
    model: StreamChat, window: int, positions: int, precision: Precision, builder: GraphBuilder
) -> tuple[Graph, list[State]]:
    """Write the graph of the frame path.

    Its output tells the mean magnitude of what it wrote, so that NaN and infinity are noticed before text reads them.

    Args:
        model: the checkpoint.
        window: frames that text may see.
        positions: position ids go from 0 to `positions` - 1.
        precision: of the decoder's weights, products and states; `of_eyes` is that of the tower and the adapter.
        builder: takes the nodes. One of its files has the decoder's weights.
    """
    g, config = builder, model.config.visual
    size, N, F = model.config.vision.image_size, model.config.vision.patches, window + 1
    G, d, dtype = config.num_key_value_heads, config.head_dim, precision.dtype
    ports = (
        Port("frame", "frame", "uint8", (STREAMS, size, size, 3)),
        Port("write_index", "write_index", "int64", (STREAMS,), VISUAL),
        Port("position_ids", "position_ids", "int64", (STREAMS, config.rope.rows, N), VISUAL),
    )
    frame, write_index, position_ids = (g.input(port.name, port.dtype, port.shape) for port in ports)
    states, uses, magnitudes = [], [], []

    def update(name: str, new: str) -> None:
        """Write the rows [S, G, N, d] of a frame into its slot of the state `name`."""
        mean = g.node("ReduceMean", g.node("Abs", precision.widen(g, new)), g.constant([1, 2, 3]), keepdims=0)  # [S]
        magnitudes.append(g.node("Unsqueeze", mean, g.constant([1])))
        shape = (STREAMS, G, F * N, d)
        past = g.input(f"{name}.past", dtype, shape)
        kind = name.split(".")[-1]
        present = g.node("TensorScatter", past, new, write_index, name=f"{kind}_update", axis=2, mode="linear")
        states.append(State(name, "linear", shape, 2, F, N, dtype))
        uses.append(StateUse(name, f"{name}.past", f"{name}.present"))
        g.output(present, f"{name}.present", dtype, shape)

    seeing = precision.of_eyes
    x = seeing.narrow(g, write_siglip(model.vision_model, frame, seeing, g))
    g.scope("adapter")
    x = seeing.linear(g, x, "adapter.fc1", model.adapter.fc1.weight, model.adapter.fc1.bias)
    x = seeing.linear(g, g.activation(x, "gelu"), "adapter.fc2", model.adapter.fc2.weight, model.adapter.fc2.bias)
    x = seeing.widen(g, x)  # [S, N, D]
    g.scope("positions")
    turn = write_turn(g, config, position_ids, positions, precision)
    for k, (block, index) in enumerate(zip(model.cross_blocks, model.config.cross_layers, strict=True)):
        layer, name = model.model.layers[index], f"layer{index}"
        attention = layer.self_attn
        g.scope(f"block{k}")
        h = precision.narrow(g, write_norm(g, x, f"{name}.input_norm", layer.input_layernorm))
        keys, values = (
            split_heads(g, precision.linear(g, h, f"{name}.{part}", linear.weight, linear.bias), d)
            for part, linear in (("key", attention.k_proj), ("value", attention.v_proj))
        )
        update(f"{VISUAL}.block{k}.key", g.node("RotaryEmbedding", keys, *turn))
        update(f"{VISUAL}.block{k}.value", values)
        if block is not model.cross_blocks[-1]:
            h = precision.narrow(g, write_norm(g, x, f"block{k}.mlp_norm", block.norm))
            with torch.no_grad():
                down = block.mlp.down_proj.weight.float() * block.mlp_gate.float()[:, None]
            h = write_mlp(g, h, f"block{k}", block.mlp, precision, config.hidden_act, down)
            x = g.node("Add", x, precision.widen(g, h))
    g.scope("")
    output = Port("magnitudes", "output", "float32", (STREAMS, len(magnitudes)))
    g.output(g.node("Concat", *magnitudes, axis=1, name="means"), output.name, output.dtype, output.shape)
    return Graph(g.file, ports, (output,), tuple(uses)), states


def write_decode(
    model: StreamChat,
    window: int,
    capacity: int,
    positions: int,
    precision: Precision,
    builder: GraphBuilder,
) -> tuple[Graph, list[State]]:
    """Write the graph of the text path.

    Args:
        model: the checkpoint.
        window: frames that text may see.
        capacity: tokens that the cache holds.
        positions: position ids go from 0 to `positions` - 1.
        precision: of weights, products and states.
        builder: takes the nodes.
    """
    g, config = builder, model.config.text
    N, F = model.config.vision.patches, window + 1
    text = TextWriter(g, config, capacity, positions, precision, TEXT)
    port = Port("visual_slot_mask", "slot_mask", "bool", (STREAMS, F), VISUAL)
    slot_mask = g.input(port.name, port.dtype, port.shape)
    mask, some = _visual_mask(g, text.embeddings, slot_mask, F, N)
    shape = (STREAMS, config.num_key_value_heads, F * N, config.head_dim)
    crossed = dict(zip(model.config.cross_layers, model.cross_blocks, strict=True))
    uses = []
    x = text.embeddings
    for index, layer in enumerate(model.model.layers):
        if index in crossed:
            k, name, attention = model.config.cross_layers.index(index), f"layer{index}", layer.self_attn
            g.scope(f"{name}/cross")
            rings = []
            for part in ("key", "value"):
                state = f"{VISUAL}.block{k}.{part}"
                rings.append(g.input(f"{state}.past", precision.dtype, shape))
                uses.append(StateUse(state, rings[-1]))
            h = precision.narrow(g, write_norm(g, x, f"{name}.input_norm", layer.input_layernorm))
            q = precision.linear(g, h, f"{name}.cross_query", *scaled_query(attention), stored=f"{name}.query")
            q = g.node("RotaryEmbedding", split_heads(g, q, config.head_dim), *text.turn)
            h = join_heads(g, g.node("Attention", q, *rings, mask, name="attention", scale=1.0), config)
            h = precision.linear(g, h, f"{name}.cross_output", attention.o_proj.weight, stored=f"{name}.output")
            gate = g.weight(f"block{k}.attention_gate", crossed[index].attention_gate.detach().float().numpy())
            h = g.node("Mul", precision.widen(g, h), g.node("Mul", gate, some))
            x = g.node("Add", x, h)
        x = text.layer(x, index, layer)
    logits = text.head(x, model.model.norm, model.head)
    return Graph(g.file, (*text.ports, port), (logits,), (*text.uses, *uses)), text.states


def write_rebase_frames(
    model: StreamChat, window: int, positions: int, precision: Precision, builder: GraphBuilder
) -> Graph:
    """Write the graph that turns the keys of all frames back by `position_shift` [S]."""
    g, config = builder, model.config.text
    N, F, d = model.config.vision.patches, window + 1, config.head_dim
    port = Port("position_shift", "position_shift", "int64", (STREAMS,), VISUAL)
    shift = g.input(port.name, port.dtype, port.shape)
    table = g.weight("shift", config.rope.table(d, positions).astype(np.float32))
    both = g.node("Unsqueeze", g.node("Gather", table, shift, axis=0), g.constant([1, 2]))  # [S, 1, 1, d]
    cos, sin = _halves(g, both, d)
    shape = (STREAMS, config.num_key_value_heads, F * N, d)
    uses = []
    for k in range(len(model.cross_blocks)):
        state = f"{VISUAL}.block{k}.key"
        g.scope(f"block{k}")
        # a cache that is updated may go nowhere but into its update, so the keys to turn are an input of their own
        old = g.input(f"{state}.old", precision.dtype, shape)
        past = g.input(f"{state}.past", precision.dtype, shape)
        a, b = _halves(g, precision.widen(g, old), d)
        turned = g.node(
            "Concat",
            g.node("Add", g.node("Mul", a, cos), g.node("Mul", b, sin)),
            g.node("Sub", g.node("Mul", b, cos), g.node("Mul", a, sin)),
            axis=-1,
        )
        turned = precision.narrow(g, turned)
        present = g.node("TensorScatter", past, turned, name="key_update", axis=2, mode="linear")
        g.output(present, f"{state}.present", precision.dtype, shape)
        uses += [StateUse(state, f"{state}.old"), StateUse(state, f"{state}.past", f"{state}.present")]
    return Graph(g.file, (port,), (), tuple(uses))


def _visual_mask(g: GraphBuilder, embeddings: str, slot_mask: str, slots: int, rows: int) -> tuple[str, str]:
    """Which rows of the rings each new token sees, bool [S, 1, T, F * N], and 1.0 where there are any, [S, 1, 1].

    Where a stream sees nothing the mask shows it all, so that no softmax is over nothing; the second value is 0.0 then.
    """
    g.scope("visual_mask")
    some = g.node("ReduceMax", g.node("Cast", slot_mask, to=1), g.constant([1]), keepdims=1)  # [S, 1]
    shown = g.node("Or", slot_mask, g.node("Equal", some, g.scalar(0.0)))
    streams = g.node("Slice", g.node("Shape", slot_mask), g.constant([0]), g.constant([1]))
    length = g.node("Slice", g.node("Shape", embeddings), g.constant([1]), g.constant([2]))
    tokens = g.node("Concat", streams, g.constant([1]), length, g.constant([slots, rows]), axis=0)
    mask = g.node("Expand", g.node("Unsqueeze", shown, g.constant([1, 2, 4])), tokens)  # [S, 1, T, F, N]
    mask = g.node("Reshape", mask, g.constant([0, 0, 0, slots * rows]), name="mask")
    return mask, g.node("Unsqueeze", some, g.constant([2]))


def _halves(g: GraphBuilder, x: str, width: int) -> tuple[str, str]:
    half = width // 2
    first, second = (
        g.node("Slice", x, g.constant([start]), g.constant([start + half]), g.constant([3])) for start in (0, half)
    )
    return first, second
