"""Which compiled engine the native library takes, against the Python runtime's choice. Needs no TensorRT."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from native_parts import Parts, Refused

from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.engines.engine_files import Target, find_engine, named, read_engine, source_key
from framestep.runtime.errors import EngineError
from framestep.runtime.manifest import EngineFile

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"
HERE = Target("tensorrt", "10.16.2.10", "8.7")
ENGINE = 5  # fs_status


@pytest.fixture
def bundle(tmp_path) -> Path:
    path = tmp_path / "steps.bundle"
    shutil.copytree(STEPS, path)
    return path


def add_engine(path: Path, **changes: Any) -> str:
    """An engine of the backbone in float32 for this machine, or what differs; its file."""
    bundle = Bundle.open(path, verify=False)
    source = source_key(bundle, bundle.manifest.at("fp32").graphs["backbone"])
    entry = EngineFile("backbone", "fp32", "tensorrt", HERE.version, ("8.7",), 2, source, 0, "")
    entry = replace(entry, **changes)
    name = named(entry)
    (path / "engines").mkdir(exist_ok=True)
    (path / name).write_bytes(f"an engine: {entry}".encode())
    written = file_entry(path / name)
    entry = replace(entry, bytes=written.bytes, sha256=written.sha256)
    engines = {**bundle.manifest.engines, name: entry}
    bundle.rewrite_manifest(replace(bundle.manifest, engines=engines))
    return name


def of_python(path: Path, streams: int, graph: str = "backbone", precision: str = "fp32") -> str:
    bundle = Bundle.open(path, verify=False)
    flat = replace(bundle, manifest=bundle.manifest.at(precision))
    name, entry = find_engine(flat, graph, HERE, streams)
    read_engine(flat, name, entry)
    return name


def of_the_library(parts: Parts, path: Path, streams: int, graph: str = "backbone", precision: str = "fp32") -> str:
    texts = [text.encode() for text in (precision, graph, HERE.version, HERE.compute_capability)]
    return parts("find_engine", os.fsencode(path), *texts, ctypes.c_int(streams)).decode()


def assert_refused_alike(
    parts: Parts, path: Path, streams: int = 1, graph: str = "backbone", precision: str = "fp32"
) -> str:
    with pytest.raises(EngineError) as python:
        of_python(path, streams, graph, precision)
    with pytest.raises(Refused) as native:
        of_the_library(parts, path, streams, graph, precision)
    assert native.value.status == ENGINE
    assert native.value.message == str(python.value)
    return native.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute_capabilities": ("8.0+",)},
        {"compute_capabilities": ("5.0", "8.7", "9.0+")},
        {"version_compatible": True, "version": "10.15.1.29"},
        {"labels": 16, "attention": "decomposed"},
    ],
)
def test_an_engine_that_fits_is_taken(parts, bundle, changes):
    name = add_engine(bundle, **changes)
    assert of_the_library(parts, bundle, 2) == of_python(bundle, 2) == name


@pytest.mark.parametrize(
    "changes",
    [
        {"flavour": "tensorrt_rtx", "version": "1.7.0"},
        {"version": "10.16.1.11"},
        {"version": "10.17.0.1", "version_compatible": True},
        {"version": "9.16.2.10", "version_compatible": True},
        {"version": "banana", "version_compatible": True},
        {"compute_capabilities": ("8.6",)},
        {"compute_capabilities": ("8.9", "9.0+")},
        {"compute_capabilities": ("8.10+",)},
        {"compute_capabilities": ()},
        {"streams": 0},
        {"precision": "fp16"},
        {"source": "0" * 64},
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason_and_the_command(parts, bundle, changes):
    add_engine(bundle, **changes)
    assert "framestep build" in assert_refused_alike(parts, bundle)


def test_of_several_the_one_for_the_fewest_streams_that_suffice_is_taken(parts, bundle):
    names = {streams: add_engine(bundle, streams=streams) for streams in (8, 2, 4)}
    add_engine(bundle, streams=1, compute_capabilities=("7.5",))
    for streams, taken in ((1, 2), (2, 2), (3, 4), (8, 8)):
        assert of_the_library(parts, bundle, streams) == of_python(bundle, streams) == names[taken]
    assert_refused_alike(parts, bundle, streams=9)


def test_an_engine_of_one_stream_is_refused_for_two(parts, bundle):
    add_engine(bundle, streams=1)
    assert "takes at most 1 stream, and 2 are asked for" in assert_refused_alike(parts, bundle, streams=2)


def test_a_version_without_its_last_number_fits(parts, bundle):
    name = add_engine(bundle, version="10.16.2")  # as some packages of TensorRT name themselves
    assert of_the_library(parts, bundle, 1) == name


def test_a_graph_without_an_engine_says_how_to_build_one(parts, bundle):
    add_engine(bundle)
    assert "has no TensorRT engine of the graph 'label'" in assert_refused_alike(parts, bundle, graph="label")


def test_a_precision_that_tensorrt_does_not_run_is_no_matter_of_building(parts, bundle):
    opened = Bundle.open(bundle, verify=False)
    opened.rewrite_manifest(replace(opened.manifest, precision="int8"))
    message = assert_refused_alike(parts, bundle, precision="int8")
    assert "TensorRT runs fp16, fp16+int8, fp16+w4, fp32, not int8; use one" in message


def damage_size(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_content(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_a_link(file: Path) -> None:
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to("../../elsewhere")


DAMAGES = [damage_size, damage_content, empty, Path.unlink, replace_by_a_folder, replace_by_a_link]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_refused(parts, bundle, damage):
    name = add_engine(bundle)
    damage(bundle / name)
    message = assert_refused_alike(parts, bundle)
    assert message.count(name) == 1 and "\n" not in message


@pytest.mark.parametrize(
    "name", ["../x.engine", "engines/../../x.engine", "engines/.engine", "engines/x", "/engines/a.engine"]
)
def test_an_engine_outside_of_its_folder_is_refused(parts, bundle, name):
    add_engine(bundle)
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["engines"] = {name: next(iter(manifest["engines"].values()))}
    file.write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="should be engines/FINGERPRINT.engine"):
        of_the_library(parts, bundle, 1)
