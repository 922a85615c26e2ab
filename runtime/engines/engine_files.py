"""Compiled engines in a bundle: which one fits a graph and a machine, and why the others do not. Needs no TensorRT."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass, replace

from ..bundle import ENGINES, Bundle
from ..counted import counted
from ..errors import EngineError
from ..manifest import EngineFile, Graph
from ..schema import to_json

FLAVOURS = ("tensorrt", "tensorrt_rtx")  # Python packages, in the order in which they are looked for
PRECISIONS = ("fp16", "fp16+int8", "fp16+w4", "fp32")  # that engines are built of
FINGERPRINT_DIGITS = 32


@dataclass(frozen=True)
class Target:
    """Where an engine is to run.

    Attributes:
        flavour, version: of the TensorRT package.
        compute_capability: of the GPU, such as "8.6".
    """

    flavour: str
    version: str
    compute_capability: str


def source_key(bundle: Bundle, graph: Graph) -> str:
    """Identifies a graph by the contents of all files that it reads; `docs/design.md` spells it out."""
    return _digest({name: bundle.manifest.files[name].sha256 for name in bundle.graph_files(graph)})


def fingerprint(entry: EngineFile) -> str:
    """Identifies what an engine was compiled from, and how."""
    values = to_json(entry)
    return _digest({key: value for key, value in values.items() if key not in ("bytes", "sha256")})[:FINGERPRINT_DIGITS]


def misfit(bundle: Bundle, entry: EngineFile, target: Target, streams: int) -> str | None:
    """Why an engine cannot run its graph of a bundle (flattened to one precision) on a machine; None where it can."""
    manifest = bundle.manifest
    if entry.precision != manifest.precision:
        return f"is {entry.precision}, not {manifest.precision}"
    if entry.graph not in manifest.graphs or entry.source != source_key(bundle, manifest.graphs[entry.graph]):
        return "was built from another graph"
    return machine_misfit(entry, target, streams)


def machine_misfit(entry: EngineFile, target: Target, streams: int = 1) -> str | None:
    """Why an engine cannot run on a machine, whatever its graph; None where it can."""
    if entry.flavour != target.flavour:
        return f"was built by {entry.flavour}, and here is {target.flavour}"
    if entry.version != target.version and not _runs_on_later(entry, target.version):
        return f"was built by {entry.flavour} {entry.version}, and here is {target.version}"
    if not any(_covers(name, target.compute_capability) for name in entry.compute_capabilities):
        built = ", ".join(entry.compute_capabilities)
        return f"was built for compute capability {built}, and this GPU has {target.compute_capability}"
    if entry.streams < streams:
        return f"takes at most {counted(entry.streams, 'stream')}, and {streams} are asked for"
    return None


def find_engine(bundle: Bundle, graph: str, target: Target, streams: int) -> tuple[str, EngineFile]:
    """The engine of a graph that fits, with its file's name. Of several, the one for the fewest streams.

    Raises:
        EngineError: there is none; it says what is wrong with each that there is, and how to build one.
    """
    precision = bundle.manifest.precision
    if precision not in PRECISIONS:
        raise EngineError(
            f"{bundle.path}: TensorRT runs {', '.join(PRECISIONS)}, not {precision}; use one of these, or the engine"
            " 'onnxruntime'"
        )
    found = [(name, entry) for name, entry in bundle.manifest.engines.items() if entry.graph == graph]
    reasons = {name: misfit(bundle, entry, target, streams) for name, entry in found}
    fitting = [(name, entry) for name, entry in found if reasons[name] is None]
    if fitting:
        return min(fitting, key=lambda pair: pair[1].streams)
    command = build_command(bundle, streams)
    if not found:
        raise EngineError(f"{bundle.path}: has no TensorRT engine of the graph '{graph}'; run '{command}'")
    seen = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise EngineError(f"{bundle.path}: no TensorRT engine of the graph '{graph}' fits: {seen}; run '{command}'")


def read_engine(bundle: Bundle, name: str, entry: EngineFile) -> mmap.mmap:
    """The content of an engine's file, checked; mapped, so that it takes no memory beside what TensorRT makes of it.

    Raises:
        EngineError: missing, truncated, changed, or a link out of the bundle.
    """
    path = bundle.file(name)
    again = f"run '{build_command(bundle, entry.streams)}'"
    if path.is_symlink() or bundle.path.resolve() not in path.resolve().parents:
        raise EngineError(f"{path}: leaves the bundle through a link; refused")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise EngineError(f"{path}: expected {entry.bytes} bytes, found {size}; {again}")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise EngineError(f"{path}: missing; {again}") from None
    except (OSError, ValueError) as error:  # of an empty file too
        raise EngineError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise EngineError(f"{path}: its content has changed; {again}")
    return content


def build_command(bundle: Bundle, streams: int) -> str:
    """What to type to get a fitting engine."""
    more = f" --streams {streams}" if streams > 1 else ""
    return f"framestep build {bundle.path} --precision {bundle.manifest.precision}{more}"


def named(entry: EngineFile) -> str:
    """Where an engine lies in its bundle."""
    return f"{ENGINES}/{fingerprint(entry)}.engine"


def with_engine(bundle: Bundle, name: str, entry: EngineFile | None) -> Bundle:
    """Record an engine in the manifest as it is on disk now, or strike one out."""
    manifest = Bundle.open(bundle.path, verify=False).manifest
    engines = {known: value for known, value in manifest.engines.items() if known != name}
    if entry is not None:
        engines[name] = entry
    return bundle.rewrite_manifest(replace(manifest, engines=engines))


def _runs_on_later(entry: EngineFile, version: str) -> bool:
    built, here = (tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (entry.version, version))
    return entry.version_compatible and built[:1] == here[:1] and built <= here


def _covers(name: str, capability: str) -> bool:
    if not name.endswith("+"):
        return name == capability
    return _numbers(name[:-1]) <= _numbers(capability)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())


def _digest(values: object) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
