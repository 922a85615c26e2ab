"""The work of `framestep bench`: the measurement that suits a bundle, and a refusal of options that do not."""

from __future__ import annotations

import sys
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.errors import FramestepError
from ..runtime.schema import to_json
from .bench import BenchOptions
from .bench import bench as bench_streams
from .bench.dialogue import bench_dialogue
from .bench.following import bench_following
from .bench.progress import bench_status_for
from .output_places import check_outside_bundles

# options that say nothing to a decoder
OF_STREAMS = ("streams", "processes", "steady", "every_frame", "budget_s", "precision")


@dataclass(frozen=True)
class Measured:
    """What came of a measurement.

    Attributes:
        framestep: whether framestep itself could be measured.
    """

    facts: Any
    text: str
    framestep: bool


def bench(options: BenchOptions, typed: Container[str], quiet: bool) -> Measured:
    """Measure, and write the report.

    Args:
        typed: names of the options that were given, and not left at their defaults.
        quiet: tell no progress of what goes on in other processes.

    Raises:
        FramestepError: see `bench.bench`; also where an option does not suit the bundle.
    """
    check_outside_bundles(options.output, "--output")
    if options.checkpoint is not None and not options.compare:
        raise FramestepError("--checkpoint: is what PyTorch's baselines run; name some with --compare, or leave it out")
    bundle = Bundle.open(options.bundle)
    if bundle.manifest.language is not None:
        return _bench_decoder(bundle, options, typed)
    report = bench_streams(options, bench_status_for(quiet=quiet))
    return Measured(to_json(report), f"{options.output / 'report.md'}", report.path("framestep") is not None)


def _bench_decoder(bundle: Bundle, options: BenchOptions, typed: Container[str]) -> Measured:
    if options.compare or options.checkpoint is not None:
        raise FramestepError(
            "--compare and --checkpoint: baselines are of models without a decoder; 'framestep recall' compares"
            " the decisions of two bundles"
        )
    for name in OF_STREAMS:
        if name in typed:
            raise FramestepError(
                f"--{name.replace('_', '-')}: a decoder is measured by turns of one stream in one process;"
                " it has --frames and --samples"
            )
    assert bundle.manifest.language is not None
    measure = bench_dialogue if bundle.manifest.language.cross is None else bench_following
    report: Any = measure(
        bundle,
        options.output,
        options.frames,
        options.samples,
        options.engine,
        options.device,
        options.threads,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    return Measured(to_json(report), report.as_text(), framestep=True)
