"""A measurement in a process of its own, whatever becomes of that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from framestep.apps.bench.measure import Job
from framestep.apps.bench.paths import PathSpec
from framestep.apps.bench.process import Task, run_process

SCRIPT = """#!/bin/sh
cat > /dev/null
echo '{"position": {"position": 4, "latencies_ms": [1.5]}}'
echo '{"progress": 0.5}'
printf '{"position": {"position": 16, "latenc'
kill -9 $$
"""


def test_what_a_killed_process_said_is_kept_but_for_half_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(SCRIPT)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    told: list[float] = []
    job = Job("latency", PathSpec("framestep", "any.bundle", None, "auto", "cpu", 1))
    answer = run_process(Task("any", job, {}, 1.0), told.append)
    assert answer.error == "the process was killed: out of memory, or far over its time"
    assert {position: found.latencies_ms for position, found in answer.positions.items()} == {4: [1.5]}
    assert told == [0.5]
