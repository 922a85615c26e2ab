"""How many threads a session takes by itself: in Python and in the native library, over made-up machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from native_parts import Parts

from framestep.runtime import cores

SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.fixture
def machine(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Threads on a machine of so many processors and files, of which both say the same."""

    def threads(processors: int, **files: str) -> int:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
        found = cores.default_threads(tmp_path)
        assert parts.library.parts_default_threads(processors, os.fsencode(tmp_path)) == found
        return found

    return threads


def test_without_any_word_of_the_system_every_processor_is_a_core(machine) -> None:
    assert machine(6) == 6


def test_hyperthreads_of_a_core_get_one_thread(machine) -> None:
    siblings = {SIBLINGS.format(processor): f"{processor % 4},{processor % 4 + 4}\n" for processor in range(8)}
    assert machine(8, **siblings) == 4
    assert machine(6) == 4  # of two cores both
    assert machine(3) == 3


@pytest.mark.parametrize(
    "quota, threads",
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("broken", 8)],
)
def test_a_container_s_quota_is_kept(machine, quota: str, threads: int) -> None:
    assert machine(8, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota}\n"}) == threads


def test_the_least_quota_of_nested_groups_counts(machine) -> None:
    group = "sys/fs/cgroup/kubepods/pod7/"
    files = {"proc/self/cgroup": "0::/kubepods/pod7/box\n", f"{group}box/cpu.max": "max 100000\n"}
    assert machine(16, **files, **{f"{group}cpu.max": "300000 100000\n"}) == 3
    assert machine(16, **{"sys/fs/cgroup/kubepods/cpu.max": "200000 100000\n"}) == 2


@pytest.mark.parametrize("quota, threads", [(300000, 3), (-1, 8)])
def test_quotas_of_control_groups_of_version_1_count(machine, quota: int, threads: int) -> None:
    files = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/a\n3:cpu,cpuacct:/box\n0::/\n"}
    for name, value in (("quota", quota), ("period", 100000)):
        files[f"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_{name}_us"] = f"{value}\n"
    assert machine(8, **files) == threads


def test_quota_and_cores_together(machine) -> None:
    siblings = {SIBLINGS.format(processor): f"{processor // 2}\n" for processor in range(8)}
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000\n"}
    assert machine(8, **siblings, **files) == 4
