"""Splitting an attention over its slots: each program sums a part, and a second launch merges the parts.

A part holds a row's largest logit (base 2), the sum of `exp2(logit - largest)`, and the sum of the values so weighted.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MERGE_ROWS = 4  # rows of one program


@triton.jit
def merge_kernel(
    largest,  # float32 [SPLITS, rows]
    total,  # float32 [SPLITS, rows]
    mixed,  # float32 [SPLITS, rows, HEAD_DIM]
    out,  # [rows, HEAD_DIM]
    rows,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_D)
    row_here = row < rows
    here = row_here[:, None] & (i < HEAD_DIM)[None, :]
    at = row[:, None] * HEAD_DIM + i[None, :]
    m = tl.load(largest + row, mask=row_here, other=0.0)
    length = tl.load(total + row, mask=row_here, other=0.0)
    acc = tl.load(mixed + at, mask=here, other=0.0)
    for split in tl.static_range(1, SPLITS):
        part = tl.full([], split, tl.int64) * rows
        m_part = tl.load(largest + part + row, mask=row_here, other=0.0)
        length_part = tl.load(total + part + row, mask=row_here, other=0.0)
        acc_part = tl.load(mixed + part * HEAD_DIM + at, mask=here, other=0.0)
        m_both = tl.maximum(m, m_part)
        # two rows that see nothing have no largest logit; their difference would be NaN
        keep = tl.where(m == m_both, 1.0, tl.exp2(m - m_both))
        take = tl.where(m_part == m_both, 1.0, tl.exp2(m_part - m_both))
        length = length * keep + length_part * take
        acc = acc * keep[:, None] + acc_part * take[:, None]
        m = m_both
    acc = tl.where(length[:, None] == 0.0, 0.0, acc / length[:, None])
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here)


class Parts:
    """Memory for the parts of `rows` rows, and the merge of them."""

    def __init__(self, splits: int, rows: int, head_dim: int, device: torch.device) -> None:
        self.splits, self.rows, self.head_dim = splits, rows, head_dim
        self.largest = torch.empty(splits, rows, dtype=torch.float32, device=device)
        self.total = torch.empty(splits, rows, dtype=torch.float32, device=device)
        self.mixed = torch.empty(splits, rows, head_dim, dtype=torch.float32, device=device)

    def merge(self, out: Tensor) -> None:
        """Into out [..., head_dim], contiguous, of as many rows."""
        merge_kernel[(triton.cdiv(self.rows, MERGE_ROWS),)](
            self.largest,
            self.total,
            self.mixed,
            out,
            self.rows,
            SPLITS=self.splits,
            HEAD_DIM=self.head_dim,
            BLOCK_D=triton.next_power_of_2(self.head_dim),
            BLOCK_R=MERGE_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
