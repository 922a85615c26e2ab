"""Which layers suffer from quantization, and the fewest that must stay in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from ..export.linears import linears
from ..export.rewriting import initializer
from ..runtime.counted import counted
from .errors import CalibrationError
from .observe import Observations
from .quantize import LEVELS, round_to_int8, weight_scale

MOST_KEPT = 0.5  # share of the layers that may stay in float; beyond it, a quantized graph is not worth having


@dataclass(frozen=True)
class LayerNoise:
    """A layer's own quantization noise.

    Attributes:
        graph, layer: where.
        decibels: signal to noise of its output, both weights and input rounded; higher is better.
        largest: the largest absolute value that entered it.
        amax: the range that was taken.
    """

    graph: str
    layer: str
    decibels: float
    largest: float
    amax: float


@dataclass(frozen=True)
class Trial:
    """One choice of layers left in float, and what it gave."""

    kept: tuple[str, ...]
    reached: float
    milliseconds: float


def layer_noise(models: Mapping[str, onnx.ModelProto], seen: Observations) -> list[LayerNoise]:
    """Signal-to-quantization-noise of every linear layer, the noisiest first."""
    found = []
    for graph, model in models.items():
        for linear in linears(model):
            activation = seen[graph][linear.input]
            decibels = _decibels(activation.rows, initializer(model, linear.weight), activation.amax)
            found.append(LayerNoise(graph, linear.name, decibels, activation.largest, activation.amax))
    return sorted(found, key=lambda noise: noise.decibels)


def fewest_kept(
    noise: list[LayerNoise], trial: Callable[[tuple[str, ...]], Trial], keeps: Callable[[float], bool], budget: str
) -> list[Trial]:
    """Leave the noisiest layers in float, as few as keep the budget.

    Args:
        noise: the layers, the noisiest first.
        trial: quantizes all but the layers named, and measures.
        keeps: whether what a trial reached is within the budget.
        budget: the budget in words.

    Returns:
        Every trial made; the last is the one to take.

    Raises:
        CalibrationError: not even with `MOST_KEPT` of the layers in float.
    """
    names = list(dict.fromkeys(item.layer for item in noise))
    most = int(len(names) * MOST_KEPT)
    trials = [trial(())]
    if keeps(trials[0].reached):
        return trials
    low, high = 0, 1  # `low` layers are too few
    best: Trial | None = None
    while best is None:
        trials.append(trial(tuple(names[:high])))
        if keeps(trials[-1].reached):
            best = trials[-1]
        elif high >= most:
            most_reached = max(trials, key=lambda item: item.reached)
            raise CalibrationError(
                f"{budget}: not reached; the best was {abs(most_reached.reached):.6g} with {len(most_reached.kept)} of"
                f" {counted(len(names), 'layer')} in float. Try --smooth, another --method, or more and other video"
            )
        else:
            low, high = high, min(2 * high, most)
    high = len(best.kept)
    while high - low > 1:
        middle = (low + high) // 2
        trials.append(trial(tuple(names[:middle])))
        if keeps(trials[-1].reached):
            best, high = trials[-1], middle
        else:
            low = middle
    if trials[-1] is not best:
        trials.append(best)
    return trials


def _decibels(rows: np.ndarray, weight: np.ndarray, amax: float) -> float:
    exact = rows @ weight
    scale = amax / LEVELS
    columns = weight_scale(weight)
    rounded = round_to_int8(rows, scale).astype(np.float32) @ round_to_int8(weight, columns).astype(np.float32)
    error = rounded * (scale * columns) - exact
    noise = float(np.square(error, dtype=np.float64).mean())
    signal = float(np.square(exact, dtype=np.float64).mean())
    return 200.0 if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
