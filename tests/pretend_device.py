"""Run every graph of bundles by the torch engine's program on a device that has no memory: shapes and types alone.

    python tests/pretend_device.py DTYPE TOKENS BUNDLE...

A call that asks for a number of the device, or that mixes its tensors with the host's, fails: a CUDA graph could not be
captured. Prints the names of the graphs that ran.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from framestep.runtime.bundle import Bundle, Graph
from framestep.runtime.engines import torch_program
from framestep.runtime.engines.onnx_program import read_graph
from framestep.runtime.engines.torch import _step
from framestep.runtime.engines.torch_operators import HOST_INPUTS, HOST_OUTPUTS
from framestep.runtime.engines.torch_program import HOST, Program

CPU, DEVICE = torch.device("cpu"), "npy:0"


class Steering:
    """A tensor on the host that steers shapes: its numbers may be read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        numbers, count = tensor.tolist(), tensor.numel()
        self.tolist = self.item = lambda: numbers
        self.numel = lambda: count


def on_device(mode: FakeTensorMode, shape, dtype: torch.dtype) -> FakeTensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device(DEVICE))


def pretended(mode: FakeTensorMode, call):
    steering = HOST_INPUTS.get(call.node.op, ())

    def compute(*given):
        fake = [isinstance(x, FakeTensor) for x in given]
        if call.node.op in HOST_OUTPUTS or not any(fake):
            made = call.compute(*given)
            return made if call.outputs[0].startswith(HOST) else on_device(mode, made.shape, made.dtype)
        host = [isinstance(x, torch.Tensor) and not known for x, known in zip(given, fake, strict=True)]
        given = [
            (Steering(x) if at in steering else mode.from_tensor(x)) if real else x
            for at, (x, real) in enumerate(zip(given, host, strict=True))
        ]
        with mode:
            return call.compute(*given)

    return compute


torch_program.keeps_integers = lambda device: True  # as on the device that is pretended


def run(bundle: Bundle, graph: Graph, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    mode = FakeTensorMode()
    position = next((port.name for port in graph.inputs if port.role == "position"), None)
    rings = [(use.input, use.output) for use in graph.states if use.output is not None]
    program = Program(read_graph(bundle.file(graph.file)), position, rings, dtype, CPU)
    for name, value in program._constants.items():
        if isinstance(value, torch.Tensor) and not name.startswith(HOST):
            program._constants[name] = on_device(mode, value.shape, value.dtype)
    program._calls = tuple(
        call if call.compute is None else replace(call, compute=pretended(mode, call)) for call in program._calls
    )
    inputs = {
        port.name: on_device(mode, [sizes.get(n, n) for n in port.shape], getattr(torch, port.dtype))
        for port in graph.inputs
    }
    states = {state.name: state for state in bundle.manifest.states}
    for use in graph.states:
        shape = (1, *map(int, states[use.state].shape[1:]))
        inputs[use.input] = on_device(mode, shape, dtype)
    attend = torch_program._attend

    def attend_pretended(*given):
        with mode:
            return attend(*given)

    torch_program._attend = attend_pretended
    found = program(inputs, _step)
    torch_program._attend = attend
    assert all(str(x.device) == DEVICE for x in found.values())


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE.split(":")[0])
    dtype, tokens = getattr(torch, sys.argv[1]), int(sys.argv[2])
    for bundle in map(Bundle.open, sys.argv[3:]):
        for name, graph in bundle.manifest.graphs.items():
            run(bundle, graph, dtype if graph.states else torch.float32, {"S": 1, "T": tokens, "C": 5, "B": 2})
            print(name)


if __name__ == "__main__":
    main()
