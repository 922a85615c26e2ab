"""`framestep build` on the command line."""

from __future__ import annotations

import json
import shutil
import signal
import sys

import pytest
from command_line import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from framestep.apps.building import BuildBar
from framestep.apps.stopping import Stopping
from framestep.export import tensorrt_network
from framestep.runtime.bundle import Bundle


def test_a_build_tells_what_it_made_and_then_that_it_is_there(golden_bundle, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "golden.bundle"
    shutil.copytree(golden_bundle, path)
    options = ["--precision", "fp32", "--streams", "2", "--compute-capability", "8.6,8.9", "--flavour", "tensorrt_rtx"]
    assert main(monkeypatch, "build", path, *options) == 0
    told = capsys.readouterr()
    assert "fp32 for compute capability 8.6, 8.9, up to 2 streams, by tensorrt_rtx" in told.out
    assert "6 states updated in place, 0 of 7 attentions fused" in told.out
    assert "per stream  state 0.6 MB; activations are known where the GPU is" in told.out
    assert "note  backbone: TensorRT has no fused attention for fp32" in told.out
    assert told.err.split() == ["building", "backbone", "building", "label", "building", "patch_label"]
    assert main(monkeypatch, "build", path, *options, "--json") == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert told.err == ""
    assert [item["graph"] for item in facts["graphs"]] == ["backbone", "label", "patch_label"]
    assert {item["file"] for item in facts["graphs"]} == set(Bundle.open(path).manifest.engines)
    assert (facts["streams"], facts["bytes_per_stream"]) == (2, None)
    assert main(monkeypatch, "build", path, *options) == 0
    assert "there already: engines/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compute-capability", "sm86"], "--compute-capability: expected one such as 8.6, found 'sm86'"),
        (["--precision", "bf16"], "--precision: expected fp16, fp16+int8, fp16+w4, fp32, found 'bf16'"),
        (["--streams", "0"], "--streams"),
        (["--workspace", "99999999999999999999"], "--workspace: expected at most 1073741824 MiB"),
    ],
)
def test_bad_options_are_one_line(golden_bundle, monkeypatch, capsys, options, message) -> None:
    assert main(monkeypatch, "build", golden_bundle, *options) == 2
    told = capsys.readouterr()
    assert told.err.startswith("framestep: ") and told.err.count("\n") == 1
    assert message in told.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_tensorrt_logs_ends_the_build(
    golden_bundle, tmp_path, monkeypatch, capsys, number
) -> None:
    path = shutil.copytree(golden_bundle, tmp_path / "golden.bundle")
    spoken = tensorrt_network.Messages

    class Interrupted(spoken):
        def __init__(self, package) -> None:
            super().__init__(package)
            log, said = type(self.logger).log, []

            def log_and_interrupt(logger, severity, message) -> None:
                if not said:
                    said.append(message)
                    signal.raise_signal(number)
                log(logger, severity, message)

            type(self.logger).log = log_and_interrupt

    monkeypatch.setattr(tensorrt_network, "Messages", Interrupted)
    options = ["--precision", "fp32", "--compute-capability", "8.6", "--flavour", "tensorrt_rtx"]
    assert main(monkeypatch, "build", path, *options) == (130 if number == signal.SIGINT else 128 + number)
    assert "Exception" not in capsys.readouterr().err
    assert not Bundle.open(path).manifest.engines


def test_run_without_a_gpu_is_one_line(golden_bundle, monkeypatch, capsys) -> None:
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(monkeypatch, "run", golden_bundle, "--engine", "tensorrt", "--source", "synthetic") == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "the tensorrt engine needs pycuda and cuda-bindings" in told.err


def test_the_bar_shows_the_outer_phases(monkeypatch) -> None:
    with BuildBar(True, Stopping()) as bar:
        bar.graph("backbone")
        bar.start("Building engine", None, 6)
        bar.start("Optimizing", "Building engine", 30)
        bar.start("Timing", "Optimizing", 3)
        bar.step("Timing", 1)
        bar.step("Optimizing", 15)
        assert [(task.description, task.completed, task.total) for task in bar._bar.tasks] == [
            ("Building engine", 0, 6),
            ("Optimizing", 15, 30),
        ]
        bar.finish("Timing")
        bar.finish("Optimizing")
        bar.start("Timing", "Building engine", 3)
        bar.graph("label")
        assert bar._bar.tasks == []
