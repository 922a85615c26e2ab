"""Both readers of manifests on what a language and cross-attention to frames add."""

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
    "unknown decoder": (lambda m: m["language"].update(decoder="brain"), "language.decoder: there is no graph 'brain'"),
    "unknown output": (
        lambda m: m["language"].update(visual="eyes"),
        "language.visual: no graph has the output 'eyes'",
    ),
    "no positions": (lambda m: m["language"].update(positions=0), "language.positions: expected at least 1, found 0"),
    "no chunk": (lambda m: m["language"].update(chunk=0), "language.chunk: expected at least 1, found 0"),
    "missing output": (lambda m: m["language"].pop("visual"), "language.visual: missing"),
    "missing tokenizer": (lambda m: m["language"].pop("tokenizer"), "language.tokenizer: missing"),
    "missing tokens": (lambda m: m["language"].pop("tokens"), "language.tokens: missing"),
    "a token in words": (
        lambda m: m["language"].update(tokens={"image": "<image>"}),
        "language.tokens.image: expected",
    ),
    "no list to stop at": (lambda m: m["language"].update(stop=7), "language.stop: expected a list"),
    "no way to write": (lambda m: m["language"].update(chat=None), "language.chat: expected"),
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


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
def test_what_was_exported_opens(bundle, read):
    read(bundle)


def test_keys_that_other_bundles_do_not_need_are_left_out_of_them(bundle, golden_bundle):
    assert '"states": "visual"' in (bundle / "manifest.json").read_text("utf-8")
    manifest = json.loads((golden_bundle / "manifest.json").read_text("utf-8"))
    assert all("states" not in port for graph in manifest["graphs"].values() for port in graph["inputs"])
