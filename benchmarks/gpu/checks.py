"""Every kernel against its reference in float64, on fresh random inputs, with outputs that hold NaN beforehand."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import block_linear, decode, prefill, reference, residual_norm, rotary, temporal
from ...kernels.temporal import Launch
from .hardware import Hardware, poisoned
from .section import Section
from .sizes import Sizes

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FEW_PRODUCTS = ((4, 32, 96, 37, 1, 1), (8, 64, 128, 20, 9, 2))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    seed = secrets.randbits(31)
    section.facts["seed"] = seed
    inputs = Inputs(hardware.device, seed)
    small = hardware.rehearsal
    # streams, patches, heads, head_dim, window, positions, launch
    shapes: list[tuple[int, int, int, int, int, list[int], Launch | None]] = [
        (2, 3, 4, 32, 16, [3, 40], None),
        (2, 5, 3, 40, 7, [0, 6], None),
        (1, 3, 2, 72, 1, [5], None),
        (2, 2, 2, 32, 50, [21, 131], Launch(4, 8, 3, 2, 1)),
    ]
    if not small:
        shapes += [
            (3, 196, 12, 64, 16, [0, 15, 1000], None),
            (2, 196, 12, 64, 64, [63, 64], None),
            (2, 7, 5, 128, 100, [50, 333], None),
            (1, 4, 12, 64, 4096, [9000], None),
            (1, 4, 3, 64, 1000, [700], None),
        ]
    for dtype in LIMITS:
        for shape in shapes:
            section.attempt("temporal_attention", lambda d=dtype, s=shape: _temporal(section, inputs, d, *s))
        for shape in shapes[1:2] if small else (shapes[0], shapes[1], shapes[4], shapes[6]):
            section.attempt("temporal_attention_int8", lambda d=dtype, s=shape: _int8(section, inputs, d, *s))
            section.attempt("causal_prefill", lambda d=dtype, s=shape: _prefill(section, inputs, d, *s))
        # the interpreter multiplies the bit patterns of bfloat16
        if not (small and dtype == torch.bfloat16):
            section.attempt("decode_attention", lambda d=dtype: _decode(section, inputs, d, small))
        section.attempt("residual_norm", lambda d=dtype: _norm(section, inputs, d, small))
        section.attempt("rotary", lambda d=dtype: _rotary(section, inputs, d, small))
    section.attempt("block_linear", lambda: products(section, inputs, torch.float16, FEW_PRODUCTS))
    if not small:
        section.attempt("temporal_attention beyond 2^31", lambda: _far(section, inputs))
    section.facts["checks"] = len(section.rows.get("checks", []))


class Inputs:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device).to(dtype)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8)

    def words(self, *shape: int) -> Tensor:
        """int32, every bit of them."""
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=self._generator, device=self.device).int()

    def qkv(self, *lead: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Slices of one product, as the engine has them."""
        return self.normal(*lead, 3, heads, head_dim, dtype=dtype).unbind(-3)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm; infinite where a number is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def differs(found: Tensor, expected: Tensor) -> float:
    """0 where all bits are equal, else 1."""
    return 0.0 if torch.equal(found, expected.to(found.dtype)) else 1.0


def _label(name: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> str:
    return f"{name} {NAMES[dtype]} {'x'.join(map(str, shape))}"


def _rings(inputs: Inputs, dtype: torch.dtype, S: int, N: int, H: int, d: int, W: int) -> tuple[Tensor, Tensor]:
    return inputs.normal(S, N * H, W, d, dtype=dtype), inputs.normal(S, N * H, W, d, dtype=dtype)


def _temporal(
    section: Section,
    inputs: Inputs,
    dtype: torch.dtype,
    S: int,
    N: int,
    H: int,
    d: int,
    W: int,
    at: list[int],
    cut: Launch | None,
) -> None:
    query, key, value = inputs.qkv(S, N, heads=H, head_dim=d, dtype=dtype)
    rings = _rings(inputs, dtype, S, N, H, d, W)
    position = torch.tensor(at, device=inputs.device)
    wide = [ring.double() for ring in rings]
    expected = reference.temporal_attention(query.double(), key.double(), value.double(), *wide, position, d**-0.5)
    with poisoned():
        found = temporal.launch(query, key, value, *rings, position, d**-0.5, cut=cut)
    label = _label("temporal_attention", dtype, (S, N * H, W, d))
    section.check(label, error(found, expected), LIMITS[dtype])
    for part, ring, right in zip(("keys", "values"), rings, wide, strict=True):
        section.check(f"{label}: ring of {part}", differs(ring, right), 0.0)


def _int8(
    section: Section,
    inputs: Inputs,
    dtype: torch.dtype,
    S: int,
    N: int,
    H: int,
    d: int,
    W: int,
    at: list[int],
    cut: Launch | None,
) -> None:
    query, key, value = inputs.qkv(S, N, heads=H, head_dim=d, dtype=dtype)
    rings = inputs.integers(S, N * H, W, d), inputs.integers(S, N * H, W, d)
    copies = [ring.clone() for ring in rings]
    steps = inputs.normal(H, dtype=torch.float32).abs() * 0.02 + 0.01, torch.full((H,), 0.02, device=inputs.device)
    position = torch.tensor(at, device=inputs.device)
    expected = reference.temporal_attention_int8(query.double(), key, value, *copies, *steps, position, d**-0.5)
    with poisoned():
        found = temporal.launch(query, key, value, *rings, position, d**-0.5, steps, cut)
    label = _label("temporal_attention_int8", dtype, (S, N * H, W, d))
    section.check(label, error(found, expected), LIMITS[dtype])
    for part, ring, right in zip(("keys", "values"), rings, copies, strict=True):
        section.check(f"{label}: ring of {part}", differs(ring, right), 0.0)


def _prefill(
    section: Section,
    inputs: Inputs,
    dtype: torch.dtype,
    S: int,
    N: int,
    H: int,
    d: int,
    W: int,
    at: list[int],
    cut: Launch | None,
) -> None:
    if inputs.device.type == "cpu" and dtype == torch.bfloat16:
        return  # the interpreter multiplies the bit patterns of bfloat16
    N = min(N, 4)
    position = torch.tensor(at, device=inputs.device)
    for T in (3, W + 5):
        query, key, value = inputs.qkv(S, T, N, heads=H, head_dim=d, dtype=dtype)
        rings = _rings(inputs, dtype, S, N, H, d, W)
        wide, stepped = [ring.double() for ring in rings], [ring.clone() for ring in rings]
        expected = reference.causal_prefill(query.double(), key.double(), value.double(), *wide, position, d**-0.5)
        for t in range(T):
            temporal.launch(query[:, t], key[:, t], value[:, t], *stepped, position + t, d**-0.5)
        with poisoned():
            found = prefill.launch(query, key, value, *rings, position, d**-0.5)
        label = _label("causal_prefill", dtype, (S, T, N * H, W, d))
        section.check(label, error(found, expected), LIMITS[dtype])
        for part, ring, right in zip(("keys", "values"), rings, stepped, strict=True):
            section.check(f"{label}: ring of {part} as of single steps", differs(ring, right), 0.0)


def _decode(section: Section, inputs: Inputs, dtype: torch.dtype, small: bool) -> None:
    shapes = [(2, 4, 2, 3, 70, 32, 2)] if small else [(2, 14, 2, 1, 4096, 64, None), (1, 14, 2, 64, 1000, 64, None)]
    if not small:
        shapes += [(3, 32, 8, 5, 300, 128, 3), (1, 3, 3, 17, 100, 40, None)]
    for B, Hq, Hkv, T, C, d, splits in shapes:
        cut = splits and decode.Launch(16, 32, splits, 3)
        query = inputs.normal(B, T, Hq, d, dtype=dtype).transpose(1, 2)
        key, value = (inputs.normal(B, T, Hkv, d, dtype=dtype).transpose(1, 2) for _ in range(2))
        caches = [inputs.normal(B, Hkv, C, d, dtype=dtype) for _ in range(2)]
        write = torch.arange(B, device=inputs.device) * 7 + C // 2
        write = write.clamp(max=C - T)
        slots = torch.arange(C, device=inputs.device)
        mask = slots <= (write[:, None] + torch.arange(T, device=inputs.device))[:, :, None]
        wide = [cache.double() for cache in caches]
        expected = reference.decode_attention(query.double(), key.double(), value.double(), *wide, write, mask, d**-0.5)
        with poisoned():
            found = decode.launch(query, key, value, *caches, write, mask, d**-0.5, cut)
        label = _label("decode_attention", dtype, (B, f"{Hq}/{Hkv}", T, C, d))
        section.check(label, error(found, expected), LIMITS[dtype])
        for part, cache, right in zip(("keys", "values"), caches, wide, strict=True):
            section.check(f"{label}: cache of {part}", differs(cache, right), 0.0)


def products(section: Section, inputs: Inputs, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> None:
    """`block_linear` and `widen_blocks`.

    Args:
        shapes: bits, block, inputs, outputs, tokens and parts.
    """
    for bits, block, K, N, T, splits in shapes:
        weight = inputs.words(-(-K * bits // 256), N, 8)
        scale = inputs.normal(K // block, N, dtype=torch.float16 if block == 64 else torch.float32)
        x, bias = inputs.normal(T, 2 * K, dtype=dtype)[:, :K], inputs.normal(N, dtype=dtype)
        cut = block_linear.plan(T, weight.shape[0], N, dtype.itemsize, 132)
        with poisoned():
            found = block_linear.launch(x, weight, scale, bias, bits, replace(cut, splits=splits))
        wide = reference.unpack_blocks(weight[:, -1200:], scale[:, -1200:].double(), K, bits)
        expected = torch.nn.functional.linear(x.double(), wide, bias[-1200:].double())
        label = _label("block_linear", dtype, (T, K, N, f"{bits} bits"))
        section.check(label, error(found[:, -1200:], expected), LIMITS[dtype])
        again = block_linear.launch(x, weight, scale, bias, bits, replace(cut, splits=splits))
        section.check(f"{label}: again", differs(found, again), 0.0)
        matrix = torch.full((min(N, 1200), K), torch.nan, dtype=dtype, device=inputs.device)
        block_linear.widen(weight, scale, matrix, bits, N - len(matrix))
        section.check(_label("widen_blocks", dtype, (K, N, f"{bits} bits")), error(matrix, wide), LIMITS[dtype])


def _norm(section: Section, inputs: Inputs, dtype: torch.dtype, small: bool) -> None:
    for width in (40,) if small else (96, 768, 896, 1152):
        for kept in {dtype, torch.float32}:
            x, update = inputs.normal(2, 9, width, dtype=kept) + 2, inputs.normal(2, 9, width, dtype=dtype)
            weight = inputs.normal(width, dtype=dtype)
            for bias in (inputs.normal(width, dtype=dtype), None):
                with poisoned():
                    total, normed = residual_norm.launch(x, update, weight, bias, 1e-6)
                label = _label(
                    "residual_norm" if bias is not None else "residual_rms_norm", dtype, (18, width, NAMES[kept])
                )
                section.check(f"{label}: sum", error(total, x.double() + update.double()), LIMITS[kept])
                wide = (None if bias is None else bias.double(), 1e-6)
                _, expected = reference.residual_norm(
                    total.double(), torch.zeros_like(total).double(), weight.double(), *wide
                )
                section.check(label, error(normed, expected), LIMITS[dtype])


def _rotary(section: Section, inputs: Inputs, dtype: torch.dtype, small: bool) -> None:
    for B, H, T, d in [(2, 3, 5, 40)] if small else [(1, 14, 1, 64), (3, 14, 33, 64), (2, 40, 7, 128), (1, 2, 3, 80)]:
        x = inputs.normal(B, T, H, d, dtype=dtype).transpose(1, 2)
        cos, sin = (inputs.normal(B, T, d // 2, dtype=dtype) for _ in range(2))
        with poisoned():
            found = rotary.launch(x, cos, sin)
        expected = reference.rotary(x.double(), cos.double(), sin.double())
        section.check(_label("rotary", dtype, (B, H, T, d)), error(found, expected), LIMITS[dtype])


def _far(section: Section, inputs: Inputs) -> None:
    """Four streams at window 4,096: the last begin beyond 2^31 elements."""
    S, N, H, d, W = 4, 196, 12, 64, 4096
    rings = _rings(inputs, torch.float16, S, N, H, d, W)
    query, key, value = inputs.qkv(S, N, heads=H, head_dim=d, dtype=torch.float16)
    position = torch.tensor([W, 2 * W + 5, 3 * W - 1, 7 * W + 4095], device=inputs.device)
    rows = slice(-24, None)  # the last two patches of the last stream
    copies = [ring[-1:, rows].double() for ring in rings]
    near = [x[-1:, -2:].double() for x in (query, key, value)]
    expected = reference.temporal_attention(*near, *copies, position[-1:], d**-0.5)
    with poisoned():
        found = temporal.launch(query, key, value, *rings, position, d**-0.5)
    section.check("temporal_attention beyond 2^31 elements", error(found[-1:, -2:], expected), LIMITS[torch.float16])
    for part, ring, right in zip(("keys", "values"), rings, copies, strict=True):
        section.check(f"beyond 2^31 elements: ring of {part}", differs(ring[-1:, rows], right), 0.0)
