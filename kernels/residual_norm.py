"""A residual sum and the norm that follows, in one launch: the sum is not written and read again.

Between the matrix products of a step there is little else, and at one stream a launch costs more than its bytes.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@triton.jit
def residual_norm_kernel(
    x,  # [rows, D] contiguous
    update,
    weight,  # [D]
    bias,
    total,  # [rows, D] contiguous
    normed,
    epsilon,
    CENTRED: tl.constexpr,  # layer norm; else by the root of the mean square, without a bias
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_D)
    here = i < WIDTH
    at = row * WIDTH + i
    added = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    added += tl.load(update + at, mask=here, other=0.0).to(tl.float32)
    # what is normed is the sum that is kept, rounded as it is kept
    added = added.to(total.dtype.element_ty)
    tl.store(total + at, added, mask=here)
    wide = added.to(tl.float32)
    if CENTRED:
        wide = tl.where(here, wide - tl.sum(wide, axis=0) / WIDTH, 0.0)
    variance = tl.sum(wide * wide, axis=0) / WIDTH
    result = wide * tl.rsqrt(variance + epsilon) * tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    if CENTRED:
        result += tl.load(bias + i, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=here)


def launch(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """Run the kernel; shapes as in `operators.residual_norm`, unchecked."""
    total, normed = torch.empty_like(x), torch.empty_like(update)
    width = x.shape[-1]
    residual_norm_kernel[(x.numel() // width,)](
        x,
        update,
        weight,
        bias,
        total,
        normed,
        epsilon,
        CENTRED=bias is not None,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return total, normed
