"""`framestep bench`: plans the measurements, runs each in a fresh process, and writes the report."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...runtime.bundle import Bundle, Manifest
from ...runtime.engines import BFLOAT16, choose_engine
from ...runtime.errors import FramestepError, OutputError
from ...runtime.schema import to_json
from .machine import examine_machine
from .measure import BLOCK, CAMERA_FRAME, GUARANTEED, Job, PositionSamples
from .paths import BASELINES, BFLOAT16_PRODUCTS, FRAMESTEP, GROUPS, RAISED_THRESHOLDS, PathSpec, window_of
from .progress import BenchStatus
from .report import (
    LEAST_SAMPLES,
    VERSION,
    Around,
    Asked,
    BundleFacts,
    Interleaved,
    Latency,
    PathReport,
    PositionReport,
    Report,
    SplitReport,
    SteadyReport,
    StreamsReport,
    Verification,
    write_report,
)

MOST_ROUNDS = 10  # of interleaved turns
MOST = 10**9  # of positions, and of streams
START_S = 4.0  # guess of what it takes to start a process and load a model


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `framestep bench` was asked for; see its help.

    Attributes:
        frames: stream positions, the first frame being 1.
        compare: keys of `GROUPS` or of `BASELINES`, or "all".
        samples: latencies at each position in each process.
        processes: fresh processes for each path.
        steady: frames of the steady run; 0 for none.
        every_frame: the steady run goes on to the last of `frames`.
        threads: None for every core.
        checkpoint: of the PyTorch baselines; None where the bundle's origin says how to make it again.
        budget_s: seconds for each baseline over all of its processes; positions up to 64 are taken anyway.
    """

    bundle: Path
    output: Path
    frames: tuple[int, ...]
    streams: tuple[int, ...]
    compare: tuple[str, ...]
    samples: int
    processes: int
    steady: int
    every_frame: bool
    engine: str
    device: str
    budget_s: float
    threads: int | None = None
    checkpoint: str | None = None


def bench(options: BenchOptions, status: BenchStatus) -> Report:
    """Measure, and write `report.json`, `report.md` and the plots into `options.output`.

    What cannot be measured is reported through `status` and in the report, and the rest goes on. Ctrl-C ends the
    measuring, and what was measured until then is written.

    Raises:
        FramestepError: the options make no sense, the bundle cannot be read or the folder not written.
    """
    _check(options)
    bundle = Bundle.open(options.bundle)
    _make_folder(options.output)
    with tempfile.TemporaryDirectory(prefix="framestep-bench-") as scratch:
        run = _Run(options, bundle, Path(scratch), status)
        try:
            report = run.measure()
        finally:
            status.close()
    plots = _draw(report, options.output, status)
    if plots is None:
        report = _with_problem(report, "plots: they need matplotlib: pip install 'framestep[bench]'")
    try:
        write_report(report, options.output, plots or [])
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written: {error.strerror}") from None
    return report


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,4,16` as ascending numbers without repeats.

    Raises:
        FramestepError: something else.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise FramestepError(f"{option}: expected numbers such as 1,4,16, found '{text}'") from None
    if not numbers or numbers[0] < 1:
        raise FramestepError(f"{option}: expected numbers of at least 1, found '{text}'")
    if numbers[-1] > MOST:
        raise FramestepError(f"{option}: expected numbers of at most {MOST}, found '{text}'")
    return tuple(numbers)


def expand_compare(names: Iterable[str]) -> tuple[str, ...]:
    """The paths behind the names of `--compare`, each once.

    Raises:
        FramestepError: an unknown name.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            group: Sequence[str] = tuple(BASELINES)
        elif name in GROUPS:
            group = GROUPS[name]
        elif name in BASELINES:
            group = (name,)
        else:
            known = ", ".join(dict.fromkeys((*GROUPS, *BASELINES)))
            raise FramestepError(f"--compare: '{name}' is unknown; expected all, {known}")
        found.update(dict.fromkeys(group))
    return tuple(found)


@dataclass
class _Task:
    """A process to run.

    Attributes:
        expected_s: guess of how long it takes; replaced by what it took when another of its like has run.
    """

    label: str
    job: Job
    environment: dict[str, str]
    expected_s: float
    limit_s: float | None = None


@dataclass
class _Answer:
    """What a process said. Positions are kept even where it died on the way."""

    result: dict[str, Any] | None = None
    error: str | None = None
    positions: dict[int, PositionSamples] = field(default_factory=dict)


class _Run:
    """One bench."""

    def __init__(self, options: BenchOptions, bundle: Bundle, scratch: Path, status: BenchStatus) -> None:
        self.options, self.bundle, self.status = options, bundle, status
        self.threads = options.threads or len(os.sched_getaffinity(0))
        self.reference = scratch / "reference.npz"
        self.problems: list[str] = []
        self.verified: dict[str, tuple[Verification | None, str]] = {}
        self.done_s = 0.0
        try:
            self.device = choose_engine(bundle.manifest, options.engine, options.device).device
        except FramestepError:
            self.device = options.device  # our own processes will say what is wrong
        self.step_s = 0.2
        self.engine = ""

    def measure(self) -> Report:
        begin = time.perf_counter()
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        machine = examine_machine()
        usable = self._verify()
        tasks = self._plan(usable)
        answers: list[tuple[_Task, _Answer]] = []
        for index, task in enumerate(tasks):
            left = sum(each.expected_s for each in tasks[index:])
            self.status.plan(self.done_s + left)
            start = time.perf_counter()
            try:
                answers.append((task, self._run(task)))
            except KeyboardInterrupt:
                self._problem(f"stopped by the user at: {task.label}; nothing after it was measured")
                break
            took = time.perf_counter() - start
            self.done_s += took
            for later in tasks[index + 1 :]:
                if (later.job.kind, later.job.path, later.job.streams) == (
                    task.job.kind,
                    task.job.path,
                    task.job.streams,
                ):
                    later.expected_s = took
        latency: dict[str, list[_Answer]] = {name: [] for name in usable}
        for task, answer in answers:
            if task.job.kind == "latency":
                latency[task.job.path.name].append(answer)
        paths = tuple(self._path_report(name, found) for name, found in latency.items() if found)
        self._tell_missing_percentiles(paths)
        interleaved = tuple(
            _interleaved(task.job, answer.result)
            for task, answer in answers
            if task.job.kind == "interleaved" and self._answered(task, answer) and answer.result
        )
        streams = tuple(
            _streams(task.job, answer.result)
            for task, answer in answers
            if task.job.kind == "streams" and self._answered(task, answer) and answer.result
        )
        return Report(
            version=VERSION,
            framestep=__version__,
            created=created,
            seconds=round(time.perf_counter() - begin, 1),
            asked=self._asked(),
            bundle=_bundle_facts(self.bundle),
            machine=machine,
            engine=self.engine,
            paths=paths,
            interleaved=interleaved,
            streams=streams,
            steady=next((self._steady(a) for t, a in answers if t.job.kind == "steady" and self._answered(t, a)), None),
            split=next((_split(a) for t, a in answers if t.job.kind == "split" and self._answered(t, a)), None),
            problems=tuple(self.problems),
        )

    def _verify(self) -> list[str]:
        """Let the session tell its outputs, and compare each baseline with them; the paths to measure, ours first."""
        usable: list[str] = []
        answer = self._run(_Task("checking framestep", self._job("reference", FRAMESTEP), {}, START_S))
        if answer.result is not None:
            usable.append(FRAMESTEP)
            self.step_s = answer.result["step_ms"] / 1e3
            self.engine = answer.result["engine"]
        else:
            self._problem(f"{FRAMESTEP}: {answer.error}")
        for name in expand_compare(self.options.compare):
            if answer.result is None:
                self._problem(f"{name}: not checked against the session, which does not run here")
                self.verified[name] = (None, BASELINES[name].precision)
                usable.append(name)
                continue
            task = _Task(f"checking {name}", self._job("difference", name), _environment(name), START_S)
            checked = self._run(task)
            if checked.result is None:
                self._problem(_with_name(name, checked.error))
                continue
            limit = BASELINES[name].tolerance
            difference = float(checked.result["difference"])
            found = Verification(
                int(checked.result["frames"]), float(f"{difference:.3g}"), limit, checked.result.get("largest_output")
            )
            precision = checked.result.get("precision") or BASELINES[name].precision
            if not math.isfinite(difference) or (limit is not None and difference > limit):
                self._problem(
                    f"{name}: not measured, its outputs differ from the session's by {difference:.1e}"
                    f" over {found.frames} frames (at most {limit or 0:.0e} is accepted); is it the same checkpoint?"
                )
                continue
            self.verified[name] = (found, precision)
            usable.append(name)
        return usable

    def _plan(self, usable: Sequence[str]) -> list[_Task]:
        options = self.options
        window = window_of(self.bundle.manifest)
        each_budget = options.budget_s / options.processes
        tasks: list[_Task] = []
        for number in range(options.processes):
            for name in usable:  # every path in turn, so that a drift of the machine touches all alike
                ours = name == FRAMESTEP
                job = self._job(
                    "latency",
                    name,
                    positions=options.frames,
                    samples=options.samples,
                    budget_s=float("inf") if ours else each_budget,
                )
                steps = window + options.samples * len(options.frames)
                guess = steps * self.step_s * (1 if ours else 8)
                expected = guess if ours else min(guess, each_budget)
                label = f"{name}, process {number + 1} of {options.processes}"
                limit = None if ours else 4 * each_budget + 1800
                tasks.append(_Task(label, job, _environment(name), START_S + expected, limit))
        if FRAMESTEP not in usable:
            return tasks
        position = max((p for p in options.frames if p <= window), default=options.frames[0])
        rounds = max(1, min(MOST_ROUNDS, options.samples // BLOCK))
        for name in usable[1:]:
            if position > GUARANTEED:
                self._problem(f"{name}: not taken in turns, for all of --frames lie beyond frame {GUARANTEED}")
                continue
            job = self._job("interleaved", FRAMESTEP, positions=(position,), samples=rounds, other=name)
            expected = START_S + rounds * self.step_s * (BLOCK + 3 * position)
            tasks.append(_Task(f"in turns with {name}", job, _environment(name), expected, 4 * expected + 1800))
        for streams in options.streams:
            samples = max(BLOCK, options.samples // 2)
            job = self._job("streams", FRAMESTEP, samples=samples, streams=streams)
            expected = START_S + (samples + window) * self.step_s * (streams + 2)
            tasks.append(_Task(f"{streams} streams", job, {}, expected))
        steady = max(options.steady, options.frames[-1] if options.every_frame else 0)
        if steady:
            job = self._job("steady", FRAMESTEP, samples=steady)
            tasks.append(_Task(f"steady run of {steady} frames", job, {}, START_S + steady * self.step_s))
        job = self._job("split", FRAMESTEP, samples=max(BLOCK, options.samples // 2))
        tasks.append(_Task("split of a frame's time", job, {}, START_S + job.samples * self.step_s))
        return tasks

    def _job(self, kind: str, name: str, **more: Any) -> Job:
        options = self.options
        spec = PathSpec(name, str(options.bundle), options.checkpoint, options.engine, self.device, self.threads)
        return Job(kind, spec, reference=str(self.reference), **more)

    def _run(self, task: _Task) -> _Answer:
        self.status.working(task.label, self.done_s)
        return _run_process(
            task, lambda fraction: self.status.working(task.label, self.done_s + fraction * task.expected_s)
        )

    def _answered(self, task: _Task, answer: _Answer) -> bool:
        if answer.result is None:
            self._problem(f"{task.label}: {answer.error}")
        return answer.result is not None

    def _path_report(self, name: str, answers: Sequence[_Answer]) -> PathReport:
        if name == FRAMESTEP:
            title, description = "framestep", f"a session of one stream, {self.engine}."
            environment: dict[str, str] = {}
            stored = self.bundle.manifest.precision
            precision = {"fp32": "float32", "fp16": "float16"}.get(stored, stored)
            if self.options.engine == BFLOAT16:
                precision = BFLOAT16_PRODUCTS
            verification = None
        else:
            baseline = BASELINES[name]
            title, description, environment = baseline.title, baseline.description, baseline.environment
            verification, precision = self.verified[name]
        stopped = None
        for number, answer in enumerate(answers):
            if answer.error is not None:
                self._problem(f"process {number + 1} of {_with_name(name, answer.error)}")
            reason = answer.error or (answer.result or {}).get("stopped")
            stopped = stopped or reason
        positions = []
        for position in self.options.frames:
            found = [answer.positions[position] for answer in answers if position in answer.positions]
            if found:
                positions.append(_position_report(position, found))
        if stopped and not any(stopped in problem for problem in self.problems):
            self._problem(f"{name}: {stopped}")
        return PathReport(
            name,
            title,
            description,
            precision,
            self.threads,
            len(answers),
            environment,
            tuple(positions),
            verification,
            stopped,
        )

    def _tell_missing_percentiles(self, paths: Iterable[PathReport]) -> None:
        fewest = {
            path.name: min(entry.latency_ms.samples for entry in path.positions) for path in paths if path.positions
        }
        few = [f"{name} ({count})" for name, count in fewest.items() if count < LEAST_SAMPLES[99]]
        if few:
            self._problem(
                f"p95 needs {LEAST_SAMPLES[95]} samples at a position and p99 {LEAST_SAMPLES[99]}; fewer somewhere with"
                f" {', '.join(few)}; raise --samples or --processes, for baselines also --budget-s"
            )

    def _steady(self, answer: _Answer) -> SteadyReport:
        assert answer.result is not None
        latencies = [round(value, 4) for value in answer.result["latencies_ms"]]
        memory = [(int(frame), int(size)) for frame, size in answer.result["memory"]]
        tenth = max(1, len(latencies) // 10)
        settled = next((size for frame, size in memory if frame > tenth), memory[-1][1])
        around = []
        for position in self.options.frames:
            near = latencies[position - 1 - position // 8 : position + position // 8]
            if position <= len(latencies):
                around.append(Around(position, len(near), round(float(np.median(near)), 4)))
        return SteadyReport(
            frames=len(latencies),
            latency_ms=Latency.of([latencies]),
            spread_ms=round(float(np.std(latencies)), 4),
            drift=round(float(np.median(latencies[-tenth:]) / np.median(latencies[:tenth])), 4),
            around=tuple(around),
            growth_bytes=memory[-1][1] - settled,
            memory=tuple(number for pair in memory for number in pair),
            latencies_ms=tuple(latencies),
        )

    def _asked(self) -> Asked:
        options = self.options
        words: list[str] = ["framestep", "bench", options.bundle.name, "-o", options.output.name]
        words += ["--frames", ",".join(map(str, options.frames)), "--streams", ",".join(map(str, options.streams))]
        words += ["--compare", ",".join(options.compare)] if options.compare else []
        words += ["--samples", str(options.samples), "--processes", str(options.processes)]
        words += ["--steady", str(options.steady), *(["--every-frame"] if options.every_frame else [])]
        words += ["--threads", str(self.threads), "--engine", options.engine, "--device", options.device]
        words += ["--budget-s", f"{options.budget_s:g}"]
        words += ["--checkpoint", Path(options.checkpoint).name] if options.checkpoint else []
        return Asked(
            command=shlex.join(words),
            frames=options.frames,
            streams=options.streams,
            compare=options.compare,
            samples=options.samples,
            processes=options.processes,
            steady=options.steady,
            every_frame=options.every_frame,
            threads=self.threads,
            engine=options.engine,
            device=self.device,
            budget_s=options.budget_s,
        )

    def _problem(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)
            self.status.report(line)


def _run_process(task: _Task, progress: Any) -> _Answer:
    """Run a job in a process of its own, and take what it says line by line."""
    environment = {name: value for name, value in os.environ.items() if name not in RAISED_THRESHOLDS}
    environment |= task.environment
    answer = _Answer()
    # not -m: the package imports the module too, and runpy warns of that
    command = [sys.executable, "-P", "-c", f"import sys; from {__package__}.measure import main; sys.exit(main())"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        timer = threading.Timer(task.limit_s or 0.0, process.kill)
        if task.limit_s is not None:
            timer.daemon = True
            timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            try:
                with process.stdin as stdin:
                    json.dump(to_json(task.job), stdin)
            except BrokenPipeError:
                pass  # it died at once; its exit status and standard error tell why
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    progress(message["progress"])
                elif "position" in message:
                    entry = PositionSamples(**message["position"])
                    answer.positions[entry.position] = entry
                else:
                    answer.result, answer.error = message.get("result"), message.get("error")
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        if answer.result is None and answer.error is None:
            answer.error = _death(process.returncode, errors)
    return answer


def _death(status: int, errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    if status == -9:
        return "the process was killed: out of memory, or far over its time"
    last = lines[-1][:300] if lines else "nothing on standard error"
    return f"the process failed ({f'signal {-status}' if status < 0 else f'status {status}'}): {last}"


def _environment(name: str) -> dict[str, str]:
    return {} if name == FRAMESTEP else BASELINES[name].environment


def _with_name(name: str, error: str | None) -> str:
    text = error or "failed"
    return text if text.startswith(f"{name}:") else f"{name}: {text}"


def _position_report(position: int, found: Sequence[PositionSamples]) -> PositionReport:
    on_device = [entry.device_bytes for entry in found if entry.device_bytes is not None]
    return PositionReport(
        position=position,
        latency_ms=Latency.of([entry.latencies_ms for entry in found]),
        process_p50_ms=tuple(round(float(np.median(entry.latencies_ms)), 4) for entry in found),
        resident_bytes=int(np.median([entry.resident_bytes for entry in found])),
        peak_bytes=int(np.median([entry.peak_bytes for entry in found])),
        device_bytes=int(np.median(on_device)) if on_device else None,
    )


def _interleaved(job: Job, result: Mapping[str, Any]) -> Interleaved:
    ours, other = Latency.of([result["a_ms"]]), Latency.of([result["b_ms"]])
    return Interleaved(job.other, job.positions[0], ours, other, round(ours.p50 / other.p50, 4))


def _streams(job: Job, result: Mapping[str, Any]) -> StreamsReport:
    together, single, alone = (Latency.of([result[f"{name}_ms"]]) for name in ("together", "single", "alone"))
    return StreamsReport(
        streams=job.streams,
        step_ms=together,
        single_ms=single,
        alone_ms=alone,
        frames_per_second=round(job.streams * 1e3 / together.p50, 3),
        cost=round(together.p50 / single.p50, 4),
        alone_ratio=round(alone.p50 / single.p50, 4),
        peak_bytes=int(result["peak_bytes"]),
    )


def _split(answer: _Answer) -> SplitReport:
    assert answer.result is not None
    medians = {name: round(float(np.median(values)), 4) for name, values in answer.result.items()}
    return SplitReport(
        CAMERA_FRAME[:2],
        medians["preprocess"],
        medians["bind"],
        medians["engine"],
        medians["results"],
        medians["total"],
    )


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest: Manifest = bundle.manifest
    graph = next((graph for graph in manifest.graphs.values() if graph.states), None)
    return BundleFacts(
        path=bundle.path.name,
        family=manifest.family,
        precision=manifest.precision,
        frame=(manifest.frame.height, manifest.frame.width),
        window=window_of(manifest),
        state_bytes=bundle.bytes_per_stream(),
        checkpoint=Path(manifest.origin.checkpoint).name,
        backbone_sha256=manifest.files[graph.file].sha256 if graph else "",
    )


def _draw(report: Report, folder: Path, status: BenchStatus) -> list[Path] | None:
    """The plots, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        status.report("plots: they need matplotlib: pip install 'framestep[bench]'")
        return None
    from .plots import draw

    return draw(report, folder)


def _with_problem(report: Report, problem: str) -> Report:
    from dataclasses import replace

    return replace(report, problems=(*report.problems, problem))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise OutputError(f"{folder}: is a file; the report needs a folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None


def _check(options: BenchOptions) -> None:
    for name, value, least in (
        ("--samples", options.samples, 1),
        ("--processes", options.processes, 1),
        ("--steady", options.steady, 0),
        ("--threads", options.threads, 1),
        ("--budget-s", options.budget_s, 1),
    ):
        if value is not None and not value >= least:
            raise FramestepError(f"{name}: expected at least {least}, found {value}")
    expand_compare(options.compare)
