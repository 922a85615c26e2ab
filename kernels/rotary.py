"""Rotary position embedding of a decoder's queries or keys in one launch, from any strides to rows without gaps."""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # of a program
WARPS = 4


@triton.jit
def rotary_kernel(
    x,  # [B, H, T, d], its last axis contiguous
    cos,  # [B, T, d / 2] contiguous
    sin,
    out,  # [B, H, T, d] contiguous
    heads,
    tokens,
    x_b,
    x_h,
    x_t,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    b, t = place // tokens, place % tokens
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK_D)[None, :]
    here = (head < heads) & (i < HALF)
    c = tl.load(cos + place * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + place * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    source = x + b * x_b + head * x_h + t * x_t + i
    first = tl.load(source, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
    target = out + ((b * heads + head) * tokens + t) * (2 * HALF) + i
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=here)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=here)


def launch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the kernel; shapes as in `operators.rotary`, unchecked."""
    B, H, T, d = x.shape
    out = torch.empty((B, H, T, d), dtype=x.dtype, device=x.device)
    rotary_kernel[(B * T, triton.cdiv(H, HEADS))](
        x,
        cos,
        sin,
        out,
        H,
        T,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        HALF=d // 2,
        BLOCK_H=HEADS,
        BLOCK_D=triton.next_power_of_2(d // 2),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out
