"""A step as a loop in Python over the `onnxruntime` package, as it was before the native library; for comparison only.

One stream, float32 or INT8, on a CPU: resize and crop with numpy, IoBinding with state in place, a look for NaN, copies
of the outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from framestep.calibration.integer import BREAK_INTEGER_PRODUCTS
from framestep.runtime.bundle import Bundle
from framestep.runtime.labels import label_inputs, read_label_embeddings
from framestep.runtime.manifest import graphs_for
from framestep.runtime.preprocess import Preprocess


def session_options(ort: Any, threads: int) -> Any:
    """The options that runtime/native/onnxruntime_engine.cpp sets."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    return options


class PythonLoop:
    """One stream of a bundle.

    Args:
        path: the bundle.
        precision: one of its own.
        outputs: to copy out of each step.
        threads: of ONNX Runtime.
    """

    def __init__(self, path: Path, precision: str, outputs: tuple[str, ...], threads: int) -> None:
        import onnxruntime as ort

        bundle = Bundle.open(path, verify=False)
        manifest = bundle.manifest.at(precision)
        frame = manifest.frame
        self.preprocess = Preprocess(frame)
        self.frame = np.zeros((1, frame.height, frame.width, 3), np.uint8)
        self.position = np.zeros(1, np.int64)
        fed: dict[str, np.ndarray] = {"frame": self.frame, "position": self.position}
        labels = 0
        if manifest.labels is not None and manifest.scoring is not None:
            labels = len(manifest.labels.names)
            embeddings = read_label_embeddings(bundle.file(manifest.labels.file), labels)
            fed |= label_inputs(manifest.scoring, *embeddings)
        states = {state.name: np.zeros((1, *state.shape[1:]), state.dtype) for state in manifest.states}
        sizes = {"S": 1, "C": labels}
        values: dict[str, np.ndarray] = {}
        self._runs = []
        disabled = BREAK_INTEGER_PRODUCTS if "int8" in precision else ()
        for name in graphs_for(manifest, outputs):
            graph = manifest.graphs[name]
            session = ort.InferenceSession(
                str(bundle.file(graph.file)),
                session_options(ort, threads),
                ["CPUExecutionProvider"],
                disabled_optimizers=list(disabled),
            )
            binding = session.io_binding()
            for port in graph.outputs:
                values[port.name] = np.zeros([sizes.get(n, n) for n in port.shape], port.dtype)
                _bind(binding.bind_output, port.name, values[port.name])
            for port in graph.inputs:
                _bind(binding.bind_input, port.name, values[port.name] if port.role == "output" else fed[port.role])
            for use in graph.states:
                _bind(binding.bind_input, use.input, states[use.state])
                _bind(binding.bind_output, use.output, states[use.state])
            self._runs.append((session, binding))
        self._outputs = {name: values[name] for name in outputs}
        self._kept = (fed, states, values)

    def step(self, rgb: np.ndarray) -> dict[str, np.ndarray]:
        """One frame uint8 [height, width, 3] -> outputs by name."""
        self.preprocess(rgb, self.frame[0])
        for session, binding in self._runs:
            session.run_with_iobinding(binding)
        found = {name: array[0].copy() for name, array in self._outputs.items()}
        if not all(np.isfinite(array).all() for array in found.values()):
            raise FloatingPointError("NaN or infinity")
        self.position += 1
        return found


def _bind(bind: Any, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
