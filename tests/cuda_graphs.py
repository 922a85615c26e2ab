"""Stands in for `torch.cuda` on a CPU: a capture records PyTorch's calls, and a replay makes them again over the same
memory, as a CUDA graph does. What Python decided while it was recorded stays decided."""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framestep.runtime.engines.torch import TorchEngine


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made = []  # function, arguments, what came out

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.made.append((function, args, kwargs or {}, found))
        return found

    def forget(self) -> None:
        """A capture computes nothing: spoil what came out in new memory."""
        for _, args, kwargs, found in self.made:
            held = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for x in tree_leaves(found):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and _memory(x) not in held:
                    x.fill_(math.nan)

    def replay(self) -> None:
        for function, args, kwargs, found in self.made:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)


class Driver:
    """Makes an engine that was loaded for a CPU go the way of CUDA.

    Attributes:
        calls: what it was asked for: "step" (eager or captured), "wait", "capture", "replay", "synchronize".
    """

    def __init__(self, engine: TorchEngine, monkeypatch) -> None:
        self.calls: list[str] = []
        calls = self.calls
        began = threading.local()  # what this thread has run, as libraries begin in each thread by themselves
        pools: dict[int, weakref.WeakSet[Graph]] = {}
        current = threading.local()

        class Stream:
            def wait_stream(self, other) -> None:
                calls.append("wait")

            def synchronize(self) -> None:
                calls.append("synchronize")

        class Graph:
            def replay(self) -> None:
                calls.append("replay")
                self.recorder.replay()

            def pool(self) -> tuple[int, int]:
                return (0, self.pool_number)

        class Capture:
            def __init__(self, graph, pool, stream, capture_error_mode) -> None:
                self.graph, self.stream = graph, stream
                graph.recorder = _Recorder()
                if pool is not None and not pools[pool[1]]:
                    raise RuntimeError("a pool without graphs")
                graph.pool_number = len(pools) if pool is None else pool[1]
                pools.setdefault(graph.pool_number, weakref.WeakSet()).add(graph)

            def __enter__(self) -> None:
                calls.append("capture")
                if not getattr(began, "yes", False):
                    raise RuntimeError("a library begins in a capture")
                current.stream = self.stream
                self.states = {name: state.clone() for name, state in engine._states.items()}
                self.graph.recorder.__enter__()

            def __exit__(self, *error) -> None:
                self.graph.recorder.__exit__(*error)
                self.graph.recorder.forget()
                for name, state in self.states.items():
                    engine._states[name].copy_(state)
                if error[0] is not None:
                    raise RuntimeError("a capture that cannot end")  # and whose stream stays
                current.stream = default

        class Using:
            def __init__(self, stream) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                began.yes = True
                self.before, current.stream = current_stream(), self.stream

            def __exit__(self, *error) -> None:
                current.stream = self.before

        default = Stream()

        def current_stream() -> Stream:
            return getattr(current, "stream", default)

        monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "stream", Using)
        engine._side = Stream()
        engine._frames, engine._positions = engine._frames.clone(), engine._positions.clone()
        step = engine._step

        def recorded_step(first: int, stop: int) -> None:
            calls.append("step")
            step(first, stop)

        engine._step = recorded_step


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
