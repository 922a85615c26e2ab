"""How the numbers of a graph are stored and computed, and its linear layers written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .block_quantize import BLOCKS, quantize_blocks, to_onnx
from .graph import GraphBuilder

Array = npt.NDArray[np.generic]
PRECISIONS = ("fp32", "fp16", "w8", "w4", "fp16+w4")
LEAST_BLOCK = 32  # inputs; a layer whose inputs are no multiple keeps its floats


@dataclass(frozen=True)
class Precision:
    """How the numbers of a graph are stored and computed.

    Attributes:
        name: one of `PRECISIONS`.
    """

    name: str

    @property
    def dtype(self) -> str:
        """Of products and states; the linear layers of "w8", "w4" and "fp16+w4" hold integers beside it."""
        return "float16" if self.name.startswith("fp16") else "float32"

    @property
    def bits(self) -> int | None:
        """Bits of a weight of a linear layer; None for those of `dtype`."""
        return {"w8": 8, "w4": 4, "fp16+w4": 4}.get(self.name)

    @property
    def integer_table(self) -> bool:
        """Whether the table of embeddings is INT8. TensorRT takes integers in products, and nowhere else."""
        return self.bits is not None and self.dtype == "float32"

    @property
    def even_outputs(self) -> bool:
        """Whether a product wants a row of zeros beside an odd number of outputs. TensorRT reads INT4 in pairs, and
        would write such a matrix down in FP16 in every step."""
        return self.bits == 4 and self.dtype == "float16"

    @property
    def of_eyes(self) -> Precision:
        """Of graphs that see: beside integers in float32 theirs have 8 bits, beside FP16 they are FP16."""
        return self.of_pixels if self.bits is None or self.dtype == "float16" else Precision("w8")

    @property
    def of_pixels(self) -> Precision:
        """Of what reads a frame: its weights are never integers."""
        return Precision("fp16" if self.dtype == "float16" else "fp32")

    def filling(self, width: int) -> int:
        """How many zeros fill an inner layer, whose size a model is free to choose, up to whole blocks of integers."""
        return 0 if self.bits is None else -width % BLOCKS[self.bits][0]

    def array(self, tensor: Tensor) -> Array:
        return np.ascontiguousarray(tensor.detach().to(getattr(torch, self.dtype)).numpy())

    def narrow(self, g: GraphBuilder, x: str) -> str:
        """From float32 to what products are computed in."""
        return g.node("Cast", x, to=10) if self.dtype == "float16" else x

    def widen(self, g: GraphBuilder, x: str) -> str:
        return g.node("Cast", x, to=1) if self.dtype == "float16" else x

    def linear(
        self,
        g: GraphBuilder,
        x: str,
        name: str,
        weight: Tensor,
        bias: Tensor | None = None,
        stored: str | None = None,
    ) -> str:
        """x [..., in] by PyTorch's weight [out, in] and bias [out].

        Args:
            stored: the linear layer whose weights these are too; they are stored once. None where there is none.
        """
        stored = stored or name
        matrix = self._weight(g, name, weight, stored)
        product = g.node("MatMul", x, matrix, name=f"{name}.MatMul")
        if bias is None:
            return product
        added = g.weight(f"{name}.bias", self.array(bias), f"{stored}.bias")
        return g.node("Add", product, added, name=f"{name}.Add")

    def _weight(self, g: GraphBuilder, name: str, weight: Tensor, stored: str) -> str:
        if self.bits is None or weight.shape[1] % LEAST_BLOCK:
            return g.weight(f"{name}.weight", np.ascontiguousarray(self.array(weight).T), f"{stored}.weight")
        integers, scales = quantize_blocks(weight.detach(), self.bits, self.dtype == "float16")
        packed = to_onnx(np.ascontiguousarray(integers.T), self.bits)
        return g.node(
            "DequantizeLinear",
            g.weight(f"{name}.weight", packed, f"{stored}.weight"),  # [in, out]
            g.weight(f"{name}.scale", np.ascontiguousarray(scales.T), f"{stored}.scale"),  # [in / block, out]
            name=f"{name}.DequantizeLinear",
            axis=0,
            block_size=weight.shape[1] // scales.shape[1],
        )
