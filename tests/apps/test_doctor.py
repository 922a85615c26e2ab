"""What `framestep doctor` finds on machines of all kinds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import main, printed

from framestep.apps import doctor
from framestep.apps.doctor import Finding, examine, table
from framestep.runtime.library import HEADER, Library
from framestep.runtime.sources import Camera


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """A machine on which these packages are not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name.split(".")[0] in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def found(name: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.name == name]
    return finding


def test_what_is_here_is_found() -> None:
    findings = {finding.name: finding for finding in examine()}
    assert findings["Python"].found.startswith(".".join(map(str, sys.version_info[:3])))
    assert findings["ONNX Runtime"].status == findings["OpenCV"].status == "ok"
    assert "CPU" in findings["ONNX Runtime"].found and "video through" in findings["OpenCV"].found
    assert "cores usable" in findings["processor"].found
    assert {finding.status for finding in findings.values()} <= {"ok", "absent", "problem"}


@pytest.mark.parametrize(
    ("package", "name", "status", "advice"),
    [
        ("onnxruntime", "ONNX Runtime", "problem", "framestep[cpu]"),
        ("cv2", "OpenCV", "problem", "opencv-python"),
        ("torch", "torch", "absent", "framestep[export]"),
        ("onnx", "onnx", "absent", "framestep[export]"),
        ("transformers", "transformers", "absent", "framestep[export]"),
        ("triton", "triton", "absent", "framestep[torch]"),
        ("tokenizers", "tokenizers", "absent", "framestep[text]"),
    ],
)
def test_an_absent_package_comes_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, name: str, status: str, advice: str
) -> None:
    without(monkeypatch, package)
    finding = found(name)
    assert finding.status == status and "not installed" in finding.found
    assert advice in finding.advice
    assert advice in printed(table([finding]))


def test_a_native_library_that_was_not_built_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> None:
        Library(HEADER, tmp_path / "libframestep.so")

    monkeypatch.setattr("framestep.runtime.library.library", absent)
    finding = found("native library")
    assert finding.status == "problem" and "build it with 'pip install -e" in finding.found


def test_a_missing_opencv_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "cv2")
    assert [finding.name for finding in examine() if finding.status == "problem"] == ["OpenCV"]


def test_an_opencv_that_cannot_be_loaded_is_one_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text('raise ImportError("libGL.so.1: cannot open shared object file")')
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = [finding for finding in examine() if finding.status == "problem"]
    assert problem == Finding(
        "OpenCV",
        "problem",
        "cannot be loaded: libGL.so.1: cannot open shared object file",
        "apt install libgl1 libglib2.0-0",
    )


@pytest.mark.parametrize(
    ("version", "status"), [("3.1.0", "absent"), ("3.10.0", "ok"), ("3.6.0", "ok"), ("3.6.0+git1", "ok"), ("4", "ok")]
)
def test_a_package_that_is_too_old_is_of_no_use(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    stated = ["triton>=3.3; extra == 'triton'", "triton>=3.6; platform_system == 'Linux' and extra == 'torch'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: stated)
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    finding = found("triton")
    assert finding.status == status
    if status == "absent":
        assert finding.found == "3.1.0 is too old for --engine torch on an NVIDIA GPU: 3.6 or later"
        assert finding.advice == "pip install --upgrade 'framestep[torch]'"


def test_a_broken_package_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("libfoo.so: [cannot] open\nsecond line")

    monkeypatch.setattr(doctor, "_opencv", broken)
    findings = examine()
    (problem,) = [finding for finding in findings if finding.name == "broken"]
    assert (problem.status, problem.found) == ("problem", "RuntimeError: libfoo.so: [cannot] open")
    assert len(findings) > 10 and "[cannot]" in printed(table(findings))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_is_not_lost_in_a_package_that_is_being_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    looked = []

    def load() -> Finding:
        looked.append("the package")
        try:
            signal.raise_signal(number)
        except BaseException as error:  # as pybind11 does it
            raise ImportError("initialization failed") from error
        return Finding("the package", "ok", "1.0")

    monkeypatch.setattr(doctor, "_opencv", load)
    monkeypatch.setattr(doctor, "_cameras", lambda: looked.append("what comes after"))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main(monkeypatch, "doctor") == status
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert looked == ["the package"]
    assert capsys.readouterr().out == ""


def test_cores_are_counted_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    finding = found("processor")
    assert finding.status == "ok" and finding.found.endswith("7 cores usable")


def test_cameras_are_listed_by_path_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras = (Camera("/dev/video0", "HD [Pro] C920"), Camera("/dev/video2", ""))
    monkeypatch.setattr("framestep.runtime.sources.list_cameras", lambda: cameras)
    finding = found("cameras")
    assert (finding.status, finding.found) == ("ok", "/dev/video0 (HD [Pro] C920); /dev/video2")
    assert finding.found in printed(table([finding]))


def test_the_command_prints_a_table_and_exits_1_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "doctor") == 0
    assert "ONNX Runtime" in capsys.readouterr().out
    without(monkeypatch, "onnxruntime")
    assert main(monkeypatch, "doctor") == 1
    assert "framestep[cpu]" in capsys.readouterr().out


def test_json_is_a_list_of_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(monkeypatch, "doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"name", "status", "found", "advice"} == set(findings[0])
    assert "Python" in [finding["name"] for finding in findings]
