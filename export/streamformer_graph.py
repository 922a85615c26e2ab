"""StreamFormer as step graphs: folding its weights, and writing the graphs.

What is folded, and into what:
- LoRA updates into their base weight;
- pixel mean, standard deviation and the division by 255 into the patch embedding;
- the patch embedding's bias into the position embedding;
- the attention scale into the query projection;
- the key's bias into nothing: it adds the same to a query's score with every slot, and softmax does not see that;
- the value's bias through the output projection into that one's bias, for attention weights sum to one;
- temporal output projection, temporal dense layer and tanh gate into one matrix;
- the pooling head's query (a constant, for its probe is one) into the graph as such.

Sizes in shape comments: S streams, N patches, H heads, W window, D hidden, d head_dim, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from ..runtime.manifest import STREAMS, Graph, Port, State, StateUse
from .checkpoint import TaskHead
from .graph import GraphBuilder
from .precision import Precision
from .streamformer import Attention, Layer, StreamFormer, StreamFormerConfig

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias"""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


@dataclass(frozen=True)
class Projections:
    """Query (scaled by head_dim ** -0.5), key and value (without bias), and what follows the attention."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear


def fold_attention(attention: Attention) -> Projections:
    """Fold LoRA and the attention scale of one attention."""
    qkv, dense = attention.attention.qkv, attention.output.dense
    weight, out_weight = qkv.weight, dense.weight
    if attention.lora_rank:
        weight = weight + attention.attention.qkv_lora_b.weight @ attention.attention.qkv_lora_a.weight
        out_weight = out_weight + attention.output.dense_lora_b.weight @ attention.output.dense_lora_a.weight
    head_dim = weight.shape[1] // attention.heads
    q, k, v = weight.chunk(3)
    scale = head_dim**-0.5
    if qkv.bias is None:
        query, out_bias = Linear(q * scale, None), dense.bias
    else:
        bq, _, bv = qkv.bias.chunk(3)
        query, out_bias = Linear(q * scale, bq * scale), dense.bias + out_weight @ bv
    return Projections(query, Linear(k, None), Linear(v, None), Linear(out_weight, out_bias))


def fold_temporal(layer: Layer) -> Projections:
    """Fold in the dense layer and gate that follow: tanh(g) * (W_dense (W_out x + b_out) + b_dense)."""
    folded = fold_attention(layer.temporal_attention)
    gate = layer.temporal_attention_gating.tanh()
    dense = layer.temporal_dense
    inner = folded.output
    assert inner.bias is not None
    output = Linear(gate * (dense.weight @ inner.weight), gate * (dense.weight @ inner.bias + dense.bias))
    return Projections(folded.query, folded.key, folded.value, output)


def fold_pooling(attention: nn.MultiheadAttention) -> Projections:
    """Fold the scale and biases of PyTorch's own attention."""
    q, k, v = attention.in_proj_weight.chunk(3)
    bq, _, bv = attention.in_proj_bias.chunk(3)
    scale = (attention.embed_dim // attention.num_heads) ** -0.5
    out = attention.out_proj
    output = Linear(out.weight, out.bias + out.weight @ bv)
    return Projections(Linear(q * scale, bq * scale), Linear(k, None), Linear(v, None), output)


def fold_patch_embedding(model: StreamFormer, grid: tuple[int, int]) -> Linear:
    """The patch embedding for pixels 0..255 (row, column, channel); its bias [N, D] holds the position embedding."""
    projection = model.embeddings.patch_embeddings.projection
    # (p / 255 - 0.5) / 0.5 = p * 2 / 255 - 1
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P * P * 3]
    positions = interpolate_positions(model.embeddings.position_embeddings[0], grid)  # [N, D]
    bias = positions + (projection.bias - weight.sum(1))
    return Linear(weight * (2 / 255), bias)


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings [M * M, D] for another grid: bicubic with antialiasing, as the reference.

    For grids that are not square the reference passes width before height, which transposes the positions; here rows
    are rows.
    """
    side = round(positions.shape[0] ** 0.5)
    if grid == (side, side):
        return positions
    if side * side != positions.shape[0]:
        raise CheckpointError(
            f"position_embeddings: {positions.shape[0]} positions are no square grid; they cannot be"
            f" interpolated to {grid[0]}x{grid[1]} patches"
        )
    image = positions.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, D, side, side]
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).flatten(0, 1)


def write_backbone(
    model: StreamFormer, window: int, image_size: tuple[int, int], precision: Precision, builder: GraphBuilder
) -> tuple[Graph, list[State]]:
    """Write the backbone's step graph. Its arithmetic and its states are float32.

    Args:
        model: the checkpoint.
        window: frames that one frame attends to, itself included; the ring's capacity.
        image_size: height and width of the input, multiples of the patch size.
        precision: of weights, "fp32" or "w8"; those that read pixels are float32 with both.
        builder: takes the nodes.
    """
    config = model.config
    height, width = image_size
    P, D, H, d = config.patch_size, config.hidden_size, config.num_attention_heads, config.head_dim
    grid = (height // P, width // P)
    N = grid[0] * grid[1]
    g = builder
    with torch.no_grad():
        frame = g.input("frame", "uint8", [STREAMS, height, width, 3])
        position = g.input("position", "int64", [STREAMS])

        g.scope("embeddings")
        patch = fold_patch_embedding(model, grid)
        x = g.node("Cast", frame, to=1)
        x = g.node("Reshape", x, g.constant([-1, grid[0], P, grid[1], P, 3]))
        x = g.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])  # [S, rows, columns, P, P, 3]
        x = g.node("Reshape", x, g.constant([-1, N, P * P * 3]))
        x = _apply(g, x, "patch_embedding", patch, precision.of_pixels)  # [S, N, D]
        last = g.constant([config.num_frames - 1])
        times = _array(model.embeddings.time_embeddings[0])
        time = g.node("Gather", g.weight("time_embedding", times), g.node("Min", position, last), axis=0)  # [S, D]
        x = g.node("Add", x, g.node("Unsqueeze", time, g.constant([1])))

        g.scope("ring")
        slot = g.node("Mod", position, g.constant([window]), name="write_index")  # [S]
        slots = g.weight("ring_slots", np.arange(window, dtype=np.int64).reshape(1, 1, 1, window))
        age = g.node("Unsqueeze", position, g.constant([1, 2, 3]))  # [S, 1, 1, 1]
        # until the ring has filled up once, only the slots up to the current one hold frames
        mask = g.node("LessOrEqual", slots, age, name="slot_mask")  # [S, 1, 1, W]

        states, uses = [], []
        for index, layer in enumerate(model.encoder.layer):
            g.scope(f"layer{index}")
            name = f"layer{index}"
            temporal = fold_temporal(layer)
            h = _norm(g, x, f"{name}.temporal_norm", layer.temporal_layernorm)
            # [S, N, H * d] is [S, N * H, 1, d] without a copy: every patch and head is a head of its own over time
            rows = g.constant([0, N * H, 1, d])
            q = g.node("Reshape", _apply(g, h, f"{name}.temporal.query", temporal.query, precision), rows)
            ring = {}
            for part, linear in (("key", temporal.key), ("value", temporal.value)):
                new = g.node("Reshape", _apply(g, h, f"{name}.temporal.{part}", linear, precision), rows)
                state = f"{name}.{part}"
                past = g.input(f"{state}.past", "float32", [STREAMS, N * H, window, d])
                updated = g.node("TensorScatter", past, new, slot, name=f"{part}_update", axis=2, mode="linear")
                ring[part] = g.output(updated, f"{state}.present", "float32", [STREAMS, N * H, window, d])
                states.append(State(state, "ring", (STREAMS, N * H, window, d), 2, window, 1, "float32"))
                uses.append(StateUse(state, f"{state}.past", f"{state}.present"))
            h = g.node("Attention", q, ring["key"], ring["value"], mask, name="temporal_attention", scale=1.0)
            h = g.node("Reshape", h, g.constant([0, N, D]))
            x = g.node("Add", x, _apply(g, h, f"{name}.temporal.output", temporal.output, precision))

            spatial = fold_attention(layer.attention)
            h = _norm(g, x, f"{name}.spatial_norm", layer.layernorm_before)
            h = _attention(g, h, f"{name}.spatial", spatial, H, precision)
            x = g.node("Add", x, _apply(g, h, f"{name}.spatial.output", spatial.output, precision))

            h = _norm(g, x, f"{name}.mlp_norm", layer.layernorm_after)
            h = _mlp(g, h, f"{name}.mlp", layer.intermediate.dense, layer.output.dense, config, precision)
            x = g.node("Add", x, h)

        g.scope("pooling")
        features = _norm(g, x, "post_norm", model.post_layernorm)
        features = g.output(features, "features", "float32", [STREAMS, N, D])
        pooled = _pool(g, features, position, model, precision)
        g.output(pooled, "pooled", "float32", [STREAMS, D])
    graph = Graph(
        g.file,
        (
            Port("frame", "frame", "uint8", (STREAMS, height, width, 3)),
            Port("position", "position", "int64", (STREAMS,)),
        ),
        (
            Port("features", "output", "float32", (STREAMS, N, D)),
            Port("pooled", "output", "float32", (STREAMS, D)),
        ),
        tuple(uses),
    )
    return graph, states


def write_label_graph(config: StreamFormerConfig, builder: GraphBuilder) -> Graph:
    """Scores of a frame: sigmoid(exp(logit_scale) * dot(pooled / |pooled|, t) + logit_bias) for each label's t."""
    D = config.hidden_size
    g = builder
    pooled = g.input("pooled", "float32", [STREAMS, D])
    scores = _score(g, pooled, "text_embeddings", D)  # [S, C]
    g.output(scores, "scores", "float32", [STREAMS, "C"])
    ports = (Port("pooled", "output", "float32", (STREAMS, D)), *_label_ports("text_embeddings", D))
    return Graph(g.file, ports, (Port("scores", "output", "float32", (STREAMS, "C")),))


def write_patch_label_graph(
    model: StreamFormer, head: TaskHead | None, grid: tuple[int, int], precision: Precision, builder: GraphBuilder
) -> Graph:
    """Scores of every patch, projected as the reference's segmentation heads do.

    A patch goes through the pooling attention's value and output projections, then its layer norm and MLP residually.

    Args:
        head: a task head; where it has no projections of its own, or is None, the pooling head's are taken.
        precision: the backbone's, whose weights the pooling head's are.
    """
    config = model.config
    D, N = config.hidden_size, grid[0] * grid[1]
    g = builder
    with torch.no_grad():
        features = g.input("features", "float32", [STREAMS, N, D])
        pooling = model.head
        if head is None or head.projections is None:
            folded = fold_pooling(pooling.attention)
            value, output = folded.value, folded.output
            norm, fc1, fc2, prefix = pooling.layernorm, pooling.mlp.fc1, pooling.mlp.fc2, "pooling"
        else:
            own, prefix = head.projections, "head"
            value, output = Linear(own.w_v.weight, own.w_v.bias), Linear(own.v_proj.weight, own.v_proj.bias)
            norm, fc1, fc2 = own.head_layernorm, own.head_mlp.fc1, own.head_mlp.fc2
        x = _apply(g, features, f"{prefix}.value", value, precision)
        x = _apply(g, x, f"{prefix}.output", output, precision)
        h = _norm(g, x, f"{prefix}.norm", norm)
        x = g.node("Add", x, _mlp(g, h, f"{prefix}.mlp", fc1, fc2, config, precision))
        scores = _score(g, x, "patch_text_embeddings", D)  # [S, N, C]
        scores = g.node("Transpose", scores, perm=[0, 2, 1])
        scores = g.node("Reshape", scores, g.constant([0, -1, *grid]))
        g.output(scores, "patch_scores", "float32", [STREAMS, "C", *grid])
    ports = (Port("features", "output", "float32", (STREAMS, N, D)), *_label_ports("patch_text_embeddings", D))
    return Graph(g.file, ports, (Port("patch_scores", "output", "float32", (STREAMS, "C", *grid)),))


def _score(g: GraphBuilder, x: str, embeddings: str, hidden: int) -> str:
    text = g.input(embeddings, "float32", ["C", hidden])
    scale = g.input("logit_scale", "float32", [])
    bias = g.input("logit_bias", "float32", [])
    length = g.node("ReduceL2", x, g.constant([-1]), keepdims=1)
    cosine = g.node("MatMul", g.node("Div", x, length), g.node("Transpose", text, perm=[1, 0]))
    logit = g.node("Add", g.node("Mul", cosine, g.node("Exp", scale)), bias)
    # spelled out: ONNX Runtime's Sigmoid is 0 from -18 on, where SigLIP's biases put most labels
    grown = g.node("Exp", g.node("Neg", logit))
    return g.node("Reciprocal", g.node("Add", grown, g.scalar(1.0)))


def _label_ports(embeddings: str, hidden: int) -> tuple[Port, ...]:
    return (
        Port(embeddings, embeddings, "float32", ("C", hidden)),
        Port("logit_scale", "logit_scale", "float32", ()),
        Port("logit_bias", "logit_bias", "float32", ()),
    )


def _pool(g: GraphBuilder, features: str, position: str, model: StreamFormer, precision: Precision) -> str:
    """Attention pooling of features [S, N, D] -> [S, D]"""
    config, head = model.config, model.head
    D, H = config.hidden_size, config.num_attention_heads
    folded = fold_pooling(head.attention)
    assert folded.query.bias is not None
    probe = F.linear(head.probe[0], folded.query.weight, folded.query.bias)  # [1, D]
    streams = g.node("Concat", g.node("Shape", position), g.constant([1, D]), axis=0)
    q = g.node("Expand", g.weight("pooling.query", _array(probe[None])), streams)  # [S, 1, D]
    k = _apply(g, features, "pooling.key", folded.key, precision)
    v = _apply(g, features, "pooling.value", folded.value, precision)
    x = g.node("Attention", q, k, v, name="attention", q_num_heads=H, kv_num_heads=H, scale=1.0)
    x = _apply(g, x, "pooling.output", folded.output, precision)
    h = _norm(g, x, "pooling.norm", head.layernorm)
    x = g.node("Add", x, _mlp(g, h, "pooling.mlp", head.mlp.fc1, head.mlp.fc2, config, precision))
    return g.node("Squeeze", x, g.constant([1]))


def _attention(g: GraphBuilder, x: str, name: str, projections: Projections, heads: int, precision: Precision) -> str:
    """Attention among the rows of x [S, N, D], before its output projection."""
    q = _apply(g, x, f"{name}.query", projections.query, precision)
    k = _apply(g, x, f"{name}.key", projections.key, precision)
    v = _apply(g, x, f"{name}.value", projections.value, precision)
    return g.node("Attention", q, k, v, name="spatial_attention", q_num_heads=heads, kv_num_heads=heads, scale=1.0)


def _mlp(
    g: GraphBuilder,
    x: str,
    name: str,
    fc1: nn.Linear,
    fc2: nn.Linear,
    config: StreamFormerConfig,
    precision: Precision,
) -> str:
    h = precision.linear(g, x, f"{name}.fc1", fc1.weight, fc1.bias)
    return precision.linear(g, g.activation(h, config.hidden_act), f"{name}.fc2", fc2.weight, fc2.bias)


def _apply(g: GraphBuilder, x: str, name: str, linear: Linear, precision: Precision) -> str:
    return precision.linear(g, x, name, linear.weight, linear.bias)


def _norm(g: GraphBuilder, x: str, name: str, norm: nn.LayerNorm) -> str:
    return g.layer_norm(x, name, _array(norm.weight), _array(norm.bias), norm.eps)


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
