"""Both readers of manifests on what cross-attention to frames adds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import streamchat_models

from framestep.export.streamchat_checkpoint import read_streamchat_checkpoint
from framestep.export.streamchat_export import StreamChatOptions, write_bundle
from framestep.runtime.bundle import Bundle, BundleWriter
from framestep.runtime.engines.onnxruntime import shared_library
from framestep.runtime.errors import BundleError
from framestep.runtime.library import library

CHANGES = {
    "unknown graph": (lambda m: m["language"]["cross"].update(graph="eyes"), "there is no graph 'eyes'"),
    "unknown re-basing": (lambda m: m["language"]["cross"].update(rebase="turn"), "there is no graph 'turn'"),
    "unknown positions": (
        lambda m: m["language"]["cross"].update(positions="flat"),
        "language.cross.positions: 'flat' is unknown; expected parallel or literal",
    ),
    "unknown key": (lambda m: m["language"]["cross"].update(frames=3), "language.cross.frames: unknown key"),
    "missing key": (lambda m: m["language"]["cross"].pop("rebase"), "language.cross.rebase: missing"),
    "unknown decoder": (lambda m: m["language"].update(decoder="brain"), "there is no graph 'brain'"),
    "unknown states": (
        lambda m: m["graphs"]["frame"]["inputs"][1].update(states="audio"),
        "'write_index' speaks of the states 'audio', and there are none",
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cross")
    checkpoint = read_streamchat_checkpoint(str(streamchat_models.save(folder)))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, StreamChatOptions(window=3, rate=2.0, capacity=64))
    return folder / "out.bundle"


def open_natively(folder: Path) -> None:
    native = library()
    options = native.new("fs_session_options")
    names = [native.ffi.new("char[]", name.encode()) for name in ("decoder", "frame")]
    graphs = native.ffi.new("char *[]", names)
    options.graphs, options.graph_count = graphs, len(names)
    shared = native.ffi.new("char[]", shared_library().encode())
    options.library = shared
    handle = native.ffi.new("fs_session *")
    native.check(native.functions.fs_session_open(os.fsencode(folder), options, handle))
    native.functions.fs_session_close(handle[0])


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_named(bundle, tmp_path, read, name):
    change, message = CHANGES[name]
    folder = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError) as raised:
        read(folder)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual", "eyes", "language.visual: no graph has the output 'eyes'"),
        ("positions", 0, "language.positions: expected at least 1, found 0"),
        ("chunk", 0, "language.chunk: expected at least 1, found 0"),
    ],
)
def test_what_only_a_dialogue_reads_is_named(bundle, tmp_path, key, value, message):
    folder = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["language"][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
def test_what_was_exported_opens(bundle, read):
    read(bundle)


def test_keys_that_other_bundles_do_not_need_are_left_out_of_them(bundle, golden_bundle):
    assert '"states": "visual"' in (bundle / "manifest.json").read_text("utf-8")
    manifest = json.loads((golden_bundle / "manifest.json").read_text("utf-8"))
    assert all("states" not in port for graph in manifest["graphs"].values() for port in graph["inputs"])
