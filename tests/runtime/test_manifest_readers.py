"""Both readers of manifests, Python's and the native library's, accept and refuse the same; see test_bundle_cross.py for
what a language has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import BundleError
from framestep.runtime.library import library

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"
ENGINE = {
    "graph": "backbone", "precision": "fp32", "flavour": "tensorrt", "version": "10.16", "streams": 1, "bytes": 1,
    "compute_capabilities": ["8.7"], "source": "", "sha256": "",
}  # fmt: skip

EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    # null is no default of these
    (lambda m: m["frame"].update(resize=None), "frame.resize: expected"),
    (lambda m: m["graphs"]["backbone"].update(states=None), "graphs.backbone.states: expected a list"),
    (lambda m: m.update(files=None), "files: expected an object"),
    (lambda m: m.update(variants=None), "variants: expected an object"),
    (lambda m: m.update(engines=None), "engines: expected an object"),
    (lambda m: m.update(engines={"engines/0f.engine": {**ENGINE, "attention": None}}), "0f.engine.attention: expected"),
    (
        lambda m: m.update(engines={"engines/0f.engine": {**ENGINE, "version_compatible": None}}),
        "0f.engine.version_compatible: expected",
    ),
    (lambda m: m.update(engines={"engines/0f.engine": {**ENGINE, "bytes": -1}}), "0f.engine.bytes: expected at least 0"),
    (lambda m: m["scoring"].update(head=1), "scoring.head: expected"),
    (lambda m: m["scoring"].pop("head"), "scoring.head: missing"),
    (lambda m: m["labels"].update(background=1), "labels.background: expected"),
    (lambda m: m["graphs"]["backbone"]["states"][0].update(input=None), r"backbone.states\[0\].input: expected"),
    (lambda m: m["graphs"]["backbone"]["states"][0].update(input=""), "has an input or output without a name"),
    (lambda m: m["graphs"]["backbone"]["states"][0].update(output=""), "has an input or output without a name"),
    (lambda m: m["graphs"]["backbone"]["inputs"][0].update(states=""), "'frame' speaks of the states '', and there are"),
    (lambda m: m["graphs"]["backbone"]["outputs"][0].update(states="ear"), "'features' speaks of the states 'ear', and"),
    (lambda m: m["graphs"]["backbone"]["inputs"][1].update(name="frame"), "the input 'frame' stands twice"),
    (lambda m: m["graphs"]["backbone"]["inputs"][0].update(shape=["S"] + [1] * 8), "'frame' has more than 8 axes"),
    (lambda m: m["states"][0].update(shape=["S"] + [1] * 8, axis=1, capacity=1), "at most (8 axes|7 positive sizes)"),
    (
        lambda m: m["states"][0].update(shape=["S", 2**31 + 1, 1], axis=2, capacity=1, dtype="int8"),
        "(none longer than 2147483648|size 2147483649 is not possible)",
    ),
    (lambda m: m["graphs"].update({f"g{i}": {"file": "label.onnx", "inputs": [], "outputs": []}
                                   for i in range(254)}), "graphs: 257 are more than 256"),
    (lambda m: m["variants"].update(int8=m["variants"]["fp32"]), "variants.int8: is the precision of the bundle's own"),
    (lambda m: m["graphs"]["label"].update(file="./label.onnx"), "'./label.onnx' (is used but not listed|should lie)"),
    (lambda m: m["files"].update({"label.onnx/": m["files"]["label.onnx"]}), "label.onnx/?: missing"),
    (lambda m: m["files"].update({"label.onnx\0": m["files"]["label.onnx"]}), "the path 'label.onnx"),
]  # fmt: skip
TEXTS = {
    "not a number": ('"logit_bias": -0.5', '"logit_bias": NaN'),
    "infinity": ('"logit_bias": -0.5', '"logit_bias": -Infinity'),
    "a number beyond a double": ('"logit_bias": -0.5', '"logit_bias": 1e400'),
    "a number beyond 64 bits": ('"trained_frames": 16', f'"trained_frames": {2**63}'),
    "a name twice": ('"trained_frames": 16', '"trained_frames": 16, "trained_frames": 16'),
    "half of a surrogate pair": ('"names": ["a"', r'"names": ["\ud83d"'),
}


def open_natively(folder: Path) -> None:
    native = library()
    options = native.new("fs_session_options")
    missing = native.ffi.new("char[]", b"/absent/libonnxruntime.so")  # the manifest is read before it is looked for
    options.library = missing
    native.check(native.functions.fs_session_open(os.fsencode(folder), options, native.ffi.new("fs_session *")))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(STEPS, tmp_path_factory.mktemp("readers") / "steps.bundle"))


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_what_one_refuses_so_does_the_other(bundle, read, edit, message):
    manifest = json.loads((STEPS / "manifest.json").read_text("utf-8"))
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=message):
        read(bundle)


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_json_is_refused(bundle, read, name):
    text = json.dumps(json.loads((STEPS / "manifest.json").read_text("utf-8")))
    old, new = TEXTS[name]
    assert text.count(old) == 1
    (bundle / "manifest.json").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(BundleError, match=r"manifest.json: "):
        read(bundle)


@pytest.mark.parametrize("read", [Bundle.open, open_natively])
def test_a_graph_lies_beside_the_weights_that_the_manifest_lists(bundle, read):
    manifest = json.loads((STEPS / "manifest.json").read_text("utf-8"))
    (bundle / "deep").mkdir(exist_ok=True)
    shutil.copy(bundle / "label.onnx", bundle / "deep")
    manifest["graphs"]["label"]["file"] = "deep/label.onnx"
    manifest["files"]["deep/label.onnx"] = manifest["files"]["label.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=r"label.file: 'deep/label.onnx' should lie beside the manifest"):
        read(bundle)
