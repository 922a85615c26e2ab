"""An ONNX graph as a list of PyTorch calls on one device.

The list is walked in Python: that is the whole engine on a CPU, and on CUDA it happens once, while a CUDA graph is
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import pack_blocks
from ..errors import EngineError
from .onnx_blocks import keep_blocks
from .onnx_program import BLOCK_LINEAR, RING, Node, OnnxGraph, rewrite
from .torch_operators import FLOATS, HOST_INPUTS, HOST_OUTPUTS, OPERATORS, Compute, Unsupported

HOST = "host:"  # prefix of what has to be on the host
WIDENED = "memory:widened"  # name of the memory into which parts of matrices are widened
WIDENED_BYTES = 1 << 25  # a part stays in the L2 cache between its being written and read

# query, key, value [S, N, H, d], key ring, value ring [S, N * H, W, d], position [S], scale -> [S, N, H, d]; an INT8
# ring's scales of keys and of values, float32 [H], come last
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class _Call:
    node: Node
    compute: Compute | None  # None for what the caller computes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]  # values that nothing needs afterwards


class Program:
    """What computes a graph's outputs from its inputs.

    On CUDA matrices of integers in blocks stay packed, and are multiplied by as they are. They are widened here on a
    CPU, the reference, and in a graph that counts frames: its steps have many rows, and would widen them again each.

    Args:
        graph: as read.
        position: the input that counts a stream's frames; None for a graph without state.
        rings: input and output of each state.
        dtype: of every floating number; None for the file's own.
        device: where constants lie and everything runs.

    Raises:
        EngineError: an operator, or a form of one, that is not here.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        position: str | None,
        rings: Sequence[tuple[str, str]],
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        if position is None and keeps_integers(device):
            graph = keep_blocks(graph)
        graph = _fold_constants(graph)
        graph = rewrite(graph, position or "", rings)
        graph = _with_floats(graph, dtype)
        self.outputs = graph.outputs
        self._dtype = dtype
        self.rings = sum(node.op == RING for node in graph.nodes)
        scales = {name for node in graph.nodes if node.op == RING for name in node.inputs[6:]}
        all_rings = self.rings * 2 == len(rings) and not any(node.op == "TensorScatter" for node in graph.nodes)
        self.prefills = all_rings and not scales  # there is no prefill into INT8
        graph, bits, steps = _with_memory(graph)
        kept = scales | steps | _tables(graph)
        on_host = _host_values(graph)
        self._calls = _calls(graph, on_host, device)
        read = {name for call in self._calls for name in call.inputs} | set(graph.outputs)
        self._constants: dict[str, Any] = {"": None}  # an input that is left out
        if bits:
            self._constants[WIDENED] = torch.empty(WIDENED_BYTES, dtype=torch.uint8, device=device)
        for name, array in graph.constants.items():
            value = torch.from_numpy(np.array(array))  # a copy: mapped files are read-only
            if name in bits:
                value = pack_blocks(value.to(device), bits[name])
            elif value.is_floating_point() and dtype is not None and name not in kept:
                value = value.to(dtype)
            if name in read:
                self._constants[name] = value.to(device)
            if HOST + name in read:
                self._constants[HOST + name] = value

    def __call__(self, inputs: Mapping[str, Tensor], attend: Attend) -> dict[str, Tensor]:
        """Run.

        Args:
            inputs: by name, those of state included; state is updated in place. Floating numbers may have any type.
            attend: one step of attention over rings.

        Returns:
            The graph's outputs by name.
        """
        values: dict[str, Any] = {**self._constants, **inputs}
        if self._dtype is not None:
            values.update({name: x.to(self._dtype) for name, x in inputs.items() if x.is_floating_point()})
        for call in self._calls:
            given = [values[name] for name in call.inputs]
            made = _attend(call.node, attend, *given) if call.compute is None else call.compute(*given)
            if len(call.outputs) == 1:
                values[call.outputs[0]] = made
            else:
                values.update(zip(call.outputs, made, strict=True))
            for name in call.last_uses:
                del values[name]
        return {name: values[name] for name in self.outputs}


def keeps_integers(device: torch.device) -> bool:
    """Whether matrices of integers in blocks are multiplied by as they are."""
    return bool(device.type == "cuda")


def _attend(
    node: Node,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    position: Tensor,
    *scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result has the shape that ONNX gives it: [S, N * H, 1, d]."""
    head_dim = key_ring.shape[-1]
    heads = node.attributes.get("heads")  # after which an INT8 ring's scales repeat
    if heads is not None:
        query, key, value = (x.reshape(x.shape[0], -1, heads, head_dim) for x in (query, key, value))
    else:
        # [S, N, H * d] as it was before it was reshaped, or rows, each of which then counts as a patch of one head
        query, key, value = (
            x.unflatten(-1, (-1, head_dim)) if x.dim() == 3 else x.reshape(x.shape[0], -1, 1, head_dim)
            for x in (query, key, value)
        )
    scale = node.attributes.get("scale", head_dim**-0.5)
    mixed = attend(query, key, value, key_ring, value_ring, position, scale, *scales)
    return mixed.flatten(1, 2).unsqueeze(2), key_ring, value_ring


def _fold_constants(graph: OnnxGraph) -> OnnxGraph:
    """Compute once what depends on constants alone, such as weights that are kept as integers."""
    constants = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        if not node.inputs or any(name and name not in constants for name in node.inputs):
            nodes.append(node)
            continue
        given = [torch.from_numpy(np.array(constants[name])) if name else None for name in node.inputs]
        made = _compute(graph, node, torch.device("cpu"))(*given)
        made = made if isinstance(made, tuple) else (made,)
        constants.update(zip(node.outputs, (value.numpy() for value in made), strict=True))
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _with_floats(graph: OnnxGraph, dtype: torch.dtype | None) -> OnnxGraph:
    """Let casts to a floating type, and what reads INT8 as one, give `dtype`."""
    if dtype is None:
        return graph
    number = next(number for number, known in FLOATS.items() if known == dtype)
    names = {"Cast": "to", "DequantizeLinear": "output_dtype"}
    nodes = [
        replace(node, attributes={**node.attributes, names[node.op]: number})
        if node.op in names and node.attributes.get(names[node.op]) in FLOATS
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def _with_memory(graph: OnnxGraph) -> tuple[OnnxGraph, dict[str, int], set[str]]:
    """Products of integers with a bias, or none, and the memory to widen into as their last inputs.

    Returns also how many bits each matrix has, and the names of the scales; both by constants' names.
    """
    products = [node for node in graph.nodes if node.op.startswith(BLOCK_LINEAR)]
    made = {
        node.outputs: replace(node, inputs=(*node.inputs, *[""] * (4 - len(node.inputs)), WIDENED)) for node in products
    }
    nodes = tuple(made.get(node.outputs, node) for node in graph.nodes)
    bits = {node.inputs[1]: int(node.attributes["bits"]) for node in products}
    return replace(graph, nodes=nodes), bits, {node.inputs[2] for node in products}


def _tables(graph: OnnxGraph) -> set[str]:
    """Constants of which rows are picked and only these are cast: embeddings in half precision need not be wider."""
    users: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    cast = {name for name, nodes in users.items() if all(node.op == "Cast" for node in nodes)} - set(graph.outputs)

    def picked(name: str, node: Node) -> bool:
        return node.op == "Gather" and node.inputs[0] == name and node.outputs[0] in cast

    return {name for name in graph.constants if name in users and all(picked(name, node) for node in users[name])}


def _host_values(graph: OnnxGraph) -> set[str]:
    """Values that steer shapes, and what they are made of."""
    needed: set[str] = set()
    for node in reversed(graph.nodes):
        needed.update(node.inputs[at] for at in HOST_INPUTS.get(node.op, ()) if at < len(node.inputs))
        if needed.intersection(node.outputs) and node.op not in HOST_OUTPUTS:
            needed.update(node.inputs)
    return needed


def _calls(graph: OnnxGraph, on_host: set[str], device: torch.device) -> tuple[_Call, ...]:
    calls = []
    # on the host alone: a number that is there may be computed with on the device too
    only_host = {name for node in graph.nodes for name in node.outputs} & on_host
    for node in graph.nodes:
        steering = HOST_INPUTS.get(node.op, ())
        runs_on_host = node.outputs[0] in on_host
        inputs = tuple(
            HOST + name
            if name and (name in only_host or at in steering or (runs_on_host and node.op not in HOST_OUTPUTS))
            else name
            for at, name in enumerate(node.inputs)
        )
        outputs = tuple(HOST + name if runs_on_host else name for name in node.outputs)
        place = torch.device("cpu") if runs_on_host else device
        compute = None if node.op == RING else _compute(graph, node, place)
        calls.append(_Call(node, compute, inputs, outputs, ()))
    seen = (
        set(graph.outputs)
        | set(graph.inputs)
        | set(graph.constants)
        | {HOST + name for name in graph.constants}
        | {"", WIDENED}
    )
    for at in reversed(range(len(calls))):
        names = dict.fromkeys((*calls[at].inputs, *calls[at].outputs))
        calls[at] = replace(calls[at], last_uses=tuple(name for name in names if name not in seen))
        seen.update(names)
    return tuple(calls)


def _compute(graph: OnnxGraph, node: Node, device: torch.device) -> Compute:
    if node.op not in OPERATORS:
        raise EngineError(
            f"{graph.path}: node '{node.name}' is a {node.op}, which the torch engine does not have;"
            " use the engine 'onnxruntime'"
        )
    if node.op == "Range":
        node = replace(node, attributes={**node.attributes, "device": device})
    try:
        return OPERATORS[node.op](node)
    except Unsupported as error:
        raise EngineError(
            f"{graph.path}: node '{node.name}' is a {node.op} with {error}, which the torch engine does not have;"
            " use the engine 'onnxruntime'"
        ) from None
