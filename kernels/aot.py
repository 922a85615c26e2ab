"""Compile the kernels ahead of time, on a machine with or without a GPU.

    python -m framestep.kernels.aot -o DIR [--target sm_90 ...] [--kernel temporal_fp16_w16 ...]

writes `sm_NN/NAME.cubin`, `sm_NN/NAME.ptx` and `sm_NN/NAME.json`: what a launcher needs to know (entry, warps, shared
memory, arguments in order, how the grid follows from the sizes) and what the compiler reports (registers, spills).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import block_linear, decode, merge, prefill, residual_norm, rotary, temporal

TARGETS = {"sm_80": 80, "sm_87": 87, "sm_90": 90, "sm_110": 110, "sm_120": 120}  # A100, Orin, H100/H200, Thor, RTX 50
PROCESSORS = 128  # of the GPU that launches are planned for; only the number of splits follows from it
HEAD_DIM = 64  # numbers of a head, of all that is compiled ahead
POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32", "int8": "*i8"}
BLOCKS = ((4, 32), (4, 64), (8, 128))  # bits of a weight, and inputs that share a scale
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}


@dataclass(frozen=True)
class Variant:
    """A kernel with everything fixed that is fixed when it is compiled.

    Attributes:
        kernel: the Triton function.
        types: Triton types of the arguments that stay, in the function's order.
        constants: the arguments that do not.
        grid: programs along x, y and z, in terms of the sizes.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, int | bool]
    grid: tuple[str, str, str]
    warps: int = 4


@dataclass(frozen=True)
class Compiled:
    """What a launcher needs, and what the compiler reports.

    Attributes:
        arguments: name and type in order; pointers, and integers marked `divisible`, are multiples of 16.
        scratch_arguments: pointers that follow them; null will do.
        shared_bytes: dynamic shared memory to ask for at launch.
        registers, spill_bytes: of one thread.
    """

    name: str
    target: str
    entry: str
    warps: int
    threads: int
    shared_bytes: int
    grid: tuple[str, str, str]
    arguments: tuple[dict[str, str | bool], ...]
    scratch_arguments: int
    constants: dict[str, int | bool]
    registers: int
    spill_bytes: int
    triton: str


def variants() -> list[Variant]:
    """What is compiled where nothing is named."""
    return [
        *(temporal_variant(dtype, window) for dtype in ("fp16", "bf16", "fp32") for window in (16, 64)),
        temporal_variant("fp16", 1024),
        temporal_variant("fp16", 4096, splits=4),
        temporal_variant("int8", 16),
        temporal_variant("int8", 64),
        merge_variant(4),
        prefill_variant("fp16", 16),
        prefill_write_variant("fp16", 16),
        decode_variant("fp16", 1),
        decode_variant("fp16", 64),
        norm_variant("fp16", 768, centred=True),
        norm_variant("fp16", 896, centred=False),
        rotary_variant("fp16"),
        *(block_linear_variant("fp16", bits, block, tokens) for bits, block in BLOCKS for tokens in (1, 16, 64)),
        block_linear_variant("fp16", 4, 64, 1, splits=2),
        block_linear_variant("bf16", 4, 64, 1),
        block_linear_variant("fp32", 4, 32, 1),
        block_linear_variant("fp32", 4, 32, 64),
        sum_variant(2),
        *(widen_variant(bits, block) for bits, block in BLOCKS),
    ]


def temporal_variant(dtype: str, window: int, splits: int = 1) -> Variant:
    """`temporal_attention` over rings of a dtype ("int8": its variant, with float16 queries)."""
    rows = 1 << 20  # so many that a program is never cut short
    cut = temporal.plan(1, rows, window, HEAD_DIM, ITEM_BYTES[dtype], PROCESSORS)
    inputs = POINTERS["fp16" if dtype == "int8" else dtype]
    types = {
        "query": inputs,
        "key": inputs,
        "value": inputs,
        "key_ring": POINTERS[dtype],
        "value_ring": POINTERS[dtype],
    }
    types |= {"key_scale": "*fp32", "value_scale": "*fp32", "position": "*i64", "out": inputs}
    types |= {"largest": "*fp32", "total": "*fp32", "mixed": "*fp32", "scale": "fp32", "rows": "i32", "heads": "i32"}
    types |= {f"{part}_{axis}": "i64" for part in ("query", "key", "value") for axis in "snh"}
    types |= {"key_ring_s": "i64", "value_ring_s": "i64"}
    constants: dict[str, int | bool] = {
        "WINDOW": window,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_D": triton.next_power_of_2(HEAD_DIM),
        "BLOCK_R": cut.rows,
        "BLOCK_W": cut.slots,
        "SPLITS": splits,
        "INT8": dtype == "int8",
        "STAGES": cut.stages,
    }
    name = f"temporal_{dtype}_w{window}" + (f"_split{splits}" if splits > 1 else "")
    grid = (f"ceil(rows / {cut.rows})", str(splits), "streams")
    return Variant(name, temporal.temporal_kernel, types, constants, grid, cut.warps)


def merge_variant(splits: int) -> Variant:
    types = {"largest": "*fp32", "total": "*fp32", "mixed": "*fp32", "out": "*fp16", "rows": "i32"}
    constants: dict[str, int | bool] = {"SPLITS": splits, "HEAD_DIM": HEAD_DIM}
    constants |= {"BLOCK_D": triton.next_power_of_2(HEAD_DIM), "BLOCK_R": merge.MERGE_ROWS}
    grid = (f"ceil(rows / {merge.MERGE_ROWS})", "1", "1")
    return Variant(f"merge_fp16_split{splits}", merge.merge_kernel, types, constants, grid)


def prefill_variant(dtype: str, window: int) -> Variant:
    """`causal_prefill`'s attention, 16 frames a program."""
    pointer = POINTERS[dtype]
    types = {name: pointer for name in ("query", "key", "value", "key_ring", "value_ring")}
    types |= {"position": "*i64", "out": pointer, "scale": "fp32", "frames": "i32", "rows": "i32", "heads": "i32"}
    types |= {f"{part}_{axis}": "i64" for part in ("query", "key", "value") for axis in "stnh"}
    types |= {"key_ring_s": "i64", "value_ring_s": "i64"}
    cut = prefill.plan(16, window, HEAD_DIM, ITEM_BYTES[dtype])
    constants: dict[str, int | bool] = {"WINDOW": window, "HEAD_DIM": HEAD_DIM}
    constants |= {"BLOCK_D": triton.next_power_of_2(HEAD_DIM), "BLOCK_T": cut.frames, "BLOCK_W": cut.slots}
    grid = (f"rows * ceil(frames / {cut.frames})", "streams", "1")
    return Variant(f"prefill_{dtype}_w{window}", prefill.prefill_kernel, types, constants, grid, cut.warps)


def prefill_write_variant(dtype: str, window: int) -> Variant:
    """`causal_prefill`'s update of the ring."""
    pointer = POINTERS[dtype]
    types = {name: pointer for name in ("key", "value", "key_ring", "value_ring")}
    types |= {"position": "*i64", "first": "i32", "rows": "i32", "heads": "i32"}
    types |= {f"{part}_{axis}": "i64" for part in ("key", "value") for axis in "stnh"}
    types |= {"key_ring_s": "i64", "value_ring_s": "i64"}
    constants: dict[str, int | bool] = {"WINDOW": window, "HEAD_DIM": HEAD_DIM}
    constants |= {"BLOCK_D": triton.next_power_of_2(HEAD_DIM), "BLOCK_R": prefill.WRITE_ROWS}
    grid = (f"ceil(rows / {prefill.WRITE_ROWS})", "min(frames, window)", "streams")
    return Variant(f"prefill_write_{dtype}_w{window}", prefill.write_kernel, types, constants, grid)


def decode_variant(dtype: str, tokens: int) -> Variant:
    """`decode_attention` of so many tokens, unsplit, for up to 64 queries of a key head in a program."""
    pointer = POINTERS[dtype]
    types = {name: pointer for name in ("query", "key", "value", "key_cache", "value_cache")}
    types |= {"write_index": "*i64", "slot_mask": "*u8", "out": pointer}
    types |= {"largest": "*fp32", "total": "*fp32", "mixed": "*fp32", "scale": "fp32"}
    types |= {name: "i32" for name in ("kv_heads", "group", "tokens", "capacity")}
    types |= {f"{part}_{axis}": "i64" for part in ("query", "key", "value") for axis in "bht"}
    types |= {"key_cache_b": "i64", "value_cache_b": "i64", "mask_b": "i64", "mask_t": "i64"}
    group = 8  # at most, of one token
    cut = decode.plan(1, group * tokens, 1, HEAD_DIM, ITEM_BYTES[dtype], PROCESSORS)
    constants: dict[str, int | bool] = {"HEAD_DIM": HEAD_DIM, "BLOCK_D": triton.next_power_of_2(HEAD_DIM)}
    constants |= {"BLOCK_M": cut.rows, "BLOCK_T": max(decode.LEAST_TILE, triton.next_power_of_2(tokens))}
    constants |= {"BLOCK_C": cut.slots, "SPLITS": 1, "STAGES": cut.stages}
    grid = (f"ceil(group * tokens / {cut.rows})", "sequences * kv_heads", "1")
    return Variant(f"decode_{dtype}_t{tokens}", decode.decode_kernel, types, constants, grid, decode.WARPS)


def norm_variant(dtype: str, width: int, centred: bool) -> Variant:
    """`residual_norm` with a float32 sum: layer norm, or the RMS norm of decoders."""
    pointer = POINTERS[dtype]
    types = {"x": "*fp32", "update": pointer, "weight": pointer, "bias": pointer, "total": "*fp32", "normed": pointer}
    types |= {"epsilon": "fp32"}
    constants: dict[str, int | bool] = {"CENTRED": centred, "WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)}
    return Variant(
        f"residual_norm_{dtype}" if centred else f"residual_rms_norm_{dtype}",
        residual_norm.residual_norm_kernel,
        types,
        constants,
        ("rows", "1", "1"),
        residual_norm.WARPS,
    )


def rotary_variant(dtype: str) -> Variant:
    """`rotary` of queries or keys."""
    types = {name: POINTERS[dtype] for name in ("x", "cos", "sin", "out")}
    types |= {"heads": "i32", "tokens": "i32"} | {f"x_{axis}": "i64" for axis in "bht"}
    constants: dict[str, int | bool] = {"HALF": HEAD_DIM // 2, "BLOCK_H": rotary.HEADS}
    constants |= {"BLOCK_D": triton.next_power_of_2(HEAD_DIM // 2)}
    grid = ("sequences * tokens", f"ceil(heads / {rotary.HEADS})", "1")
    return Variant(f"rotary_{dtype}", rotary.rotary_kernel, types, constants, grid, rotary.WARPS)


def block_linear_variant(dtype: str, bits: int, block: int, tokens: int, splits: int = 1) -> Variant:
    """`block_linear` of up to so many tokens, with a bias."""
    cut = block_linear.plan(tokens, 1, 1 << 20, ITEM_BYTES[dtype], PROCESSORS)
    pointer = POINTERS[dtype]
    types = {"x": pointer, "weight": "*i32", "scale": _scale_pointer(block), "bias": pointer, "out": pointer}
    types |= {"parts": "*fp32"} | dict.fromkeys(("tokens", "inputs", "outputs", "units"), "i32") | {"x_t": "i64"}
    constants: dict[str, int | bool] = {"BITS": bits, "BLOCK": block, "BIAS": True, "BLOCK_N": cut.rows}
    constants |= {"BLOCK_T": max(block_linear.LEAST_COLUMNS, triton.next_power_of_2(tokens)), "BLOCK_U": cut.units}
    constants |= {"SPLITS": splits, "STAGES": cut.stages}
    name = f"block_linear_w{bits}_b{block}_{dtype}_t{tokens}" + (f"_split{splits}" if splits > 1 else "")
    grid = (f"ceil(outputs / {cut.rows})", str(splits), "1")
    return Variant(name, block_linear.block_linear_kernel, types, constants, grid, cut.warps)


def sum_variant(splits: int) -> Variant:
    """The sum of `block_linear`'s parts."""
    types = {"parts": "*fp32", "bias": "*fp16", "out": "*fp16", "numbers": "i32", "outputs": "i32"}
    constants: dict[str, int | bool] = {"SPLITS": splits, "BIAS": True, "BLOCK": block_linear.SUMMED}
    grid = (f"ceil(numbers / {block_linear.SUMMED})", "1", "1")
    return Variant(f"sum_fp16_split{splits}", block_linear.sum_kernel, types, constants, grid)


def widen_variant(bits: int, block: int) -> Variant:
    """`widen_blocks` to float16."""
    types = {"weight": "*i32", "scale": _scale_pointer(block), "out": "*fp16"}
    types |= dict.fromkeys(("first", "rows", "inputs", "outputs", "units"), "i32")
    rows, units = block_linear.WIDE_ROWS, block_linear.WIDE_UNITS
    constants: dict[str, int | bool] = {"BITS": bits, "BLOCK": block, "BLOCK_N": rows, "BLOCK_U": units}
    grid = (f"ceil(rows / {rows})", f"ceil(units / {units})", "1")
    return Variant(f"widen_w{bits}_b{block}_fp16", block_linear.widen_kernel, types, constants, grid)


def compile_variant(variant: Variant, target: str, folder: Path) -> Compiled:
    """Compile for `target` and write cubin, PTX and JSON into `folder`/`target`.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the functions that are to be compiled.
    """
    if not isinstance(variant.kernel, triton.runtime.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    names = variant.kernel.arg_names
    if set(names) != {*variant.types, *variant.constants}:
        raise RuntimeError(f"{variant.name}: its arguments are not those of the kernel")
    divisible = {name for name, kind in variant.types.items() if kind.startswith("*") or _is_multiple(name)}
    source = ASTSource(
        variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_warps": variant.warps, "enable_fp_fusion": True},
    )
    arguments = tuple(
        {"name": name, "type": variant.types[name], "divisible": name in divisible}
        for name in names
        if name in variant.types
    )
    entry, parameters = _entry(built.asm["ptx"])
    place = folder / target
    place.mkdir(parents=True, exist_ok=True)
    cubin = place / f"{variant.name}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    cubin.with_suffix(".ptx").write_text(built.asm["ptx"])
    registers, spills = _resources(built.asm["cubin"])
    compiled = Compiled(
        name=variant.name,
        target=target,
        entry=entry,
        warps=variant.warps,
        threads=variant.warps * 32,
        shared_bytes=built.metadata.shared,
        grid=variant.grid,
        arguments=arguments,
        scratch_arguments=parameters - len(arguments),
        constants=variant.constants,
        registers=registers,
        spill_bytes=spills,
        triton=triton.__version__,
    )
    cubin.with_suffix(".json").write_text(json.dumps(asdict(compiled), indent=1) + "\n")
    return compiled


def compile_all(folder: Path, targets: Sequence[str], chosen: Sequence[Variant]) -> Iterator[Compiled]:
    for target in targets:
        for variant in chosen:
            yield compile_variant(variant, target, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    known = {variant.name: variant for variant in variants()}
    parser = argparse.ArgumentParser(prog="python -m framestep.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", action="append", choices=known, help="default: all")
    options = parser.parse_args(arguments)
    chosen = [known[name] for name in options.kernel or known]
    print(f"{'kernel':36} {'target':8} {'registers':>9} {'spilled bytes':>13} {'shared bytes':>12}")
    for found in compile_all(options.output, options.target or list(TARGETS), chosen):
        print(f"{found.name:36} {found.target:8} {found.registers:9} {found.spill_bytes:13} {found.shared_bytes:12}")
    return 0


def _is_multiple(name: str) -> bool:
    """Of 16: strides, and a product's inputs, which are whole blocks."""
    return name == "inputs" or name.endswith(tuple(f"_{axis}" for axis in "stnhb"))


def _scale_pointer(block: int) -> str:
    """As bundles have them: float16 with blocks of 64."""
    return POINTERS["fp16" if block == 64 else "fp32"]


def _entry(ptx: str) -> tuple[str, int]:
    """Name of a PTX entry, and how many parameters it has."""
    found = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if found is None:
        raise RuntimeError("the PTX has no entry")
    return found[1], found[2].count(".param")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory of one thread, as the disassembler that comes with Triton reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {done.stdout.strip()[:200]}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main())
