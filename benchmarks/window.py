"""What a wider window costs: two bundles of one model in turns, against reading the wider one's extra memory once.

    python benchmarks/window.py BUNDLE WIDER_BUNDLE [--steps 60] [--threads N]

    framestep export --random-init base -o base.bundle
    framestep export --random-init base --window 64 -o base-64.bundle

Both rings are full. Steps alternate, A B A B; the cost is the median of the differences of neighbours. Read bandwidth
is that of roofline.py, measured before, in the middle and after: the best of the three counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from roofline import measure_bandwidth

import framestep
from framestep.runtime.cores import default_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("wider", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    sessions = [
        framestep.load(path, outputs=("pooled",), threads=arguments.threads)
        for path in (arguments.bundle, arguments.wider)
    ]
    extra = sessions[1].bundle.bytes_per_stream() - sessions[0].bundle.bytes_per_stream()
    streams = [session.open_stream() for session in sessions]
    frame = sessions[0].frame
    pixels = np.random.default_rng(0).integers(0, 256, (8, frame.height, frame.width, 3), np.uint8)
    for stream, session in zip(streams, sessions, strict=True):
        for index in range(session.bundle.manifest.states[0].capacity + 4):
            stream.step(pixels[index % len(pixels)])
    rates = [measure_bandwidth(arguments.threads)]
    times = np.empty((2, arguments.steps))
    for step in range(arguments.steps):
        if step == arguments.steps // 2:
            rates.append(measure_bandwidth(arguments.threads))
        for which, stream in enumerate(streams):
            begin = time.perf_counter()
            stream.step(pixels[step % len(pixels)])
            times[which, step] = time.perf_counter() - begin
    rates.append(measure_bandwidth(arguments.threads))
    cost = float(np.median(times[1] - times[0]))
    bandwidth = max(rates)
    print(f"p50: {1e3 * np.median(times[0]):.1f} ms and {1e3 * np.median(times[1]):.1f} ms, cost {1e3 * cost:.1f} ms")
    print(f"{extra / 1e6:.0f} MB more to read; read bandwidth {', '.join(f'{rate / 1e9:.1f}' for rate in rates)} GB/s")
    print(f"the extra memory is read at {extra / cost / 1e9:.1f} GB/s, {extra / cost / bandwidth:.0%} of the best")


if __name__ == "__main__":
    main()
