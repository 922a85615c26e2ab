"""The GPU suite where there is no GPU: rehearsed in full on the CPU, and what it makes of wrong results."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from suite_rehearsal import ROOT, SUITE, rehearse, run_suite

SPEC = importlib.util.spec_from_file_location("gpu_suite", SUITE)
gpu_suite = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_suite)


REHEARSED = ("bandwidth", "step", "prime", "products", "decoding", "decoder", "compare", "tune")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The suite of a checkout in a folder whose name no package could have."""
    checkout = tmp_path_factory.mktemp("suite") / "a.b-c"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "build", "out", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=ignored, symlinks=True)
    return checkout / "benchmarks" / "gpu_suite.py"


@pytest.fixture(scope="module")
def rehearsal(suite, tmp_path_factory):
    """Every section but the longest."""
    folder = tmp_path_factory.mktemp("rehearsal")
    rehearse(folder / "found", *REHEARSED, suite=suite, cwd=folder)
    return folder / "found"


def test_a_rehearsal_runs_its_sections_and_every_result_is_right(rehearsal):
    results = json.loads((rehearsal / "gpu.json").read_text())
    assert [section["name"] for section in results["sections"]] == list(REHEARSED)
    assert all(section["failures"] == [] == section["skipped"] for section in results["sections"])
    rows = {table: found for section in results["sections"] for table, found in section["rows"].items()}
    assert {row["precision"] for row in rows["step"]} == {"fp16", "fp32"}
    assert {row["name"].split(",")[0] for row in rows["baselines"]} == {"eager", "torch.compile"}
    assert {row["weights"] for row in rows["decoder"]} == {"fp16", "fp16+w4"}
    assert len(rows["block_linear"]) == 8 and rows["widen_blocks"]
    assert any("flex microseconds" in row for row in rows["temporal_attention"])
    assert all(row["good"] for row in rows["checks"])


def test_the_best_way_to_cut_is_the_first_line_of_its_table(rehearsal):
    results = json.loads((rehearsal / "gpu.json").read_text())
    rows = results["sections"][-1]["rows"]
    assert {row["launch"].endswith(", planned") for row in rows["tune"]} == {True, False}
    worst = [row["worst_of_best"] for row in rows["tune"]]
    assert worst == sorted(worst, reverse=True) and worst[0] > 0
    assert rows["tune_parts"][0]["1 parts"] and rows["tune_decoder"][0]["planned"]
    assert len(rows["tune_products"]) == 2


@pytest.mark.parametrize(
    ("version", "numbers", "refused"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.10.0", "2.4.0", False)]
)
def test_an_interpreter_that_this_numpy_breaks_is_refused_in_one_line(monkeypatch, version, numbers, refused):
    import triton

    from framestep.benchmarks.gpu.hardware import find_hardware

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(np, "__version__", numbers)
    if refused:
        with pytest.raises(SystemExit, match=r"^Triton 3\.6\.0 cannot interpret kernels with NumPy 2\.4\.0; take .*$"):
            find_hardware(True)
    else:
        assert find_hardware(True).rehearsal


def test_a_launch_that_fails_somewhere_is_no_rule():
    from framestep.benchmarks.gpu.tune import rank

    shares = {"a": {"4 x 64": 0.8, "1 x 16": 0.5}, "b": {"4 x 64": 0.9}, "c": {"4 x 64": 0.7, "1 x 16": 0.6}}
    assert [row["launch"] for row in rank(shares)] == ["a", "c", "b"]
    assert rank(shares)[0]["worst_of_best"] == pytest.approx(0.5 / 0.6)


def test_what_the_targets_are_judged_by_comes_first():
    names = list(gpu_suite.SECTIONS)
    assert set(names[:5]) == {"checks", "step", "bandwidth", "streams", "compare"}
    enough = gpu_suite.LIMIT_SECONDS - gpu_suite.GRACE_SECONDS
    assert sum(gpu_suite.SECTIONS[name] for name in names[:5]) <= enough


def test_a_rehearsal_says_that_its_times_mean_nothing(rehearsal):
    text = (rehearsal / "gpu.md").read_text()
    assert "no time here means anything" in text
    assert "## Targets" not in text


def test_without_a_gpu_it_says_so_and_runs_the_checks_that_need_none(suite, tmp_path):
    done = run_suite("-o", tmp_path / "found", suite=suite, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("There is no GPU here that PyTorch can use")
    results = json.loads((tmp_path / "found" / "gpu.json").read_text())
    assert [section["name"] for section in results["sections"]] == ["checks"]
    kinds = {row["what"].split()[0] for row in results["sections"][0]["rows"]["checks"]}
    assert kinds >= {
        "temporal_attention",
        "temporal_attention_int8",
        "causal_prefill",
        "decode_attention",
        "block_linear",
    }


def section(**values):
    return {"name": "checks", "facts": {}, "rows": {}, "failures": [], "skipped": [], "seconds": 1.0, **values}


GOOD = {"what": "a kernel", "error": 1e-7, "limit": 1e-5, "good": True}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (section(rows={"checks": [GOOD]}), 0),
        (section(rows={"checks": [GOOD]}, skipped=["the rest: no time left"]), 0),
        (section(rows={"checks": [GOOD]}, failures=["a kernel: error inf is above its limit"]), 1),
        (section(), 1),  # nothing was compared
    ],
)
def test_a_wrong_result_is_an_error_and_what_was_not_measured_is_none(monkeypatch, tmp_path, found, status):
    monkeypatch.setattr(gpu_suite, "import_checkout", lambda: None)
    monkeypatch.setattr(gpu_suite, "_start", lambda *given: found)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "-o", str(tmp_path), "--rehearse", "--only", "checks"])
    assert gpu_suite.main() == status
    text = (tmp_path / "gpu.md").read_text()
    assert all(message in text for message in found["failures"] + found["skipped"])


def test_a_section_that_dies_is_a_failure_and_keeps_what_it_had(monkeypatch, tmp_path):
    died = tmp_path / "died.py"
    died.write_text("""
import json, pathlib, sys
path = pathlib.Path(sys.argv[sys.argv.index("-o") + 1]) / "checks.json"
path.write_text(json.dumps({"name": "checks", "rows": {"checks": [{"what": "first"}]}, "seconds": 1.0}))
sys.exit(139)
""")
    monkeypatch.setattr(gpu_suite, "__file__", str(died))
    found = gpu_suite._start("checks", 60.0, False, tmp_path, tmp_path)
    assert found["failures"] == ["the section ended with status 139"]
    assert found["rows"]["checks"] == [{"what": "first"}]


def test_a_section_that_hangs_is_stopped(monkeypatch, tmp_path):
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(gpu_suite, "__file__", str(hangs))
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0.5)
    found = gpu_suite._start("checks", 1.0, False, tmp_path, tmp_path)
    assert found["failures"] == []
    assert "was stopped" in found["skipped"][0]


def test_an_error_that_is_not_a_number_fails(tmp_path):
    from framestep.benchmarks.gpu.section import Section

    found = Section("checks", tmp_path / "checks.json", 10)
    found.check("fine", 0.0, 0.0)
    found.check("nan", float("nan"), 1.0)
    found.check("inf", float("inf"), 1.0)
    assert [failure.split(":")[0] for failure in found.failures] == ["nan", "inf"]
    assert not found.attempt("part", lambda: torch.zeros(2).view(3))
    assert found.failures[-1].startswith("part: RuntimeError")


def test_targets_are_judged_from_what_was_measured():
    from framestep.benchmarks.gpu.report import markdown

    attention = {"streams": 4, "window": 64, "share_of_copy": 0.9, "times_faster": 1.2}
    steps = [{"precision": "fp16", "position": at, "p50_ms": 0.8, "p99_ms": 0.85} for at in (1, 16, 4096)]
    growing = {"name": "eager, growing cache, float16", "position": 64, "p50_ms": 9.0}
    alone = {"streams": 64, "window": 2048, "share_of_copy": 0.95}  # PyTorch's own did not fit
    rows = {"temporal_attention": [attention, alone], "step": steps, "baselines": [growing]}
    text = markdown({"rehearsal": False, "hardware": {"name": "GPU"}, "sections": [section(rows=rows)]})
    assert "| least share of copy, window >= 64, streams >= 4: 0.85 | 0.90 | yes |" in text
    assert "| least factor over the best of PyTorch: 1.3 | 1.20 | NO |" in text
    assert "| over eager, growing cache, float16 at 64: 10 | 11.2 | yes |" in text
