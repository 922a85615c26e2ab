"""New tokens of a decoder over a linear cache with a slot mask, and the cache's update, in one launch.

A program takes the queries that share a key head, so a key is read once for its whole group. The new keys and values
are taken from the inputs, and written into the cache by one program; nobody reads the slots that are written. Tiles of
which nothing is visible are not read.

Sizes: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv, T new tokens, C capacity, d head_dim.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import LOG2E, Parts
from .softmax import attend_tile
from .temporal import processors

LEAST_TILE = 16  # of a matrix product
MOST_ROWS = 64  # queries of one program
TILE_SLOTS = 64
MOST_SPLITS = 32
SPLIT_SLOTS = 256  # fewer slots than this are not worth a second launch
PROGRAMS_PER_PROCESSOR = 2


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
):
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    block = tl.program_id(1)
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

    cache_at = kv_head.to(tl.int64) * capacity * HEAD_DIM
    tiles = tl.cdiv(tl.cdiv(capacity, SPLITS), BLOCK_C)  # of one split
    begin = split * tiles * BLOCK_C
    for start in tl.range(begin, tl.minimum(begin + tiles * BLOCK_C, capacity), BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        old = (slot < capacity) & ((slot < write) | (slot >= write + tokens))
        visible = tl.load(seen + slot[None, :], mask=row_here[:, None] & old[None, :], other=0) != 0
        if tl.max(tl.max(visible.to(tl.int32), axis=1), axis=0) > 0:
            tile_at = cache_at + slot.to(tl.int64)[:, None] * HEAD_DIM + i[None, :]
            tile_here = old[:, None] & i_here[None, :]
            k = tl.load(key_cache + b * key_cache_b + tile_at, mask=tile_here, other=0.0)
            v = tl.load(value_cache + b * value_cache_b + tile_at, mask=tile_here, other=0.0)
            m, length, acc = attend_tile(q, k, v, visible, m, length, acc, scale)

    if split == 0:
        j = tl.arange(0, BLOCK_T)
        slot = write + j
        fits = (j < tokens) & (slot < capacity)
        new_here = fits[:, None] & i_here[None, :]
        j_at = j.to(tl.int64)[:, None]
        k = tl.load(key + b * key_b + kv_head * key_h + j_at * key_t + i[None, :], mask=new_here, other=0.0)
        v = tl.load(value + b * value_b + kv_head * value_h + j_at * value_t + i[None, :], mask=new_here, other=0.0)
        visible = tl.load(seen + slot[None, :], mask=row_here[:, None] & fits[None, :], other=0) != 0
        m, length, acc = attend_tile(q, k, v, visible, m, length, acc, scale)
        if block == 0:
            new_at = cache_at + slot[:, None] * HEAD_DIM + i[None, :]
            tl.store(key_cache + b * key_cache_b + new_at, k, mask=new_here)
            tl.store(value_cache + b * value_cache_b + new_at, v, mask=new_here)

    out_row = (b * kv_heads * group + head) * tokens + t
    out_at = out_row[:, None] * HEAD_DIM + i[None, :]
    if SPLITS > 1:
        part = split.to(tl.int64) * (tl.num_programs(0) * group * tokens)
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
    splits: int | None = None,
) -> Tensor:
    """Run the kernel; shapes as in `operators.decode_attention`, unchecked.

    Args:
        splits: parts that the cache is cut into; default: as many as keep the GPU busy.
    """
    sequences, query_heads, tokens, head_dim = query.shape
    kv_heads, capacity = key_cache.shape[1], key_cache.shape[2]
    group = query_heads // kv_heads
    block_m = min(MOST_ROWS, max(LEAST_TILE, triton.next_power_of_2(group * tokens)))
    programs = sequences * kv_heads * triton.cdiv(group * tokens, block_m)
    if splits is None:
        wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(query.device), programs)
        splits = max(1, min(wanted, capacity // SPLIT_SLOTS, MOST_SPLITS))
    out = torch.empty((sequences, query_heads, tokens, head_dim), dtype=query.dtype, device=query.device)
    parts = Parts(splits, sequences * query_heads * tokens, head_dim, query.device) if splits > 1 else None
    unused = out  # a pointer must be given, and is not followed
    mask = slot_mask.view(torch.uint8)
    decode_kernel[(sequences * kv_heads, triton.cdiv(group * tokens, block_m), splits)](
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
        BLOCK_M=block_m,
        BLOCK_T=max(LEAST_TILE, triton.next_power_of_2(tokens)),
        BLOCK_C=TILE_SLOTS,
        SPLITS=splits,
        num_warps=4,
        enable_fp_fusion=True,
    )
    if parts is not None:
        parts.merge(out)
    return out
