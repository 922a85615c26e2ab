"""Bundles to build engines from."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from framestep.calibration.observe import Activation
from framestep.calibration.quantize import quantize
from framestep.export.graph import WeightFile, save_graph
from framestep.export.half import centre_pixels, to_half
from framestep.export.linears import linears
from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.manifest import Variant

AMAX = 8.0  # what every linear layer is taken to see: ranges matter to numbers, not to the network


def add_quantized(path: Path) -> int:
    """Add the precision fp16+int8 to a bundle, with made-up ranges. Returns the number of quantized layers."""
    bundle = Bundle.open(path, verify=False)
    manifest = bundle.manifest
    graph = manifest.graphs["backbone"]
    model = onnx.load(bundle.file(graph.file))
    centre_pixels(model)
    seen = Activation(AMAX, AMAX, np.ones(1, np.float32), np.ones((1, 1), np.float32))
    quantized = quantize(model, {linear.input: seen for linear in linears(model)})
    to_half(model, [port for use in graph.states for port in (use.input, use.output) if port])
    weights = WeightFile(path / "fp16-int8.bin")
    quantized_graph = replace(graph, file="backbone.fp16-int8.onnx")
    save_graph(model, path / quantized_graph.file, weights)
    weights.close()
    states = tuple(replace(state, dtype="float16") for state in manifest.states)
    files = {name: file_entry(path / name) for name in (quantized_graph.file, "fp16-int8.bin")}
    variants = {**manifest.variants, "fp16+int8": Variant({"backbone": quantized_graph}, states)}
    bundle.rewrite_manifest(replace(manifest, files={**manifest.files, **files}, variants=variants))
    return len(quantized)


def weight_bytes(bundle: Bundle, precision: str, graph: str) -> int:
    """Bytes of a graph's constants."""
    file = bundle.file(bundle.manifest.at(precision).graphs[graph].file)
    model = onnx.load(file, load_external_data=False)
    size = 0
    for item in model.graph.initializer:
        places = {entry.key: entry.value for entry in item.external_data}
        size += int(places.get("length", 0)) or len(item.SerializeToString())
    return size


def readers_of_caches(plan: bytes) -> list[str]:
    """Kernels of an engine that read keys or values and do not update them."""
    cache = rb"\.(?:key|value)\.p"  # past or present: where a step only reads it
    steps = re.findall(rb"function=\{ name=(\S+) [^\n]* input_args=\{([^}]*)\}[^}]* output_args=\{([^}]*)\}", plan)
    return [name.decode() for name, read, written in steps if re.search(cache, read) and not re.search(cache, written)]


class NoProgress:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.started: list[tuple[str, str | None, int]] = []
        self.steps = 0
        self.open: list[str] = []

    def graph(self, name: str) -> None:
        self.graphs.append(name)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.started.append((phase, parent, steps))
        self.open.append(phase)

    def step(self, phase: str, done: int) -> None:
        self.steps += 1

    def finish(self, phase: str) -> None:
        self.open.remove(phase)
