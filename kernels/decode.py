"""New tokens of a decoder over a linear cache with a slot mask, and the cache's update, in one launch.

A program takes the queries that share a key head, so a key is read once for its whole group. The new keys and values
are taken from the inputs, and written into the cache by one program; nobody reads the slots that are written. Tiles of
which nothing is visible are not read. Two tiles of keys and values are on their way into shared memory while one is
used; their masks, which decide whether they are read at all, are waited for.

Sizes: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv, T new tokens, C capacity, d head_dim.
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
from .softmax import attend_tile
from .temporal import processors

LEAST_TILE = 16  # of a matrix product
MOST_TILE = 64
TILE_BYTES = 8192  # of a program's queries, of a tile's keys, and of its values
WARPS = 4
STAGES = 3
MOST_SPLITS = 32
SPLIT_SLOTS = 128  # fewer slots than this are not worth a part of their own


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    Attributes:
        rows: queries of one program, a power of 2.
        slots: slots of one tile, a power of 2.
        splits: parts of the cache, each summed by programs of its own.
        stages: tiles that are fetched ahead through shared memory; 1 for none.
    """

    rows: int
    slots: int
    splits: int
    stages: int


def plan(key_heads: int, queries: int, capacity: int, head_dim: int, itemsize: int, processors: int) -> Launch:
    """The launch for these sizes on a GPU with so many multiprocessors.

    Args:
        key_heads: of all sequences.
        queries: that share a key head: its query heads times the tokens.
    """
    most = max(LEAST_TILE, min(MOST_TILE, TILE_BYTES // (triton.next_power_of_2(head_dim) * itemsize)))
    rows = min(most, max(LEAST_TILE, triton.next_power_of_2(queries)))
    resident = (4 if rows == LEAST_TILE else 2) * processors  # programs at a time, for want of registers
    splits = min(resident // (key_heads * triton.cdiv(queries, rows)), capacity // SPLIT_SLOTS, MOST_SPLITS)
    return Launch(rows, most, max(1, splits), STAGES)


@triton.jit
def is_old(slot, end, write, tokens):
    """Slots before `end` that are not written now."""
    return (slot < end) & ((slot < write) | (slot >= write + tokens))


@triton.jit
def load_mask(seen, start, end, row_here, write, tokens, BLOCK_C: tl.constexpr):
    """Which rows see which old slots of a tile: [BLOCK_M, BLOCK_C]."""
    slot = start + tl.arange(0, BLOCK_C)
    here = row_here[:, None] & is_old(slot, end, write, tokens)[None, :]
    return tl.load(seen + slot[None, :], mask=here, other=0) != 0


@triton.jit
def load_tile(rows, start, end, i_here, write, tokens, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """Keys or values of a tile's old slots, [BLOCK_C, BLOCK_D]."""
    slot = start + tl.arange(0, BLOCK_C)
    here = is_old(slot, end, write, tokens)[:, None] & i_here[None, :]
    return tl.load(rows + slot.to(tl.int64)[:, None] * HEAD_DIM, mask=here, other=0.0)


@triton.jit
def decode_kernel(
    query,  # [B, Hq, T, d] by strides, unit stride over d
    key,  # [B, Hkv, T, d] by strides
    value,
    key_cache,  # [B, Hkv, C, d], contiguous within a sequence
    value_cache,
    write_index,  # int64 [B]
    slot_mask,  # uint8 [B, T, C] by strides, unit stride over C
    out,  # [B, Hq, T, d] contiguous
    largest,  # parts, where SPLITS > 1
    total,
    mixed,
    scale,  # of the logits, times log2(e)
    kv_heads,
    group,
    tokens,
    capacity,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    key_cache_b,
    value_cache_b,
    mask_b,
    mask_t,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.program_id(0)  # first, so that those that read the same keys run at the same time
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    split = tl.program_id(2)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # query g * T + t of this key head
    row_here = row < group * tokens
    t = row % tokens
    head = kv_head * group + row // tokens
    i = tl.arange(0, BLOCK_D)
    i_here = i < HEAD_DIM
    here = row_here[:, None] & i_here[None, :]
    q_at = b * query_b + (head.to(tl.int64) * query_h + t.to(tl.int64) * query_t)[:, None] + i[None, :]
    q = tl.load(query + q_at, mask=here, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    length = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    write = tl.load(write_index + b)
    seen = slot_mask + b * mask_b + t.to(tl.int64)[:, None] * mask_t  # [BLOCK_M, 1]

    cache_at = kv_head.to(tl.int64) * capacity * HEAD_DIM + i[None, :]
    keys = key_cache + b * key_cache_b + cache_at  # [1, BLOCK_D]
    values = value_cache + b * value_cache_b + cache_at
    tiles = tl.cdiv(tl.cdiv(capacity, SPLITS), BLOCK_C)  # of one split
    begin = split * tiles * BLOCK_C
    end = tl.minimum(begin + tiles * BLOCK_C, capacity)
    for start in tl.range(begin, end, BLOCK_C, num_stages=STAGES):
        visible = load_mask(seen, start, end, row_here, write, tokens, BLOCK_C)
        some = tl.max(tl.max(visible.to(tl.int32), axis=1), axis=0) > 0
        read_end = tl.where(some, end, start)
        k = load_tile(keys, start, read_end, i_here, write, tokens, HEAD_DIM, BLOCK_C)
        v = load_tile(values, start, read_end, i_here, write, tokens, HEAD_DIM, BLOCK_C)
        if some:
            m, length, acc = attend_tile(q, k, v, visible, m, length, acc, scale)

    if split == 0:
        j = tl.arange(0, BLOCK_T)
        slot = write + j
        fits = (j < tokens) & (slot < capacity)
        new_here = fits[:, None] & i_here[None, :]
        j_at = j.to(tl.int64)[:, None]
        k_new = tl.load(key + b * key_b + kv_head * key_h + j_at * key_t + i[None, :], mask=new_here, other=0.0)
        v_new = tl.load(value + b * value_b + kv_head * value_h + j_at * value_t + i[None, :], mask=new_here, other=0.0)
        seen_new = tl.load(seen + slot[None, :], mask=row_here[:, None] & fits[None, :], other=0) != 0
        m, length, acc = attend_tile(q, k_new, v_new, seen_new, m, length, acc, scale)
        if block == 0:
            tl.store(keys + slot[:, None] * HEAD_DIM, k_new, mask=new_here)
            tl.store(values + slot[:, None] * HEAD_DIM, v_new, mask=new_here)

    out_row = (b * kv_heads * group + head) * tokens + t
    out_at = out_row[:, None] * HEAD_DIM + i[None, :]
    if SPLITS > 1:
        part = split.to(tl.int64) * (tl.num_programs(1) * group * tokens)
        tl.store(largest + part + out_row, m, mask=row_here)
        tl.store(total + part + out_row, length, mask=row_here)
        tl.store(mixed + part * HEAD_DIM + out_at, acc, mask=here)
    else:
        acc = tl.where(length[:, None] == 0.0, 0.0, acc / length[:, None])
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=here)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    write_index: Tensor,
    slot_mask: Tensor,
    scale: float,
    cut: Launch | None = None,
) -> Tensor:
    """Run the kernel; shapes as in `operators.decode_attention`, unchecked.

    Args:
        cut: how the work is cut; default: `plan`.
    """
    sequences, query_heads, tokens, head_dim = query.shape
    kv_heads, capacity = key_cache.shape[1], key_cache.shape[2]
    group = query_heads // kv_heads
    if cut is None:
        sizes = sequences * kv_heads, group * tokens, capacity, head_dim, query.element_size()
        cut = plan(*sizes, processors(query.device))
    out = torch.empty((sequences, query_heads, tokens, head_dim), dtype=query.dtype, device=query.device)
    parts = Parts(cut.splits, sequences * query_heads * tokens, head_dim, query.device) if cut.splits > 1 else None
    unused = out  # a pointer must be given, and is not followed
    mask = slot_mask.view(torch.uint8)
    decode_kernel[(triton.cdiv(group * tokens, cut.rows), sequences * kv_heads, cut.splits)](
        query,
        key,
        value,
        key_cache,
        value_cache,
        write_index,
        mask,
        out,
        parts.largest if parts else unused,
        parts.total if parts else unused,
        parts.mixed if parts else unused,
        scale * LOG2E,
        kv_heads,
        group,
        tokens,
        capacity,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        key_cache.stride(0),
        value_cache.stride(0),
        *mask.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=cut.rows,
        BLOCK_T=max(LEAST_TILE, triton.next_power_of_2(tokens)),
        BLOCK_C=cut.slots,
        SPLITS=cut.splits,
        STAGES=cut.stages,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    if parts is not None:
        parts.merge(out)
    return out
