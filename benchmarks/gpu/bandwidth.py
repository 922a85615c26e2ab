"""`temporal_attention` as a fraction of a measured device copy, and against what PyTorch offers on the same ring."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import reference, temporal
from ...kernels.temporal import Launch
from .checks import Inputs, error
from .hardware import Hardware
from .section import Section
from .sizes import Sizes

COPY_BYTES = 1 << 32
SLICE = 1 << 26  # elements that are drawn at once
LEAST_STREAMS, LEAST_WINDOW = 4, 64  # from which on a target is set


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    copy = measure_copy(hardware)
    hardware.free()
    section.facts["copy_bytes_per_second"] = copy
    section.add("copy", terabytes_per_second=copy / 1e12)
    rows = sizes.model.patches * sizes.model.num_attention_heads
    pairs = itertools.product(sizes.streams, sizes.windows)
    for streams, window in sorted(pairs, key=lambda pair: not _is_target(*pair)):
        ring = Ring(streams, rows, window, max(sizes.model.head_dim, 16), 2)
        if ring.held() > hardware.room():
            section.skip(f"{streams} streams at window {window}: {ring.held() / 1e9:.0f} GB, above the share")
            continue
        if section.left() < 15:
            section.skip(f"{streams} streams at window {window}: no time left")
            continue
        flex = (streams, window) in sizes.flex and section.left() > 45
        section.attempt("temporal_attention", lambda r=ring, f=flex: _compare(section, hardware, sizes, r, copy, f))
        hardware.free()
    for streams, window in ((4, 64), (4, 1024)) if not hardware.rehearsal else ((2, 6),):
        ring = Ring(streams, rows, window, max(sizes.model.head_dim, 16), 1)
        section.attempt("temporal_attention_int8", lambda r=ring: _int8(section, hardware, sizes, r, copy))
        hardware.free()


def _is_target(streams: int, window: int) -> bool:
    """Whether a share of the copy's bandwidth is asked for at this size."""
    return streams >= LEAST_STREAMS and window >= LEAST_WINDOW


def measure_copy(hardware: Hardware) -> float:
    """Bytes a second of a large copy on the device, read and written bytes together: the most of three measurements.

    A GPU that idled begins with a slow clock, and everything is judged by this.
    """
    size = COPY_BYTES if not hardware.rehearsal else 1 << 16
    source = torch.empty(size, dtype=torch.uint8, device=hardware.device).random_()
    target = torch.empty_like(source)
    return 2 * size / min(hardware.time([lambda: target.copy_(source)]) for _ in range(3))


@dataclass(frozen=True)
class Ring:
    """Sizes of a ring, and the fewest bytes of a step over it once it is full."""

    streams: int
    rows: int
    window: int
    head_dim: int
    itemsize: int

    def held(self) -> int:
        return 2 * self.streams * self.rows * self.window * self.head_dim * self.itemsize

    def moved(self) -> int:
        """All slots but the new one are read, and it is written; query, key, value are read, the result is written."""
        numbers = self.streams * self.rows * self.head_dim
        return numbers * (2 * self.window * self.itemsize + 4 * 2)


@dataclass(frozen=True)
class Filled:
    """A full ring and what a step brings: query, key, value [S, N, H, d], rings [S, N * H, W, d], position [S]."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_ring: Tensor
    value_ring: Tensor
    position: Tensor
    scale: float


def fill(hardware: Hardware, ring: Ring, heads: int, dtype: torch.dtype = torch.float16) -> Filled:
    inputs = Inputs(hardware.device, 0)
    shape = (ring.streams, ring.rows, ring.window, ring.head_dim)
    rings = []
    for _ in range(2):
        memory = torch.empty(shape, dtype=dtype if ring.itemsize > 1 else torch.int8, device=hardware.device)
        flat = memory.view(-1)
        for start in range(0, flat.numel(), SLICE):
            part = flat[start : start + SLICE]
            part.normal_() if ring.itemsize > 1 else part.random_(-127, 128)
        rings.append(memory)
    patches = ring.rows // heads
    query, key, value = inputs.qkv(ring.streams, patches, heads=heads, head_dim=ring.head_dim, dtype=dtype)
    position = torch.arange(ring.streams, device=hardware.device) * 3 + 5 * ring.window
    return Filled(query, key, value, rings[0], rings[1], position, ring.head_dim**-0.5)


def step(filled: Filled, cut: Launch | None = None) -> Callable[[], Tensor]:
    given = filled.query, filled.key, filled.value, filled.key_ring, filled.value_ring, filled.position
    return lambda: temporal.launch(*given, filled.scale, cut=cut)


def _compare(section: Section, hardware: Hardware, sizes: Sizes, ring: Ring, copy: float, flex: bool) -> None:
    heads = sizes.model.num_attention_heads
    count = max(1, min(hardware.sets(ring.held()), hardware.room() // ring.held()))
    filled = [fill(hardware, ring, heads) for _ in range(count)]
    check_rows(section, filled[0], ring)
    ours = hardware.time([step(one) for one in filled])
    share = ring.moved() / ours / copy
    others = {"sdpa": _sdpa(masked=True), "sdpa, ring full": _sdpa(masked=False), "matmul": _matmul}
    found: dict[str, float] = {}
    for name, other in others.items():
        try:
            found[name] = hardware.time([other(one) for one in filled], 0.1)
        except RuntimeError as problem:  # out of memory, or sizes that a library kernel does not take
            section.skip(f"{name}, {ring.streams} streams, window {ring.window}: {str(problem)[:120]}")
    if flex:
        try:
            attend = _flex(hardware, filled[0].position)  # compiled once, so every set has one position
            found["flex"] = hardware.time([attend(one) for one in filled], 0.1)
        except Exception as problem:  # the compiler raises errors of many kinds
            section.skip(f"FlexAttention, {ring.streams} streams, window {ring.window}: {str(problem)[:200]}")
    compared: dict[str, Any] = {}
    if found:  # what PyTorch has may all be too large
        best = min(found, key=lambda name: found[name])
        compared = {"best_other": best, "times_faster": found[best] / ours}
    section.add(
        "temporal_attention",
        streams=ring.streams,
        window=ring.window,
        megabytes=ring.moved() / 1e6,
        microseconds=ours * 1e6,
        share_of_copy=share,
        **compared,
        **{f"{name} microseconds": spent * 1e6 for name, spent in found.items()},
    )


def _int8(section: Section, hardware: Hardware, sizes: Sizes, ring: Ring, copy: float) -> None:
    heads = sizes.model.num_attention_heads
    scales = tuple(torch.full((heads,), 0.02, device=hardware.device) for _ in range(2))
    filled = [fill(hardware, ring, heads) for _ in range(hardware.sets(ring.held()))]

    def call(one: Filled) -> Callable[[], Tensor]:
        given = one.query, one.key, one.value, one.key_ring, one.value_ring, one.position
        return lambda: temporal.launch(*given, one.scale, (scales[0], scales[1]))

    spent = hardware.time([call(one) for one in filled])
    section.add(
        "temporal_attention_int8",
        streams=ring.streams,
        window=ring.window,
        megabytes=ring.moved() / 1e6,
        microseconds=spent * 1e6,
        share_of_copy=ring.moved() / spent / copy,
    )


def check_rows(section: Section, filled: Filled, ring: Ring, cut: Launch | None = None) -> None:
    """A few rows of the first and the last stream against float64."""
    patches = min(2, filled.query.shape[1])
    rows = patches * filled.query.shape[2]
    for stream in {0, ring.streams - 1}:
        part = slice(stream, stream + 1)
        wide = [x[part, -patches:].double() for x in (filled.query, filled.key, filled.value)]
        rings = [x[part, -rows:].double() for x in (filled.key_ring, filled.value_ring)]
        expected = reference.temporal_attention(*wide, *rings, filled.position[part], filled.scale)
        found = step(filled, cut)()[part, -patches:]
        label = f"temporal_attention, {ring.streams} streams, window {ring.window}, stream {stream}"
        section.check(f"{label}, {cut}" if cut else label, error(found, expected), 2e-3)


def _write(filled: Filled) -> Callable[[], None]:
    """The ring's update, as PyTorch does it."""
    streams = torch.arange(filled.position.shape[0], device=filled.position.device)
    slots = filled.position % filled.key_ring.shape[2]
    key, value = filled.key.flatten(1, 2), filled.value.flatten(1, 2)

    def write() -> None:
        filled.key_ring[streams, :, slots] = key
        filled.value_ring[streams, :, slots] = value

    return write


def _rows(filled: Filled) -> Tensor:
    return filled.query.flatten(1, 2).unsqueeze(2)  # [S, R, 1, d]


def _sdpa(masked: bool) -> Callable[[Filled], Callable[[], Tensor]]:
    def make(filled: Filled) -> Callable[[], Tensor]:
        write, rows = _write(filled), _rows(filled)
        slots = torch.arange(filled.key_ring.shape[2], device=rows.device)
        visible = (slots <= filled.position[:, None])[:, None, None] if masked else None

        def call() -> Tensor:
            write()
            return F.scaled_dot_product_attention(rows, filled.key_ring, filled.value_ring, visible, scale=filled.scale)

        return call

    return make


def _matmul(filled: Filled) -> Callable[[], Tensor]:
    write, rows = _write(filled), _rows(filled)

    def call() -> Tensor:
        write()
        scores = (rows @ filled.key_ring.transpose(2, 3)) * filled.scale
        return scores.softmax(dim=-1) @ filled.value_ring

    return call


def _flex(hardware: Hardware, position: Tensor) -> Callable[[Filled], Callable[[], Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex_attention if hardware.rehearsal else torch.compile(flex_attention, dynamic=False)

    def visible(score: Tensor, b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
        return torch.where(slot <= position[b], score, -float("inf"))

    def make(filled: Filled) -> Callable[[], Tensor]:
        write, rows = _write(filled), _rows(filled)

        def call() -> Tensor:
            write()
            mixed: Tensor = attend(rows, filled.key_ring, filled.value_ring, score_mod=visible, scale=filled.scale)
            return mixed

        return call

    return make
