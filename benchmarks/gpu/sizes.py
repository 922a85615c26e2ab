"""How large everything is: in full on a GPU, small in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        decoder: of a whole decoder, as in Hugging Face's `config.json`.
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
    decoder: dict[str, Any]
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
    decoder={  # Qwen2.5-0.5B
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
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
    decoder={
        "model_type": "qwen2",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    capacity=64,
)
