"""What the integers in a bundle stand for, beside the decoder that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class StoredWeights:
    """The integer weights of a bundle, read when they are needed: one matrix at a time is in memory.

    Args:
        decoder: of the checkpoint; it calls its methods `embed` and `logits`.
        bundle: what was exported of it.
        others: further graphs with integer weights, by name.
        mlps: MLPs that stand in those, by the names of their layers there, and what their last weight [out, in] was
            multiplied by, [out].
    """

    def __init__(
        self,
        decoder: Speaker,
        bundle: Bundle,
        others: Sequence[str] = (),
        mlps: Mapping[str, tuple[MLP, Tensor]] | None = None,
    ) -> None:
        language = bundle.manifest.language
        assert language is not None
        names = (language.embed, language.decoder, *others)
        self._decoder = decoder
        self._table, *graphs = (StoredBlocks(bundle.file(bundle.manifest.graphs[name].file)) for name in names)
        self._rows = next(iter(self._table.names()), None)  # none where the table has no integers
        self._blocks = {name: graph for graph in reversed(graphs) for name in graph.names()}
        self._linears: dict[str, nn.Linear] = {}
        self._factors: dict[str, Tensor] = {}  # what an export multiplied a weight by, of each output
        for index, layer in enumerate(decoder.model.layers):
            attention = layer.self_attn
            parts = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            self._add(f"layer{index}", {**parts, "output": attention.o_proj}, layer.mlp)
            scale = torch.tensor(attention.config.head_dim**-0.5)
            self._factors[f"layer{index}.query"] = scale.expand(len(attention.q_proj.weight))
        for name, (mlp, factor) in (mlps or {}).items():
            self._add(name, {}, mlp)
            self._factors[f"{name}.down"] = factor

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let PyTorch's decoder compute with them."""
        decoder = self._decoder
        decoder.__dict__["logits"] = partial(self._multiply, name="head")
        if self._rows is not None:
            decoder.__dict__["embed"] = self._embed
        for name, linear in self._linears.items():
            linear.__dict__["forward"] = partial(self._multiply, name=name, bias=linear.bias)
        try:
            yield
        finally:
            del decoder.__dict__["logits"]
            decoder.__dict__.pop("embed", None)
            for linear in self._linears.values():
                del linear.__dict__["forward"]

    def rounding(self) -> float:
        """How far a weight is from the checkpoint's at most, in steps of its block."""
        found = []
        if self._rows is not None:
            table, embedding = self._table, self._decoder.model.embed_tokens.weight
            ids = slice(len(embedding))  # a row more is not of the checkpoint's table
            found += [steps_off(table.integers(self._rows)[ids], table.scales(self._rows)[ids], embedding.detach())]
        for name in ("head", *self._linears):
            integers, scales = self._stored(name)
            weight = self._weight(name)
            factor = self._factors.get(name)
            wanted = weight.detach() if factor is None else weight.detach().float() * factor[:, None]
            found.append(steps_off(integers, scales, wanted))
        return max(found)

    def _add(self, name: str, linears: dict[str, nn.Linear], mlp: MLP) -> None:
        linears |= {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        self._linears.update({f"{name}.{part}": linear for part, linear in linears.items()})

    def _stored(self, name: str) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.floating]]:
        """Integers [out, in] and scales [out, in / block]."""
        blocks, outputs = self._blocks[name], len(self._weight(name))  # the head may have a row more
        return blocks.integers(name).T[:outputs], blocks.scales(name).T[:outputs]

    def _weight(self, name: str) -> Tensor:
        """The checkpoint's, [out, in]."""
        return self._decoder.head if name == "head" else self._linears[name].weight

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self._rows is not None
        integers, scales, ids = self._table.integers(self._rows), self._table.scales(self._rows), tokens.numpy()
        return torch.from_numpy(dequantize_blocks(integers[ids], scales[ids]))

    def _multiply(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        product = F.linear(x, torch.from_numpy(dequantize_blocks(*self._stored(name))))
        factor = self._factors.get(name)
        if factor is not None:  # where it is zero, so is the product
            product = product / torch.where(factor == 0, 1, factor)
        return product if bias is None else product + bias.to(x.dtype)
