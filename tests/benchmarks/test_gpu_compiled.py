"""The TensorRT and ONNX Runtime sections of the GPU suite, rehearsed: real builds, a stand-in for driver and runtime."""

from __future__ import annotations

import json
import sys

import pytest
from suite_rehearsal import rehearse

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def test_a_rehearsal_builds_runs_and_compares(tmp_path) -> None:
    rehearse(tmp_path, "tensorrt", "onnxruntime")
    compiled, ort = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert compiled["failures"] == [] == ort["failures"]
    assert compiled["skipped"] == [] == ort["skipped"]
    rows = compiled["rows"]["compiled"]
    assert {row["engine"].split()[0] for row in rows} == {"tensorrt", "tensorrt_rtx"}
    assert {(row["precision"], row["streams"]) for row in rows} == {("fp16", 4)}
    assert len(compiled["rows"]["checks"]) == 2 * 4 * 2  # flavours, streams, outputs
    assert compiled["facts"]["tensorrt fp16 4: attentions fused"] == "7 of 7"
    assert [row["engine"] for row in ort["rows"]["compiled"]] == ["onnxruntime"] * 2


def test_where_tensorrt_does_not_know_the_gpu_that_is_recorded(tmp_path, monkeypatch) -> None:
    from framestep.benchmarks.gpu import compiled
    from framestep.benchmarks.gpu.hardware import find_hardware
    from framestep.benchmarks.gpu.section import Section
    from framestep.benchmarks.gpu.sizes import SMALL

    section = Section("tensorrt", tmp_path / "tensorrt.json", 60)
    hardware = find_hardware(True)
    monkeypatch.setattr(type(hardware), "rehearsal", False)  # no stand-in
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    compiled.tensorrt(section, hardware, SMALL, tmp_path)
    assert section.failures == []
    assert [line.split(":")[0] for line in section.skipped] == ["tensorrt", "tensorrt_rtx"]
    assert all("TensorRT is not installed" in line for line in section.skipped)
