"""Arithmetic that always takes the same number of operations: what varies in its time is the machine's doing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIDE = 256  # three matrices of 256 KB: in a core's own cache, so that memory has no part in it
TRIALS = 5
# a product of the library that numpy calls is for one thread; ours share the work
ONE_THREAD_EACH = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "BLIS_NUM_THREADS": "1"}


class FixedWork:
    """The same float32 matrix products on each of `threads` threads, over when the last is done, as a step is.

    To be used in a process with `ONE_THREAD_EACH` in its environment.

    Args:
        threads: the caller's is one of them.
        ms: about how long it is to take.
    """

    def __init__(self, threads: int, ms: float) -> None:
        rng = np.random.default_rng(0)
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._operands = [
            (*rng.standard_normal((2, SIDE, SIDE), np.float32), np.empty((SIDE, SIDE), np.float32))
            for _ in range(threads)
        ]
        self.products = 1
        for _ in range(2):  # the first guess is of a single product, and of threads that have yet to start
            each = float(np.median([self.run() for _ in range(TRIALS)])) / self.products
            self.products = max(1, round(ms / each))

    def run(self) -> float:
        """Do the work; milliseconds that it took."""
        start = time.perf_counter()
        others = (
            [self._pool.submit(self._multiply, index) for index in range(1, len(self._operands))] if self._pool else []
        )
        self._multiply(0)
        for other in others:
            other.result()
        return (time.perf_counter() - start) * 1e3

    def _multiply(self, index: int) -> None:
        left, right, product = self._operands[index]
        for _ in range(self.products):
            np.dot(left, right, out=product)
