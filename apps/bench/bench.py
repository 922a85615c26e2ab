"""`framestep bench`: plans the measurements, runs each in a fresh process, and writes the report."""

from __future__ import annotations

import datetime
import importlib.util
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...runtime.bundle import Bundle
from ...runtime.cores import default_threads
from ...runtime.counted import counted
from ...runtime.engines.choosing import BFLOAT16, choose_engine
from ...runtime.errors import FramestepError, OutputError
from . import results
from .baselines import BFLOAT16_PRODUCTS, find_baseline, precision_name, precision_path
from .figures import make_folder
from .fixed_work import ONE_THREAD_EACH
from .machine import examine_machine
from .measure import BLOCK, GUARANTEED, Job
from .options import BenchOptions, expand_compare
from .paths import FRAMESTEP, PathSpec, window_of
from .process import Answer, Task, run_process
from .progress import BenchStatus
from .report import LEAST_SAMPLES, VERSION, Asked, PathReport, Report, Verification
from .report_files import write_report

MOST_ROUNDS = 10  # of interleaved turns
MOST_TURNS = 200  # of frames and fixed work
NO_PLOTS = "plots: they need matplotlib: pip install 'framestep[bench]'"
START_S = 4.0  # guess of what it takes to start a process and load a model


def bench(options: BenchOptions, status: BenchStatus) -> Report:
    """Measure, and write `report.json`, `report.md` and the plots into `options.output`.

    What cannot be measured is reported through `status` and in the report, and the rest goes on. Ctrl-C ends the
    measuring, and what was measured until then is written.

    Raises:
        FramestepError: the options make no sense, the bundle cannot be read, the folder not written, or nothing could
            be measured and the folder has an earlier report, which stays.
    """
    options.check()
    bundle = Bundle.open(options.bundle)
    make_folder(options.output)
    with tempfile.TemporaryDirectory(prefix="framestep-bench-") as scratch:
        run = _Run(options, bundle, Path(scratch), status)
        try:
            report = run.measure()
        finally:
            status.close()
    if not report.paths and (options.output / "report.json").exists():
        raise FramestepError(f"{options.output}: nothing could be measured; the earlier report there stays as it was")
    plots = _draw(report, options.output, status)
    if plots is None:
        report = replace(report, problems=(*report.problems, NO_PLOTS))
    try:
        write_report(report, options.output, plots or [])
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written: {error.strerror}") from None
    return report


class _Run:
    """One bench."""

    def __init__(self, options: BenchOptions, bundle: Bundle, scratch: Path, status: BenchStatus) -> None:
        self.options, self.bundle, self.status = options, bundle, status
        self.compared = expand_compare(options.compare, bundle.manifest.precisions)
        self.precision, self.stored = options.precision, bundle.manifest.precisions
        self.threads = options.threads or default_threads()
        self.reference = scratch / "reference.npz"
        self.problems: list[str] = []
        self.verified: dict[str, tuple[Verification | None, str]] = {}
        self.done_s = 0.0
        self.reason = ""
        try:
            choice = choose_engine(bundle.manifest, options.engine, options.device, options.precision)
            self.device, self.reason = choice.device, choice.reason
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
        answers: list[tuple[Task, Answer]] = []
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
        latency: dict[str, list[Answer]] = {name: [] for name in usable}
        for task, answer in answers:
            if task.job.kind == "latency":
                latency[task.job.path.name].append(answer)
        paths = tuple(self._path_report(name, found) for name, found in latency.items() if found)
        self._tell_missing_percentiles(paths)
        interleaved = [results.interleaved(*found) for found in self._results("interleaved", answers)]
        streams = [results.streams(*found) for found in self._results("streams", answers)]
        steady = [results.steady(found, self.options.frames) for _, found in self._results("steady", answers)]
        split = [results.split(found) for _, found in self._results("split", answers)]
        jitter = [results.jitter(found) for _, found in self._results("jitter", answers)]
        return Report(
            version=VERSION,
            framestep=__version__,
            created=created,
            seconds=round(time.perf_counter() - begin, 1),
            asked=self._asked(),
            bundle=results.bundle_facts(self.bundle),
            machine=machine,
            engine=self.engine,
            paths=paths,
            interleaved=tuple(interleaved),
            streams=tuple(streams),
            steady=steady[0] if steady else None,
            split=split[0] if split else None,
            jitter=jitter[0] if jitter else None,
            problems=tuple(self.problems),
        )

    def _verify(self) -> list[str]:
        """Let the session tell its outputs, and compare each baseline with them; the paths to measure, ours first."""
        usable: list[str] = []
        answer = self._run(Task("checking framestep", self._job("reference", FRAMESTEP), {}, START_S))
        if answer.result is not None:
            usable.append(FRAMESTEP)
            self.step_s = answer.result["step_ms"] / 1e3
            self.precision = answer.result["precision"]  # of a bundle's several
            taken = self.bundle.manifest.at(self.precision)
            self.bundle = replace(self.bundle, manifest=taken)
            self.engine = f"{self.reason}, {taken.precision}"
        else:
            self._problem(f"{FRAMESTEP}: {answer.error}")
        for name in self.compared:
            if name == precision_path(self.precision):
                continue  # that is the session itself
            if answer.result is None:
                self._problem(f"{name}: not checked against the session, which does not run here")
                self.verified[name] = (None, find_baseline(name).precision)
                usable.append(name)
                continue
            task = Task(f"checking {name}", self._job("difference", name), _environment(name), START_S)
            checked = self._run(task)
            if checked.result is None:
                self._problem(_with_name(name, checked.error))
                continue
            difference, largest = float(checked.result["difference"]), checked.result.get("largest_output")
            limit = find_baseline(name).tolerance
            if limit is not None:
                limit *= max(1.0, largest or 1.0)  # rounding goes by the size of what is summed
            found = Verification(int(checked.result["frames"]), float(f"{difference:.3g}"), limit, largest)
            precision = checked.result.get("precision") or find_baseline(name).precision
            if not math.isfinite(difference) or (limit is not None and difference > limit):
                ours = self.bundle.manifest.precision
                advice = "is it the same checkpoint?" if ours == "fp32" else f"take a bundle in fp32, not {ours}"
                advice = "add --precision fp32" if ours != "fp32" and "fp32" in self.stored else advice
                self._problem(
                    f"{name}: not measured, its outputs differ from the session's by {difference:.1e}"
                    f" over {counted(found.frames, 'frame')} (at most {limit or 0:.1e} is accepted); {advice}"
                )
                continue
            self.verified[name] = (found, precision)
            usable.append(name)
        return usable

    def _plan(self, usable: Sequence[str]) -> list[Task]:
        options = self.options
        window = window_of(self.bundle.manifest)
        each_budget = options.budget_s / options.processes
        tasks: list[Task] = []
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
                tasks.append(Task(label, job, _environment(name), START_S + expected, limit))
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
            tasks.append(Task(f"in turns with {name}", job, _environment(name), expected, 4 * expected + 1800))
        for streams in options.streams:
            samples = max(BLOCK, options.samples // 2)
            job = self._job("streams", FRAMESTEP, samples=samples, streams=streams)
            expected = START_S + (samples + window) * self.step_s * (streams + 2)
            tasks.append(Task(counted(streams, "stream"), job, {}, expected))
        steady = max(options.steady, options.frames[-1] if options.every_frame else 0)
        if steady:
            job = self._job("steady", FRAMESTEP, samples=steady)
            tasks.append(Task(f"steady run of {counted(steady, 'frame')}", job, {}, START_S + steady * self.step_s))
        if steady and self.device == "cpu":
            job = self._job("jitter", FRAMESTEP, samples=min(steady, MOST_TURNS))
            expected = START_S + (2 * job.samples + window) * self.step_s
            tasks.append(Task("the machine's own jitter", job, ONE_THREAD_EACH, expected))
        job = self._job("split", FRAMESTEP, samples=max(BLOCK, options.samples // 2))
        tasks.append(Task("split of a frame's time", job, {}, START_S + job.samples * self.step_s))
        return tasks

    def _job(self, kind: str, name: str, **more: Any) -> Job:
        options = self.options
        spec = PathSpec(
            name,
            str(options.bundle),
            options.checkpoint,
            options.engine,
            self.device,
            self.threads,
            self.precision,
        )
        return Job(kind, spec, reference=str(self.reference), **more)

    def _run(self, task: Task) -> Answer:
        self.status.working(task.label, self.done_s)
        return run_process(
            task, lambda fraction: self.status.working(task.label, self.done_s + fraction * task.expected_s)
        )

    def _results(self, kind: str, answers: Iterable[tuple[Task, Answer]]) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        """What came of the jobs of a kind."""
        for task, answer in answers:
            if task.job.kind == kind:
                if answer.result is None:
                    self._problem(f"{task.label}: {answer.error}")
                else:
                    yield task.job, answer.result

    def _path_report(self, name: str, answers: Sequence[Answer]) -> PathReport:
        if name == FRAMESTEP:
            title, description = "framestep", f"a session of one stream, {self.engine}."
            environment: dict[str, str] = {}
            precision = precision_name(self.bundle.manifest.precision)
            if self.options.engine == BFLOAT16:
                precision = BFLOAT16_PRODUCTS
            verification = None
        else:
            baseline = find_baseline(name)
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
                positions.append(results.position_report(position, found))
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

    def _asked(self) -> Asked:
        options = self.options
        return Asked(
            command=options.command(self.threads),
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
            precision=options.precision,
        )

    def _problem(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)
            self.status.report(line)


def _environment(name: str) -> dict[str, str]:
    return {} if name == FRAMESTEP else find_baseline(name).environment


def _with_name(name: str, error: str | None) -> str:
    text = error or "failed"
    return text if text.startswith(f"{name}:") else f"{name}: {text}"


def _draw(report: Report, folder: Path, status: BenchStatus) -> list[Path] | None:
    """The plots, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        status.report(NO_PLOTS)
        return None
    from .plots import draw

    return draw(report, folder)
