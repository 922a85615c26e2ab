"""One query per row over the valid slots of a ring, and the ring's update, in one launch.

The step reads the ring once and computes almost nothing: two operations an element. So the kernel is written for
memory:
- a row belongs to the few threads that cover head_dim with 16 bytes each, and they walk its slots: the softmax over
  time needs no other thread;
- two tiles of keys and values are on their way into shared memory while one is used. (Loads into registers would do as
  well, were they all issued first; the assembler interleaves them with their use, to save registers.)
- the new key and value come from registers; the slot they go to is not read, only written;
- slots that hold no frame yet are not read either.

Sizes: S streams, N patches, H heads, R = N * H rows, W window, d head_dim.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import LOG2E, Parts

WARPS = 2
TILE_SLOTS = 8  # of keys and values together: 16 loads of 16 bytes in flight for each thread
INT8_TILE_SLOTS = 4  # a load has twice the elements, and each takes a register once it is widened
STAGES = 3
VECTOR_BYTES = 16  # of one thread's load
THREADS = 32  # of a warp
MOST_SPLITS = 32
SPLIT_SLOTS = 256  # fewer slots than this are not worth a second launch
PROGRAMS_PER_PROCESSOR = 6  # that run side by side, for want of shared memory


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    Attributes:
        rows: rows of one program, a power of 2.
        slots: slots of one tile, a power of 2.
        splits: parts of the window, each summed by a program of its own.
        warps: warps of one program.
        stages: tiles that are fetched ahead through shared memory; 1 for none.
    """

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int


def plan(streams: int, rows: int, window: int, head_dim: int, itemsize: int, processors: int) -> Launch:
    """The launch for these sizes on a GPU with so many multiprocessors."""
    threads_per_row = min(THREADS, triton.cdiv(triton.next_power_of_2(head_dim) * itemsize, VECTOR_BYTES))
    block_rows = WARPS * THREADS // threads_per_row
    # as many parts as run side by side: what waits for a second round leaves the GPU half empty at its end
    programs = streams * triton.cdiv(rows, block_rows)
    splits = max(1, min(PROGRAMS_PER_PROCESSOR * processors // programs, window // SPLIT_SLOTS, MOST_SPLITS))
    tile = INT8_TILE_SLOTS if itemsize == 1 else TILE_SLOTS
    return Launch(block_rows, min(triton.next_power_of_2(window), tile), splits, WARPS, STAGES)


@triton.jit
def temporal_kernel(
    query,  # [S, N, H, d] by strides, unit stride over d
    key,
    value,
    key_ring,  # [S, R, W, d], contiguous within a stream
    value_ring,
    key_scale,  # float32 [H] where the ring is int8
    value_scale,
    position,  # int64 [S], frames since reset
    out,  # [S, R, d] contiguous
    largest,  # parts, where SPLITS > 1
    total,
    mixed,
    scale,  # of the logits, times log2(e)
    rows,
    heads,
    query_s,
    query_n,
    query_h,
    key_s,
    key_n,
    key_h,
    value_s,
    value_n,
    value_h,
    key_ring_s,
    value_ring_s,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
    STAGES: tl.constexpr,
):
    stream = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_D)
    r_here = r < rows
    i_here = i < HEAD_DIM
    here = r_here[:, None] & i_here[None, :]  # [BLOCK_R, BLOCK_D]
    n = (r // heads).to(tl.int64)
    h = r % heads

    frames = tl.load(position + stream)
    slot = (frames % WINDOW).to(tl.int32)
    valid = tl.minimum(frames + 1, WINDOW).to(tl.int32)

    q_at = stream * query_s + (n * query_n + h * query_h)[:, None] + i[None, :]
    k_at = stream * key_s + (n * key_n + h * key_h)[:, None] + i[None, :]
    v_at = stream * value_s + (n * value_n + h * value_h)[:, None] + i[None, :]
    q = tl.load(query + q_at, mask=here, other=0.0).to(tl.float32) * scale
    k_new = tl.load(key + k_at, mask=here, other=0.0)
    v_new = tl.load(value + v_at, mask=here, other=0.0)
    if INT8:
        k_step = tl.load(key_scale + h)[:, None]
        v_step = tl.load(value_scale + h)[:, None]
        one = tl.full([BLOCK_R, 1], 1.0, tl.float32)
        # clamped before it is rounded: a product and a sum side by side become one instruction, which rounds otherwise
        k_new = tl.minimum(tl.maximum(k_new.to(tl.float32) * tl.div_rn(one, k_step), -127.0), 127.0)
        v_new = tl.minimum(tl.maximum(v_new.to(tl.float32) * tl.div_rn(one, v_step), -127.0), 127.0)
        k_new = tl.floor(k_new + 0.5).to(tl.int8)
        v_new = tl.floor(v_new + 0.5).to(tl.int8)
        q = q * k_step

    # the new slot is every split's first guess at the largest logit, so there always is one, and split 0 counts it
    m = tl.sum(q * k_new.to(tl.float32), axis=1)  # [BLOCK_R]
    counted = tl.where(split == 0, 1.0, 0.0)
    length = tl.zeros([BLOCK_R], tl.float32) + counted
    acc = v_new.to(tl.float32) * counted  # [BLOCK_R, BLOCK_D]

    # A tile is loaded as BLOCK_W * BLOCK_R lines of head_dim, all rows of a slot and then those of the next: so each
    # thread gets the same row of every slot.
    line = tl.arange(0, BLOCK_W * BLOCK_R)
    line_r = tl.program_id(0) * BLOCK_R + line % BLOCK_R
    line_w = line // BLOCK_R
    line_at = line_r.to(tl.int64) * (WINDOW * HEAD_DIM) + line_w * HEAD_DIM
    line_here = line_r < rows
    key_tile = key_ring + stream * key_ring_s + line_at[:, None] + i[None, :]
    value_tile = value_ring + stream * value_ring_s + line_at[:, None] + i[None, :]
    tiles = tl.cdiv(tl.cdiv(valid, SPLITS), BLOCK_W)  # of one split
    begin = split * tiles * BLOCK_W
    end = tl.minimum(begin + tiles * BLOCK_W, valid)
    for start in tl.range(begin, end, BLOCK_W, num_stages=STAGES):
        w = start + line_w
        line_read = line_here & (w < valid) & (w != slot)
        tile_here = line_read[:, None] & i_here[None, :]
        k = tl.load(key_tile + start * HEAD_DIM, mask=tile_here, other=0, eviction_policy="evict_first")
        v = tl.load(value_tile + start * HEAD_DIM, mask=tile_here, other=0, eviction_policy="evict_first")
        k = tl.reshape(k, [BLOCK_W, BLOCK_R, BLOCK_D])
        v = tl.reshape(v, [BLOCK_W, BLOCK_R, BLOCK_D])
        w = start + tl.arange(0, BLOCK_W)
        read = (w < valid) & (w != slot)
        logits = tl.sum(q[None, :, :] * k.to(tl.float32), axis=2)  # [BLOCK_W, BLOCK_R]
        logits = tl.where(read[:, None], logits, float("-inf"))
        m_next = tl.maximum(m, tl.max(logits, axis=0))
        keep = tl.exp2(m - m_next)
        weights = tl.exp2(logits - m_next[None, :])
        length = length * keep + tl.sum(weights, axis=0)
        acc = acc * keep[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), axis=0)
        m = m_next

    row_at = stream * rows + r.to(tl.int64)
    out_at = row_at[:, None] * HEAD_DIM + i[None, :]
    if INT8:
        acc *= v_step
    if SPLITS > 1:
        part = split.to(tl.int64) * tl.num_programs(2) * rows
        tl.store(largest + part + row_at, m, mask=r_here)
        tl.store(total + part + row_at, length, mask=r_here)
        tl.store(mixed + part * HEAD_DIM + out_at, acc, mask=here)
    else:
        tl.store(out + out_at, (acc / length[:, None]).to(out.dtype.element_ty), mask=here)

    if split == 0:
        slot_at = r.to(tl.int64)[:, None] * (WINDOW * HEAD_DIM) + slot * HEAD_DIM + i[None, :]
        tl.store(key_ring + stream * key_ring_s + slot_at, k_new.to(key_ring.dtype.element_ty), mask=here)
        tl.store(value_ring + stream * value_ring_s + slot_at, v_new.to(value_ring.dtype.element_ty), mask=here)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    position: Tensor,
    scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
    cut: Launch | None = None,
) -> Tensor:
    """Run the kernel; shapes as in `operators.temporal_attention`, unchecked.

    Args:
        scales: the steps of the int8 rings' keys and values, float32 [H] each; None for a floating ring.
        cut: how the work is cut; default: `plan`.
    """
    streams, _, heads, head_dim = query.shape
    rows, window = key_ring.shape[1], key_ring.shape[2]
    if cut is None:
        cut = plan(streams, rows, window, head_dim, key_ring.element_size(), processors(query.device))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    parts = Parts(cut.splits, streams * rows, head_dim, query.device) if cut.splits > 1 else None
    unused = out  # a pointer must be given, and is not followed
    temporal_kernel[(triton.cdiv(rows, cut.rows), cut.splits, streams)](
        query,
        key,
        value,
        key_ring,
        value_ring,
        scales[0] if scales else unused,
        scales[1] if scales else unused,
        position,
        out,
        parts.largest if parts else unused,
        parts.total if parts else unused,
        parts.mixed if parts else unused,
        scale * LOG2E,
        rows,
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        key_ring.stride(0),
        value_ring.stride(0),
        WINDOW=window,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_R=cut.rows,
        BLOCK_W=cut.slots,
        SPLITS=cut.splits,
        INT8=scales is not None,
        STAGES=cut.stages,
        num_warps=cut.warps,
        enable_fp_fusion=True,
    )
    if parts is not None:
        parts.merge(out)
    return out


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
