"""The vision tower of Qwen2.5-VL in PyTorch, with the parameter names of Hugging Face, for frames of one fixed size.

This is the definition that exported graphs are checked against. Weights stay in the type that the checkpoint has.

Sizes in shape comments: S streams, N patches, M merged patches (tokens), H heads, D hidden, d head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import CheckpointError
from .decoder import MLP, Linear, RMSNorm, rotate
from .streamformer import activation

THETA = 10000.0  # base of the rotary frequencies
EPSILON = 1e-6
LARGEST_FRAME = 100_352  # pixels: what Streamo is run with


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; field names as in Hugging Face's `vision_config`.

    Attributes:
        mean, std: of pixels from 0 to 1, for each channel; from the image processor's file.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    hidden_act: str
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def unit(self) -> int:
        """Pixels along a side of a merged patch; sides of frames are multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], processor: dict[str, Any], where: str) -> VisionConfig:
        """Read `vision_config` of a `config.json`.

        Args:
            values: the parsed object.
            processor: the parsed `preprocessor_config.json`; empty for the published models' mean and deviation.
            where: what to call the file in messages.

        Raises:
            CheckpointError: something that is not supported, or sizes that do not fit together.
        """
        sizes: dict[str, int] = {}
        defaults = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
        for key in ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size",
                    "temporal_patch_size", "window_size", "out_hidden_size"):  # fmt: skip
            value = values.get(key, defaults.get(key))
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{where}: vision_config.{key} is {value!r}; expected a positive integer")
            sizes[key] = value
        if sizes["hidden_size"] % (4 * sizes["num_heads"]):
            raise CheckpointError(
                f"{where}: vision_config.hidden_size {sizes['hidden_size']} is not a multiple of four times num_heads"
                f" {sizes['num_heads']}"
            )
        if sizes["window_size"] % (sizes["patch_size"] * sizes["spatial_merge_size"]):
            raise CheckpointError(
                f"{where}: vision_config.window_size {sizes['window_size']} is not a multiple of patch_size"
                f" {sizes['patch_size']} times spatial_merge_size {sizes['spatial_merge_size']}"
            )
        full = values.get("fullatt_block_indexes", [7, 15, 23, 31])
        if not isinstance(full, list) or not all(type(index) is int for index in full):
            raise CheckpointError(
                f"{where}: vision_config.fullatt_block_indexes is {full!r}; expected a list of integers"
            )
        if values.get("in_channels", values.get("in_chans", 3)) != 3:
            raise CheckpointError(f"{where}: vision_config.in_channels is not 3 (RGB)")
        act = values.get("hidden_act", "silu")
        try:
            activation(act)
        except (KeyError, TypeError):
            raise CheckpointError(f"{where}: vision_config.hidden_act '{act}' is unknown to transformers") from None
        norms: dict[str, tuple[float, ...]] = {}
        for key, name in (("image_mean", "mean"), ("image_std", "std")):
            if (found := processor.get(key)) is not None:
                if not isinstance(found, list) or len(found) != 3:
                    raise CheckpointError(f"{where}: {key} of the image processor is {found!r}; expected three numbers")
                norms[name] = tuple(float(number) for number in found)
        sized = cls(**sizes, fullatt_block_indexes=tuple(full), hidden_act=act)  # type: ignore[arg-type]
        return replace(sized, **norms)  # type: ignore[arg-type]

    def default_frame(self) -> tuple[int, int]:
        """Height and width of the largest frame of about 16:9 within `LARGEST_FRAME`, as the reference rounds it."""
        shrink = math.sqrt(9 * 16 / LARGEST_FRAME)
        height, width = (max(1, int(side / shrink / self.unit)) * self.unit for side in (9, 16))
        return height, width


@dataclass(frozen=True)
class FrameLayout:
    """Where the patches of a frame of one size lie. Patches are in the image processor's order: those that are merged
    stand together, merged patches row by row.

    Attributes:
        grid: merged patches in height and width.
        rows, columns: of each patch, [N].
        windows: indices of the patches of each window, [windows, largest]; short ones are filled up with -1.
    """

    grid: tuple[int, int]
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, config: VisionConfig, height: int, width: int) -> FrameLayout:
        m, grid = config.spatial_merge_size, (height // config.unit, width // config.unit)
        block_rows, block_columns, inner_rows, inner_columns = np.indices((*grid, m, m))
        rows, columns = (block_rows * m + inner_rows).ravel(), (block_columns * m + inner_columns).ravel()
        side = config.window_size // config.patch_size  # patches along a side of a window
        window_of = rows // side * (-(-grid[1] * m // side)) + columns // side
        windows = np.full((window_of.max() + 1, side * side), -1, np.int64)
        for window, slots in enumerate(windows):
            patches = np.flatnonzero(window_of == window)
            slots[: len(patches)] = patches
        longest = (windows >= 0).sum(axis=1).max()
        return cls(grid, rows, columns, windows[:, :longest])

    def angles(self, head_dim: int) -> npt.NDArray[np.float64]:
        """Radians by which each patch turns the pairs of numbers of a head, [N, d / 2]: first rows, then columns."""
        frequencies = THETA ** -(np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
        return np.concatenate([self.rows[:, None] * frequencies, self.columns[:, None] * frequencies], axis=1)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel_size=size, stride=size, bias=False)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, config.hidden_size * 3)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        h = F.scaled_dot_product_attention(rotate(q, *turn), rotate(k, *turn), v, attn_mask=mask)
        return self.proj(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, EPSILON)
        self.norm2 = RMSNorm(config.hidden_size, EPSILON)
        self.attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=True)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), turn, mask)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, EPSILON)
        self.mlp = nn.Sequential(Linear(merged, merged), nn.GELU(), Linear(merged, config.out_hidden_size))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, frame: Tensor) -> Tensor:
        """Embeddings [S, M, out_hidden_size] of frames uint8 [S, height, width, 3], one still picture each."""
        config = self.config
        p, m = config.patch_size, config.spatial_merge_size
        S, height, width, _ = frame.shape
        layout = FrameLayout.of(config, height, width)
        pixels = (frame.float() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
        patches = pixels.view(S, height // p // m, m, p, width // p // m, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        patches = patches.flatten(1, 4).unsqueeze(3)  # [S, N, 3, 1, p, p]
        patches = patches.expand(-1, -1, -1, config.temporal_patch_size, -1, -1).flatten(2)
        x = F.linear(patches, self.patch_embed.proj.weight.float().flatten(1))  # [S, N, D]
        angles = torch.from_numpy(layout.angles(config.head_dim))[None]
        turn = angles.cos().float(), angles.sin().float()
        window_of = torch.empty(x.shape[1], dtype=torch.int64)
        for window, patch_indices in enumerate(layout.windows):
            window_of[patch_indices[patch_indices >= 0]] = window
        same_window = window_of[:, None] == window_of
        for index, block in enumerate(self.blocks):
            x = block(x, turn, None if index in config.fullatt_block_indexes else same_window)
        x = self.merger.ln_q(x).unflatten(1, (-1, m * m)).flatten(2)
        return self.merger.mlp(x)
