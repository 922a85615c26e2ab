"""The vision tower of Qwen2.5-VL as a graph without state, for frames of one fixed size.

Folded: pixel mean, deviation and the division by 255 into the patch embedding; the second of the two equal frames that
a still picture stands for into the first (the sum of both weights); the attention scale into the query projection; the
bias of the value through the output projection into that one's bias.

Sizes in shape comments: S streams, N patches, M merged patches (tokens), H heads, D hidden, d head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..runtime.manifest import STREAMS, Graph, Port
from .decoder import MLP
from .decoder_graph import write_norm
from .graph import GraphBuilder
from .precision import Precision
from .vision import Attention, FrameLayout, VisionTower

VISUAL = "visual"  # the output that holds a frame's embeddings


def write_vision(tower: VisionTower, frame_size: tuple[int, int], precision: Precision, builder: GraphBuilder) -> Graph:
    """Write the graph from a frame uint8 [S, height, width, 3] to its embeddings [S, M, out], float32."""
    g, config = builder, tower.config
    height, width = frame_size
    p, m, D = config.patch_size, config.spatial_merge_size, config.hidden_size
    layout = FrameLayout.of(config, height, width)
    N, (rows, columns) = len(layout.rows), layout.grid
    with torch.no_grad():
        frame = g.input("frame", "uint8", [STREAMS, height, width, 3])
        g.scope("patches")
        std, mean = torch.tensor(config.std), torch.tensor(config.mean)
        kernel = tower.patch_embed.proj.weight.float().sum(2)  # [D, 3, p, p]
        scaled = kernel / (255 * std[:, None, None])
        bias = -(kernel * (mean / std)[:, None, None]).sum((1, 2, 3))
        x = precision.narrow(g, g.node("Cast", frame, to=1))
        x = g.node("Reshape", x, g.constant([-1, rows, m, p, columns, m, p, 3]))
        x = g.node("Transpose", x, perm=[0, 1, 4, 2, 5, 3, 6, 7])  # [S, rows, columns, m, m, p, p, 3]
        x = g.node("Reshape", x, g.constant([-1, N, p * p * 3]))
        weight = scaled.permute(0, 2, 3, 1).flatten(1)  # [D, p * p * 3]
        x = precision.widen(g, precision.of_pixels.linear(g, x, "patch_embedding", weight, bias))

        angles = layout.angles(config.head_dim)
        streams = g.node("Slice", g.node("Shape", frame), g.constant([0]), g.constant([1]))
        shape = g.node("Concat", streams, g.constant([N, config.head_dim // 2]), axis=0)
        turn = tuple(
            g.node("Expand", g.weight(name, table[None].astype(precision.dtype)), shape, name=name)
            for name, table in (("cosines", np.cos(angles)), ("sines", np.sin(angles)))
        )
        for index, block in enumerate(tower.blocks):
            name = f"block{index}"
            g.scope(name)
            h = precision.narrow(g, write_norm(g, x, f"{name}.norm1", block.norm1))
            windows = None if index in config.fullatt_block_indexes else layout.windows
            x = g.node("Add", x, precision.widen(g, _attention(g, h, name, block.attn, turn, windows, precision)))
            h = precision.narrow(g, write_norm(g, x, f"{name}.norm2", block.norm2))
            x = g.node("Add", x, precision.widen(g, _mlp(g, h, name, block.mlp, config.hidden_act, precision)))

        g.scope("merger")
        x = precision.narrow(g, write_norm(g, x, "merger.norm", tower.merger.ln_q))
        x = g.node("Reshape", x, g.constant([0, N // (m * m), m * m * D]))
        fc1, fc2 = tower.merger.mlp[0], tower.merger.mlp[2]
        x = precision.linear(g, x, "merger.fc1", fc1.weight, fc1.bias)
        x = precision.linear(g, g.activation(x, "gelu"), "merger.fc2", fc2.weight, fc2.bias)
        output = Port(VISUAL, "output", "float32", (STREAMS, rows * columns, config.out_hidden_size))
        g.output(precision.widen(g, x), output.name, output.dtype, output.shape)
    return Graph(g.file, (Port("frame", "frame", "uint8", (STREAMS, height, width, 3)),), (output,))


def _mlp(g: GraphBuilder, x: str, name: str, mlp: MLP, activation: str, precision: Precision) -> str:
    """Beside integers Qwen's inner layer of 3,420 has 3,456."""
    more = precision.filling(mlp.gate_proj.out_features)
    gate, up = (
        precision.linear(g, x, f"{name}.{part}", F.pad(linear.weight, (0, 0, 0, more)), F.pad(linear.bias, (0, more)))
        for part, linear in (("gate", mlp.gate_proj), ("up", mlp.up_proj))
    )
    inner = g.node("Mul", g.activation(gate, activation), up)
    return precision.linear(g, inner, f"{name}.down", F.pad(mlp.down_proj.weight, (0, more)), mlp.down_proj.bias)


def _attention(
    g: GraphBuilder,
    x: str,
    name: str,
    attention: Attention,
    turn: tuple[str, ...],
    windows: np.ndarray | None,
    precision: Precision,
) -> str:
    """Attention among all patches of x [S, N, D], or within windows, with its output projection.

    Windows become heads of their own, [S, windows * H, patches of a window, d], so that one mask for short windows
    serves every stream.
    """
    H, D = attention.heads, attention.proj.out_features
    d = D // H
    weights = attention.qkv.weight.float().chunk(3)
    query_bias, key_bias, value_bias = attention.qkv.bias.float().chunk(3)
    scale = d**-0.5
    q = precision.linear(g, x, f"{name}.query", weights[0] * scale, query_bias * scale)
    k = precision.linear(g, x, f"{name}.key", weights[1], key_bias)
    v = precision.linear(g, x, f"{name}.value", weights[2])
    q, k = (g.node("RotaryEmbedding", rows, *turn, num_heads=H) for rows in (q, k))
    if windows is None:
        h = g.node("Attention", q, k, v, name="attention", q_num_heads=H, kv_num_heads=H, scale=1.0)
    else:
        W, P = windows.shape
        places = g.weight("window_patches", np.maximum(windows, 0).reshape(-1))
        split, joined = g.constant([0, W, P, H, d]), g.constant([0, W * H, P, d])
        q, k, v = (
            g.node("Reshape", g.node("Transpose", g.node("Reshape", rows, split), perm=[0, 1, 3, 2, 4]), joined)
            for rows in (g.node("Gather", part, places, axis=1) for part in (q, k, v))
        )
        mask = []
        if (windows < 0).any():
            seen = np.broadcast_to((windows >= 0)[:, None, None, :], (W, H, P, P)).reshape(1, W * H, P, P)
            mask = [g.weight("window_mask", np.ascontiguousarray(seen))]
        h = g.node("Attention", q, k, v, *mask, name="window_attention", scale=1.0)
        h = g.node("Transpose", g.node("Reshape", h, g.constant([0, W, H, P, d])), perm=[0, 1, 3, 2, 4])
        h = g.node("Reshape", h, g.constant([0, W * P, D]))
        back = np.empty(windows.max() + 1, np.int64)
        back[windows[windows >= 0]] = np.flatnonzero(windows >= 0)
        h = g.node("Gather", h, g.weight("window_places", back), axis=1)  # [S, N, D]
    out = attention.proj
    bias = out.bias.float() + out.weight.float() @ value_bias
    return precision.linear(g, h, f"{name}.output", out.weight, bias)
