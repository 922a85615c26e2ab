"""A measurement in a process of its own: what is run there, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...runtime.schema import to_json
from .baselines import RAISED_THRESHOLDS
from .measure import Job, PositionSamples


@dataclass
class Task:
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
class Answer:
    """What a process said. Positions are kept even where it died on the way."""

    result: dict[str, Any] | None = None
    error: str | None = None
    positions: dict[int, PositionSamples] = field(default_factory=dict)


def run_process(task: Task, progress: Callable[[float], None]) -> Answer:
    """Run a job in a process of its own, and take what it says line by line."""
    environment = {name: value for name, value in os.environ.items() if name not in RAISED_THRESHOLDS}
    environment |= task.environment
    answer = Answer()
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
                if not line.endswith("\n"):
                    break  # it was killed as it wrote
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
