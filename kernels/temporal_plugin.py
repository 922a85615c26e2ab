"""`temporal_attention` as a kernel that TensorRT can launch by itself: pointers alone, inputs before outputs.

Sizes, strides and the scale are compiled in; the number of streams is the grid. The rings' outputs are their inputs'
memory, and are there because TensorRT passes a pointer for each.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import re
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .merge import LOG2E
from .temporal import plan, temporal_kernel

POINTERS = ("query", "key", "value", "key_ring", "value_ring", "position", "out", "key_ring_out", "value_ring_out")
TYPES = {"fp16": ("*fp16", 2), "fp32": ("*fp32", 4)}


@triton.jit
def temporal_plugin(
    query,  # [S, R, d]
    key,
    value,
    key_ring,  # [S, R, W, d]
    value_ring,
    position,  # int64 [S]
    out,  # [S, R, d]
    key_ring_out,
    value_ring_out,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    row: tl.constexpr = HEAD_DIM
    stream: tl.constexpr = ROWS * HEAD_DIM
    ring: tl.constexpr = ROWS * WINDOW * HEAD_DIM
    temporal_kernel(
        query,
        key,
        value,
        key_ring_out,
        value_ring_out,
        out,  # not followed: scales of int8 rings
        out,
        position,
        out,
        out,  # not followed: parts of a split window
        out,
        out,
        SCALE,
        ROWS,
        1,  # each row is a patch of one head
        stream,
        row,
        row,
        stream,
        row,
        row,
        stream,
        row,
        row,
        ring,
        ring,
        WINDOW,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_R,
        BLOCK_W,
        1,
        False,
        STAGES,
    )


@dataclass(frozen=True)
class Launchable:
    """A compiled kernel and how to launch it; along z the grid is the streams.

    Attributes:
        shared_bytes: dynamic shared memory.
    """

    entry: str
    ptx: str
    threads: int
    shared_bytes: int
    grid_x: int


def constants(rows: int, window: int, head_dim: int, itemsize: int, scale: float) -> dict[str, int | float]:
    """What is compiled in. The window is not split: that would take a second launch."""
    cut = plan(1, rows, window, head_dim, itemsize, 1)
    return {
        "SCALE": scale * LOG2E,
        "ROWS": rows,
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_R": cut.rows,
        "BLOCK_W": cut.slots,
        "STAGES": cut.stages,
    }


def compile_plugin(rows: int, window: int, head_dim: int, dtype: str, scale: float, capability: int) -> Launchable:
    """Compile for a GPU of a compute capability such as 87.

    Args:
        rows: patches times heads.
        dtype: "fp16" or "fp32".
    """
    pointer, itemsize = TYPES[dtype]
    cut = plan(1, rows, window, head_dim, itemsize, 1)
    fixed = constants(rows, window, head_dim, itemsize, scale)
    names = temporal_plugin.arg_names
    types = {name: "*i64" if name == "position" else pointer for name in POINTERS}
    source = ASTSource(
        temporal_plugin,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=fixed,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": cut.warps, "enable_fp_fusion": True}
    )
    entry, ptx = _without_scratch(built.asm["ptx"], len(POINTERS))
    return Launchable(entry, ptx, cut.warps * 32, built.metadata.shared, triton.cdiv(rows, cut.rows))


def _without_scratch(ptx: str, wanted: int) -> tuple[str, str]:
    """Name of the entry, and the PTX without the pointers that Triton adds after ours and TensorRT does not pass.

    Raises:
        RuntimeError: the kernel needs them.
    """
    found = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx)
    if found is None:
        raise RuntimeError("the PTX has no entry")
    parameters = [part.strip() for part in found[2].split(",")]
    body = ptx[found.end() :]
    for part in parameters[wanted:]:
        if re.search(rf"\b{part.split()[-1]}\b", body):
            raise RuntimeError(f"the kernel reads {part}, which TensorRT does not pass")
    kept = ",\n\t".join(parameters[:wanted])
    return found[1], f"{ptx[: found.start(2)]}\n\t{kept}\n{ptx[found.end(2) :]}"
