"""`decode_attention` against `scaled_dot_product_attention` over the same cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import decode, reference
from ...kernels.decode import Launch
from ...kernels.temporal import processors
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


class Steps:
    """Full caches, and one step over them that brings `tokens` new ones to each sequence.

    Attributes:
        filled: query, key, value, key cache and value cache, as many sets as keep one from being found in the L2 cache.
    """

    def __init__(self, hardware: Hardware, case: tuple[int, int, int, int], tokens: int, capacity: int) -> None:
        B, Hq, Hkv, d = self.case = case
        self.tokens, self.capacity = tokens, capacity
        self.label = f"{B} sequences, {Hq}/{Hkv} heads of {d}, {tokens} tokens"
        self.held = 2 * B * Hkv * capacity * d * 2
        self.scale = d**-0.5
        self._processors = processors(hardware.device)
        inputs = Inputs(hardware.device, 1)
        self.filled: list[tuple[Tensor, ...]] = []
        for _ in range(hardware.sets(self.held)):
            query = inputs.normal(B, tokens, Hq, d, dtype=torch.float16).transpose(1, 2)
            new = [inputs.normal(B, tokens, Hkv, d, dtype=torch.float16).transpose(1, 2) for _ in range(2)]
            caches = [inputs.normal(B, Hkv, capacity, d, dtype=torch.float16) for _ in range(2)]
            self.filled.append((query, *new, *caches))
        self._write = torch.full((B,), capacity - tokens, device=hardware.device)
        slots = torch.arange(capacity, device=hardware.device)
        self._mask = slots <= (self._write[:, None] + torch.arange(tokens, device=hardware.device))[:, :, None]
        self._batch = torch.arange(B, device=hardware.device)[:, None]
        self._places = self._write[:, None] + slots[:tokens]

    def planned(self) -> Launch:
        B, Hq, Hkv, d = self.case
        return decode.plan(B * Hkv, Hq // Hkv * self.tokens, self.capacity, d, 2, self._processors)

    def ours(self, given: tuple[Tensor, ...], cut: Launch | None = None) -> Callable[[], Tensor]:
        query, key, value, key_cache, value_cache = given
        fixed = query, key, value, key_cache, value_cache, self._write, self._mask, self.scale
        return lambda: decode.launch(*fixed, cut)

    def library(self, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        query, key, value, key_cache, value_cache = given

        def call() -> Tensor:
            key_cache[self._batch, :, self._places] = key.transpose(1, 2)
            value_cache[self._batch, :, self._places] = value.transpose(1, 2)
            return F.scaled_dot_product_attention(
                query, key_cache, value_cache, self._mask[:, None], scale=self.scale, enable_gqa=True
            )

        return call

    def check(self, section: Section, cut: Launch | None = None) -> None:
        wide = [x.double() for x in self.filled[0]]
        expected = reference.decode_attention(*wide, self._write, self._mask, self.scale)
        found = self.ours(self.filled[0], cut)()
        label = f"decode_attention: {self.label}"
        section.check(f"{label}, {cut}" if cut else label, error(found, expected), 2e-3)


def _compare(
    section: Section, hardware: Hardware, case: tuple[int, int, int, int], tokens: int, capacity: int, copy: float
) -> None:
    steps = Steps(hardware, case, tokens, capacity)
    steps.check(section)
    spent = hardware.time([steps.ours(given) for given in steps.filled])
    other = hardware.time([steps.library(given) for given in steps.filled], 0.1)
    section.add(
        "decode_attention",
        case=steps.label,
        megabytes=steps.held / 1e6,
        microseconds=spent * 1e6,
        share_of_copy=steps.held / spent / copy,
        sdpa_microseconds=other * 1e6,
        times_faster=other / spent,
    )
