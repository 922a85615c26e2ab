"""What the integers in a bundle stand for, beside the decoder that they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.bundle import Bundle
from .block_quantize import StoredBlocks, dequantize_blocks, steps_off
from .decoder import Decoder


class StoredWeights:
    """The weights of a bundle in "w8" or "w4", read when they are needed: one matrix at a time is in memory.

    Args:
        decoder: of the checkpoint.
        bundle: what was exported of it.
    """

    def __init__(self, decoder: Decoder, bundle: Bundle) -> None:
        language = bundle.manifest.language
        assert language is not None
        files = [bundle.file(bundle.manifest.graphs[name].file) for name in (language.decoder, language.embed)]
        self._decoder = decoder
        self._blocks, self._table = (StoredBlocks(path) for path in files)
        (self._rows,) = self._table.names()
        self._linears: dict[str, nn.Linear] = {}
        for index, layer in enumerate(decoder.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            parts = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            parts |= {"output": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
            self._linears.update({f"layer{index}.{part}": linear for part, linear in parts.items()})

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let PyTorch's decoder compute with them."""
        decoder = self._decoder
        decoder.__dict__.update(embed=self._embed, logits=partial(self._multiply, name="head"))
        for name, linear in self._linears.items():
            linear.__dict__["forward"] = partial(self._multiply, name=name, bias=linear.bias)
        try:
            yield
        finally:
            del decoder.__dict__["embed"], decoder.__dict__["logits"]
            for linear in self._linears.values():
                del linear.__dict__["forward"]

    def rounding(self) -> float:
        """How far a weight is from the checkpoint's at most, in steps of its block."""
        table, embedding = self._table, self._decoder.model.embed_tokens.weight
        ids = slice(len(embedding))  # a row more is not of the checkpoint's table
        found = [steps_off(table.integers(self._rows)[ids], table.scales(self._rows)[ids], embedding.detach())]
        weights = {"head": self._decoder.head, **{name: linear.weight for name, linear in self._linears.items()}}
        for name, weight in weights.items():
            integers, scales = self._blocks.integers(name).T, self._blocks.scales(name).T
            found.append(steps_off(integers, scales, weight.detach(), self._factor(name)))
        return max(found)

    def _embed(self, tokens: Tensor) -> Tensor:
        integers, scales, ids = self._table.integers(self._rows), self._table.scales(self._rows), tokens.numpy()
        return torch.from_numpy(dequantize_blocks(integers[ids], scales[ids]))

    def _multiply(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        matrix = dequantize_blocks(self._blocks.integers(name).T, self._blocks.scales(name).T)
        product = F.linear(x, torch.from_numpy(matrix)) / self._factor(name)
        return product if bias is None else product + bias.to(x.dtype)

    def _factor(self, name: str) -> float:
        """What an export multiplied a weight by: the attention scale is folded into the query."""
        return float(self._decoder.config.head_dim**-0.5) if name.endswith(".query") else 1.0
