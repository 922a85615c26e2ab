"""Which engine runs a bundle on this machine, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..bundle import Bundle
from ..errors import EngineError
from ..manifest import Manifest
from . import Engine

ENGINES = ("onnxruntime", "torch", "tensorrt")
ARITHMETIC = ("fp32", "tf32", "fp16", "bf16")  # what the torch engine computes in where it is asked to: "torch:fp16"
VARIANTS = {"torch": ARITHMETIC, "onnxruntime": ("plain", "bf16")}  # behind a colon
BFLOAT16 = "onnxruntime:bf16"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class EngineChoice:
    """An engine on a device, and why it was taken.

    Attributes:
        variant: one of the engine's `VARIANTS`: of torch what it computes in; of ONNX Runtime "plain" for no operator
            but its own, "bf16" for products of float32 in bfloat16. None for what the graphs have.
    """

    engine: str
    device: str
    reason: str
    variant: str | None = None

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.engine}:{self.variant}" if self.variant else self.engine


def has_int8_memory(manifest: Manifest, precision: str) -> bool:
    """Whether the states of a precision are INT8, which only some engines run; see `check_memory`."""
    return any(state.dtype == "int8" for state in manifest.at(precision).states)


def check_memory(manifest: Manifest, precision: str, engine: str, device: str = "auto") -> None:
    """Raise EngineError where an engine does not run the memory of a precision."""
    reason = _no_memory(manifest, precision, engine, device)
    if reason is not None:
        others = [name for name in manifest.precisions if _no_memory(manifest, name, engine, device) is None]
        advice = f", or take another precision ({', '.join(others)})" if others else ""
        on_cpu = _no_memory(manifest, precision, "onnxruntime", "cpu") is None
        raise EngineError(
            f"precision '{precision}' keeps its memory as INT8, which the engine '{engine}' does not run:"
            f" {reason}; use the engine 'torch'{' or, on a CPU, onnxruntime' if on_cpu else ''}{advice}"
        )


def _no_memory(manifest: Manifest, precision: str, engine: str, device: str) -> str | None:
    """Why an engine does not run the memory of a precision; None where it does.

    Kernels that read INT8 as it is are the torch engine's, and on a CPU the native library's beside float32.
    """
    name, _, variant = engine.partition(":")
    if name not in ("onnxruntime", "tensorrt") or not has_int8_memory(manifest, precision):
        return None
    if name == "tensorrt":
        return "TensorRT's caches are FP32 or FP16"
    if device == "cuda" or variant == "plain":
        return "ONNX Runtime would dequantize the whole memory in every step"
    return "on a CPU it reads INT8 beside float32 alone" if precision.startswith("fp16") else None


def choose_engine(manifest: Manifest, engine: str, device: str, precision: str = "auto") -> EngineChoice:
    """Take the fastest engine that the bundle and the machine allow, or the one asked for.

    Args:
        engine: "auto", one of `ENGINES`, or one of `VARIANTS` such as "torch:fp16" or "onnxruntime:plain".
        precision: "auto" or one of the bundle's.

    Raises:
        EngineError: unknown, or not usable here.
        BundleError: the bundle does not have that precision.
    """
    name, colon, variant = engine.partition(":")
    if name not in ("auto", *ENGINES):
        raise EngineError(f"engine '{name}' is unknown; expected auto, {', '.join(ENGINES)}")
    if colon and variant not in VARIANTS.get(name, ()):
        known = ", ".join(f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants)
        raise EngineError(f"engine '{engine}' is unknown; with ':' expected {known}")
    if device not in ("auto", *DEVICES):
        raise EngineError(f"device '{device}' is unknown; expected auto, {', '.join(DEVICES)}")
    if precision != "auto":
        check_memory(manifest, precision, engine, device)
    if name == "torch":
        return _choose_torch("asked for", variant or None, device)
    if name == "tensorrt" or (name == "auto" and device != "cpu" and _built_for_here(manifest)):
        return _choose_tensorrt(manifest, device, name)
    wanted = manifest.precisions if precision == "auto" else (precision,)
    if name == "auto" and all(_no_memory(manifest, one, "onnxruntime", device) for one in wanted):
        return _choose_torch("no other engine runs INT8 memory", None, device)
    if name == "auto" and find_spec("onnxruntime") is None and find_spec("torch") is not None:
        return _choose_torch("ONNX Runtime is not installed", None, device)
    if engine == BFLOAT16 and device == "auto":
        device = "cpu"
    from .onnxruntime import available_devices

    found = available_devices()
    if device != "auto" and device not in found:
        raise EngineError(
            f"device '{device}' is not available to ONNX Runtime here (found {', '.join(found)});"
            " pip install 'framestep[gpu]' on a machine with an NVIDIA GPU"
        )
    taken = found[0] if device == "auto" else device
    if name == "auto" and all(_no_memory(manifest, one, "onnxruntime", taken) for one in wanted):
        return _choose_torch("no other engine runs INT8 memory", None, device)
    why = "asked for" if device != "auto" else "the fastest device found" if len(found) > 1 else "no GPU provider found"
    return EngineChoice(
        "onnxruntime", taken, f"{engine if variant else 'onnxruntime'} on {taken} ({why})", variant or None
    )


def _choose_torch(why: str, arithmetic: str | None, device: str) -> EngineChoice:
    from .torch import available_devices

    found = available_devices()
    if device != "auto" and device not in found:
        raise EngineError(
            f"device '{device}' is not available to PyTorch here (found {', '.join(found)});"
            " use a machine with an NVIDIA GPU and a PyTorch built for CUDA"
        )
    taken = found[0] if device == "auto" else device
    numbers = f" in {arithmetic}" if arithmetic else ""
    return EngineChoice("torch", taken, f"torch on {taken}{numbers} ({why})", arithmetic)


def _choose_tensorrt(manifest: Manifest, device: str, asked: str) -> EngineChoice:
    from .tensorrt import find_target

    if device == "cpu":
        raise EngineError("the engine 'tensorrt' needs an NVIDIA GPU; use the engine 'onnxruntime' on a CPU")
    target = find_target(manifest)
    why = "asked for" if asked == "tensorrt" else "the bundle has an engine for this GPU"
    return EngineChoice("tensorrt", "cuda", f"tensorrt on cuda, {target.flavour} {target.version} ({why})")


def _built_for_here(manifest: Manifest) -> bool:
    """Whether somebody built engines for this very machine."""
    from .engine_files import machine_misfit

    if not manifest.engines:
        return False
    from .tensorrt import find_target

    try:
        target = find_target(manifest)
    except EngineError:
        return False
    return any(machine_misfit(entry, target) is None for entry in manifest.engines.values())


def choose_precision(manifest: Manifest, precision: str, device: str, engine: str) -> str:
    """Take the precision asked for, or the fastest one in the bundle that the device runs well.

    INT8 memory, which costs accuracy, is taken where the bundle's own precision has it or where there is no other.

    Args:
        engine: as a choice is named, with its variant.

    Raises:
        BundleError: the bundle does not have it.
        EngineError: the engine does not run it.
    """
    if precision == "auto" and _wants_int8_memory(manifest, device, engine):
        return manifest.precision
    if precision == "auto":
        # A CPU widens every FP16 number before it computes with it.
        integers = () if engine == BFLOAT16 else ("int8",)
        order = (*integers, "fp32") if device == "cpu" else ("fp16", "fp32", "fp16+int8", "int8")
        known = [name for name in manifest.precisions if not has_int8_memory(manifest, name)]
        known = known or [name for name in manifest.precisions if _no_memory(manifest, name, engine, device) is None]
        if engine == "tensorrt":  # what it was built for, where it was
            built = {entry.precision for entry in manifest.engines.values()}
            known = [name for name in known if name in built] or known
        precision = next((name for name in (*order, *known) if name in known), manifest.precision)
    check_memory(manifest, precision, engine, device)
    return manifest.at(precision).precision


def _wants_int8_memory(manifest: Manifest, device: str, engine: str) -> bool:
    """Whether a bundle's own precision has INT8 memory, as nobody makes it who does not want it, and runs well here."""
    main = manifest.precision
    if (device == "cpu" and main.startswith("fp16")) or (engine == BFLOAT16 and not main.startswith("fp32")):
        return False
    return has_int8_memory(manifest, main) and _no_memory(manifest, main, engine, device) is None


def make_engine(
    choice: EngineChoice,
    bundle: Bundle,
    graphs: Sequence[str],
    outputs: Sequence[str],
    streams: int,
    threads: int,
    own_graphs: Sequence[str] = (),
) -> Engine:
    """Make an engine that steps `graphs` and runs `own_graphs` by themselves.

    Raises:
        EngineError: it cannot be used here.
    """
    if choice.engine == "torch":
        from .torch import TorchEngine

        return TorchEngine(bundle, graphs, outputs, streams, choice.device, threads, choice.variant, own_graphs)
    if choice.engine == "tensorrt":
        from .tensorrt import TensorRtEngine

        return TensorRtEngine(bundle, graphs, outputs, streams, own_graphs)
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, outputs, streams, choice.device, threads, own_graphs, choice.name)
