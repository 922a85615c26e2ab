"""The bundle: a folder with `manifest.json`, step graphs as ONNX, and their weights.

The manifest is all that a runtime needs to know: which graphs there are, what feeds each input (its *role*), and which
*states* a stream carries from step to step. `docs/design.md` tells the contract.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from .errors import BundleError, OutputError
from .onnx_files import external_files
from .schema import SchemaError, from_json, to_json

FORMAT = "framestep"
VERSION = 1
MANIFEST = "manifest.json"
STREAMS = "S"  # the symbol of the dynamic streams axis in shapes
LABEL_ROLES = ("text_embeddings", "patch_text_embeddings", "logit_scale", "logit_bias")
ROLES = ("frame", "position", "output", *LABEL_ROLES, "input_ids")
DTYPES = ("uint8", "int64", "int32", "bool", "float32", "float16", "int8")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: name in the graph.
        role: what feeds an input, one of `ROLES`; "output" is the output of another graph with the same name.
            Outputs have the role "output".
        dtype: numpy name.
        shape: sizes; "S" is the streams axis, "C" the number of labels, "B" a number of texts.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StateUse:
    """How a graph touches a state: read as `input`; written as `output`, or only read where `output` is None."""

    state: str
    input: str
    output: str | None = None


@dataclass(frozen=True)
class Graph:
    """A pure function (inputs, states) -> (outputs, states)."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[StateUse, ...] = ()


@dataclass(frozen=True)
class State:
    """Memory of a stream. It starts zeroed.

    Attributes:
        name: name of the state.
        kind: "ring": slot `position mod capacity` is written by each step.
        shape: sizes, the first is "S".
        axis: the axis of the slots.
        capacity: number of slots.
        rows_per_slot: rows along `axis` that one slot takes.
        dtype: numpy name.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    axis: int
    capacity: int
    rows_per_slot: int
    dtype: str

    def bytes_per_stream(self) -> int:
        size = {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        for extent in self.shape[1:]:
            size *= int(extent)
        return size


@dataclass(frozen=True)
class FrameSpec:
    """What a model sees: uint8 RGB of this height and width, and how other frames are brought to it.

    Attributes:
        resize: "crop" (shorter side to size, centre crop), "stretch" or "letterbox" (grey bars).
    """

    height: int
    width: int
    resize: str = "crop"


@dataclass(frozen=True)
class Scoring:
    """Scores are sigmoid(exp(logit_scale) * cosine + logit_bias).

    Attributes:
        head: the task head that the numbers and projections are from, or None.
        calibrated: the numbers were trained with this model; otherwise they are the original SigLIP's.
    """

    logit_scale: float
    logit_bias: float
    head: str | None
    calibrated: bool


@dataclass(frozen=True)
class Labels:
    """Open-vocabulary labels; their embeddings lie in `file` as `text_embeddings` and `patch_text_embeddings`."""

    names: tuple[str, ...]
    file: str
    background: str | None = None


@dataclass(frozen=True)
class Text:
    """The text tower as a graph, for new labels without a training framework.

    Attributes:
        length: tokens per text, padded.
        templates, patch_templates: the texts that one label stands for; `{}` is the label.
    """

    graph: str
    tokenizer: str
    length: int
    templates: tuple[str, ...]
    patch_templates: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where a bundle came from; nothing at run time depends on it."""

    checkpoint: str
    framestep: str
    trained_frames: int | None = None


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contract of a bundle; see `docs/design.md`."""

    format: str
    version: int
    family: str
    precision: str
    frame: FrameSpec
    graphs: dict[str, Graph]
    states: tuple[State, ...]
    origin: Origin
    rate: float | None = None
    grid: tuple[int, ...] | None = None
    scoring: Scoring | None = None
    labels: Labels | None = None
    text: Text | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)

    def state_key(self) -> str:
        """Identifies what a saved state fits: state schema, files of the graphs that touch it, precision."""
        used: set[str] = set()
        for graph in self.graphs.values():
            if graph.states:
                used.update(name for name in self.files if name == graph.file or name == _weights(graph.file))
        parts = {
            "states": to_json(self.states),
            "files": {name: self.files[name].sha256 for name in sorted(used)},
            "precision": self.precision,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _weights(graph_file: str) -> str:
    return str(PurePosixPath(graph_file).with_suffix(".bin"))


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files are there."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Open a bundle.

        Args:
            path: the folder.
            verify: also compare every file with its SHA-256 (about 0.3 s for 500 MB).

        Raises:
            BundleError: not a bundle, of another version, a file missing or changed, or a path that leaves the bundle.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        bundle = cls(folder, manifest)
        bundle._check(verify)
        return bundle

    def file(self, name: str) -> Path:
        return self.path / name

    def bytes_per_stream(self) -> int:
        return sum(state.bytes_per_stream() for state in self.manifest.states)

    def rewrite_manifest(self, manifest: Manifest) -> Bundle:
        """Replace the manifest in one step; a reader sees the old one or the new one."""
        _write_json(self.path / MANIFEST, manifest)
        return replace(self, manifest=manifest)

    def _check(self, verify: bool) -> None:
        manifest, where = self.manifest, self.path / MANIFEST
        for name in manifest.files:
            _check_name(name, where)
        for name in _named_files(manifest):
            _check_name(name, where)
            if name not in manifest.files:
                raise BundleError(f"{where}: '{name}' is used but not listed under files")
        for name, entry in manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise BundleError(f"{file}: missing; export the bundle again")
            if self.path.resolve() not in file.resolve().parents:
                raise BundleError(f"{file}: leaves the bundle through a link; refused")
            size = file.stat().st_size
            if size != entry.bytes:
                raise BundleError(f"{file}: expected {entry.bytes} bytes, found {size}; export the bundle again")
        for graph_name, graph in manifest.graphs.items():
            for location in external_files(self.path / graph.file):
                if location not in manifest.files:
                    raise BundleError(
                        f"{self.path / graph.file}: graph '{graph_name}' reads external data '{location}',"
                        " which the manifest does not list; refused"
                    )
        if verify:
            with ThreadPoolExecutor() as pool:
                digests = pool.map(lambda name: file_entry(self.path / name).sha256, manifest.files)
                for (name, entry), digest in zip(manifest.files.items(), digests, strict=True):
                    if digest != entry.sha256:
                        raise BundleError(
                            f"{self.path / name}: its content has changed (SHA-256 {digest[:12]}…,"
                            f" expected {entry.sha256[:12]}…); export the bundle again"
                        )


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


class BundleWriter:
    """Writes a bundle into a temporary sibling and renames it into place; on any error nothing is left.

    Args:
        path: where the bundle will be.
        replace: whether an existing bundle there is replaced.
    """

    def __init__(self, path: str | os.PathLike[str], replace: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists():
            if not replace:
                raise OutputError(f"{self.path}: exists already; choose another name or give --force to replace it")
            if not (self.path / MANIFEST).is_file():
                raise OutputError(f"{self.path}: exists and is not a bundle; it is not replaced")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.partial-", dir=self.path.parent))
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> BundleWriter:
        return self

    def finish(self, manifest: Manifest) -> Manifest:
        """Add sizes and hashes of all files written, and write the manifest; the rename follows on exit."""
        names = sorted(file.name for file in self.folder.iterdir())
        manifest = replace(manifest, files={name: file_entry(self.folder / name) for name in names})
        _write_json(self.folder / MANIFEST, manifest)
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not (self.folder / MANIFEST).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            return
        self.folder.chmod(0o777 & ~_umask())
        old = self.folder.with_suffix(".old")
        if self.path.exists():
            self.path.rename(old)
        self.folder.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder}: no such bundle")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder}: not a bundle, {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path}: not a framestep manifest (format should be '{FORMAT}')")
    if values.get("version") != VERSION:
        raise BundleError(
            f"{path}: bundle version {values.get('version')}, this framestep reads version {VERSION};"
            " export the bundle again or use a matching framestep"
        )
    try:
        manifest = from_json(Manifest, values)
        _check_references(manifest)
    except SchemaError as error:
        raise BundleError(f"{path}: {error}") from None
    return manifest


def _check_references(manifest: Manifest) -> None:
    states = {state.name: state for state in manifest.states}
    outputs = {port.name for graph in manifest.graphs.values() for port in graph.outputs}
    for state in manifest.states:
        where = f"states '{state.name}'"
        if state.kind != "ring":
            raise SchemaError(f"{where}: kind '{state.kind}' is unknown; expected 'ring'")
        if state.dtype not in ("float32", "float16", "int8"):
            raise SchemaError(f"{where}: dtype '{state.dtype}' is unknown")
        sizes = state.shape[1:]
        if not state.shape or state.shape[0] != STREAMS or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise SchemaError(f"{where}: shape should be '{STREAMS}' and then positive sizes")
        if not 0 < state.axis < len(state.shape):
            raise SchemaError(f"{where}: axis {state.axis} is outside of its shape")
        if state.shape[state.axis] != state.capacity * state.rows_per_slot:
            raise SchemaError(f"{where}: capacity * rows_per_slot does not fill axis {state.axis}")
    for name, graph in manifest.graphs.items():
        for port in (*graph.inputs, *graph.outputs):
            if port.role not in ROLES:
                raise SchemaError(f"graphs.{name}: '{port.name}' has the unknown role '{port.role}'")
            if port.dtype not in DTYPES:
                raise SchemaError(f"graphs.{name}: '{port.name}' has the unknown dtype '{port.dtype}'")
        for port in graph.inputs:
            if port.role == "output" and port.name not in outputs:
                raise SchemaError(f"graphs.{name}: no graph has the output '{port.name}' that it takes")
        for use in graph.states:
            if use.state not in states:
                raise SchemaError(f"graphs.{name}: state '{use.state}' is not declared")
    if manifest.frame.resize not in ("crop", "stretch", "letterbox"):
        raise SchemaError(f"frame.resize: '{manifest.frame.resize}' is unknown")
    if manifest.frame.height < 1 or manifest.frame.width < 1:
        raise SchemaError("frame: height and width should be positive")


def _named_files(manifest: Manifest) -> Iterator[str]:
    yield from (graph.file for graph in manifest.graphs.values())
    if manifest.labels is not None:
        yield manifest.labels.file
    if manifest.text is not None:
        yield manifest.text.tokenizer


def _check_name(name: str, where: Path) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in name or name == MANIFEST:
        raise BundleError(f"{where}: the path '{name}' leaves the bundle; refused")


def _write_json(path: Path, manifest: Manifest) -> None:
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def graphs_for(manifest: Manifest, outputs: Iterable[str]) -> list[str]:
    """The graphs that compute these outputs, in an order in which each runs after those that feed it.

    Raises:
        BundleError: an output that no graph of the bundle has.
    """
    makers = {port.name: name for name, graph in manifest.graphs.items() for port in graph.outputs}
    order: list[str] = []

    def visit(output: str) -> None:
        graph = makers[output]
        if graph in order:
            return
        for port in manifest.graphs[graph].inputs:
            if port.role == "output":
                visit(port.name)
        order.append(graph)

    for output in outputs:
        if output not in makers:
            raise BundleError(f"no output '{output}' in this bundle; it has {', '.join(makers)}")
        visit(output)
    return order
