"""The bundle: a folder with `manifest.json`, step graphs as ONNX, and their weights; read, checked and written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from .durable import exchange, sync, sync_names, write_file
from .errors import BundleError, OutputError
from .manifest import FORMAT, VERSION, FileEntry, Graph, Manifest, named_files
from .manifest_checks import check_manifest
from .onnx_files import external_files
from .partial_folder import hold, partial_path, remove_abandoned
from .schema import SchemaError, from_json, parse_json, to_json

MANIFEST = "manifest.json"
MOST_OF_A_MANIFEST = 1 << 20  # bytes looked at to tell whose it is
ENGINES = "engines"  # folder of what was compiled from the graphs


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
        bundle = cls(folder, _read_manifest(folder))
        while True:
            try:
                bundle._check(verify)
                return bundle
            except BundleError:
                again = cls(folder, _read_manifest(folder))
                if again == bundle:
                    raise
                bundle = again  # labelled anew meanwhile, which takes files away

    def file(self, name: str) -> Path:
        return self.path / name

    def graph_files(self, graph: Graph) -> set[str]:
        """The files that a graph reads: itself and its external data."""
        return {graph.file, *external_files(self.path / graph.file)}

    def bytes_per_stream(self) -> int:
        return sum(state.bytes_per_stream() for state in self.manifest.states)

    def state_key(self) -> str:
        """Identifies what a saved state fits: state schema, every file that a graph with states reads, precision.

        "" where the manifest does not list such a file, as before a bundle is finished. Otherwise the SHA-256 of a JSON
        object with sorted keys and no spaces; `docs/design.md` spells it out.
        """
        manifest = self.manifest
        used: set[str] = set()
        for graph in manifest.graphs.values():
            if graph.states:
                used |= self.graph_files(graph)
        if not used <= manifest.files.keys():
            return ""
        parts = {
            "states": to_json(manifest.states),
            "files": {name: manifest.files[name].sha256 for name in used},
            "precision": manifest.precision,
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def rewrite_manifest(self, manifest: Manifest) -> Bundle:
        """Replace the manifest in one step; a reader sees the old one or the new one. New files are there already."""
        for name in manifest.files.keys() - self.manifest.files.keys():
            file = self.path / name
            try:
                sync(file)
            except OSError as error:
                raise OutputError(f"{file}: cannot be written: {error.strerror}") from None
        _write_json(self.path / MANIFEST, manifest)
        return replace(self, manifest=manifest)

    def _check(self, verify: bool) -> None:
        manifest, where = self.manifest, self.path / MANIFEST
        for name in manifest.files:
            _check_name(name, where)
        for name in manifest.engines:
            if re.fullmatch(rf"{ENGINES}/[0-9a-f]+\.engine", name) is None:
                raise BundleError(f"{where}: the engine '{name}' should be {ENGINES}/FINGERPRINT.engine; refused")
        for name in named_files(manifest):
            _check_name(name, where)
            if name not in manifest.files:
                raise BundleError(f"{where}: '{name}' is used but not listed under files")
        graphs = [pair for precision in manifest.precisions for pair in manifest.at(precision).graphs.items()]
        for graph_name, graph in graphs:
            if "/" in graph.file:  # external data is looked for beside the graph, and listed as beside the manifest
                raise BundleError(f"{where}: graphs.{graph_name}.file: '{graph.file}' should lie beside the manifest")
        for name, entry in manifest.files.items():
            file = self.path / name
            try:
                size = _size(f"{self.path}/{name}")
            except OSError as error:
                raise BundleError(f"{file}: cannot be read: {error.strerror}") from None
            if size is None:
                raise BundleError(f"{file}: missing; export the bundle again")
            if self.path.resolve() not in file.resolve().parents:
                raise BundleError(f"{file}: leaves the bundle through a link; refused")
            if size != entry.bytes:
                raise BundleError(f"{file}: expected {entry.bytes} bytes, found {size}; export the bundle again")
        for graph_name, graph in graphs:
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


def _size(file: str) -> int | None:
    """Bytes of a file; None where there is none of that name, as it is written."""
    try:
        found = os.stat(file)  # noqa: PTH116, a Path would lose the slash that makes a name a folder's
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path.stat().st_size, digest)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None


def check_replaceable(path: Path, replace: bool) -> None:
    """Whether a bundle may be written at `path`.

    Raises:
        OutputError: something is there, and not to be replaced or no bundle, or the place lies in another bundle.
    """
    if (around := bundle_around(path.resolve().parent)) is not None:
        raise OutputError(f"{path}: lies in the bundle {around}; name another place")
    if not path.exists():
        return
    if not replace:
        raise OutputError(f"{path}: exists already; choose another name or give --force to replace it")
    if not is_bundle(path):
        raise OutputError(f"{path}: exists and is not a bundle; it is not replaced")


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, be it a damaged one; other programs' folders have a `manifest.json` too."""
    try:
        if not (path / MANIFEST).is_file():
            return False
        with (path / MANIFEST).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(MOST_OF_A_MANIFEST)
    except OSError:
        return False


def bundle_around(path: Path) -> Path | None:
    """The bundle that `path` is or lies in, if any."""
    place = path.resolve()
    return next((folder for folder in (place, *place.parents) if is_bundle(folder)), None)


class BundleWriter:
    """Writes a bundle into a temporary sibling and renames it into place; on any error nothing is left.

    Args:
        path: where the bundle will be.
        replace: whether an existing bundle there is replaced.
        progress: takes a line about each sibling that a killed process had left and that was removed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        replace: bool = False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = Path(path)
        if self.path.is_symlink():  # replace what it points to, not the link
            self.path = self.path.resolve()
        self._replace = replace
        check_replaceable(self.path, replace)
        for abandoned in remove_abandoned(self.path):
            progress(f"removed {abandoned}, which a process that is gone had not finished")
        self.folder = self._make_folder()

    def __enter__(self) -> BundleWriter:
        return self

    def finish(self, manifest: Manifest) -> Manifest:
        """Add sizes and hashes of all files written, and write the manifest; the rename follows on exit.

        Engines are built into a finished bundle: a new one has none.
        """
        names = sorted(file.name for file in self.folder.iterdir())
        files = {name: file_entry(self.folder / name) for name in names}
        manifest = replace(manifest, files=files, engines={})
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
        try:
            self._put_in_place()
        except BaseException as failure:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(failure, OSError):
                raise OutputError(f"{self.path}: cannot be written: {failure.strerror or failure}") from None
            raise

    def _make_folder(self) -> Path:
        while True:
            folder = partial_path(self.path)
            # first the promise to remove it, also at the interpreter's exit, then the folder
            weakref.finalize(self, shutil.rmtree, folder, True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
            lock = hold(folder)
            if lock is not None:
                weakref.finalize(self, os.close, lock)
            if folder.is_dir():  # else another writer took it for abandoned before it was held
                return folder

    def _put_in_place(self) -> None:
        for file in self.folder.iterdir():
            sync(file)
        sync_names(self.folder)
        check_replaceable(self.path, self._replace)  # another may have been written there meanwhile
        self._rename()
        sync_names(self.path.parent)

    def _rename(self) -> None:
        if not self.path.exists():
            self.folder.rename(self.path)
            return
        if exchange(self.folder, self.path):
            shutil.rmtree(self.folder, ignore_errors=True)  # the old one now
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.old-", dir=self.path.parent))
        try:
            self.path.rename(aside / "bundle")
            try:
                self.folder.rename(self.path)
            except BaseException:
                (aside / "bundle").rename(self.path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if not folder.exists():
            raise BundleError(f"{folder}: no such bundle")
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BundleError(f"{path}: is no file")
        values = parse_json(path.read_text("utf-8"))
    except NotADirectoryError:
        raise BundleError(f"{folder}: is a file; give the bundle's folder") from None
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: not a bundle, {MANIFEST} is missing ('framestep export' makes a bundle of a checkpoint)"
        ) from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
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
        check_manifest(manifest)
    except SchemaError as error:
        raise BundleError(f"{path}: {error}") from None
    return manifest


def _check_name(name: str, where: Path) -> None:
    pure = PurePosixPath(name)
    odd = "\\" in name or "\0" in name or name == MANIFEST
    if odd or pure.is_absolute() or not pure.parts or ".." in pure.parts:
        raise BundleError(f"{where}: the path '{name}' leaves the bundle; refused")


def _write_json(path: Path, manifest: Manifest) -> None:
    values = to_json(manifest)
    for key in ("engines", "language"):
        if not values[key]:
            del values[key]  # readers from before there were such bundles refuse the key
    if values.get("language", {}).get("cross", True) is None:
        del values["language"]["cross"]
    for part in (values, *values["variants"].values()):
        for graph in part["graphs"].values():
            for port in (*graph["inputs"], *graph["outputs"]):
                if port["states"] is None:
                    del port["states"]
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_file(path, [text.encode()])
