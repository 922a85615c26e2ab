"""`block_linear` as a fraction of a measured device copy, and against products with FP16 weights and PyTorch's own."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import block_linear, reference
from ...kernels.block_linear import Launch
from ...kernels.temporal import processors
from .bandwidth import measure_copy
from .checks import LIMITS, Inputs, error, products
from .hardware import Hardware, poisoned
from .section import Section
from .sizes import Sizes

# a decoder of 0.5 billion weights, and one of 7: inputs and outputs of queries, keys and values, of the output, of the
# gate and its input, of the last product of a layer, and of the head
MATRICES = (
    ((896, 1152), (896, 896), (896, 9728), (4864, 896), (896, 151936)),
    ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584), (3584, 152064)),
)
SMALL_MATRICES = (((96, 40), (64, 70)),)
FORMATS = ((4, 64, torch.float16), (4, 32, torch.float32), (8, 128, torch.float32))  # bits, block, type of scales
TOKENS = (1, 16, 64)
PROMPT = 512  # tokens, for which a matrix is widened
CHECKED = 256  # outputs, the last ones
# bits, block, inputs, outputs, tokens, parts
SHAPES = ((4, 32, 896, 1152, 1, 1), (8, 128, 3456, 1280, 16, 1), (4, 128, 4864, 897, 64, 2))
HALF_SHAPES = ((4, 64, 3584, 1000, 3, 4), (8, 32, 1120, 1001, 33, 1), (4, 64, 896, 151936, 1, 1))
LIMIT = 2e-3


@dataclass(frozen=True)
class Product:
    """Sizes of a product, and how its weights are held."""

    tokens: int
    inputs: int
    outputs: int
    bits: int
    block: int
    scale_dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.tokens} x {self.inputs} x {self.outputs}, {self.bits} bits in blocks of {self.block}"

    def held(self) -> int:
        """Bytes of weights and scales."""
        scales = self.inputs // self.block * self.outputs * self.scale_dtype.itemsize
        return self.inputs * self.outputs * self.bits // 8 + scales

    def moved(self) -> int:
        return self.held() + 2 * self.tokens * (self.inputs + self.outputs)

    def planned(self, hardware: Hardware) -> Launch:
        units = -(-self.inputs * self.bits // 256)
        return block_linear.plan(self.tokens, units, self.outputs, 2, processors(hardware.device))


@dataclass(frozen=True)
class Filled:
    """x [T, K], packed weights [U, N, 8], scales [K / B, N]."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    bits: int

    def ours(self, cut: Launch | None = None) -> Callable[[], Tensor]:
        return lambda: block_linear.launch(self.x, self.weight, self.scale, None, self.bits, cut)


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    copy = measure_copy(hardware)
    section.facts["copy_bytes_per_second"] = copy
    hardware.free()
    if not hardware.rehearsal:
        seed = section.facts["seed of products"] = secrets.randbits(31)
        inputs = Inputs(hardware.device, seed)
        for dtype, shapes in zip(LIMITS, (SHAPES, (*SHAPES, *HALF_SHAPES), SHAPES), strict=True):
            section.attempt("block_linear", lambda d=dtype, s=shapes: products(section, inputs, d, s))
        hardware.free()
    models = SMALL_MATRICES if hardware.rehearsal else MATRICES
    formats = FORMATS if not hardware.rehearsal else ((4, 32, torch.float16), (8, 32, torch.float32))
    cases = [(tokens, form, models[-1]) for tokens in TOKENS for form in formats if tokens == 1 or form == formats[0]]
    cases[1:1] = [(1, formats[0], model) for model in models[:-1]]
    for tokens, form, model in cases:
        for matrix in model:
            product = Product(tokens, *matrix, *form)
            if section.left() < 5:
                section.skip(f"{product.label}: no time left")
                continue
            section.attempt("block_linear", lambda p=product: _compare(section, hardware, p, copy))
            hardware.free()
    prompt = Product(PROMPT, *models[-1][0], *formats[0])
    section.attempt("widen_blocks", lambda: _prompt(section, hardware, prompt))


def fill(hardware: Hardware, product: Product, seed: int = 0) -> Filled:
    """Every pattern of bits is a weight."""
    inputs = Inputs(hardware.device, seed)
    units = -(-product.inputs * product.bits // 256)
    weight = inputs.words(units, product.outputs, 8)
    scale = inputs.normal(product.inputs // product.block, product.outputs, dtype=product.scale_dtype) * 0.01
    return Filled(inputs.normal(product.tokens, product.inputs, dtype=torch.float16), weight, scale, product.bits)


def check_outputs(section: Section, filled: Filled, product: Product, cut: Launch | None = None) -> None:
    """The last outputs against float64."""
    last = slice(-CHECKED, None)
    wide = reference.unpack_blocks(filled.weight[:, last], filled.scale[:, last].double(), product.inputs, product.bits)
    with poisoned():
        found = filled.ours(cut)()
    label = f"block_linear {product.label}"
    whole = float("inf") if not bool(found.isfinite().all()) else 0.0
    section.check(
        f"{label}, {cut}" if cut else label, max(whole, error(found[:, last], filled.x.double() @ wide.t())), LIMIT
    )


def _compare(section: Section, hardware: Hardware, product: Product, copy: float) -> None:
    filled = [fill(hardware, product, seed) for seed in range(hardware.sets(product.held()))]
    check_outputs(section, filled[0], product)
    ours = hardware.time([one.ours() for one in filled], 0.05)
    del filled
    hardware.free()
    half = [_half(hardware, product, seed) for seed in range(hardware.sets(2 * product.inputs * product.outputs))]
    found = {"fp16": hardware.time(half, 0.05)}
    del half
    hardware.free()
    if not hardware.rehearsal:
        for name, make in (("int4pack", _int4pack), ("int8pack", _int8pack)):
            if name[3] == str(product.bits):
                try:
                    calls = [make(hardware, product) for _ in range(hardware.sets(product.held()))]
                    found[name] = hardware.time(calls, 0.05)
                except Exception as problem:  # not in this PyTorch, or not for these sizes
                    section.skip(f"{name}, {product.label}: {str(problem)[:100]}")
    section.add(
        "block_linear",
        product=product.label,
        megabytes=product.moved() / 1e6,
        microseconds=ours * 1e6,
        share_of_copy=product.moved() / ours / copy,
        times_faster_than_fp16=found["fp16"] / ours,
        **{f"{name} microseconds": spent * 1e6 for name, spent in found.items()},
    )


def _prompt(section: Section, hardware: Hardware, product: Product) -> None:
    """Many rows: the matrix widened and multiplied by, and the product alone."""
    filled = fill(hardware, product)
    matrix = torch.empty(product.outputs, product.inputs, dtype=torch.float16, device=hardware.device)

    def widen() -> None:
        block_linear.widen(filled.weight, filled.scale, matrix, product.bits, 0)

    widen()
    wide = reference.unpack_blocks(filled.weight, filled.scale.double(), product.inputs, product.bits)
    section.check(f"widen_blocks {product.label}", error(matrix, wide), LIMIT)
    section.add(
        "widen_blocks",
        product=product.label,
        widening_microseconds=hardware.time([widen], 0.05) * 1e6,
        fp16_product_microseconds=hardware.time([lambda: F.linear(filled.x, matrix)], 0.05) * 1e6,
    )


def _half(hardware: Hardware, product: Product, seed: int) -> Callable[[], Tensor]:
    inputs = Inputs(hardware.device, seed)
    x = inputs.normal(product.tokens, product.inputs, dtype=torch.float16)
    weight = torch.empty(product.outputs, product.inputs, dtype=torch.float16, device=hardware.device).normal_()
    return lambda: F.linear(x, weight)


def _int4pack(hardware: Hardware, product: Product) -> Callable[[], Tensor]:
    """PyTorch's INT4, with bfloat16 scales and zero points; its weights are random, for time alone."""
    device = hardware.device
    pairs = torch.randint(0, 256, (product.outputs, product.inputs // 2), dtype=torch.uint8, device=device)
    weight = torch._convert_weight_to_int4pack(pairs, 8)
    steps = torch.ones(product.inputs // product.block, product.outputs, 2, dtype=torch.bfloat16, device=device)
    x = torch.ones(product.tokens, product.inputs, dtype=torch.bfloat16, device=device)
    return lambda: torch._weight_int4pack_mm(x, weight, product.block, steps)


def _int8pack(hardware: Hardware, product: Product) -> Callable[[], Tensor]:
    """PyTorch's INT8, with one scale for each output and bfloat16 inputs; for time alone."""
    device = hardware.device
    weight = torch.randint(-128, 128, (product.outputs, product.inputs), dtype=torch.int8, device=device)
    steps = torch.ones(product.outputs, dtype=torch.bfloat16, device=device)
    x = torch.ones(product.tokens, product.inputs, dtype=torch.bfloat16, device=device)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, weight, steps)
