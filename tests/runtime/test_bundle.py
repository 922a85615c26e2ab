"""What a damaged or dangerous bundle is told.

`Bundle.open` is asked: `framestep.load` goes on to the native library, whose own checks (test_native.py) would hide that
one is missing here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import framestep
from framestep.runtime import bundle as bundle_module
from framestep.runtime.bundle import Bundle, BundleWriter
from framestep.runtime.durable import exchange
from framestep.runtime.errors import BundleError, OutputError
from framestep.runtime.manifest import Manifest, graphs_for
from framestep.runtime.onnx_files import external_files
from framestep.runtime.schema import from_json, to_json
from framestep.runtime.session import Session

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"


@pytest.fixture
def bundle(golden_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_bundle, tmp_path / "copy.bundle"))


def change(bundle: Path, edit) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def relist(bundle: Path, name: str) -> None:
    """Make the manifest agree with a changed file."""
    content = (bundle / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(bundle, lambda manifest: manifest["files"].update({name: entry}))


def test_a_manifest_survives_a_round_trip(golden_bundle):
    manifest = Bundle.open(golden_bundle).manifest
    assert from_json(Manifest, json.loads(json.dumps(to_json(manifest)))) == manifest


def label_anew(bundle: Path, mark: str) -> None:
    """What `framestep label` leaves: a new file of embeddings, named by the manifest, and the old one gone."""
    old = json.loads((bundle / "manifest.json").read_text())["labels"]["file"]
    new = f"labels-{mark}.safetensors"
    shutil.copy(bundle / old, bundle / new)

    def rename(manifest: dict) -> None:
        manifest["labels"]["file"] = new
        manifest["files"][new] = manifest["files"].pop(old)

    change(bundle, rename)
    (bundle / old).unlink()


def test_a_bundle_that_is_labelled_while_it_is_opened_is_read_again(tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(STEPS, tmp_path / "steps.bundle"))
    marks = iter(["one", "two"])
    read = bundle_module._read_manifest

    def read_and_label(folder: Path) -> Manifest:
        manifest = read(folder)
        for mark in marks:
            label_anew(bundle, mark)
            break
        return manifest

    monkeypatch.setattr(bundle_module, "_read_manifest", read_and_label)
    assert Bundle.open(bundle).manifest.labels.file == "labels-two.safetensors"
    (bundle / "labels-two.safetensors").unlink()
    with pytest.raises(BundleError, match=r"labels-two.safetensors: missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_bundle_that_is_labelled_while_it_is_loaded_is_not_called_damaged(tmp_path, engine):
    bundle = Path(shutil.copytree(STEPS, tmp_path / "steps.bundle"))
    opened = Bundle.open(bundle)
    label_anew(bundle, "new")
    with pytest.raises(BundleError, match=r"safetensors: missing; if the bundle was labelled anew meanwhile, open it"):
        Session(opened, engine=engine)


@pytest.mark.parametrize("name", ["backbone.bin", "backbone.onnx", "label.onnx"])
def test_a_changed_byte_is_found(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle)


def test_a_truncated_file_is_found(bundle):
    content = (bundle / "backbone.bin").read_bytes()
    (bundle / "backbone.bin").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"backbone.bin: expected {len(content)} bytes, found {len(content) - 1}"):
        Bundle.open(bundle)


def test_a_missing_file_is_found(bundle):
    (bundle / "backbone.bin").unlink()
    with pytest.raises(BundleError, match="backbone.bin: missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../backbone.onnx", "/etc/passwd", "a/../../x", "..\\x"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle, name):
    def edit(manifest):
        manifest["files"][name] = manifest["files"]["backbone.onnx"]
        manifest["graphs"]["backbone"]["file"] = name

    change(bundle, edit)
    with pytest.raises(BundleError, match="leaves the bundle; refused"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../00ff.engine", "engines/../00ff.engine", "engines/00FF.engine", "00ff.engine"])
def test_an_engine_that_is_not_in_its_folder_is_refused(bundle, name):
    entry = {
        "graph": "backbone", "precision": "fp32", "flavour": "tensorrt", "version": "10.16", "streams": 1, "bytes": 1,
        "compute_capabilities": ["8.7"], "source": "", "sha256": "",
    }  # fmt: skip
    change(bundle, lambda manifest: manifest.update(engines={"engines/00ff.engine": entry}))
    Bundle.open(bundle)
    change(bundle, lambda manifest: manifest.update(engines={name: entry}))
    with pytest.raises(BundleError, match=f"the engine '{name}' should be engines/FINGERPRINT.engine; refused"):
        Bundle.open(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.bin"
    (bundle / "backbone.bin").rename(outside)
    (bundle / "backbone.bin").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle through a link"):
        Bundle.open(bundle)


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "other.bin"])
def test_external_data_outside_of_the_manifest_is_refused(bundle, location):
    import onnx

    path = bundle / "backbone.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    relist(bundle, "backbone.onnx")
    with pytest.raises(BundleError, match=f"external data '{location}'"):
        Bundle.open(bundle)


def test_external_files_are_those_that_onnx_knows(golden_bundle):
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    path = golden_bundle / "patch_label.onnx"
    model = onnx.load(path, load_external_data=False)
    expected = {ExternalDataInfo(t).location for t in model.graph.initializer if t.external_data}
    assert external_files(path) == expected == {"backbone.bin"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format="other"), "not a framestep manifest"),
        (lambda m: m.update(version=99), "bundle version 99, this framestep reads version 1"),
        (lambda m: m.update(frame=[64, 64]), r"frame: expected an object, found \[64, 64\]"),
        (lambda m: m.update(graphs=[]), r"graphs: expected an object, found \[\]"),
        (lambda m: m.update(states={}), r"states: expected a list, found \{\}"),
        (lambda m: m.update(grid=[4, "4"]), r"grid\[1\]: expected int, found '4'"),
        (lambda m: m["frame"].update(height=True), "frame.height: expected int, found True"),
        (lambda m: m["frame"].update(height=None), "frame.height: expected int, found None"),
        (lambda m: m["frame"].update(width=64.0), "frame.width: expected int, found 64.0"),
        (lambda m: m["states"][0].update(shape=["S", 64.0, 16, 24]), r"states\[0\].shape\[1\]: expected .*, found 64.0"),
        (lambda m: m.update(rate="fast"), "rate: expected float, found 'fast'"),
        (lambda m: m.update(colour=1), "colour: unknown key"),
        (lambda m: m.pop("states"), "states: missing"),
        (lambda m: m["states"][0].update(capacity=15), r"states 'layer0.key': capacity \* rows_per_slot"),
        (lambda m: m["states"][0].update(kind="heap"), "states 'layer0.key': kind 'heap' is unknown"),
        (lambda m: m["states"][1].update(name="layer0.key"), "states: a name stands twice"),
        (lambda m: m["states"][0].update(dtype="int32"), "states 'layer0.key': dtype 'int32' is unknown"),
        (lambda m: m["states"][0].update(shape=[1, 64, 16, 24]), "'layer0.key': shape should be 'S' and then positive"),
        (lambda m: m["states"][0].update(shape=["S", 0, 16, 24]), "'layer0.key': shape should be 'S' and then positive"),
        (lambda m: m["states"][0].update(axis=0), "'layer0.key': axis 0 is outside of its shape"),
        (lambda m: m["states"][0].update(axis=4), "'layer0.key': axis 4 is outside of its shape"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(role="noise"), "'frame' has the unknown role"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(dtype="float64"), "'frame' has the unknown dtype 'float64'"),
        (lambda m: m["graphs"]["label"]["outputs"][0].update(shape=["S", "K"]), "'scores' has the shape .* not possible"),
        (lambda m: m["graphs"]["label"]["outputs"][0].update(shape=["S", 0]), "'scores' has the shape .* not possible"),
        (lambda m: m["graphs"]["label"]["inputs"][0].update(name="sum"), "graphs.label: no graph has the output 'sum'"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(dtype=3), r"backbone.inputs\[0\].dtype: expected str"),
        (lambda m: m["graphs"]["backbone"]["states"][0].update(state="x"), "state 'x' is not declared"),
        (lambda m: m["files"].pop("backbone.onnx"), "'backbone.onnx' is used but not listed"),
        (lambda m: m["frame"].update(resize="magic"), "frame.resize: 'magic' is unknown"),
        (lambda m: m["frame"].update(height=10**9), "frame: height and width should be from 1 to"),
        (lambda m: m["frame"].update(width=0), "frame: height and width should be from 1 to"),
        (lambda m: m.update(rate=-3.0), "rate: expected a number above 0"),
        (lambda m: m.update(rate=0), "rate: expected a number above 0"),
        (lambda m: m.update(rate=float("inf")), "cannot be read as JSON: Infinity is no number"),
        (lambda m: m["states"][0].update(capacity=-16, rows_per_slot=-1), r"capacity \* rows_per_slot"),
        (lambda m: m["states"][0].update(shape=["S", 10**15, 16, 24]), "bytes a stream, more than"),
        (lambda m: m["graphs"]["backbone"]["outputs"][0].update(shape=[1, 16, 96]), "should have 'S' as its first axis"),
        (lambda m: m["graphs"]["backbone"]["inputs"][1].update(shape=[]), "'position' should have 'S' as its first axis"),
        (lambda m: m["graphs"]["label"]["outputs"][0].update(name="pooled"), "two outputs have the same name"),
        (lambda m: m.update(text={"graph": "nope", "tokenizer": "label.onnx", "length": 64, "templates": [],
                                  "patch_templates": []}), "text.graph: there is no graph 'nope'"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_names_the_key(bundle, edit, message):
    change(bundle, edit)
    with pytest.raises(BundleError, match=message) as error:
        Bundle.open(bundle)
    assert "\n" not in str(error.value)


def test_graphs_that_feed_each_other_are_refused(bundle):
    def edit(manifest):
        label, patch = manifest["graphs"]["label"], manifest["graphs"]["patch_label"]
        label["inputs"].append(
            {"name": "patch_scores", "role": "output", "dtype": "float32", "shape": ["S", "C", 4, 4]}
        )
        patch["inputs"].append({"name": "scores", "role": "output", "dtype": "float32", "shape": ["S", "C"]})

    change(bundle, edit)
    with pytest.raises(BundleError, match="feed each other in a circle"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m["graphs"]["backbone"]["outputs"][1].update(shape=["S", 5]),
            r"output 'pooled' is float32 \[S, 96\]",
        ),
        (
            lambda m: m["graphs"]["backbone"]["inputs"][0].update(shape=["S", 32, 64, 3]),
            "input 'frame' is not one that frames",
        ),
        (lambda m: m["graphs"]["backbone"]["states"].pop(), "'layer2.value.past' is .* and absent in the manifest"),
        (lambda m: m["states"][1].update(dtype="float16"), "'layer0.value.past' is float32"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle, edit, message):
    change(bundle, edit)
    with pytest.raises(BundleError, match=message):
        framestep.load(bundle, outputs=["features"])


def test_a_state_key_follows_every_file_that_the_graph_reads(bundle):
    before = Bundle.open(bundle).state_key()
    content = bytearray((bundle / "backbone.bin").read_bytes())
    content[-1] ^= 1
    (bundle / "backbone.bin").write_bytes(content)
    relist(bundle, "backbone.bin")
    assert Bundle.open(bundle).state_key() != before


def test_a_replacement_that_fails_at_the_last_step_puts_the_old_bundle_back(bundle, monkeypatch):
    before = (bundle / "manifest.json").read_bytes()
    manifest = Bundle.open(bundle).manifest
    original = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(bundle_module, "exchange", lambda one, other: False)  # as not every file system can
    with pytest.raises(OutputError, match="Input/output error"), BundleWriter(bundle, replace=True) as writer:
        writer.finish(manifest)
        monkeypatch.setattr(Path, "rename", rename)
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.bundle"]


def test_a_link_to_a_bundle_is_followed_when_it_is_replaced(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/absent")  # often another disk, to which nothing can be renamed
    link = tmp_path / "link.bundle"
    link.symlink_to(bundle)
    with BundleWriter(link, replace=True) as writer:
        for file in bundle.iterdir():
            if file.name != "manifest.json":
                shutil.copyfile(file, writer.folder / file.name)
        writer.finish(Bundle.open(bundle).manifest)
    assert link.is_symlink()
    Bundle.open(link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bundle", "link.bundle"]


def test_what_is_no_bundle_is_named(tmp_path):
    with pytest.raises(BundleError, match="absent: no such bundle"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match="manifest.json is missing"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="manifest.json: is a file; give the bundle's folder"):
        Bundle.open(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.open(tmp_path)


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest.json: is no file"):
        Bundle.open(tmp_path)
    assert bundle_module.bundle_around(tmp_path / "out.jsonl") is None


def test_a_name_that_the_system_refuses_is_an_error_of_the_bundle(bundle):
    change(bundle, lambda manifest: manifest["files"].update({"n" * 300: manifest["files"]["label.onnx"]}))
    with pytest.raises(BundleError, match=r"nnn: cannot be read: File name too long"):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        Bundle.open("a" * 300)


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x.bundle") as writer:
        (writer.folder / "backbone.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_bundle(bundle):
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="No space left"), BundleWriter(bundle, replace=True):
        raise OSError(28, "No space left on device")
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.bundle"]


def test_a_bundle_that_was_written_meanwhile_is_not_replaced(bundle, tmp_path):
    target = tmp_path / "new.bundle"
    with pytest.raises(OutputError, match=r"new.bundle: exists already"), BundleWriter(target) as writer:
        writer.finish(Bundle.open(bundle).manifest)
        shutil.copytree(bundle, target)
    assert len(list(target.iterdir())) == len(list(bundle.iterdir()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bundle", "new.bundle"]


def test_a_bundle_is_there_at_every_moment_while_it_is_replaced(bundle, monkeypatch):
    manifest = replace(Bundle.open(bundle).manifest, graphs={}, variants={}, labels=None)
    if not exchange(bundle, bundle):
        pytest.skip("this file system cannot exchange two names")
    monkeypatch.setattr(Path, "rename", None)  # leaves a moment without it
    with BundleWriter(bundle, replace=True) as writer:
        writer.finish(manifest)
    assert Bundle.open(bundle).manifest.files == {}
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.bundle"]


def test_what_a_killed_writer_left_is_removed_and_told(tmp_path):
    target, told = tmp_path / "x.bundle", []
    script = f"""
import os, signal
from framestep.runtime.bundle import BundleWriter
writer = BundleWriter({str(target)!r})
(writer.folder / "backbone.bin").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / ".y.bundle.partial-00112233").mkdir()  # of another name
    alive = BundleWriter(target, progress=told.append)
    assert told == [f"removed {left}, which a process that is gone had not finished"]
    other = BundleWriter(target, progress=told.append)
    assert len(told) == 1 and alive.folder.is_dir() and other.folder.is_dir()
    names = {alive.folder.name, other.folder.name, ".y.bundle.partial-00112233"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_existing_bundle_is_not_replaced_unless_asked(bundle, tmp_path):
    with pytest.raises(OutputError, match="exists already; choose another name or give --force"):
        BundleWriter(bundle)
    with pytest.raises(OutputError, match="exists and is not a bundle"):
        BundleWriter(tmp_path, replace=True)
    with pytest.raises(OutputError, match="inner: lies in the bundle .*; name another place"):
        BundleWriter(bundle / "x" / "inner", replace=True)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(OutputError, match="is not a bundle; it is not replaced"):
        BundleWriter(tmp_path, replace=True)


def test_graphs_run_after_those_that_feed_them(golden_bundle):
    manifest = Bundle.open(golden_bundle).manifest
    assert graphs_for(manifest, ["patch_scores", "scores"]) == ["backbone", "patch_label", "label"]
    assert graphs_for(manifest, ["pooled"]) == ["backbone"]
