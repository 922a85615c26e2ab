"""The bundle's own graph on OpenVINO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.errors import EngineError
from .paths import OUTPUTS, Array, MissingPackageError, PathSpec, frame_at, window_of


class OpenVinoRing:
    """The bundle's own graph on OpenVINO.

    OpenVINO has no TensorScatter: the ring's update is a Select between the ring and the new rows, and the ring is a
    variable of OpenVINO's (ReadValue and Assign), the form in which it runs fastest among Select and ScatterUpdate,
    each with such a variable or with explicit inputs and outputs. Everything else is converted by OpenVINO itself.
    """

    walks = False

    def __init__(self, spec: PathSpec, precision: str | None) -> None:
        if spec.device != "cpu":
            raise EngineError(f"{spec.name}: measured on the CPU only")
        try:
            import openvino
        except ImportError:
            raise MissingPackageError(f"{spec.name}: pip install 'framestep[openvino]'") from None
        bundle = Bundle.open(spec.bundle, verify=False)
        if spec.precision != "auto":
            bundle = replace(bundle, manifest=bundle.manifest.at(spec.precision))
        self._manifest = bundle.manifest
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": spec.threads}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino.Core().compile_model(_openvino_model(bundle), "CPU", settings)
        self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._request = compiled.create_infer_request()
        self._tensor = openvino.Tensor
        self._clock = 0
        self._filled = False

    def reset(self) -> None:
        self._clock = 0

    def seek(self, seen: int, deadline: float) -> None:
        if not self._filled:
            self.reset()
            for index in range(window_of(self._manifest)):
                self.step(frame_at(self._manifest, index))
            self._filled = True
        self._clock = seen

    def step(self, rgb: Array) -> tuple[Array, Array]:
        self._request.set_tensor("frame", self._tensor(rgb[None]))
        self._request.set_tensor("position", self._tensor(np.array([self._clock], np.int64)))
        self._request.infer()
        self._clock += 1
        features, pooled = (self._request.get_tensor(name).data[0].copy() for name in OUTPUTS)
        return features, pooled

    def bytes_at(self, position: int) -> int:
        return 0


def _openvino_model(bundle: Bundle) -> Any:
    """The bundle's step graph for one stream, its states as variables."""
    import openvino.opset15 as ops
    from openvino import Core
    from openvino._offline_transformations import apply_make_stateful_transformation
    from openvino.frontend.onnx import ConversionExtension

    def tensor_scatter(node: Any) -> list[Any]:
        ring, new, slot = (node.get_input(i) for i in range(3))
        axis = node.get_attribute("axis")
        rank = ring.get_partial_shape().rank.get_length()
        axis = axis % rank
        shape = [1] * rank
        shape[axis] = ring.get_partial_shape()[axis].get_length()
        slots = ops.constant(np.arange(shape[axis], dtype=np.int64).reshape(shape))
        other_axes = ops.constant(np.arange(1, rank, dtype=np.int64))
        return [ops.select(ops.equal(slots, ops.unsqueeze(slot, other_axes)), new, ring).output(0)]

    core = Core()
    core.add_extension(ConversionExtension("TensorScatter", tensor_scatter))
    graph = next(graph for graph in bundle.manifest.graphs.values() if graph.states)
    model = core.read_model(bundle.file(graph.file))
    shapes = {port.name: port.shape for port in graph.inputs}
    states = {state.name: state.shape for state in bundle.manifest.states}
    shapes |= {use.input: states[use.state] for use in graph.states}
    model.reshape({name: [1 if n == "S" else int(n) for n in shape] for name, shape in shapes.items()})
    pairs = {use.input: use.output for use in graph.states if use.output is not None}
    apply_make_stateful_transformation(model, pairs)
    return model
