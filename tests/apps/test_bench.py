"""`framestep bench` on the golden model; what it says about timings is never asserted."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from command_line import main

import framestep
from framestep.apps.bench import BenchOptions, bench
from framestep.apps.bench.baselines import BASELINES, GROUPS
from framestep.apps.bench.fixed_work import FixedWork
from framestep.apps.bench.measure import JOBS, PositionSamples
from framestep.apps.bench.options import expand_compare, parse_numbers
from framestep.apps.bench.process import Answer, Task, run_process
from framestep.apps.bench.progress import BenchProgress, bench_status_for
from framestep.apps.bench.report import Latency, Report, read_report
from framestep.apps.bench.report_files import markdown
from framestep.export.half import add_half
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import FramestepError, OutputError
from framestep.runtime.manifest import Variant

DOCS = Path(__file__).parents[2] / "docs" / "bench-report.md"


class Lines:
    """A status that keeps what it is told."""

    def __init__(self) -> None:
        self.reported: list[str] = []
        self.fractions: list[float] = []
        self.total = 0.0

    def plan(self, total_s: float) -> None:
        self.total = total_s

    def working(self, what: str, done_s: float) -> None:
        self.fractions.append(done_s)

    def report(self, message: str) -> None:
        self.reported.append(message)

    def close(self) -> None:
        pass


def options(bundle: Path, output: Path, **changes: Any) -> BenchOptions:
    smallest: dict[str, Any] = {
        "bundle": bundle,
        "output": output,
        "frames": (1, 20),
        "streams": (),
        "compare": (),
        "samples": 2,
        "processes": 1,
        "steady": 0,
        "every_frame": False,
        "engine": "auto",
        "device": "cpu",
        "budget_s": 60.0,
        "threads": 1,
        "checkpoint": str(golden.CHECKPOINT),
    }
    return BenchOptions(**(smallest | changes))


def measured_here(task: Task, progress: Callable[[float], None]) -> Answer:
    """What a process of its own would say, without the seconds in which it imports PyTorch."""
    answer = Answer()

    def emit(message: dict[str, Any]) -> None:
        if entry := message.get("position"):
            answer.positions[entry["position"]] = PositionSamples(**entry)
        else:
            progress(message["progress"])

    threads = torch.get_num_threads()
    try:
        answer.result = JOBS[task.job.kind](task.job, emit)
    except FramestepError as error:
        answer.error = str(error)
    finally:
        torch.set_num_threads(threads)
    return answer


def measured_in_part_here(task: Task, progress: Callable[[float], None]) -> Answer:
    job = task.job
    pytorch = any(name.startswith("pytorch") for name in (job.path.name, job.other))
    apart = job.path.name == "pytorch-growing-cache-tuned" and job.kind == "latency"
    return measured_here(task, progress) if pytorch and not apart else run_process(task, progress)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is measured in this process."""
    monkeypatch.setattr(sys.modules["framestep.apps.bench.bench"], "run_process", measured_here)


@pytest.fixture(scope="module")
def whole(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, Lines]:
    """A bench with each kind of measurement once; one of PyTorch's in a process of its own, as all of ours."""
    folder = tmp_path_factory.mktemp("bench") / "report"
    compare = ("pytorch-recompute", "pytorch-growing-cache-tuned")
    asked = options(golden_bundle, folder, streams=(2,), compare=compare, samples=3, steady=16, every_frame=True)
    status = Lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["framestep.apps.bench.bench"], "run_process", measured_in_part_here)
        report = bench(asked, status)
    return report, folder, status


def test_every_path_is_measured_at_every_position(whole: tuple[Report, Path, Lines]) -> None:
    report, _, _ = whole
    assert [path.name for path in report.paths] == [
        "framestep",
        "pytorch-recompute",
        "pytorch-growing-cache-tuned",
    ]
    for path in report.paths:
        assert path.stopped is None
        assert [entry.position for entry in path.positions] == [1, 20]
        for entry in path.positions:
            assert entry.latency_ms.samples >= 3
            assert len(entry.process_p50_ms) == 1
            assert entry.peak_bytes >= entry.resident_bytes > 1e7


def test_baselines_agree_with_the_session(whole: tuple[Report, Path, Lines]) -> None:
    report, _, _ = whole
    for path in report.paths[1:]:
        assert path.verification is not None
        assert path.verification.difference <= golden.TOLERANCE
        assert path.verification.frames >= 4
    assert report.paths[0].verification is None


def test_tuned_baseline_runs_with_raised_thresholds(whole: tuple[Report, Path, Lines]) -> None:
    report, _, _ = whole
    tuned = report.path("pytorch-growing-cache-tuned")
    recompute = report.path("pytorch-recompute")
    assert tuned is not None
    assert recompute is not None
    assert set(tuned.environment) == {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert recompute.environment == {}


def test_streams_steady_run_and_split_are_in_the_report(whole: tuple[Report, Path, Lines]) -> None:
    report, _, _ = whole
    assert [entry.streams for entry in report.streams] == [2]
    assert len(report.interleaved) == 2
    assert report.steady is not None
    assert report.steady.frames == len(report.steady.latencies_ms) == 20  # on to the last position
    assert [entry.position for entry in report.steady.around] == [1, 20]
    assert report.split is not None
    assert report.split.frame == (720, 1280)
    assert report.split.total_ms >= report.split.engine_ms


def test_machines_own_jitter_stands_beside_that_of_frames(whole: tuple[Report, Path, Lines]) -> None:
    report, folder, _ = whole
    assert report.jitter is not None
    assert report.jitter.frame_ms.samples == report.jitter.fixed_ms.samples == 20
    page = (folder / "report.md").read_text("utf-8")
    for row in ("frame", "fixed arithmetic"):
        assert re.search(rf"^\| {row} \| [0-9.]+ / [0-9.]+ / – / [0-9.]+ \| [0-9.]+ \| – \|$", page, re.MULTILINE)


def test_fixed_work_is_as_much_on_each_thread_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int]] = []
    multiply = np.dot

    def counting(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> np.ndarray:
        done.append((threading.get_ident(), id(out)))
        return multiply(left, right, out=out)

    work = FixedWork(2, 3.0)
    monkeypatch.setattr("framestep.apps.bench.fixed_work.np.dot", counting)
    for _ in range(2):
        done.clear()
        work.run()
        assert sorted(Counter(done).values()) == [work.products, work.products]
        assert len({thread for thread, _ in done}) == 2


def test_report_reads_back_as_it_was(whole: tuple[Report, Path, Lines]) -> None:
    report, folder, _ = whole
    assert read_report(folder / "report.json") == report


def test_machine_and_versions_are_in_the_report(whole: tuple[Report, Path, Lines]) -> None:
    report, folder, _ = whole
    assert report.machine.cores >= 1
    assert report.machine.memory_bytes > 1e8
    assert {"numpy", "onnxruntime", "torch"} <= set(report.machine.packages)
    assert report.machine.title() in (folder / "report.md").read_text()


def test_report_names_no_folder_of_this_machine(whole: tuple[Report, Path, Lines], golden_bundle: Path) -> None:
    _, folder, _ = whole
    text = (folder / "report.json").read_text() + (folder / "report.md").read_text()
    assert str(golden_bundle.parent) not in text
    assert str(folder.parent) not in text
    assert str(Path.home()) + "/" not in text


def test_plots_are_drawn(whole: tuple[Report, Path, Lines]) -> None:
    pytest.importorskip("matplotlib")
    _, folder, _ = whole
    for name in ("latency.png", "memory.png", "histogram.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (folder / "report.md").read_text()


def test_too_few_samples_for_a_percentile_are_told(whole: tuple[Report, Path, Lines]) -> None:
    report, folder, status = whole
    lines = [line for line in report.problems if "p99 100" in line]
    assert len(lines) == 1
    assert "framestep (3)" in lines[0]
    assert lines[0] in status.reported
    assert lines[0] in (folder / "report.md").read_text()
    assert all(entry.latency_ms.p99 is None for path in report.paths for entry in path.positions)


def test_progress_reaches_what_was_planned(whole: tuple[Report, Path, Lines]) -> None:
    _, _, status = whole
    assert status.total > 0
    assert status.fractions[0] == 0
    assert status.fractions[-1] == pytest.approx(status.total)


def test_schema_page_names_every_key() -> None:
    page = DOCS.read_text("utf-8")
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", page))))

    def keys(kind: type) -> set[str]:
        found = set()
        for item in dataclasses.fields(kind):
            found.add(item.name)
        return found

    from framestep.apps.bench import report as module
    from framestep.apps.bench.machine import Machine

    for kind in (
        module.Report,
        module.Asked,
        module.BundleFacts,
        Machine,
        module.PathReport,
        module.PositionReport,
        module.Verification,
        module.Interleaved,
        module.StreamsReport,
        module.SteadyReport,
        module.Around,
        module.SplitReport,
        module.JitterReport,
        Latency,
    ):
        assert keys(kind) <= named, kind


def test_products_in_bfloat16_are_compared_like_a_baseline(golden_bundle: Path, tmp_path: Path, here: None) -> None:
    report = bench(options(golden_bundle, tmp_path / "report", compare=("framestep-bf16",), checkpoint=None), Lines())
    if any("needs a processor with AVX512-BF16" in line for line in report.problems):
        pytest.skip("this processor has no AVX512-BF16")
    found = report.path("framestep-bf16")
    assert found.precision == "float32, products in bfloat16"
    assert found.verification is not None and found.verification.tolerance is None
    assert 1e-3 < found.verification.difference < 1
    assert [item.position for item in found.positions] == [item.position for item in report.path("framestep").positions]


def test_openvino_gives_the_sessions_outputs(golden_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    report = bench(options(golden_bundle, tmp_path / "report", compare=("openvino",), checkpoint=None), Lines())
    exact, default = report.path("openvino-f32"), report.path("openvino-default")
    assert exact is not None
    assert exact.verification is not None
    assert exact.verification.frames == 18  # the ring wraps
    assert exact.verification.difference <= golden.TOLERANCE
    assert default is not None
    assert default.verification is not None
    assert default.verification.tolerance is None


def test_missing_package_names_its_extra_and_the_rest_goes_on(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "hidden" / "openvino"
    empty.mkdir(parents=True)
    (empty / "__init__.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(empty.parent))
    report = bench(options(golden_bundle, tmp_path / "report", compare=("openvino-f32",)), Lines())
    assert [path.name for path in report.paths] == ["framestep"]
    assert any("openvino-f32" in line and "framestep[openvino]" in line for line in report.problems)
    assert (tmp_path / "report" / "report.md").exists()


def test_without_the_checkpoint_pytorch_is_left_out(golden_bundle: Path, tmp_path: Path, here: None) -> None:
    manifest_path = tmp_path / "moved.bundle" / "manifest.json"
    shutil.copytree(golden_bundle, manifest_path.parent)
    values = json.loads(manifest_path.read_text())
    values["origin"]["checkpoint"] = "someone/elses-folder"
    manifest_path.write_text(json.dumps(values))
    asked = options(manifest_path.parent, tmp_path / "report", compare=("pytorch-growing-cache",), checkpoint=None)
    report = bench(asked, Lines())
    assert [path.name for path in report.paths] == ["framestep"]
    assert sum("--checkpoint" in line for line in report.problems) == 2  # both variants


def test_another_checkpoint_is_found_out(golden_bundle: Path, tmp_path: Path, here: None) -> None:
    from safetensors.torch import save_file

    from framestep.export.streamformer import TINY, random_model

    other = tmp_path / "other"
    other.mkdir()
    save_file(random_model(TINY, 3).state_dict(), other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(TINY.to_dict()))
    asked = options(golden_bundle, tmp_path / "report", compare=("pytorch-recompute",), checkpoint=str(other))
    report = bench(asked, Lines())
    assert report.path("pytorch-recompute") is None
    assert any("differ" in line and "same checkpoint" in line for line in report.problems)


@pytest.fixture
def half_first(golden_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle of two precisions, FP16 being the main one."""
    shutil.copytree(golden_bundle, tmp_path / "both.bundle")
    bundle = add_half(Bundle.open(tmp_path / "both.bundle"))
    exact = bundle.manifest.at("fp32")
    floats = {"fp32": Variant(exact.graphs, exact.states)}
    bundle.rewrite_manifest(dataclasses.replace(bundle.manifest.at("fp16"), variants=floats))
    return Bundle.open(bundle.path)


def test_of_several_precisions_the_report_is_of_the_one_that_ran(
    half_first: Bundle, tmp_path: Path, here: None
) -> None:
    bundle = half_first
    exact = bundle.manifest.at("fp32")
    report = bench(options(bundle.path, tmp_path / "report", frames=(1,)), Lines())
    assert report.engine.endswith(", fp32")  # a CPU's choice
    assert (report.bundle.precision, report.path("framestep").precision) == ("fp32", "float32")
    assert report.bundle.state_bytes == sum(state.bytes_per_stream() for state in exact.states)
    asked = bench(options(bundle.path, tmp_path / "asked", frames=(1,), streams=(2,), precision="fp16"), Lines())
    assert asked.engine.endswith(", fp16") and "--precision fp16" in asked.asked.command
    assert asked.bundle.precision == "fp16" and asked.bundle.state_bytes == report.bundle.state_bytes // 2
    missing = bench(options(bundle.path, tmp_path / "missing", frames=(1,), precision="w4"), Lines())
    assert missing.path("framestep") is None
    assert any("w4" in line and "fp32" in line for line in missing.problems)


def test_a_bundles_other_precisions_are_compared_like_baselines(half_first: Bundle, tmp_path: Path, here: None) -> None:
    asked = options(half_first.path, tmp_path / "report", frames=(1, 4), streams=(1,), compare=("precisions",))
    report = bench(asked, Lines())
    assert [path.name for path in report.paths] == ["framestep", "framestep-fp16"]  # what ran, and the rest
    half = report.path("framestep-fp16")
    assert (half.title, half.precision) == ("framestep, fp16", "float16")
    assert half.verification is not None and half.verification.tolerance is None
    assert 1e-5 < half.verification.difference < 5e-2  # FP16's rounding, not float32's and not another model
    assert [entry.position for entry in half.positions] == [1, 4]
    assert [pair.other for pair in report.interleaved] == ["framestep-fp16"]
    assert (tmp_path / "report" / "latency.png").exists()


def test_baselines_have_the_graph_of_the_measured_precision(half_first: Bundle, tmp_path: Path, here: None) -> None:
    pytest.importorskip("openvino")
    asked = options(half_first.path, tmp_path / "report", frames=(1,), streams=(1,), compare=("openvino-f32",))
    assert bench(asked, Lines()).path("openvino-f32").verification.difference <= golden.TOLERANCE
    wrong = dataclasses.replace(asked, output=tmp_path / "half", precision="fp16")
    assert any(line.endswith("add --precision fp32") for line in bench(wrong, Lines()).problems)


def test_a_baseline_in_float32_is_not_compared_with_rounded_weights(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w8.bundle"
    assert main(monkeypatch, "export", golden.CHECKPOINT, "-o", path, "--precision", "w8") == 0
    asked = options(path, tmp_path / "report", frames=(1,), compare=("pytorch-recompute",))
    report = bench(asked, Lines())
    assert report.path("pytorch-recompute") is None
    assert any("differ" in line and line.endswith("take a bundle in fp32, not w8") for line in report.problems)


def test_bundle_for_a_device_that_is_not_here_still_gives_a_report(golden_bundle: Path, tmp_path: Path) -> None:
    from framestep.runtime.engines.onnxruntime import available_devices

    if "cuda" in available_devices():
        pytest.skip("this machine has the device")
    report = bench(options(golden_bundle, tmp_path / "report", device="cuda"), Lines())
    assert report.paths == ()
    assert any("'cuda' is not available" in line for line in report.problems)
    assert "cuda" in (tmp_path / "report" / "report.md").read_text()


def test_a_report_is_not_replaced_by_one_of_nothing(golden_bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FramestepError, match="nothing could be measured; the earlier report there stays as it was"):
        bench(options(golden_bundle, tmp_path, threads=10**6), Lines())
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert main(monkeypatch, "bench", golden_bundle, "-o", tmp_path / "new", "--threads", 10**6) == 2
    assert "new/report.md" in capsys.readouterr().out


def test_interrupt_keeps_what_was_measured(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["framestep.apps.bench.bench"]
    run = module.run_process  # type: ignore[attr-defined]

    def interrupted(task: Any, progress: Any) -> Any:
        if task.job.kind == "split":
            raise KeyboardInterrupt
        return run(task, progress)

    monkeypatch.setattr(module, "run_process", interrupted)
    report = bench(options(golden_bundle, tmp_path / "report", device="auto"), Lines())
    assert report.path("framestep") is not None
    with framestep.load(golden_bundle, threads=1) as session:
        assert report.engine == session.engine_choice  # nobody asked for a device
    assert report.split is None
    assert any("stopped by the user" in line for line in report.problems)
    assert (tmp_path / "report" / "report.json").exists()


def test_report_is_written_where_matplotlib_is_missing(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    module = sys.modules["framestep.apps.bench.bench"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    report = bench(options(golden_bundle, tmp_path / "report"), Lines())
    assert any("framestep[bench]" in line for line in report.problems)
    assert any("framestep[bench]" in line for line in read_report(tmp_path / "report" / "report.json").problems)
    assert "](latency.png)" not in markdown(report, [])


def test_output_that_is_a_file_is_refused(golden_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        bench(options(golden_bundle, tmp_path / "taken"), Lines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples"),
        ({"processes": 0}, "--processes"),
        ({"threads": 0}, "--threads"),
        ({"budget_s": 0.0}, "--budget-s"),
        ({"budget_s": float("inf")}, "--budget-s: expected 1 to 1000000000, found inf"),
        ({"compare": ("tensorflow",)}, "'tensorflow' is unknown; expected all, precisions, pytorch-recompute"),
    ],
)
def test_options_that_make_no_sense_are_named(
    golden_bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FramestepError, match=message):
        bench(options(golden_bundle, tmp_path / "report", **changes), Lines())


def test_log_gets_a_line_for_each_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    status = bench_status_for(quiet=False)  # standard error is no terminal here
    status.plan(600.0)
    for done in (0.0, 1.0, 2.0):
        status.working("framestep, process 1 of 5", done)
    status.plan(45.0)
    status.working("1 stream", 3.0)
    status.report("openvino: missing")
    status.close()
    assert capsys.readouterr().err == (
        "framestep, process 1 of 5 (about 10 min left)\n1 stream (about 42 s left)\nwarning: openvino: missing\n"
    )
    quiet = bench_status_for(quiet=True)
    quiet.plan(1.0)
    quiet.working("framestep", 0.0)
    assert capsys.readouterr().err == ""


def test_terminal_gets_a_bar_with_the_remaining_time() -> None:
    status = BenchProgress()
    status.plan(10.0)
    status.working("framestep", 4.0)
    status.report("one thing")
    status.close()
    task = status._progress.tasks[0]
    assert (task.description, task.completed, task.total) == ("framestep", 4.0, 10.0)


def test_numbers_are_sorted_and_counted_once() -> None:
    assert parse_numbers("64, 1,4,4", "--frames") == (1, 4, 64)
    for bad in ("", "0,1", "a", "1.5", "1,99999999999999999999"):
        with pytest.raises(FramestepError, match="--frames"):
            parse_numbers(bad, "--frames")


def test_compare_expands_variants() -> None:
    assert expand_compare(["all"], ("fp32",)) == (*BASELINES, "framestep-fp32")
    assert expand_compare(["openvino", "openvino-f32"], ("fp32",)) == ("openvino-f32", "openvino-default")
    assert expand_compare(["precisions"], ("int8", "int8+kv8")) == ("framestep-int8", "framestep-int8+kv8")
    with pytest.raises(FramestepError, match="'framestep-w8' is unknown; expected all, .*framestep-int8$"):
        expand_compare(["framestep-w8"], ("int8",))
    assert set(BASELINES) == {name for group in GROUPS.values() for name in group}


def test_percentiles_are_nearest_rank_of_all_samples() -> None:
    one = [float(value) for value in range(1, 101)]
    found = Latency.of([one])
    assert (found.p50, found.p95, found.p99, found.max) == (50.5, 95.0, 99.0, 100.0)
    assert Latency.of([one[:99]]).p99 is None
    assert Latency.of([one[:19]]).p95 is None
    assert Latency.of([one[:20]]).p95 == 19.0


def test_p50_is_the_median_over_processes() -> None:
    found = Latency.of([[1.0] * 100, [2.0] * 3, [9.0] * 3])
    assert found.p50 == 2.0
    assert found.samples == 106
    assert found.max == 9.0
    assert Latency.of([np.array([3.0])]).p50 == 3.0
