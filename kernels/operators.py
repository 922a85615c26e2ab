"""Attention over a stream's memory, what stands around it, and products, as `torch.library` operators.

Each has a fake implementation and declares what it writes, so `torch.compile` and CUDA graphs see through it. On CUDA
it runs a Triton kernel, elsewhere the reference. Weights and sums are float32 whatever the inputs are. None of them is
differentiable.

Alignment: the last axis of every tensor is contiguous; rings and caches are contiguous within a stream, so a range of
streams of a larger buffer will do. Any address works; loads are widest (16 bytes) where the tensors' starts and strides
are multiples of 16 bytes, which they are for head_dim 32, 64, 96 and 128 and buffers as PyTorch allocates them.

Sizes: S streams, N patches, H heads, W window, d head_dim, T frames or tokens; of products T rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_WINDOW = 4096
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 128
MOST_TOKENS = 64
MOST_WIDTH = 8192
MOST_ROTATED = 256
WEIGHT_BITS = (4, 8)
WEIGHT_BLOCKS = (32, 64, 128)


def _like_first(first: Tensor, *others: Any) -> Tensor:
    return first.new_empty(first.shape)


def _operator(*mutated: str, fake: Callable[..., Any] = _like_first) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function an operator `framestep::NAME` that writes its arguments `mutated`.

    What `torch.library.custom_op` makes imports the compiler at its first call, which takes 1.5 s, and three times as
    long for every call.
    """

    def made(function: Callable[..., Any]) -> Any:
        name = f"framestep::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutated))
        torch.library.impl(name, ("cpu", "cuda"), function)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.framestep, function.__name__).default

    return made


@_operator("key_ring", "value_ring")
def temporal_attention(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """One step of attention over time: write the new key and value into the ring, and attend to its valid slots.

    Slot `position mod W` is written; slots `<= position` are attended to, so all of them once the ring has filled up.

    Args:
        query, key, value: [S, N, H, d], of the ring's dtype; may be views, such as slices of one QKV product.
        key_ring, value_ring: [S, N * H, W, d], float16, bfloat16 or float32. Row n * H + h is patch n and head h.
        position: int64 [S], frames of each stream since its reset.
        scale: of the logits.

    Returns:
        [S, N, H, d] of the query's dtype.

    Reads the inputs and the valid slots but the one that it writes; writes one slot of each ring and the result.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    _check_temporal("temporal_attention", query, key, value, key_ring, value_ring, position)
    _check_dtypes("temporal_attention", query, key, value, key_ring, value_ring)
    if not query.is_cuda:
        return reference.temporal_attention(query, key, value, key_ring, value_ring, position, scale)
    from .temporal import launch

    return launch(query, key, value, key_ring, value_ring, position, scale)


@_operator("key_ring", "value_ring")
def temporal_attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """`temporal_attention` over an int8 ring.

    A key x of head h is kept as `clamp(floor(x * (1 / key_scale[h]) + 0.5), -127, 127)` and read as that times
    `key_scale[h]`, the new one too; values alike.

    Args:
        query, key, value: [S, N, H, d], float16, bfloat16 or float32.
        key_ring, value_ring: int8 [S, N * H, W, d].
        key_scale, value_scale: float32 [H], above 0.
        position: int64 [S].
        scale: of the logits.

    Returns:
        [S, N, H, d] of the query's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "temporal_attention_int8"
    _check_temporal(name, query, key, value, key_ring, value_ring, position)
    _check_dtypes(name, query, key, value)
    for part, ring in (("key_ring", key_ring), ("value_ring", value_ring)):
        if ring.dtype != torch.int8:
            raise ValueError(f"{name}: {part}: expected int8, found {_plain(ring.dtype)}")
    for part, steps in (("key_scale", key_scale), ("value_scale", value_scale)):
        _check_shape(name, part, steps, (query.shape[2],))
        if steps.dtype != torch.float32 or not steps.is_contiguous() or steps.device != query.device:
            raise ValueError(f"{name}: {part}: expected contiguous float32 on {query.device}, found {_kind(steps)}")
    if not query.is_cuda:
        return reference.temporal_attention_int8(
            query, key, value, key_ring, value_ring, key_scale, value_scale, position, scale
        )
    from .temporal import launch

    return launch(query, key, value, key_ring, value_ring, position, scale, (key_scale, value_scale))


@_operator("key_ring", "value_ring")
def causal_prefill(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """T steps of `temporal_attention` at once: a frame attends to the W frames up to itself, held or among the T.

    The ring is left as T single steps would leave it, bit for bit. T may exceed W.

    Args:
        query, key, value: [S, T, N, H, d], of the ring's dtype.
        key_ring, value_ring: [S, N * H, W, d], float16, bfloat16 or float32.
        position: int64 [S], frames of each stream since its reset, without these.
        scale: of the logits.

    Returns:
        [S, T, N, H, d] of the query's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "causal_prefill"
    if query.dim() != 5:
        raise ValueError(f"{name}: query: expected [S, T, N, H, d], found {list(query.shape)}")
    if query.shape[1] < 1:
        raise ValueError(f"{name}: query: expected at least one frame, found {list(query.shape)}")
    for part, tensor in (("key", key), ("value", value)):
        _check_shape(name, part, tensor, tuple(query.shape))
    _check_temporal(name, query[:, 0], key[:, 0], value[:, 0], key_ring, value_ring, position)
    _check_dtypes(name, query, key, value, key_ring, value_ring)
    if not query.is_cuda:
        return reference.causal_prefill(query, key, value, key_ring, value_ring, position, scale)
    from .prefill import launch

    return launch(query, key, value, key_ring, value_ring, position, scale)


@_operator("key_cache", "value_cache")
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    write_index: Tensor,
    slot_mask: Tensor,
    scale: float,
) -> Tensor:
    """A decoder's step: write T new tokens into a linear cache, and attend with grouped queries under a slot mask.

    Query head h reads key head `h // (Hq / Hkv)`. A token that sees no slot gets zeros.

    Args:
        query: [B, Hq, T, d], T from 1 to 64, of the cache's dtype.
        key, value: [B, Hkv, T, d]; Hkv divides Hq.
        key_cache, value_cache: [B, Hkv, C, d], float16, bfloat16 or float32.
        write_index: int64 [B]; slots write_index..write_index + T - 1 are written and have to lie inside of the cache.
        slot_mask: bool [B, T, C], true where a token sees a slot, those of the new tokens included.
        scale: of the logits.

    Returns:
        [B, Hq, T, d] of the query's dtype.

    Reads the inputs and those tiles of the caches of which something is visible; writes T slots of each cache and the
    result.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "decode_attention"
    for part, tensor in (("query", query), ("key", key), ("value", value), ("key_cache", key_cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: {part}: expected 4 dimensions, found {list(tensor.shape)}")
    B, Hq, T, d = query.shape
    Hkv, C = key_cache.shape[1], key_cache.shape[2]
    _check_head_dim(name, d)
    if not 1 <= T <= MOST_TOKENS:
        raise ValueError(f"{name}: query: expected 1 to {MOST_TOKENS} tokens, found {T}")
    if Hkv < 1 or Hq % Hkv:
        raise ValueError(f"{name}: expected a multiple of the {Hkv} key heads, found {Hq} query heads")
    if T > C:
        raise ValueError(f"{name}: key_cache: expected at least {T} slots, found {C}")
    for part, tensor, shape in (
        ("key", key, (B, Hkv, T, d)),
        ("value", value, (B, Hkv, T, d)),
        ("key_cache", key_cache, (B, Hkv, C, d)),
        ("value_cache", value_cache, (B, Hkv, C, d)),
        ("write_index", write_index, (B,)),
        ("slot_mask", slot_mask, (B, T, C)),
    ):
        _check_shape(name, part, tensor, shape)
    _check_dtypes(name, query, key, value, key_cache, value_cache)
    _check_memory(name, query, ("key_cache", key_cache), ("value_cache", value_cache))
    _check_rows(name, query, ("query", query), ("key", key), ("value", value), ("slot_mask", slot_mask))
    _check_integers(name, "write_index", write_index, query)
    if slot_mask.dtype != torch.bool:
        raise ValueError(f"{name}: slot_mask: expected bool, found {_plain(slot_mask.dtype)}")
    if not query.is_cuda:
        return reference.decode_attention(query, key, value, key_cache, value_cache, write_index, slot_mask, scale)
    from .decode import launch

    return launch(query, key, value, key_cache, value_cache, write_index, slot_mask, scale)


@_operator(fake=lambda x, update, *others: (torch.empty_like(x), torch.empty_like(update)))
def residual_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + update, and the norm of that over the last axis.

    Args:
        x: [..., D], contiguous, of the dtype of the update or float32.
        update: [..., D], contiguous, float16, bfloat16 or float32.
        weight, bias: [D], of the dtype of the update or float32. With a bias it is the layer norm, without one the RMS
            norm, which takes no mean away (https://arxiv.org/abs/1910.07467).
        epsilon: added to the variance, or to the mean square.

    Returns:
        The sum [..., D] in the dtype of x, and its norm [..., D] in that of the update.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "residual_norm"
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MOST_WIDTH:
        raise ValueError(f"{name}: x: expected a last axis of 1 to {MOST_WIDTH}, found {list(x.shape)}")
    width = x.shape[-1:]
    _check_dtypes(name, update)
    given = [("x", x, x.shape), ("update", update, x.shape), ("weight", weight, width)]
    for part, tensor, shape in (*given, *([] if bias is None else [("bias", bias, width)])):
        _check_shape(name, part, tensor, shape)
        if tensor.device != x.device:
            raise ValueError(f"{name}: {part}: expected on {x.device}, found on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {part}: expected contiguous, found strides {tensor.stride()}")
        if tensor.dtype not in (update.dtype, torch.float32):
            found = _plain(tensor.dtype)
            raise ValueError(f"{name}: {part}: expected {_plain(update.dtype)} or float32, found {found}")
    if not x.is_cuda:
        return reference.residual_norm(x, update, weight, bias, epsilon)
    from .residual_norm import launch

    return launch(x, update, weight, bias, epsilon)


@_operator()
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): number i of a head is paired with number i + d / 2.

    Args:
        x: [B, H, T, d], d even and at most 256, float16, bfloat16 or float32; its last axis is contiguous.
        cos, sin: [B, T, d / 2] of how far each pair turns, contiguous, of the dtype of x.

    Returns:
        [B, H, T, d] of the dtype of x, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "rotary"
    if x.dim() != 4 or x.shape[-1] % 2 or not 2 <= x.shape[-1] <= MOST_ROTATED:
        raise ValueError(f"{name}: x: expected [B, H, T, d] with an even d to {MOST_ROTATED}, found {list(x.shape)}")
    B, _, T, d = x.shape
    for part, tensor in (("cos", cos), ("sin", sin)):
        _check_shape(name, part, tensor, (B, T, d // 2))
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {part}: expected contiguous, found strides {tensor.stride()}")
    _check_dtypes(name, x, cos, sin)
    _check_rows(name, x, ("x", x), ("cos", cos), ("sin", sin))
    if not x.is_cuda:
        return reference.rotary(x, cos, sin)
    from .rotary import launch

    return launch(x, cos, sin)


@_operator(fake=lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[1]))
def block_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x by the transpose of a matrix [N, K] of integers, which have a scale for each block of inputs, plus a bias.

    Scales may be negative. Sums are float32, and rounded once. The same input gives the same bits in every run.

    Args:
        x: [T, K], T from 1 to 64, K a multiple of the block, float16, bfloat16 or float32; its rows may lie apart.
        weight: int32 [U, N, 8], contiguous, of `reference.pack_blocks`; U is K / 64 (4 bits) or K / 32 (8), rounded up.
        scale: [K / B, N], contiguous, float16 or float32, for blocks of B = 32, 64 or 128 inputs.
        bias: [N], contiguous, of the dtype of x; or None.
        bits: of a weight, 4 or 8.

    Returns:
        [T, N] of the dtype of x, contiguous.

    Reads the weights and scales once, x once for each 16 to 64 outputs; writes the result, and reads it back in
    float32 where few outputs have long sums.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "block_linear"
    if x.dim() != 2 or not 1 <= x.shape[0] <= MOST_TOKENS:
        raise ValueError(f"{name}: x: expected [T, K] with 1 to {MOST_TOKENS} rows, found {list(x.shape)}")
    _check_dtypes(name, x)
    _check_rows(name, x, ("x", x))
    _check_blocks(name, x, weight, scale, x.shape[1], bits)
    if bias is not None:
        _check_shape(name, "bias", bias, (weight.shape[1],))
        _check_dtypes(name, x, bias)
        _check_contiguous(name, "bias", bias, x)
    if not x.is_cuda:
        return reference.block_linear(x, weight, scale, bias, bits)
    from .block_linear import launch

    return launch(x, weight, scale, bias, bits)


@_operator("out", fake=lambda *given: None)
def widen_blocks(weight: Tensor, scale: Tensor, out: Tensor, bits: int, first: int) -> None:
    """Write outputs first, first + 1, ... of a matrix of integers in blocks as floating numbers.

    Args:
        weight, scale, bits: as in `block_linear`.
        out: [rows, K], contiguous, float16, bfloat16 or float32; every number is written.
        first: of the N outputs; first + rows is at most N.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    name = "widen_blocks"
    if out.dim() != 2 or not out.numel():
        raise ValueError(f"{name}: out: expected [rows, K], found {list(out.shape)}")
    _check_dtypes(name, out)
    _check_contiguous(name, "out", out, out)
    _check_blocks(name, out, weight, scale, out.shape[1], bits)
    if not 0 <= first <= weight.shape[1] - out.shape[0]:
        stop = first + out.shape[0]
        raise ValueError(f"{name}: expected rows within the {weight.shape[1]} outputs, found {first} to {stop}")
    if not out.is_cuda:
        return reference.widen_blocks(weight, scale, out, bits, first)
    from .block_linear import widen

    return widen(weight, scale, out, bits, first)


def _check_blocks(name: str, like: Tensor, weight: Tensor, scale: Tensor, inputs: int, bits: int) -> None:
    if bits not in WEIGHT_BITS:
        raise ValueError(f"{name}: expected 4 or 8 bits, found {bits}")
    if weight.dim() != 3 or weight.dtype != torch.int32:
        found = f"{_plain(weight.dtype)} {list(weight.shape)}"
        raise ValueError(f"{name}: weight: expected int32 [U, N, 8], found {found}")
    unit, outputs = 16 * (16 // bits), weight.shape[1]
    _check_shape(name, "weight", weight, (-(-inputs // unit), outputs, 8))
    if scale.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"{name}: scale: expected float16 or float32, found {_plain(scale.dtype)}")
    blocks = {inputs // block for block in WEIGHT_BLOCKS if inputs % block == 0}
    if scale.dim() != 2 or scale.shape[1] != outputs or scale.shape[0] not in blocks:
        wanted = f"[K / B, {outputs}] with B 32, 64 or 128 for K = {inputs}"
        raise ValueError(f"{name}: scale: expected {wanted}, found {list(scale.shape)}")
    _check_contiguous(name, "weight", weight, like)
    _check_contiguous(name, "scale", scale, like)


def _check_contiguous(name: str, part: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device or not tensor.is_contiguous():
        raise ValueError(f"{name}: {part}: expected contiguous on {like.device}, found {_kind(tensor)}")


def _check_temporal(
    name: str, query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor
) -> None:
    """Shapes, strides and devices of query, key and value [S, N, H, d] and of their rings."""
    if query.dim() != 4:
        raise ValueError(f"{name}: query: expected [S, N, H, d], found {list(query.shape)}")
    S, N, H, d = query.shape
    _check_head_dim(name, d)
    if key_ring.dim() != 4:
        raise ValueError(f"{name}: key_ring: expected [S, N * H, W, d], found {list(key_ring.shape)}")
    W = key_ring.shape[2]
    if not 1 <= W <= MOST_WINDOW:
        raise ValueError(f"{name}: key_ring: expected a window of 1 to {MOST_WINDOW}, found {W}")
    for part, tensor, shape in (
        ("key", key, (S, N, H, d)),
        ("value", value, (S, N, H, d)),
        ("key_ring", key_ring, (S, N * H, W, d)),
        ("value_ring", value_ring, (S, N * H, W, d)),
        ("position", position, (S,)),
    ):
        _check_shape(name, part, tensor, shape)
    _check_memory(name, query, ("key_ring", key_ring), ("value_ring", value_ring))
    _check_rows(name, query, ("query", query), ("key", key), ("value", value))
    _check_integers(name, "position", position, query)


def _check_head_dim(name: str, head_dim: int) -> None:
    if not LEAST_HEAD_DIM <= head_dim <= MOST_HEAD_DIM:
        raise ValueError(f"{name}: expected head_dim {LEAST_HEAD_DIM} to {MOST_HEAD_DIM}, found {head_dim}")


def _check_shape(name: str, part: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: {part}: expected shape {list(shape)}, found {list(tensor.shape)}")


def _check_dtypes(name: str, query: Tensor, *others: Tensor) -> None:
    if query.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float16, bfloat16 or float32, found {_plain(query.dtype)}")
    for tensor in others:
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: expected one dtype, found {_plain(query.dtype)} and {_plain(tensor.dtype)}")


def _check_memory(name: str, query: Tensor, *caches: tuple[str, Tensor]) -> None:
    for part, cache in caches:
        if cache.device != query.device:
            raise ValueError(f"{name}: {part}: expected on {query.device}, found on {cache.device}")
        if cache.shape[0] and not cache[0].is_contiguous():
            raise ValueError(f"{name}: {part}: expected contiguous within a stream, found strides {cache.stride()}")


def _check_rows(name: str, query: Tensor, *inputs: tuple[str, Tensor]) -> None:
    for part, tensor in inputs:
        if tensor.device != query.device:
            raise ValueError(f"{name}: {part}: expected on {query.device}, found on {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: {part}: expected its last axis contiguous, found strides {tensor.stride()}")


def _check_integers(name: str, part: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != torch.int64 or not tensor.is_contiguous() or tensor.device != query.device:
        raise ValueError(f"{name}: {part}: expected contiguous int64 on {query.device}, found {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return f"{_plain(tensor.dtype)} with strides {tensor.stride()} on {tensor.device}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
