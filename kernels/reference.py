"""What the kernels compute, in plain PyTorch. Inputs of any floating dtype; sums are float32 or wider.

Sizes: S streams, N patches, H heads, R = N * H rows, W window, d head_dim, T frames or tokens, C capacity.
Of products: T rows, K inputs, N outputs, B inputs of a block, U units of K.
"""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_attention(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """See `operators.temporal_attention`."""
    write_ring(key, key_ring, position)
    write_ring(value, value_ring, position)
    return _attend_ring(query, key_ring, value_ring, position, scale)


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
    """See `operators.temporal_attention_int8`."""
    write_ring(quantize(key, key_scale), key_ring, position)
    write_ring(quantize(value, value_scale), value_ring, position)
    patches = query.shape[1]
    keys = key_ring * key_scale.repeat(patches)[:, None, None]  # row n * H + h has the scale of head h
    values = value_ring * value_scale.repeat(patches)[:, None, None]
    return _attend_ring(query, keys, values, position, scale)


def causal_prefill(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """See `operators.causal_prefill`."""
    outputs = [
        temporal_attention(query[:, t], key[:, t], value[:, t], key_ring, value_ring, position + t, scale)
        for t in range(query.shape[1])
    ]
    return torch.stack(outputs, dim=1)


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
    """See `operators.decode_attention`."""
    tokens, group = key.shape[2], query.shape[1] // key.shape[1]
    batch = torch.arange(key.shape[0], device=key.device)[:, None]
    slots = write_index[:, None] + torch.arange(tokens, device=key.device)  # [B, T]
    key_cache[batch, :, slots] = key.transpose(1, 2)
    value_cache[batch, :, slots] = value.transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key_cache.to(wide).repeat_interleave(group, dim=1)  # [B, Hq, C, d]
    values = value_cache.to(wide).repeat_interleave(group, dim=1)
    scores = (query.to(wide) * scale) @ keys.transpose(2, 3)
    scores = scores.masked_fill(~slot_mask[:, None], -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a token that sees nothing gets zeros
    return (weights @ values).to(query.dtype)


def residual_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See `operators.residual_norm`."""
    total = x + update.to(x.dtype)
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if bias is None:
        normed = torch.nn.functional.rms_norm(wide, weight.shape, weight.to(wide.dtype), epsilon)
    else:
        normed = torch.nn.functional.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), epsilon)
    return total, normed.to(update.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `operators.rotary`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def block_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """See `operators.block_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = unpack_blocks(weight, scale, x.shape[1], bits).to(wide)
    return torch.nn.functional.linear(x.to(wide), matrix, None if bias is None else bias.to(wide)).to(x.dtype)


def widen_blocks(weight: Tensor, scale: Tensor, out: Tensor, bits: int, first: int) -> None:
    """See `operators.widen_blocks`."""
    rows = slice(first, first + out.shape[0])
    out.copy_(unpack_blocks(weight[:, rows], scale[:, rows], out.shape[1], bits))


def pack_blocks(integers: Tensor, bits: int) -> Tensor:
    """Integers int8 [K, N] in the order in which `block_linear` reads them, int32 [U, N, 8].

    A unit is `16 * (16 // bits)` inputs, filled up with zeros. Its number j of 16 bits, of 16 for each output, holds
    the weights of inputs j, j + 16, ... from the lowest bits on, each with half of the range added. Two such numbers
    are one of 32 bits.
    """
    inputs, outputs = integers.shape
    unit, half = 16 * (16 // bits), 1 << bits - 1
    units = -(-inputs // unit)
    filled = torch.nn.functional.pad(integers, (0, 0, 0, units * unit - inputs)).view(units, -1, 16, outputs)
    numbers = torch.zeros(units, outputs, 16, dtype=torch.int16, device=integers.device)
    for piece in range(filled.shape[1]):
        numbers |= (filled[:, piece].transpose(1, 2).to(torch.int16) + half) << bits * piece
    return numbers.view(torch.int32)


def unpack_blocks(weight: Tensor, scale: Tensor, inputs: int, bits: int) -> Tensor:
    """What packed weights [U, N, 8] stand for: the matrix [N, K], float32 or as wide as the scales [K / B, N]."""
    numbers = weight.view(torch.int16).to(torch.int32)  # [U, N, 16]
    pieces = [(numbers >> bits * piece) % (1 << bits) for piece in range(16 // bits)]
    integers = torch.stack(pieces, dim=2).transpose(0, 1).flatten(1)[:, :inputs] - (1 << bits - 1)  # [N, K]
    steps = scale.to(torch.promote_types(scale.dtype, torch.float32)).t()
    return integers * steps.repeat_interleave(inputs // scale.shape[0], dim=1)


def write_ring(new: Tensor, ring: Tensor, position: Tensor) -> None:
    """new [S, N, H, d] into slot `position mod W` of ring [S, N * H, W, d]"""
    streams = torch.arange(ring.shape[0], device=ring.device)
    ring[streams, :, position % ring.shape[2]] = new.flatten(1, 2).to(ring.dtype)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., H, d] to int8 steps of scale [H], rounding halves up."""
    return torch.floor(x.float() * (1 / scale)[:, None] + 0.5).clamp(-127, 127).to(torch.int8)


def _attend_ring(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query.flatten(1, 2).unsqueeze(2).to(wide) * scale  # [S, R, 1, d]
    visible = torch.arange(keys.shape[2], device=keys.device) <= position[:, None]  # [S, W]
    scores = rows @ keys.to(wide).transpose(2, 3)  # [S, R, 1, W]
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    mixed = scores.softmax(dim=-1) @ values.to(wide)
    return mixed.view(query.shape).to(query.dtype)
