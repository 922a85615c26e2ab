"""The baselines of `--compare`: what a user would run without framestep, and the other precisions of the bundle.

The former are written as one would write them with their library, with the library's default settings: float32,
inference mode, the same weights and the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...runtime.engines.choosing import BFLOAT16
from .openvino_path import OpenVinoRing
from .paths import FRAMESTEP, FramestepPath, MeasuredPath, PathSpec
from .pytorch_paths import CompiledRing, GrowingCache, WholeClip

# Above the largest cache tensor of any path, so that glibc keeps freed tensors instead of giving their pages back
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


@dataclass(frozen=True)
class Baseline:
    """A baseline of `--compare`.

    Attributes:
        title: for plots and tables.
        description: what is measured, in one sentence.
        precision: of its arithmetic.
        tolerance: largest accepted difference from the session's outputs, times their largest number where that is
            above 1; None: the difference is reported only.
        environment: variables of its process.
        make: sets it up.
    """

    title: str
    description: str
    precision: str
    tolerance: float | None
    environment: dict[str, str]
    make: Callable[[PathSpec], MeasuredPath]


def make_path(spec: PathSpec) -> MeasuredPath:
    """Set a path up.

    Raises:
        FramestepError: a package, the checkpoint or the device is missing.
    """
    if spec.name == FRAMESTEP:
        return FramestepPath(spec)
    return find_baseline(spec.name).make(spec)


def find_baseline(name: str) -> Baseline:
    """One of `BASELINES`, or a session in another precision of the bundle, named as `precision_path` does."""
    if name in BASELINES:
        return BASELINES[name]
    stored = name.removeprefix(precision_path(""))
    return Baseline(
        f"framestep, {stored}",
        f"A session of one stream in the bundle's precision {stored}.",
        precision_name(stored),
        None,
        {},
        lambda spec: FramestepPath(replace(spec, precision=stored)),
    )


def precision_path(stored: str) -> str:
    """The path of a precision of the bundle, as `--compare` names it."""
    return f"{FRAMESTEP}-{stored}"


def precision_name(stored: str) -> str:
    """A precision as reports name it."""
    return {"fp32": "float32", "fp16": "float16"}.get(stored, stored)


AGREEMENT = 2e-4
BFLOAT16_PRODUCTS = "float32, products in bfloat16"
BASELINES: dict[str, Baseline] = {
    "pytorch-recompute": Baseline(
        "PyTorch, recompute all frames",
        "PyTorch eager; all frames so far again for each new one, causal attention over time.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: WholeClip(spec, causal=True),
    ),
    "pytorch-bidirectional": Baseline(
        "PyTorch, bidirectional",
        "PyTorch eager; all frames so far again for each new one, every frame attends to every frame.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: WholeClip(spec, causal=False),
    ),
    "pytorch-growing-cache": Baseline(
        "PyTorch, growing cache",
        "PyTorch eager; one frame at a time, keys and values of all frames before concatenated (as the reference"
        " implementation does, with PyTorch's own attention function); glibc's default allocator thresholds.",
        "float32",
        AGREEMENT,
        {},
        GrowingCache,
    ),
    "pytorch-growing-cache-tuned": Baseline(
        "PyTorch, growing cache, tuned",
        "The same with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised.",
        "float32",
        AGREEMENT,
        RAISED_THRESHOLDS,
        GrowingCache,
    ),
    "pytorch-compile": Baseline(
        "torch.compile, ring",
        "torch.compile of a step over a preallocated ring of keys and values, updated in place.",
        "float32",
        AGREEMENT,
        {},
        CompiledRing,
    ),
    "openvino-f32": Baseline(
        "OpenVINO float32, ring",
        "OpenVINO with INFERENCE_PRECISION_HINT=f32; the bundle's graph, its ring a variable of OpenVINO's.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: OpenVinoRing(spec, "f32"),
    ),
    "openvino-default": Baseline(
        "OpenVINO default precision, ring",
        "The same in the precision that OpenVINO chooses for this processor.",
        "the library's default",
        None,
        {},
        lambda spec: OpenVinoRing(spec, None),
    ),
    "framestep-bf16": Baseline(
        "framestep, bfloat16",
        "A session of one stream on the engine onnxruntime:bf16.",
        BFLOAT16_PRODUCTS,
        None,
        {},
        lambda spec: FramestepPath(replace(spec, engine=BFLOAT16)),
    ),
}

PRECISIONS = "precisions"  # of `--compare`: every other precision of the bundle
# what `--compare` takes: a path, or a path in each of its variants
GROUPS: dict[str, tuple[str, ...]] = {
    "pytorch-recompute": ("pytorch-recompute",),
    "pytorch-bidirectional": ("pytorch-bidirectional",),
    "pytorch-growing-cache": ("pytorch-growing-cache", "pytorch-growing-cache-tuned"),
    "pytorch-compile": ("pytorch-compile",),
    "openvino": ("openvino-f32", "openvino-default"),
    "framestep-bf16": ("framestep-bf16",),
}
