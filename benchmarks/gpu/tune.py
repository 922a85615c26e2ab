"""Which way to cut the kernels is fastest: the neighbours of the planned launches. Not part of the suite's time.

Every launch of `temporal_attention` is measured at every size, and the table has a line for each launch: the best rule
is the first line, whose worst size is nearest to the best that any launch reached there. Parts of a window and of a
decoder's cache have tables of their own: a line for each size, a column for each number of parts. Products with weights
in blocks have a table like the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import block_linear, temporal
from ...kernels.temporal import Launch
from . import decoding, products
from .bandwidth import Filled, Ring, check_rows, fill, measure_copy, step
from .hardware import Hardware
from .section import Section
from .sizes import Sizes

CASES = ((4, 64), (1, 16), (4, 256), (64, 16), (16, 64), (4, 16), (4, 4096))  # streams, window; what matters most first
WARPS, SLOTS, STAGES = (1, 2, 4), (4, 8, 16), (2, 3, 4)
MOST_SHARED = 1 << 16  # bytes of one program; with more, three or fewer run side by side
PARTED = ((1, 512), (1, 1024), (1, 4096), (4, 4096))
PARTS = (1, 2, 3, 4, 8)
DECODER_PARTS = (0.5, 1, 2, 4)  # of the planned number
SECONDS = 0.03
ROWS, UNITS = (16, 32, 64), (4, 8, 16)  # outputs of a program, and units of a tile, of `block_linear`
PRODUCTS = ((3584, 37888), (3584, 3584), (18944, 3584), (896, 151936), (896, 9728), (896, 896))  # inputs, outputs
PRODUCT_PARTS = (1, 2)


def run(section: Section, hardware: Hardware, sizes: Sizes) -> None:
    copy = measure_copy(hardware)
    section.facts["copy_bytes_per_second"] = copy
    hardware.free()
    _launches(section, hardware, sizes, copy)
    _parts(section, hardware, sizes, copy)
    for case in decoding.CASES[:1] if hardware.rehearsal else decoding.CASES:
        for tokens in (1, 64)[: 1 if hardware.rehearsal else 2]:
            name = f"decode_attention of {tokens} tokens, {case}"
            if section.left() < 10:
                section.skip(f"{name}: no time left")
                continue
            section.attempt(name, lambda c=case, t=tokens: _decoder_parts(section, hardware, sizes, c, t))
            hardware.free()
    _product_launches(section, hardware, copy)


def _product_launches(section: Section, hardware: Hardware, copy: float) -> None:
    small = hardware.rehearsal
    tried = [products.Product(1, *matrix, 4, 64, torch.float16) for matrix in (((128, 40),) if small else PRODUCTS)]
    shares: dict[str, dict[str, float]] = {}  # by launch and size
    for product in tried:
        filled = [products.fill(hardware, product, seed) for seed in range(hardware.sets(product.held()))]
        planned = product.planned(hardware)
        ways = itertools.product(ROWS, UNITS, STAGES, PRODUCT_PARTS)
        for rows, units, stages, splits in [(16, 4, 2, 1), (32, 4, 2, 2)] if small else ways:
            if section.left() < 10:
                section.skip(f"block_linear {product.label}: no time left")
                break
            cut = block_linear.Launch(rows, units, splits, planned.warps, stages)
            name = f"{rows} rows, {units} units, {stages} stages, {splits} parts"
            try:
                products.check_outputs(section, filled[0], product, cut)
                spent = hardware.time([one.ours(cut) for one in filled], SECONDS)
            except Exception as problem:  # more shared memory than there is; Triton's own kind of error
                section.skip(f"{product.label}, {cut}: {str(problem)[:100]}")
                continue
            size = f"{product.inputs} x {product.outputs}"
            shares.setdefault(name, {})[size] = product.moved() / spent / copy
        section.facts[f"planned: {product.label}"] = str(planned)
        section.rows["tune_products"] = rank(shares)
        section.save()
        del filled
        hardware.free()


def _launches(section: Section, hardware: Hardware, sizes: Sizes, copy: float) -> None:
    shares: dict[str, dict[str, float]] = {}  # by launch and size
    for streams, window in CASES if not hardware.rehearsal else ((1, 6), (2, 4)):
        ring, filled = _filled(hardware, sizes, streams, window)
        planned = _planned(hardware, ring)
        size = f"{streams} x {window}"
        for warps, slots, stages in itertools.product(WARPS, SLOTS, STAGES):
            rows = planned.rows // planned.warps * warps
            cut = replace(planned, rows=rows, slots=slots, warps=warps, stages=stages)
            usual = (warps, slots, stages) == (planned.warps, planned.slots, planned.stages)
            tile = 2 * rows * slots * ring.head_dim * ring.itemsize
            if (stages - 1) * tile > MOST_SHARED:
                continue
            if hardware.rehearsal and not usual and (warps, slots, stages) != (1, 4, 2):
                continue
            if section.left() < 10:
                section.skip(f"{size}, {cut}: no time left")
                break
            name = f"{warps} warps, {slots} slots, {stages} stages" + (", planned" if usual else "")
            share = _share(section, hardware, ring, filled, cut, copy)
            if share is not None:
                shares.setdefault(name, {})[size] = share
        section.rows["tune"] = rank(shares)  # with what is known so far
        section.save()
        for row in section.rows["tune"][:3]:
            print("tune:", row, flush=True)
        del filled
        hardware.free()


def rank(shares: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A line for each launch, the one first that is at worst nearest to the best of any.

    Args:
        shares: of the copy's bandwidth, by launch and size.
    """
    sizes = list(dict.fromkeys(size for found in shares.values() for size in found))
    best = {size: max(found.get(size, 0.0) for found in shares.values()) for size in sizes}
    rows = [
        {
            "launch": name,
            "worst_of_best": min(found.get(size, 0.0) / best[size] for size in sizes),
            **{size: found.get(size) for size in sizes},
        }
        for name, found in shares.items()
    ]
    return sorted(rows, key=lambda row: -row["worst_of_best"])


def _parts(section: Section, hardware: Hardware, sizes: Sizes, copy: float) -> None:
    for streams, window in PARTED if not hardware.rehearsal else ((1, 6),):
        if section.left() < 20:
            section.skip(f"parts of {streams} x {window}: no time left")
            continue
        ring, filled = _filled(hardware, sizes, streams, window)
        planned = _planned(hardware, ring)
        found = {
            f"{splits} parts": _share(section, hardware, ring, filled, replace(planned, splits=splits), copy)
            for splits in (PARTS if not hardware.rehearsal else PARTS[:2])
        }
        section.add("tune_parts", streams=streams, window=window, planned=planned.splits, **found)
        del filled
        hardware.free()


def _decoder_parts(
    section: Section, hardware: Hardware, sizes: Sizes, case: tuple[int, int, int, int], tokens: int
) -> None:
    steps = decoding.Steps(hardware, case, tokens, sizes.capacity)
    planned = steps.planned()
    found: dict[str, float] = {}
    for factor in DECODER_PARTS:
        cut = replace(planned, splits=max(1, int(planned.splits * factor)))
        if cut.splits > steps.capacity // cut.slots:
            continue
        steps.check(section, cut)
        calls: list[Callable[[], Tensor]] = [steps.ours(given, cut) for given in steps.filled]
        found[f"{cut.splits} parts"] = hardware.time(calls, SECONDS) * 1e6
    best = min(found, key=lambda parts: found[parts])
    listed = ", ".join(f"{parts} {spent:.1f}" for parts, spent in found.items())
    section.add(
        "tune_decoder",
        case=steps.label,
        planned=planned.splits,
        best=best,
        microseconds=found[best],
        all_of_them=listed,
    )


def _share(
    section: Section, hardware: Hardware, ring: Ring, filled: list[Filled], cut: Launch, copy: float
) -> float | None:
    """Of the copy's bandwidth; None where the launch does not fit onto the GPU."""
    try:
        check_rows(section, filled[0], ring, cut)
        return ring.moved() / hardware.time([step(one, cut) for one in filled], SECONDS) / copy
    except Exception as problem:  # more shared memory than there is; Triton's own kind of error
        section.skip(f"{ring.streams} x {ring.window}, {cut}: {str(problem)[:100]}")
        return None


def _filled(hardware: Hardware, sizes: Sizes, streams: int, window: int) -> tuple[Ring, list[Filled]]:
    heads = sizes.model.num_attention_heads
    ring = Ring(streams, sizes.model.patches * heads, window, max(sizes.model.head_dim, 16), 2)
    return ring, [fill(hardware, ring, heads) for _ in range(hardware.sets(ring.held()))]


def _planned(hardware: Hardware, ring: Ring) -> Launch:
    sizes = ring.streams, ring.rows, ring.window, ring.head_dim, ring.itemsize
    return temporal.plan(*sizes, temporal.processors(hardware.device))
