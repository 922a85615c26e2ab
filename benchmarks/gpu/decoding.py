"""`decode_attention` against `scaled_dot_product_attention` over the same cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import decode, reference
from .bandwidth import measure_copy
from .checks import Inputs, error
from .hardware import Hardware
from .section import Section
from .sizes import Sizes

CASES = (  # sequences, query heads, key heads, head_dim
    (1, 14, 2, 64),
    (32, 14, 2, 64),
    (32, 32, 8, 128),
)
TOKENS = (1, 16, 64)


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    copy = measure_copy(hardware)
    section.facts["copy_bytes_per_second"] = copy
    for case in CASES[:1] if hardware.rehearsal else CASES:
        for tokens in TOKENS[:2] if hardware.rehearsal else TOKENS:
            if section.left() < 5:
                section.skip(f"decode_attention of {tokens} tokens, {case}: no time left")
                continue
            section.attempt(
                "decode_attention", lambda c=case, t=tokens: _compare(section, hardware, c, t, sizes.capacity, copy)
            )
            hardware.free()


def _compare(
    section: Section, hardware: Hardware, case: tuple[int, int, int, int], tokens: int, capacity: int, copy: float
) -> None:
    B, Hq, Hkv, d = case
    inputs = Inputs(hardware.device, 1)
    held = 2 * B * Hkv * capacity * d * 2
    filled = []
    for _ in range(hardware.sets(held)):
        query = inputs.normal(B, tokens, Hq, d, dtype=torch.float16).transpose(1, 2)
        new = [inputs.normal(B, tokens, Hkv, d, dtype=torch.float16).transpose(1, 2) for _ in range(2)]
        caches = [inputs.normal(B, Hkv, capacity, d, dtype=torch.float16) for _ in range(2)]
        filled.append((query, *new, *caches))
    write = torch.full((B,), capacity - tokens, device=hardware.device)
    slots = torch.arange(capacity, device=hardware.device)
    mask = slots <= (write[:, None] + torch.arange(tokens, device=hardware.device))[:, :, None]
    batch, places = torch.arange(B, device=hardware.device)[:, None], write[:, None] + slots[:tokens]

    def ours(given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        query, key, value, key_cache, value_cache = given
        return lambda: decode.launch(query, key, value, key_cache, value_cache, write, mask, d**-0.5)

    def library(given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        query, key, value, key_cache, value_cache = given

        def call() -> Tensor:
            key_cache[batch, :, places] = key.transpose(1, 2)
            value_cache[batch, :, places] = value.transpose(1, 2)
            return F.scaled_dot_product_attention(
                query, key_cache, value_cache, mask[:, None], scale=d**-0.5, enable_gqa=True
            )

        return call

    wide = [x.double() for x in filled[0]]
    expected = reference.decode_attention(*wide, write, mask, d**-0.5)
    label = f"{B} sequences, {Hq}/{Hkv} heads of {d}, {tokens} tokens"
    section.check(f"decode_attention: {label}", error(ours(filled[0])(), expected), 2e-3)
    spent = hardware.time([ours(given) for given in filled])
    other = hardware.time([library(given) for given in filled], 0.1)
    section.add(
        "decode_attention",
        case=label,
        megabytes=held / 1e6,
        microseconds=spent * 1e6,
        share_of_copy=held / spent / copy,
        sdpa_microseconds=other * 1e6,
        times_faster=other / spent,
    )
