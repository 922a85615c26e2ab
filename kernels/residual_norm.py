"""A residual sum and the layer norm that follows, in one launch: the sum is not written and read again.

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
    mean = tl.sum(wide, axis=0) / WIDTH
    centred = tl.where(here, wide - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / WIDTH
    scale = tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + i, mask=here, other=0.0).to(tl.float32)
    result = centred * tl.rsqrt(variance + epsilon) * scale + shift
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=here)


def launch(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
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
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return total, normed
