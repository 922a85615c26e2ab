"""Which way to cut `temporal_attention` is fastest: every combination at a few sizes. Not part of the suite's time."""

from __future__ import annotations

import itertools

from ...kernels import temporal
from ...kernels.temporal import Launch
from .bandwidth import Ring, check_rows, fill, measure_copy, step
from .hardware import Hardware
from .section import Section
from .sizes import Sizes

CASES = ((1, 16), (4, 16), (64, 16), (4, 64), (4, 256), (1, 4096), (4, 4096))  # streams, window
WARPS, SLOTS, STAGES, SPLITS = (1, 2, 4), (4, 8, 16), (1, 2, 3, 4), (1, 4)


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    copy = measure_copy(hardware)
    section.facts["copy_bytes_per_second"] = copy
    rows, heads = sizes.model.patches * sizes.model.num_attention_heads, sizes.model.num_attention_heads
    cases = CASES if not hardware.rehearsal else ((1, 6),)
    for streams, window in cases:
        ring = Ring(streams, rows, window, max(sizes.model.head_dim, 16), 2)
        filled = [fill(hardware, ring, heads) for _ in range(hardware.sets(ring.held()))]
        usual = temporal.plan(streams, rows, window, ring.head_dim, 2, temporal.processors(hardware.device))
        row = usual.rows // usual.warps
        found: list[tuple[float, Launch]] = []
        choices = itertools.product(WARPS, SLOTS, STAGES, SPLITS if window >= 1024 else (1,))
        for warps, slots, stages, splits in itertools.islice(choices, 2 if hardware.rehearsal else None):
            cut = Launch(row * warps, slots, splits, warps, stages)
            if section.left() < 5:
                section.skip(f"{streams} streams at window {window}, {cut}: no time left")
                break
            try:
                check_rows(section, filled[0], ring, cut)
                found.append((hardware.time([step(one, cut) for one in filled], 0.03), cut))
            except RuntimeError as problem:  # more shared memory than there is
                section.skip(f"{cut}: {str(problem)[:100]}")
        found.sort(key=lambda pair: pair[0])
        spent = hardware.time([step(one) for one in filled], 0.1)
        section.add("tune", streams=streams, window=window, launch="as planned", share=ring.moved() / spent / copy)
        for spent, cut in found[:6] + found[-1:]:
            section.add("tune", streams=streams, window=window, launch=str(cut), share=ring.moved() / spent / copy)
        del filled
        hardware.free()
