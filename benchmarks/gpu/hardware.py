"""The device that a section runs on: a GPU, or this machine's CPU for a rehearsal with small sizes."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import triton

L2_TIMES = 4  # rotate among so many times the L2 cache's bytes
MOST_SETS = 64
GRAPH_SECONDS = 3e-3  # a timed graph takes about so long: its launch then counts for little
MOST_REPEATS = 200
MEMORY_SHARE = 0.6  # of the card that one measurement may take


class Hardware(Protocol):
    """Where to allocate, how long calls take, and how much memory there is."""

    device: torch.device
    rehearsal: bool

    def describe(self) -> dict[str, Any]: ...
    def sets(self, size: int) -> int: ...
    def room(self) -> int: ...
    def time(self, calls: Sequence[Callable[[], Any]], seconds: float = 0.2) -> float: ...
    def wall(self, call: Callable[[], Any], count: int) -> list[float]: ...
    def synchronize(self) -> None: ...
    def peak_bytes(self) -> int: ...
    def held_bytes(self) -> int: ...
    def free(self) -> None: ...


class Cuda:
    """The first GPU."""

    rehearsal = False

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self._properties = torch.cuda.get_device_properties(0)

    def describe(self) -> dict[str, Any]:
        found = self._properties
        return {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def sets(self, size: int) -> int:
        """How many sets of so many bytes to rotate among, so that none is found in the cache."""
        return max(1, min(MOST_SETS, -(-L2_TIMES * self._properties.L2_cache_size // size)))

    def room(self) -> int:
        """Bytes that one measurement may take."""
        return int(MEMORY_SHARE * self._properties.total_memory)

    def time(self, calls: Sequence[Callable[[], Any]], seconds: float = 0.2) -> float:
        """Median seconds of one call, over replays of a CUDA graph of all of them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        once = self._replays(calls, 3)
        repeats = max(1, min(MOST_REPEATS, int(GRAPH_SECONDS / once)))
        found = self._replays(list(calls) * repeats, max(7, min(100, int(seconds / (once * repeats)))))
        return found / (repeats * len(calls))

    def wall(self, call: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each call on the host's clock; a call has to wait for its result itself."""
        return _wall(call, count)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """The most memory that was allocated since `free`."""
        return torch.cuda.max_memory_allocated()

    def held_bytes(self) -> int:
        """The memory that is allocated now."""
        return torch.cuda.memory_allocated()

    def free(self) -> None:
        """Give back what is not used any more."""
        import gc

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def _replays(self, calls: Sequence[Callable[[], Any]], count: int) -> float:
        """Median seconds of a graph of these calls."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        spent = []
        for _ in range(count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(spent)


class Rehearsal:
    """The CPU, with the kernels interpreted: everything runs once, and no time means anything."""

    rehearsal = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        return {"name": "rehearsal on the CPU", "torch": torch.__version__, "triton": triton.__version__}

    def sets(self, size: int) -> int:
        return 2

    def room(self) -> int:
        return 1 << 28

    def time(self, calls: Sequence[Callable[[], Any]], seconds: float = 0.2) -> float:
        return statistics.median(_wall(calls[0], 1))

    def wall(self, call: Callable[[], Any], count: int) -> list[float]:
        return _wall(call, 1)

    def synchronize(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def held_bytes(self) -> int:
        return 0

    def free(self) -> None:
        pass


def find_hardware(rehearse: bool) -> Hardware:
    if rehearse:
        check_interpreter()
    return Rehearsal() if rehearse else Cuda()


def check_interpreter() -> None:
    """Triton's interpreter before 3.7 takes numbers out of arrays in a way that NumPy 2.4 refuses."""
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise SystemExit(
            f"Triton {triton.__version__} cannot interpret kernels with NumPy {np.__version__};"
            " take Triton 3.7 or later, or NumPy below 2.4"
        )


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    return {
        "p50_ms": percentile(seconds, 0.5) * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "max_ms": max(seconds) * 1e3,
    }


def _wall(call: Callable[[], Any], count: int) -> list[float]:
    spent = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return spent


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
