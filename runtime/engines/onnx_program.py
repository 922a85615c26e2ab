"""Reading an ONNX graph into a list of nodes and constants, and rewriting what has a faster form.

The rewrites change no arithmetic but the order of sums:
- `TensorScatter` of keys and of values and the `Attention` over both become one `RingAttention`, where slot and mask
  are a ring's: slot `position mod window`, slots `<= position` visible; an INT8 ring's `QuantizeLinear` and
  `DequantizeLinear` go into it, and their scales become two more inputs, a number for each head;
- the same around a cache that is linear, with any slot and mask, becomes one `CachedAttention`;
- `MatMul` by a constant and `Add` of a constant vector become one `Linear`, and several of one input one `LinearGroup`;
  a `BlockLinear`, whose matrix is integers and scales (`onnx_blocks.py`), takes the vector likewise;
- `Add` and the `LayerNormalization` or `RMSNormalization` of its sum become one `ResidualNorm`; where the sum is
  float32 beside products in half precision, the `Cast` before it and the one behind the norm go into it;
- `Mul` of a value and its `Sigmoid` becomes `Silu`, `Gather` of one constant place a `Select`, which copies nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError

Array = npt.NDArray[Any]
RING = "RingAttention"
CACHED = "CachedAttention"
BLOCK_LINEAR = "BlockLinear"
FLOAT32, HALVES = 1, (10, 16)  # ONNX's numbers of types


@dataclass(frozen=True)
class Node:
    """One operator; `op` is an ONNX operator, or one of the rewrites' own."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxGraph:
    """Nodes in an order in which each follows those that feed it, and the constants."""

    path: Path
    nodes: tuple[Node, ...]
    constants: dict[str, Array]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(path: Path) -> OnnxGraph:
    """Read a graph whose weights lie in it or beside it.

    Raises:
        EngineError: `onnx` is not installed, or the file uses what this engine cannot run.
    """
    try:
        import onnx
    except ImportError:
        raise EngineError("the torch engine needs the onnx package: pip install 'framestep[torch]'") from None
    model = onnx.load(str(path), load_external_data=False)
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            raise EngineError(
                f"{path}: uses the operator domain '{opset.domain}'; the torch engine has the default one"
            )
    constants = {tensor.name: _array(tensor, path.parent) for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        texts = {key: value.decode() for key, value in attributes.items() if isinstance(value, bytes)}
        inputs, outputs = tuple(node.input), tuple(node.output)
        nodes.append(Node(node.op_type, node.name or outputs[0], inputs, outputs, {**attributes, **texts}))
    return OnnxGraph(
        path,
        tuple(nodes),
        constants,
        tuple(item.name for item in model.graph.input),
        tuple(item.name for item in model.graph.output),
    )


def rewrite(graph: OnnxGraph, position: str, rings: Sequence[tuple[str, str]]) -> OnnxGraph:
    """Put faster forms in place of what has one.

    Args:
        position: the input that counts a stream's frames.
        rings: input and output of each state of the graph.
    """
    graph = _merge_attentions(graph, position, rings)
    graph = _merge_linears(graph)
    graph = _group_linears(graph)
    graph = _name_forms(graph)
    return _merge_norms(graph)


def _array(tensor: Any, folder: Path) -> Array:
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inline: Array = onnx.numpy_helper.to_array(tensor)
        return inline.astype(np.int8) if tensor.data_type == onnx.TensorProto.INT4 else inline
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, offset = folder / entries["location"], int(entries.get("offset", 0))
    shape = tuple(tensor.dims)
    if tensor.data_type == onnx.TensorProto.INT4:  # two in a byte, the first one low
        size = int(np.prod(shape, dtype=np.int64))
        both = np.fromfile(file, np.int8, -(-size // 2), offset=offset)
        return np.stack([both << 4 >> 4, both >> 4], axis=-1).reshape(-1)[:size].reshape(shape)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(file, dtype, "r", offset, shape))


def _merge_attentions(graph: OnnxGraph, position: str, states: Sequence[tuple[str, str]]) -> OnnxGraph:
    makers = {output: node for node in graph.nodes for output in node.outputs}
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    present = {output: past for past, output in states}
    constants = dict(graph.constants)
    merged: dict[str, Node] = {}  # by the attention's output
    gone: set[str] = set()
    for node in graph.nodes:
        if node.op != "Attention" or len(node.inputs) != 4 or set(node.attributes) - {"scale"}:
            continue
        query, key, value, mask = node.inputs
        read = [_read_ring(makers, uses, name) for name in (key, value)]
        updated = [name for name, _ in read]
        updates = _updates(makers, uses, present, updated)
        if updates is None:
            continue
        pasts, new, slot = updates
        window = _ring_window(graph, makers, slot, mask, position)
        if window is None:
            modes = {makers[name].attributes.get("mode", "linear") for name in updated}
            if updated == [key, value] and modes == {"linear"}:
                inputs = (query, *new, *pasts, slot, mask)
                merged[node.outputs[0]] = Node(CACHED, node.name, inputs, (*node.outputs, *updated), node.attributes)
                gone.update(updated)
            continue
        attributes = {**node.attributes, "window": window}
        scales: tuple[str, ...] = ()
        if any(steps is not None for _, steps in read):
            quantizers = [_ring_quantizer(graph, makers, *pair) for pair in zip(new, read, strict=True)]
            if quantizers[0] is None or quantizers[1] is None:
                continue
            new = [quantizer.inputs[0] for quantizer in quantizers if quantizer is not None]
            rows = np.stack([constants[quantizer.inputs[1]] for quantizer in quantizers if quantizer is not None])
            attributes["heads"] = heads = _period(rows)
            scales = (f"{node.name}/key_scale", f"{node.name}/value_scale")
            constants.update(zip(scales, rows[:, :heads].astype(np.float32), strict=True))
        merged[node.outputs[0]] = Node(
            RING,
            node.name,
            (
                *(_rows_source(graph, makers, name) for name in (query, *new)),
                *pasts,
                position,
                *scales,
            ),
            (*node.outputs, *updated),
            attributes,
        )
        gone.update(updated)
    nodes = [merged.get(node.outputs[0], node) for node in graph.nodes if node.outputs[0] not in gone]
    return without_unused(replace(graph, nodes=tuple(nodes), constants=constants))


def _updates(
    makers: dict[str, Node], uses: Counter[str], present: dict[str, str], updated: Sequence[str]
) -> tuple[list[str], list[str], str] | None:
    """Two states, what is written into them, and the slot, where `updated` are made by a `TensorScatter` over axis 2
    each, from one slot on, and are read once."""
    found = []
    for name in updated:
        scatter = makers.get(name)
        if scatter is None or scatter.op != "TensorScatter" or len(scatter.inputs) != 3:
            return None
        past, new, slot = scatter.inputs
        if present.get(name) != past or uses[past] != 1 or uses[name] != 1:
            return None
        if scatter.attributes.get("axis", -2) not in (2, -2):
            return None
        found.append((past, new, slot))
    (past, new, slot), (other_past, other_new, other_slot) = found
    if slot != other_slot or past == other_past:
        return None
    return [past, other_past], [new, other_new], slot


def _read_ring(makers: dict[str, Node], uses: Counter[str], name: str) -> tuple[str, str | None]:
    """The value that a `DequantizeLinear` of rows reads, and its scales; the value itself and None without one."""
    node = makers.get(name)
    if node is None or node.op != "DequantizeLinear" or len(node.inputs) != 2 or node.attributes.get("axis", 1) != 1:
        return name, None
    return (node.inputs[0], node.inputs[1]) if uses[name] == 1 else (name, None)


def _ring_quantizer(graph: OnnxGraph, makers: dict[str, Node], new: str, read: tuple[str, str | None]) -> Node | None:
    """The `QuantizeLinear` that makes what is written into a ring, where its scales are those of reading."""
    node, scale = makers.get(new), read[1]
    if node is None or node.op != "QuantizeLinear" or node.attributes.get("axis", 1) != 1 or scale is None:
        return None
    array = graph.constants.get(scale)
    return node if node.inputs[1:] == (scale,) and array is not None and array.ndim == 1 else None


def _period(rows: Array) -> int:
    """The least divisor of the number of columns after which they repeat: the heads of [.., N * H]."""
    count = rows.shape[1]
    divisors = (n for n in range(1, count + 1) if count % n == 0)
    return next(n for n in divisors if np.array_equal(rows[:, n:], rows[:, : count - n]))


def _ring_window(graph: OnnxGraph, makers: dict[str, Node], slot: str, mask: str, position: str) -> int | None:
    """The window, where `slot` is `position mod window` and `mask` is `0..window - 1 <= position`."""
    mod, compare = makers.get(slot), makers.get(mask)
    if mod is None or mod.op != "Mod" or mod.inputs[0] != position or mod.attributes.get("fmod", 0):
        return None
    size = graph.constants.get(mod.inputs[1])
    if size is None or size.size != 1 or compare is None or compare.op != "LessOrEqual":
        return None
    window = int(size.ravel()[0])
    slots, age = graph.constants.get(compare.inputs[0]), makers.get(compare.inputs[1])
    if slots is None or slots.shape[-1:] != (window,) or not np.array_equal(slots.ravel(), np.arange(window)):
        return None
    if age is None or age.op != "Unsqueeze" or age.inputs[0] != position:
        return None
    axes = graph.constants.get(age.inputs[1])
    return window if axes is not None and axes.tolist() == [1, 2, 3] else None


def _rows_source(graph: OnnxGraph, makers: dict[str, Node], name: str) -> str:
    """What [S, rows, 1, d] was before it was reshaped from [S, N, H * d], or itself."""
    node = makers.get(name)
    if node is None or node.op != "Reshape" or node.attributes.get("allowzero", 0):
        return name
    shape = graph.constants.get(node.inputs[1])
    if shape is None or shape.tolist()[:1] != [0] or shape.size != 4 or shape[2] != 1:
        return name
    return node.inputs[0]


def _merge_linears(graph: OnnxGraph) -> OnnxGraph:
    """`MatMul` by a constant matrix, and the `Add` of a constant vector where one follows."""
    uses = _uses(graph)
    users = {name: node for node in graph.nodes for name in node.inputs}  # the only one, where there is one
    nodes: list[Node] = []
    gone: set[str] = set()
    for node in graph.nodes:
        if node.outputs[0] in gone:
            continue
        weight = graph.constants.get(node.inputs[1]) if node.op in ("MatMul", BLOCK_LINEAR) else None
        if weight is None or weight.ndim != 2 or node.inputs[0] in graph.constants:
            nodes.append(node)
            continue
        inputs, outputs = node.inputs, node.outputs
        user = users.get(outputs[0])
        if user is not None and user.op == "Add" and uses[outputs[0]] == 1:
            other = next((name for name in user.inputs if name != outputs[0]), None)
            bias = graph.constants.get(other) if other is not None else None
            if other is not None and bias is not None and bias.shape == (weight.shape[1],):
                inputs, outputs = (*inputs, other), user.outputs
                gone.add(user.outputs[0])
        op = "Linear" if node.op == "MatMul" else node.op
        nodes.append(Node(op, node.name, inputs, outputs, node.attributes))
    return replace(graph, nodes=tuple(nodes))


def _group_linears(graph: OnnxGraph) -> OnnxGraph:
    """Linears of one input as one product, whose result is cut apart."""
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op == "Linear":
            groups.setdefault((node.inputs[0],), []).append(node)
        elif node.op == BLOCK_LINEAR:
            scale = graph.constants[node.inputs[2]]
            alike = (node.inputs[0], node.attributes["bits"], scale.shape[0], scale.dtype)
            groups.setdefault(alike, []).append(node)
    constants = dict(graph.constants)
    grouped: dict[str, Node | None] = {}
    for members in groups.values():
        if len(members) == 1:
            continue
        name = members[0].name + "/group"
        parts = ("weight",) if members[0].op == "Linear" else ("weight", "scale")  # each [.., outputs]
        for at, part in enumerate(parts, 1):
            constants[f"{name}.{part}"] = np.concatenate([constants[node.inputs[at]] for node in members], axis=1)
        sizes = [constants[node.inputs[1]].shape[1] for node in members]
        inputs: tuple[str, ...] = (members[0].inputs[0], *(f"{name}.{part}" for part in parts))
        biased = [len(node.inputs) > len(inputs) for node in members]
        if any(biased):
            kind = next(constants[node.inputs[-1]].dtype for node, has in zip(members, biased, strict=True) if has)
            biases = [
                constants[node.inputs[-1]] if has else np.zeros(size, kind)
                for node, size, has in zip(members, sizes, biased, strict=True)
            ]
            constants[f"{name}.bias"] = np.concatenate(biases)
            inputs = (*inputs, f"{name}.bias")
        outputs = tuple(node.outputs[0] for node in members)
        attributes = {**members[0].attributes, "sizes": sizes}
        grouped[members[0].outputs[0]] = Node(members[0].op + "Group", name, inputs, outputs, attributes)
        grouped.update({node.outputs[0]: None for node in members[1:]})
    nodes = [grouped.get(node.outputs[0], node) for node in graph.nodes]
    return without_unused(replace(graph, nodes=tuple(node for node in nodes if node is not None), constants=constants))


def _merge_norms(graph: OnnxGraph) -> OnnxGraph:
    makers = {output: node for node in graph.nodes for output in node.outputs}
    users = {name: node for node in graph.nodes for name in node.inputs}  # the only one, where there is one
    uses = _uses(graph)
    merged: dict[str, Node | None] = {}
    for node in graph.nodes:
        centred = node.op == "LayerNormalization"
        if node.op not in ("LayerNormalization", "RMSNormalization") or len(node.inputs) != 2 + centred:
            continue
        add = makers.get(node.inputs[0])
        if add is None or add.op != "Add" or add.outputs[0] in merged:
            continue
        if len(node.outputs) != 1 or node.attributes.get("axis", -1) != -1:
            continue
        if any(name in graph.constants for name in add.inputs) or any(
            n not in graph.constants for n in node.inputs[1:]
        ):
            continue
        (x, update), normed = add.inputs, node.outputs[0]
        widened, narrowed = makers.get(update), users.get(normed)
        float32 = uses[update] == uses[normed] == 1 and _casts(widened, FLOAT32) and _casts(narrowed, *HALVES)
        if float32:
            assert widened is not None and narrowed is not None
            update, normed = widened.inputs[0], narrowed.outputs[0]
            merged[narrowed.outputs[0]] = None
        attributes = {"epsilon": node.attributes.get("epsilon", 1e-5), "wide": float32}
        inputs, outputs = (x, update, *node.inputs[1:]), (add.outputs[0], normed)
        merged[node.outputs[0]] = None
        merged[add.outputs[0]] = Node("ResidualNorm", node.name, inputs, outputs, attributes)
    kept = [merged.get(node.outputs[0], node) for node in graph.nodes]
    nodes = [node for node in kept if node is not None]
    normed_sums = {node.inputs[0] for node in nodes if node.op == "RMSNormalization"}
    normed_sums |= {node.inputs[0] for node in nodes if node.op == "Select" and node.outputs[0] in normed_sums}
    others = set(graph.outputs)  # what is used elsewhere than as the running sum of a residual
    for node in nodes:
        last = node.op == "Add" and node.outputs[0] in normed_sums and uses[node.outputs[0]] == 1
        others.update(node.inputs[1:] if node.op == "ResidualNorm" or last else node.inputs)
    return without_unused(replace(graph, nodes=tuple(_mark_wide(node, others) for node in nodes)))


def _casts(node: Node | None, *kinds: int) -> bool:
    return node is not None and node.op == "Cast" and node.attributes["to"] in kinds


def _mark_wide(node: Node, others: set[str]) -> Node:
    if node.op != "ResidualNorm":
        return node
    wide = node.attributes["wide"] or node.outputs[0] not in others
    return replace(node, attributes={**node.attributes, "wide": wide})


def _name_forms(graph: OnnxGraph) -> OnnxGraph:
    makers, uses = {output: node for node in graph.nodes for output in node.outputs}, _uses(graph)
    nodes = []
    for node in graph.nodes:
        if node.op == "Mul":
            for x, gate in (node.inputs, node.inputs[::-1]):
                sigmoid = makers.get(gate)
                if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs == (x,) and uses[gate] == 1:
                    node = replace(node, op="Silu", inputs=(x,))
                    break
        elif node.op == "Gather":
            place = graph.constants.get(node.inputs[1])
            if place is not None and place.ndim == 0:
                attributes = {"axis": node.attributes.get("axis", 0), "index": int(place)}
                node = replace(node, op="Select", inputs=node.inputs[:1], attributes=attributes)
        nodes.append(node)
    return without_unused(replace(graph, nodes=tuple(nodes)))


def _uses(graph: OnnxGraph) -> Counter[str]:
    return Counter([name for node in graph.nodes for name in node.inputs] + list(graph.outputs))


def without_unused(graph: OnnxGraph) -> OnnxGraph:
    """Drop nodes and constants that nothing needs any more."""
    wanted = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    constants = {name: value for name, value in graph.constants.items() if name in wanted}
    return replace(graph, nodes=tuple(reversed(kept)), constants=constants)
