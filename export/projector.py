"""From StreamFormer's features to a decoder's embeddings: the projector of its VideoQA checkpoints.

The parameter names are those of LLaVA (`mm_projector`, `image_newline`). As in the reference, patches are pooled 2 x 2
after the projection, whatever the config's stride says, and newline tokens end rows, frames, the video or nothing.

Folded: pooling is linear but for "max", so it goes before the last linear layer, which then has a quarter of the rows.

Sizes in shape comments: S streams, N patches, M tokens of a frame, D hidden size of the decoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from ..runtime.manifest import STREAMS, Graph, Port
from .decoder import Linear
from .graph import GraphBuilder
from .precision import Precision
from .vision_graph import VISUAL

POOLINGS = ("average", "max", "bilinear")
NEWLINES = ("grid", "frame", "one_token", "no_token")
STRIDE = 2  # patches along each side that become one token


@dataclass(frozen=True)
class ProjectorConfig:
    """How features become tokens.

    Attributes:
        depth: linear layers, with GELU in between.
        pooling: one of `POOLINGS`.
        newline: where newline tokens stand, one of `NEWLINES`: after each row, each frame, the video ("one_token",
            which is a token of the dialogue, not of a frame), nowhere.
    """

    input_size: int
    hidden_size: int
    depth: int
    pooling: str
    newline: str

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> ProjectorConfig:
        """Read LLaVA's keys of a `config.json`.

        Raises:
            CheckpointError: something that is not supported.
        """
        kind = values.get("mm_projector_type", "linear")
        found = re.fullmatch(r"linear|mlp([1-9])x_gelu", str(kind))
        if found is None:
            raise CheckpointError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlp2x_gelu")
        input_size, hidden_size = values.get("mm_hidden_size"), values.get("hidden_size")
        for key, size in (("mm_hidden_size", input_size), ("hidden_size", hidden_size)):
            if type(size) is not int or size < 1:
                raise CheckpointError(f"{where}: {key} is {size!r}; expected a positive integer")
        pooling = values.get("mm_spatial_pool_mode", "average")
        if pooling not in POOLINGS:
            raise CheckpointError(f"{where}: mm_spatial_pool_mode is {pooling!r}; expected {', '.join(POOLINGS)}")
        merge = str(values.get("mm_patch_merge_type", "flat"))
        newline = values.get("mm_newline_position", "one_token") if merge.startswith("spatial") else "no_token"
        if newline not in NEWLINES:
            raise CheckpointError(f"{where}: mm_newline_position is {newline!r}; expected {', '.join(NEWLINES)}")
        if values.get("add_faster_video"):
            raise CheckpointError(f"{where}: add_faster_video is true; such projectors are not supported")
        if "unpad" not in merge and newline == "one_token":
            newline = "no_token"
        if "unpad" not in merge and newline != "no_token":
            raise CheckpointError(f"{where}: mm_newline_position is '{newline}', but '{merge}' has no image_newline")
        assert isinstance(input_size, int)
        assert isinstance(hidden_size, int)
        return cls(input_size, hidden_size, int(found[1] or 1), pooling, newline)


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [Linear(config.input_size, config.hidden_size)]
        for _ in range(1, config.depth):
            layers += [nn.GELU(), Linear(config.hidden_size, config.hidden_size)]
        self.mm_projector = nn.Sequential(*layers)
        if config.newline != "no_token":
            self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embeddings [S, M, D] of features [S, N, input_size] of a grid of patches."""
        x = self.mm_projector(features).unflatten(1, grid).permute(0, 3, 1, 2)
        x = pool(x, self.config.pooling).permute(0, 2, 3, 1)  # [S, rows, columns, D]
        if self.config.newline == "grid":
            newline = self.image_newline.to(x.dtype).expand(*x.shape[:2], 1, -1)
            return torch.cat([x, newline], dim=2).flatten(1, 2)
        x = x.flatten(1, 2)
        if self.config.newline == "frame":
            return torch.cat([x, self.image_newline.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        return x


def pool(x: Tensor, kind: str) -> Tensor:
    """Pool images [S, D, rows, columns] by the stride."""
    if kind == "average":
        return F.avg_pool2d(x, STRIDE)
    if kind == "max":
        return F.max_pool2d(x, STRIDE)
    size = [-(-side // STRIDE) for side in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear")


def write_projector(projector: Projector, grid: tuple[int, int], precision: Precision, builder: GraphBuilder) -> Graph:
    """Write the graph from the backbone's features to a frame's embeddings [S, M, D], float32."""
    g, config = builder, projector.config
    N, D = grid[0] * grid[1], config.hidden_size
    with torch.no_grad():
        x = g.input("features", "float32", [STREAMS, N, config.input_size])
        identity = torch.eye(N).unflatten(1, grid)[None]  # [1, N, rows, columns]
        pooled = pool(identity, config.pooling)
        rows, columns = pooled.shape[2:]
        layers = [layer for layer in projector.mm_projector if isinstance(layer, Linear)]
        h = precision.narrow(g, x)
        for index, layer in enumerate(layers):
            if index == len(layers) - 1 and config.pooling != "max":
                matrix = precision.array(pooled[0].flatten(1).T)  # [M, N]
                h = g.node("MatMul", g.weight("pooling_matrix", matrix), h, name="pooling")
            h = precision.linear(g, h, f"projector{index}", layer.weight, layer.bias)
            if index < len(layers) - 1:
                h = g.activation(h, "gelu")
        if config.pooling == "max":
            inner = [0, rows, STRIDE, columns, STRIDE, D]
            if grid != (rows * STRIDE, columns * STRIDE):  # what is left over at the edges is not pooled
                kept = np.arange(N).reshape(grid)[: rows * STRIDE, : columns * STRIDE].reshape(-1)
                h = g.node("Gather", h, g.weight("pooled_patches", kept), axis=1)
            h = g.node("ReduceMax", g.node("Reshape", h, g.constant(inner)), g.constant([2, 4]), keepdims=0)
        h = precision.widen(g, h)
        tokens = rows * columns
        if config.newline in ("grid", "frame"):
            lines = rows if config.newline == "grid" else 1
            tokens += lines
            streams = g.node("Slice", g.node("Shape", x), g.constant([0]), g.constant([1]))
            shape = g.node("Concat", streams, g.constant([lines, 1, D]), axis=0)
            newline = projector.image_newline.float().numpy()[None, None, None]
            newlines = g.node("Expand", g.weight("image_newline", newline), shape)  # [S, lines, 1, D]
            h = g.node("Reshape", h, g.constant([-1, lines, rows * columns // lines, D]))
            h = g.node("Concat", h, newlines, axis=2)
        h = g.node("Reshape", h, g.constant([-1, tokens, D]))
        g.output(h, VISUAL, "float32", [STREAMS, tokens, D])
    return Graph(
        g.file,
        (Port("features", "output", "float32", (STREAMS, N, config.input_size)),),
        (Port(VISUAL, "output", "float32", (STREAMS, tokens, D)),),
    )
