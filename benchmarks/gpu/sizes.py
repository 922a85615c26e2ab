"""How large everything is: in full on a GPU, small in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from ...export.streamformer import BASE, TINY, StreamFormerConfig


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        model: the step's model.
        window: of the step.
        windows, streams: of `temporal_attention`, every pair that fits into the memory.
        flex: pairs of (streams, window) at which FlexAttention is compiled and measured; each takes seconds to compile.
        positions: of a stream at which the step is measured.
        precisions: of the engine.
        served: stream counts of the whole step.
        runs: measured steps at each position.
        primed: frames that a stream is primed with.
        capacity: of the decoder's cache.
    """

    model: StreamFormerConfig
    window: int
    windows: tuple[int, ...]
    streams: tuple[int, ...]
    flex: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]
    precisions: tuple[str, ...]
    served: tuple[int, ...]
    runs: int
    primed: tuple[int, ...]
    capacity: int


FULL = Sizes(
    model=BASE,
    window=16,
    windows=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    streams=(1, 4, 16, 64),
    flex=((4, 64), (4, 256), (16, 64), (4, 1024)),
    positions=(1, 4, 16, 64, 256, 1024, 4096),
    precisions=("fp16", "bf16", "tf32", "fp32"),
    served=(1, 4, 16, 64, 128, 192, 256, 320, 384),
    runs=400,
    primed=(16, 64, 256),
    capacity=4096,
)
SMALL = Sizes(
    model=TINY,
    window=4,
    windows=(4, 6),
    streams=(1, 2),
    flex=((2, 4),),
    positions=(1, 16),
    precisions=("fp16", "fp32"),
    served=(1, 2),
    runs=4,
    primed=(3,),
    capacity=64,
)
