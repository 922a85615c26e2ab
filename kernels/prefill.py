"""T frames at once over a ring: attention in one launch, the ring's update in a second one.

The attention reads the ring as it was before the frames, so the update waits for it; launches on one CUDA stream do.

Sizes: S streams, T frames, N patches, H heads, R = N * H rows, W window, d head_dim.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import LOG2E
from .softmax import attend_tile

TILE = 64  # frames or slots of one tile, at most
LEAST_TILE = 16  # of a matrix product
TILE_BYTES = 16384  # of a program's queries, of a tile's keys, and of its values: six of them fit on small GPUs
WARPS = 4  # at most
WRITE_ROWS = 16  # rows of one program of the update


@dataclass(frozen=True)
class Launch:
    """How the attention is cut.

    Attributes:
        frames: of one program, a power of 2.
        slots: of one tile, a power of 2; frames of the past or among the T.
        warps: of one program.
    """

    frames: int
    slots: int
    warps: int


def plan(frames: int, window: int, head_dim: int, itemsize: int) -> Launch:
    """The launch for so many frames over a window."""
    tile = min(TILE, TILE_BYTES // (triton.next_power_of_2(head_dim) * itemsize))
    most = min(tile, max(LEAST_TILE, triton.next_power_of_2(frames)))
    slots = min(tile, max(LEAST_TILE, triton.next_power_of_2(window)))
    # a warp's matrix product has 16 rows; more warps would compute the same numbers and wait for each other
    share = most // LEAST_TILE * triton.cdiv(triton.next_power_of_2(head_dim), 64)
    # float32 products are made of ordinary multiplications, which take a warp more registers than it has
    return Launch(most, slots, WARPS if itemsize == 4 else min(WARPS, share))


@triton.jit
def prefill_kernel(
    query,  # [S, T, N, H, d] by strides, unit stride over d
    key,
    value,
    key_ring,  # [S, R, W, d], contiguous within a stream
    value_ring,
    position,  # int64 [S], index of the first frame
    out,  # [S, T, R, d] contiguous
    scale,  # of the logits, times log2(e)
    frames,
    rows,
    heads,
    query_s,
    query_t,
    query_n,
    query_h,
    key_s,
    key_t,
    key_n,
    key_h,
    value_s,
    value_t,
    value_n,
    value_h,
    key_ring_s,
    value_ring_s,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    stream = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(frames, BLOCK_T)
    r = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_T
    n = (r // heads).to(tl.int64)
    h = r % heads
    i = tl.arange(0, BLOCK_D)
    i_here = i < HEAD_DIM
    t = first + tl.arange(0, BLOCK_T)
    t_here = (t < frames)[:, None] & i_here[None, :]
    q_at = stream * query_s + n * query_n + h * query_h + t.to(tl.int64)[:, None] * query_t + i[None, :]
    q = tl.load(query + q_at, mask=t_here, other=0.0)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    length = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)

    # the past: slot w holds the latest frame before this one that is w modulo W
    begin = tl.load(position + stream)
    held = tl.where(first < WINDOW - 1, tl.minimum(begin, WINDOW), 0).to(tl.int32)
    row_at = r.to(tl.int64) * (WINDOW * HEAD_DIM)
    for start in tl.range(0, held, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        frame = begin - 1 - (begin - 1 - w + WINDOW) % WINDOW  # [BLOCK_W], int64
        visible = (w < held)[None, :] & (frame[None, :] > begin + t[:, None] - WINDOW)
        w_here = (w < held)[:, None] & i_here[None, :]
        tile_at = row_at + w[:, None] * HEAD_DIM + i[None, :]
        k = tl.load(key_ring + stream * key_ring_s + tile_at, mask=w_here, other=0.0)
        v = tl.load(value_ring + stream * value_ring_s + tile_at, mask=w_here, other=0.0)
        m, length, acc = attend_tile(q, k, v, visible, m, length, acc, scale)

    # the frames themselves
    oldest = tl.maximum(first - WINDOW + 1, 0)
    for start in tl.range(oldest, tl.minimum(first + BLOCK_T, frames), BLOCK_W):
        other = start + tl.arange(0, BLOCK_W)
        visible = (other[None, :] <= t[:, None]) & (other[None, :] > t[:, None] - WINDOW)
        other_here = (other < frames)[:, None] & i_here[None, :]
        wide = other.to(tl.int64)[:, None]
        k_at = stream * key_s + n * key_n + h * key_h + wide * key_t + i[None, :]
        v_at = stream * value_s + n * value_n + h * value_h + wide * value_t + i[None, :]
        k = tl.load(key + k_at, mask=other_here, other=0.0)
        v = tl.load(value + v_at, mask=other_here, other=0.0)
        m, length, acc = attend_tile(q, k, v, visible, m, length, acc, scale)

    out_at = ((stream * frames + t.to(tl.int64)) * rows + r)[:, None] * HEAD_DIM + i[None, :]
    tl.store(out + out_at, (acc / length[:, None]).to(out.dtype.element_ty), mask=t_here)


@triton.jit
def write_kernel(
    key,  # [S, T, N, H, d] by strides
    value,
    key_ring,  # [S, R, W, d], contiguous within a stream
    value_ring,
    position,  # int64 [S]
    first,  # the first frame that is still in the ring afterwards
    rows,
    heads,
    key_s,
    key_t,
    key_n,
    key_h,
    value_s,
    value_t,
    value_n,
    value_h,
    key_ring_s,
    value_ring_s,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stream = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) + first
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_D)
    here = (r < rows)[:, None] & (i < HEAD_DIM)[None, :]
    n = (r // heads).to(tl.int64)
    h = r % heads
    slot = (tl.load(position + stream) + t) % WINDOW
    slot_at = (r.to(tl.int64) * WINDOW + slot)[:, None] * HEAD_DIM + i[None, :]
    k_at = stream * key_s + t * key_t + (n * key_n + h * key_h)[:, None] + i[None, :]
    v_at = stream * value_s + t * value_t + (n * value_n + h * value_h)[:, None] + i[None, :]
    tl.store(key_ring + stream * key_ring_s + slot_at, tl.load(key + k_at, mask=here), mask=here)
    tl.store(value_ring + stream * value_ring_s + slot_at, tl.load(value + v_at, mask=here), mask=here)


def launch(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """Run the kernels; shapes as in `operators.causal_prefill`, unchecked."""
    streams, frames, _, heads, head_dim = query.shape
    rows, window = key_ring.shape[1], key_ring.shape[2]
    cut = plan(frames, window, head_dim, query.element_size())
    block_d = triton.next_power_of_2(head_dim)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    prefill_kernel[(rows * triton.cdiv(frames, cut.frames), streams)](
        query,
        key,
        value,
        key_ring,
        value_ring,
        position,
        out,
        scale * LOG2E,
        frames,
        rows,
        heads,
        *query.stride()[:4],
        *key.stride()[:4],
        *value.stride()[:4],
        key_ring.stride(0),
        value_ring.stride(0),
        WINDOW=window,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_T=cut.frames,
        BLOCK_W=cut.slots,
        num_warps=cut.warps,
        enable_fp_fusion=True,
    )
    kept = min(frames, window)
    write_kernel[(triton.cdiv(rows, WRITE_ROWS), kept, streams)](
        key,
        value,
        key_ring,
        value_ring,
        position,
        frames - kept,
        rows,
        heads,
        *key.stride()[:4],
        *value.stride()[:4],
        key_ring.stride(0),
        value_ring.stride(0),
        WINDOW=window,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_R=WRITE_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
