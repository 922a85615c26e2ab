"""The floor's arithmetic."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from framestep.runtime.bundle import Bundle

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "roofline.py"


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    found = importlib.util.spec_from_file_location("roofline", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["roofline"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_operations_are_those_of_the_architecture(roofline: ModuleType, golden_bundle: Path) -> None:
    found = roofline.count(Bundle.open(golden_bundle))
    N, D, F, L, H, W, d, pixels = 16, 96, 192, 3, 4, 16, 24, 16 * 16 * 3
    products = 2 * N * (pixels * D + L * (8 * D * D + 2 * D * F))
    pooling = 2 * (2 * N * D * D + D * D + 2 * D * F)  # key and value; output and MLP of one row
    attention = L * 4 * H * d * (N * W + N * N) + 4 * H * d * N
    assert sum(item.operations for item in found if item.shape) == products + pooling
    assert sum(item.operations for item in found if item.kind == "Attention") == attention
    assert sum(item.memory_bytes for item in found if item.kind == "Attention") == L * 2 * N * D * W * 4
    assert sum(item.memory_bytes for item in found if item.kind == "TensorScatter") == L * 2 * N * D * 4


def test_floor_takes_the_slower_of_arithmetic_and_memory(roofline: ModuleType) -> None:
    slow = roofline.Operator("a", "MatMul", (2, 3, 4), 48, 100, True)
    memory = roofline.Operator("b", "MatMul", (2, 3, 4), 48, 4000, True)
    attention = roofline.Operator("c", "Attention", (), 1000, 10)
    scatter = roofline.Operator("d", "TensorScatter", (), 0, 500)
    rates = roofline.Rates({(2, 3, 4): 2.0}, flops=500.0, bandwidth=1000.0)
    found = roofline.floor([slow, memory, attention, scatter], rates)
    assert found.products_ms == pytest.approx(2000 + 4000)
    assert found.attention_ms == pytest.approx(2000)
    assert found.state_ms == pytest.approx(500)
    assert found.total_ms == pytest.approx(8500)


def test_prediction_halves_the_bytes_of_float32(roofline: ModuleType) -> None:
    device = roofline.Device("x", flops=1e3, bandwidth=1e3, source="s")
    found = roofline.predict([roofline.Operator("a", "MatMul", (1, 1, 1), 2, 4000, True)], device)
    assert found.total_ms == pytest.approx(2000)


def test_every_device_names_its_source(roofline: ModuleType) -> None:
    assert len(roofline.DEVICES) == 4
    assert all("NVIDIA" in device.source for device in roofline.DEVICES)


def test_script_reports_floor_and_predictions(
    roofline: ModuleType, golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "RUN_S", 0.001)
    monkeypatch.setattr(
        roofline,
        "measure",
        lambda operators, threads, runs: roofline.Rates(
            {item.shape: roofline.measure_product(item.shape, threads, 1, 0.0) for item in operators if item.shape},
            1e9,
            roofline.measure_bandwidth(threads, 1, 1 << 20),
        ),
    )
    assert roofline.main([str(golden_bundle), "--threads", "1", "--runs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["floor"]["total_ms"] > 0
    assert found["efficiency"] is None
    assert len(found["predictions"]) == 4
    assert "bound" in roofline.text(found)


def test_missing_bundle_is_one_line(roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main([str(tmp_path / "none")]) == 2
    assert "no such bundle" in capsys.readouterr().err


def test_bandwidth_reads_the_whole_array(roofline: ModuleType) -> None:
    assert roofline.measure_bandwidth(1, 1, 1 << 20) > 0
    assert np.isfinite(roofline.measure_bandwidth(2, 1, 1 << 20))
