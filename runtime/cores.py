"""How many threads a session has where nobody says it; `runtime/native/cores.h` is the same for C and C++."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_processors() -> int:
    """Processors that this process may use; hyperthreads count."""
    return len(_processors())


def default_threads(root: Path = ROOT) -> int:
    """Cores behind the processors that this process may use, but no more than its control groups give the time of.

    Hyperthreads share the arithmetic of their core. Threads beyond a group's quota (`docker run --cpus`, a limit in
    Kubernetes) would use it up early in each period, and then all of them stand still for the rest of it.

    Args:
        root: of the file systems `/sys` and `/proc`.
    """
    cores = {_siblings(root, processor) for processor in _processors()}
    quotas = [int(quota) for quota in _quotas(root)]
    return max(1, min([len(cores), *quotas]))


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(root: Path, processor: int) -> str:
    """The processors of the same core, as Linux lists them."""
    with suppress(OSError):
        return (root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    return str(processor)


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time of the control groups that this process is in, one within the other."""
    groups = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                for folder in _upwards(groups, path):
                    with suppress(OSError, ValueError, ZeroDivisionError):
                        quota, period = (folder / "cpu.max").read_text().split()
                        if quota != "max":
                            yield int(quota) / int(period)
            elif "cpu" in controllers.split(","):
                for folder in _upwards(groups / controllers, path):
                    with suppress(OSError, ValueError, ZeroDivisionError):
                        quota = (folder / "cpu.cfs_quota_us").read_text()
                        if int(quota) > 0:
                            yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    inside = PurePosixPath(path.lstrip("/"))
    for part in (inside, *inside.parents):
        yield mount / part
