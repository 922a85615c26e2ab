"""Our attention kernel inside a TensorRT engine: a quickly deployable plugin whose PTX is compiled when it is built.

Written, never built: it needs the full TensorRT and a GPU. What leads up to the builder's call is tested.

The ONNX parser has no node for it. So each update of two rings and the attention over both is replaced by identities
that carry its six inputs, and in the parsed network the plugin is put in their place.
"""

# No `from __future__ import annotations`: TensorRT reads the annotations of what is registered. They are its own types,
# which are known only where it is installed.
# mypy: disable-error-code="valid-type,name-defined,attr-defined"

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Tuple  # noqa: UP035  TensorRT compares with these very names

import onnx
from onnx import helper

from ..runtime.bundle import Bundle
from ..runtime.errors import EngineError
from ..runtime.manifest import Graph
from .rewriting import replace_nodes

NAMESPACE, NAME = "framestep", "temporal_attention"
INPUTS = ("query", "key", "value", "key_ring", "value_ring")  # and the position
OUTPUTS = ("query", "key_ring", "value_ring")  # the result has the query's shape; rings are their own memory


@dataclass(frozen=True)
class Site:
    """An attention over two rings that the plugin takes the place of.

    Attributes:
        rings: input and output of the state of the keys and of the values.
    """

    name: str
    scale: float
    rings: tuple[tuple[str, str], tuple[str, str]]


def mark_sites(bundle: Bundle, graph: Graph) -> tuple[onnx.ModelProto, list[Site]]:
    """The graph with identities in the place of what the plugin does.

    Raises:
        EngineError: no attention over rings, or a state that is none.
    """
    path = bundle.file(graph.file)
    rings = {state.name for state in bundle.manifest.states if state.kind == "ring"}
    outputs = {use.output: use.input for use in graph.states if use.state in rings}
    model = onnx.load(path, load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    sites: list[Site] = []
    replaced: dict[str, list[onnx.NodeProto]] = {}  # name of a node -> what takes its place
    for node in model.graph.node:
        if node.op_type != "Attention":
            continue
        updates = [makers.get(name) for name in node.input[1:3]]
        if any(update is None or update.op_type != "TensorScatter" for update in updates):
            continue
        keys, values = (update for update in updates if update is not None)
        if keys.output[0] not in outputs or values.output[0] not in outputs:
            continue
        scale = next((item.f for item in node.attribute if item.name == "scale"), None)
        if scale is None:
            raise EngineError(f"{path}: the attention '{node.name}' leaves its scale open; export the bundle again")
        given = (node.input[0], keys.input[1], values.input[1], keys.input[0], values.input[0])
        made = (
            node.output[0],
            f"{node.name}/key/unused",
            f"{node.name}/value/unused",
            keys.output[0],
            values.output[0],
        )
        replaced[keys.name] = replaced[values.name] = []
        replaced[node.name] = [
            helper.make_node("Identity", [source], [target], name=f"{node.name}/{name}")
            for name, source, target in zip(INPUTS, given, made, strict=True)
        ]
        pairs = (keys.input[0], keys.output[0]), (values.input[0], values.output[0])
        sites.append(Site(node.name, float(scale), pairs))
    if not sites:
        raise EngineError(f"{path}: has no attention over rings, which is what --attention triton replaces")
    replace_nodes(model, [new for node in model.graph.node for new in replaced.get(node.name, [node])])
    return model, sites


def insert_plugins(trt: Any, network: Any, sites: Sequence[Site], position: str, capability: str) -> None:
    """Put the plugin into a network that was parsed from a marked graph.

    Args:
        position: name of the input that counts a stream's frames.
        capability: of the GPU to compile for, such as "8.7".
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    by_name = {layer.name: layer for layer in layers}
    counter = next(item for item in (network.get_input(i) for i in range(network.num_inputs)) if item.name == position)
    for site in sites:
        carriers = {name: by_name[f"{site.name}/{name}"] for name in INPUTS}
        given = [carriers[name].get_input(0) for name in INPUTS]
        create = register(trt, site.scale, int(capability.replace(".", "")))
        layer = network.add_plugin(create(*given, counter), aot=True)
        layer.name = site.name
        for index, name in enumerate(OUTPUTS):
            old, new = carriers[name].get_output(0), layer.get_output(index)
            label, is_output = old.name, old.is_network_output
            for reader in layers:
                for at in range(reader.num_inputs):
                    tensor = reader.get_input(at)
                    if tensor is not None and tensor.name == label:
                        reader.set_input(at, new)
            if is_output:
                network.unmark_output(old)
                old.name = f"{label}/unused"
                new.name = label
                network.mark_output(new)


def register(trt: Any, scale: float, capability: int) -> Any:
    """Register the plugin once for a scale and a GPU, and return what makes one from tensors.

    Both are part of its name. As its attributes they would come back as arrays of one number, which TensorRT's bindings
    turn into numbers in a way that NumPy refuses from 2.4 on.
    """
    import importlib

    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    desc = trtp.TensorDesc
    name = f"{NAME}_{capability}_{struct.pack('>f', scale).hex()}"
    known = getattr(trtp.op, NAMESPACE, None)
    if known is not None and hasattr(known, name):
        return getattr(known, name)

    @trtp.register(f"{NAMESPACE}::{name}")
    def describe(
        query: desc,
        key: desc,
        value: desc,
        key_ring: desc,
        value_ring: desc,
        position: desc,
    ) -> Tuple[desc, desc, desc]:  # noqa: UP006
        return query.like(), key_ring.aliased(), value_ring.aliased()

    @trtp.aot_impl(f"{NAMESPACE}::{name}")
    def implement(
        query: desc,
        key: desc,
        value: desc,
        key_ring: desc,
        value_ring: desc,
        position: desc,
        outputs: Tuple[desc],  # noqa: UP006
        tactic: int,
    ) -> Tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:  # noqa: UP006
        from ..kernels.temporal_plugin import compile_plugin

        streams, rows, window, head_dim = key_ring.shape_expr
        dtype = {trt.DataType.HALF: "fp16", trt.DataType.FLOAT: "fp32"}[key_ring.dtype]
        row_count, slots, size = (extent.constant_value for extent in (rows, window, head_dim))
        kernel = compile_plugin(row_count, slots, size, dtype, scale, capability)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = kernel.grid_x, 1, streams
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared_bytes
        return kernel.entry, kernel.ptx, launch, trtp.SymIntExprs(0)

    return getattr(getattr(trtp.op, NAMESPACE), name)


def allow_aliases(trt: Any, config: Any) -> None:
    """Let outputs of plugins be their inputs' memory."""
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def parse_marked(parser: Any, model: onnx.ModelProto, path: Path) -> bool:
    """Parse a changed graph whose weights lie beside `path`."""
    return bool(parser.parse(model.SerializeToString(), str(path)))
