"""What the integers in a bundle stand for, beside the decoder that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.bundle import Bundle
from .block_quantize import StoredBlocks, dequantize_blocks, steps_off
from .decoder import MLP, TextModel


class Speaker(Protocol):
    """What decodes text: a `Decoder`, or a `StreamChat`."""

    model: TextModel

    @property
    def head(self) -> Tensor: ...


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer of a checkpoint whose weight a bundle holds as integers.

    Attributes:
        factor: what the export multiplied its weight by, [out]; None for nothing.
        constant: a part of its input that the export put through the checkpoint's own weight, [in]; None for none.
    """

    linear: nn.Linear
    factor: Tensor | None = None
    constant: Tensor | None = None


class StoredWeights:
    """The integer weights of a bundle, read when they are needed: one matrix at a time is in memory.

    Args:
        decoder: of the checkpoint; it calls its methods `embed` and `logits`.
        bundle: what was exported of it.
        others: further graphs with integer weights, by name.
        linears: linear layers that stand in those, by name; the bundle may hold floats of some.
    """

    def __init__(
        self,
        decoder: Speaker,
        bundle: Bundle,
        others: Sequence[str] = (),
        linears: Mapping[str, StoredLinear] | None = None,
    ) -> None:
        language = bundle.manifest.language
        assert language is not None
        names = (language.embed, language.decoder, *others)
        self._decoder = decoder
        self._table, *graphs = (StoredBlocks(bundle.file(bundle.manifest.graphs[name].file)) for name in names)
        self._rows = next(iter(self._table.names()), None)  # none where the table has no integers
        self._blocks = {name: graph for graph in reversed(graphs) for name in graph.names()}
        self._linears = {name: layer for name, layer in (linears or {}).items() if name in self._blocks}
        for index, layer in enumerate(decoder.model.layers):
            attention = layer.self_attn
            self._linears[f"layer{index}.query"] = scaled_by(attention.config.head_dim**-0.5, attention.q_proj)
            parts = {"key": attention.k_proj, "value": attention.v_proj, "output": attention.o_proj}
            for part, linear in {**parts, **mlp_linears(layer.mlp)}.items():
                self._linears[f"layer{index}.{part}"] = StoredLinear(linear)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let PyTorch's decoder compute with them."""
        decoder = self._decoder
        decoder.__dict__["logits"] = self._logits
        if self._rows is not None:
            decoder.__dict__["embed"] = self._embed
        for name, layer in self._linears.items():
            layer.linear.__dict__["forward"] = partial(self._multiply, name=name, layer=layer)
        try:
            yield
        finally:
            del decoder.__dict__["logits"]
            decoder.__dict__.pop("embed", None)
            for layer in self._linears.values():
                del layer.linear.__dict__["forward"]

    def rounding(self) -> float:
        """How far a weight is from the checkpoint's at most, in steps of its block."""
        found = []
        if self._rows is not None:
            table, embedding = self._table, self._decoder.model.embed_tokens.weight
            ids = slice(len(embedding))  # a row more is not of the checkpoint's table
            found += [steps_off(table.integers(self._rows)[ids], table.scales(self._rows)[ids], embedding.detach())]
        found.append(steps_off(*self._stored("head", len(self._decoder.head)), self._decoder.head.detach()))
        for name, layer in self._linears.items():
            weight = layer.linear.weight.detach()
            integers, scales = self._stored(name, len(weight))
            if layer.factor is not None:
                weight = weight.float() * layer.factor[:, None]
            found.append(steps_off(integers, scales, F.pad(weight, (0, integers.shape[1] - weight.shape[1]))))
        return max(found)

    def _stored(self, name: str, outputs: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.floating]]:
        """Integers [out, in] and scales [out, in / block]. Zeros may be behind the outputs, and behind the inputs."""
        blocks = self._blocks[name]
        return blocks.integers(name).T[:outputs], blocks.scales(name).T[:outputs]

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self._rows is not None
        integers, scales, ids = self._table.integers(self._rows), self._table.scales(self._rows), tokens.numpy()
        return torch.from_numpy(dequantize_blocks(integers[ids], scales[ids]))

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.from_numpy(dequantize_blocks(*self._stored("head", len(self._decoder.head)))))

    def _multiply(self, x: Tensor, name: str, layer: StoredLinear) -> Tensor:
        linear, factor, constant = layer.linear, layer.factor, layer.constant
        weight = torch.from_numpy(dequantize_blocks(*self._stored(name, len(linear.weight))))[:, : x.shape[-1]]
        product = F.linear(x if constant is None else x - constant.to(x.dtype), weight)
        if factor is not None:  # where it is zero, so is the product
            product = product / torch.where(factor == 0, 1, factor)
        if constant is not None:
            product = product + F.linear(constant.to(x.dtype), linear.weight.to(x.dtype))
        return product if linear.bias is None else product + linear.bias.to(x.dtype)


def scaled_by(factor: float, linear: nn.Linear) -> StoredLinear:
    return StoredLinear(linear, torch.tensor(factor).expand(len(linear.weight)))


def mlp_linears(mlp: MLP) -> dict[str, nn.Linear]:
    """By what `write_mlp` calls them."""
    return {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
