"""The measured paths: ours, and what a user would run without it.

Every path takes one model-sized frame after another and gives the newest frame's features and pooled vector as numpy
arrays. The baselines are written as one would write them with their library, with the library's default settings:
float32, inference mode, the same weights and the same number of threads.

Sizes in shape comments: T frames, P past frames, N patches, H heads, W window, D hidden, d head_dim.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...runtime.bundle import Bundle, Manifest
from ...runtime.engines import BFLOAT16
from ...runtime.errors import EngineError, FramestepError

Array = npt.NDArray[Any]
FRAMESTEP = "framestep"
OUTPUTS = ("features", "pooled")
RANDOM_INIT = re.compile(r"random-init:(base|tiny):(\d+)")  # origin of `framestep export --random-init`
# Above the largest cache tensor of any path, so that glibc keeps freed tensors instead of giving their pages back
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


class MissingPackageError(FramestepError):
    """A path needs a package that is not installed; the message names the extra."""


class NoCheckpointError(FramestepError):
    """A PyTorch path needs the checkpoint: a bundle holds folded weights only."""


class OutOfTimeError(FramestepError):
    """A position could not be reached in the time given."""


class MeasuredPath(Protocol):
    """A way to get the features of the newest frame.

    Attributes:
        walks: a position is reached only by feeding every frame before it, as in a stream; otherwise `seek` is free.
    """

    walks: bool

    def reset(self) -> None:
        """Forget every frame."""
        ...

    def seek(self, seen: int, deadline: float) -> None:
        """Bring the memory to where `seen` frames have been fed.

        Raises:
            OutOfTimeError: `time.perf_counter()` passed the deadline on the way.
        """
        ...

    def step(self, rgb: Array) -> tuple[Array, Array]:
        """One frame [height, width, 3] -> features [N, D], pooled [D]"""
        ...

    def bytes_at(self, position: int) -> int:
        """About how much memory a step at this position takes beyond the weights."""
        ...


@dataclass(frozen=True)
class PathSpec:
    """What a path needs to be set up in its own process."""

    name: str
    bundle: str
    checkpoint: str | None
    engine: str
    device: str
    threads: int


@dataclass(frozen=True)
class Baseline:
    """A baseline of `--compare`.

    Attributes:
        title: for plots and tables.
        description: what is measured, in one sentence.
        precision: of its arithmetic.
        tolerance: largest accepted difference from the session's outputs; None: the difference is reported only.
        environment: variables of its process.
        make: sets it up.
    """

    title: str
    description: str
    precision: str
    tolerance: float | None
    environment: dict[str, str]
    make: Callable[[PathSpec], MeasuredPath]


def make_path(spec: PathSpec) -> MeasuredPath:
    """Set a path up.

    Raises:
        FramestepError: a package, the checkpoint or the device is missing.
    """
    if spec.name == FRAMESTEP:
        return FramestepPath(spec)
    return BASELINES[spec.name].make(spec)


def frame_at(manifest: Manifest, index: int) -> Array:
    """The frame of this index of the stream that every path sees: noise, the same in every process."""
    shape = (manifest.frame.height, manifest.frame.width, 3)
    return np.random.default_rng(index).integers(0, 256, shape, np.uint8)


def window_of(manifest: Manifest) -> int:
    """Frames that the model attends to, the newest included."""
    return max((state.capacity for state in manifest.states), default=1)


class FramestepPath:
    """A session on its engine, through the public interface.

    `seek` fills the ring with real frames once and then sets the stream's clock: from there on a step does what it does
    after that many frames, for a step's work depends on the clock and on the ring alone.
    """

    walks = False

    def __init__(self, spec: PathSpec, streams: int = 1) -> None:
        from ...runtime.session import Session

        bundle = Bundle.open(spec.bundle, verify=False)
        self.manifest = bundle.manifest
        self.session = Session(bundle, spec.engine, spec.device, streams, OUTPUTS, spec.threads)
        self.stream = self.session.open_stream()
        self._filled = False

    def reset(self) -> None:
        self.stream.reset()

    def seek(self, seen: int, deadline: float) -> None:
        if not self._filled:
            for index in range(window_of(self.manifest)):
                self.stream.step(frame_at(self.manifest, index))
            self._filled = True
        self.session._engine.seek(self.stream.slot, seen)

    def step(self, rgb: Array) -> tuple[Array, Array]:
        result = self.stream.step(rgb)
        return result["features"], result["pooled"]

    def bytes_at(self, position: int) -> int:
        return 0


class TorchWeights:
    """The PyTorch model of a bundle, from its checkpoint."""

    def __init__(self, spec: PathSpec) -> None:
        self.manifest = Bundle.open(spec.bundle, verify=False).manifest
        source = _checkpoint_source(self.manifest, spec)
        torch = _import_torch()
        torch.set_num_threads(spec.threads)
        if spec.device == "cuda" and not torch.cuda.is_available():
            raise EngineError(f"{spec.name}: this PyTorch ({torch.__version__}) finds no CUDA device")
        self.device = spec.device
        self.model = _load_model(source, self.manifest).to(spec.device)
        config = self.model.config
        self.cache_bytes_per_frame = 2 * 4 * config.num_hidden_layers * config.patches * config.hidden_size
        # what one layer has alive at once: the MLP's inner activations twice, and some rows of the hidden size
        self.activation_bytes_per_frame = 4 * config.patches * (2 * config.intermediate_size + 12 * config.hidden_size)

    def to_device(self, frames: Array) -> Any:
        return _import_torch().from_numpy(frames).to(self.device)


class WholeClip:
    """All frames so far are fed again for each new one; the last frame's outputs count."""

    walks = False

    def __init__(self, spec: PathSpec, causal: bool) -> None:
        self._weights = TorchWeights(spec)
        self._causal = causal
        self._clip: Array = np.empty((0,), np.uint8)
        self._seen = 0

    def reset(self) -> None:
        self._seen = 0

    def seek(self, seen: int, deadline: float) -> None:
        if len(self._clip) != seen + 1:
            self._clip = np.stack([frame_at(self._weights.manifest, index) for index in range(seen + 1)])
        self._seen = seen

    def step(self, rgb: Array) -> tuple[Array, Array]:
        if len(self._clip) != self._seen + 1:
            self.seek(self._seen, float("inf"))
        self._clip[self._seen] = rgb
        features, pooled = self._encode(self._clip)
        self._seen += 1
        return features, pooled

    def bytes_at(self, position: int) -> int:
        return position * self._weights.activation_bytes_per_frame

    def _encode(self, clip: Array) -> tuple[Array, Array]:
        torch = _import_torch()
        attention = torch.nn.functional.scaled_dot_product_attention

        def over_time(layer: int, q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, is_causal=self._causal)

        with torch.inference_mode():
            features, pooled = encode(self._weights.model, self._weights.to_device(clip)[None], 0, over_time)
            return features[0, -1].cpu().numpy(), pooled[0, -1].cpu().numpy()


class GrowingCache:
    """One frame at a time; keys and values of all frames before are kept and concatenated, as the reference does.

    Layout [N, H, P, d], as the reference's. Attention is PyTorch's own function where the reference writes out matrix
    products and softmax; on one core of an EPYC with AVX-512 both took the same time (within 3%).
    """

    walks = True

    def __init__(self, spec: PathSpec) -> None:
        self._weights = TorchWeights(spec)
        self._cache: list[tuple[Any, Any]] = []
        self._seen = 0

    def reset(self) -> None:
        self._cache = []
        self._seen = 0

    def seek(self, seen: int, deadline: float) -> None:
        if seen < self._seen:
            self.reset()
        while self._seen < seen:
            if time.perf_counter() > deadline:
                raise OutOfTimeError("out of time")
            self.step(frame_at(self._weights.manifest, self._seen))

    def step(self, rgb: Array) -> tuple[Array, Array]:
        torch = _import_torch()
        attention = torch.nn.functional.scaled_dot_product_attention
        cache = self._cache

        def over_time(layer: int, q: Any, k: Any, v: Any) -> Any:
            if layer == len(cache):
                cache.append((k, v))
            else:
                cache[layer] = (torch.cat((cache[layer][0], k), dim=2), torch.cat((cache[layer][1], v), dim=2))
            return attention(q, *cache[layer])

        with torch.inference_mode():
            frame = self._weights.to_device(rgb)[None, None]
            features, pooled = encode(self._weights.model, frame, self._seen, over_time)
            self._seen += 1
            return features[0, 0].cpu().numpy(), pooled[0, 0].cpu().numpy()

    def bytes_at(self, position: int) -> int:
        # one layer is there twice while it is concatenated, and freed blocks of other sizes lie between
        return int(1.3 * position * self._weights.cache_bytes_per_frame)


class CompiledRing:
    """`torch.compile` of a step over preallocated keys and values that it updates in place."""

    walks = False

    def __init__(self, spec: PathSpec) -> None:
        torch = _import_torch()
        self._weights = TorchWeights(spec)
        self._window = window_of(self._weights.manifest)
        config = self._weights.model.config
        shape = (config.patches, config.num_attention_heads, self._window, config.head_dim)
        self._keys = [torch.zeros(shape, device=spec.device) for _ in range(config.num_hidden_layers)]
        self._values = [torch.zeros(shape, device=spec.device) for _ in range(config.num_hidden_layers)]
        self._clock = torch.zeros(1, dtype=torch.int64, device=spec.device)
        self._step = torch.compile(self._eager_step)
        self._filled = False
        try:
            self.step(frame_at(self._weights.manifest, 0))
        except Exception as error:  # what is raised without a compiler depends on the version
            line = " ".join(str(error).split())[:200]
            raise EngineError(f"torch.compile does not work here (it needs a C++ compiler): {line}") from None

    def reset(self) -> None:
        self._clock.zero_()

    def seek(self, seen: int, deadline: float) -> None:
        if not self._filled:
            self.reset()
            for index in range(self._window):
                self.step(frame_at(self._weights.manifest, index))
            self._filled = True
        self._clock.fill_(seen)

    def step(self, rgb: Array) -> tuple[Array, Array]:
        with _import_torch().inference_mode():
            features, pooled = self._step(self._weights.to_device(rgb)[None, None], self._clock)
            self._clock.add_(1)
            return features[0, 0].cpu().numpy(), pooled[0, 0].cpu().numpy()

    def bytes_at(self, position: int) -> int:
        return 0

    def _eager_step(self, frame: Any, clock: Any) -> tuple[Any, Any]:
        torch = _import_torch()
        slot = clock % self._window  # [1]
        visible = torch.arange(self._window, device=clock.device) <= clock  # [W]

        def over_time(layer: int, q: Any, k: Any, v: Any) -> Any:
            keys, values = self._keys[layer], self._values[layer]
            keys.index_copy_(2, slot, k)
            values.index_copy_(2, slot, v)
            mask = visible[None, None, None]
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        return encode(self._weights.model, frame, clock, over_time)


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


def encode(model: Any, frames: Any, position: Any, over_time: Callable[[int, Any, Any, Any], Any]) -> tuple[Any, Any]:
    """StreamFormer with a temporal attention of the caller's.

    Args:
        model: `export.streamformer.StreamFormer`.
        frames: uint8 [1, T, height, width, 3].
        position: index of the first frame, an int, or an int64 tensor [1] where T is 1.
        over_time: (layer, query, key, value), each [N, H, T, d] -> [N, H, T, d].

    Returns:
        features [1, T, N, D], pooled [1, T, D]
    """
    torch = _import_torch()
    T = frames.shape[1]
    embeddings = model.embeddings
    pixels = (frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # [T, 3, height, width]
    x = embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2) + embeddings.position_embeddings
    times = (torch.arange(T, device=frames.device) + position).clamp(max=embeddings.time_embeddings.shape[1] - 1)
    x = (x + embeddings.time_embeddings[0, times][:, None])[None]  # [1, T, N, D]
    N, D = x.shape[2:]
    for index, layer in enumerate(model.encoder.layer):
        temporal = layer.temporal_attention
        q, k, v = temporal.project(layer.temporal_layernorm(x)[0].transpose(0, 1))  # [N, H, T, d]
        mixed = temporal.output.dense(over_time(index, q, k, v).transpose(1, 2).flatten(2))  # [N, T, D]
        mixed = layer.temporal_dense(mixed.transpose(0, 1)[None])
        x = x + layer.temporal_attention_gating.tanh() * mixed
        q, k, v = layer.attention.project(layer.layernorm_before(x).flatten(0, 1))  # [T, H, N, d]
        x = x + layer.attention.mix(q, k, v).view(1, T, N, D)
        x = x + layer.output.dense(layer.act(layer.intermediate.dense(layer.layernorm_after(x))))
    features = model.post_layernorm(x)
    return features, model.head(features.flatten(0, 1)).view(1, T, D)


def plain_bidirectional(model: Any, frames: Any) -> tuple[Any, Any]:
    """The definition of the bidirectional baseline, for checking it: every softmax written out, in float64.

    Args:
        frames: uint8 [T, height, width, 3].

    Returns:
        features [T, N, D], pooled [T, D]
    """
    import copy

    torch = _import_torch()
    model = copy.deepcopy(model).double()

    def mix(x: Any, attention: Any) -> Any:
        """x [B, L, D] attends to all of itself."""
        B, L, D = x.shape
        weight, bias = attention.attention.qkv.weight, attention.attention.qkv.bias
        if attention.lora_rank:
            weight = weight + attention.attention.qkv_lora_b.weight @ attention.attention.qkv_lora_a.weight
        rows = x @ weight.T + (0 if bias is None else bias)
        q, k, v = (part.view(B, L, attention.heads, -1) for part in rows.split(D, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v).reshape(B, L, D)
        weight = attention.output.dense.weight
        if attention.lora_rank:
            weight = weight + attention.output.dense_lora_b.weight @ attention.output.dense_lora_a.weight
        return out @ weight.T + attention.output.dense.bias

    with torch.inference_mode():
        T = len(frames)
        patch = model.embeddings.patch_embeddings.projection
        pixels = frames.permute(0, 3, 1, 2).double() / 127.5 - 1
        x = patch(pixels).flatten(2).transpose(1, 2) + model.embeddings.position_embeddings
        last = model.config.num_frames - 1
        x = torch.stack([x[t] + model.embeddings.time_embeddings[0, min(t, last)] for t in range(T)])  # [T, N, D]
        for layer in model.encoder.layer:
            over_time = mix(layer.temporal_layernorm(x).transpose(0, 1), layer.temporal_attention).transpose(0, 1)
            x = x + torch.tanh(layer.temporal_attention_gating) * layer.temporal_dense(over_time)
            x = x + mix(layer.layernorm_before(x), layer.attention)
            x = x + layer.output.dense(layer.act(layer.intermediate.dense(layer.layernorm_after(x))))
        features = model.post_layernorm(x)
        return features, model.head(features)


def bidirectional_difference(path: WholeClip, frames: Array) -> float:
    """Largest absolute difference of the bidirectional baseline from its definition, over the last of these frames."""
    torch = _import_torch()
    features, pooled = plain_bidirectional(path._weights.model, torch.from_numpy(frames).to(path._weights.device))
    found = path._encode(frames)
    expected = (features[-1].cpu().numpy(), pooled[-1].cpu().numpy())
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


AGREEMENT = 2e-4
BFLOAT16_PRODUCTS = "float32, products in bfloat16"
BASELINES: dict[str, Baseline] = {
    "pytorch-recompute": Baseline(
        "PyTorch, recompute all frames",
        "PyTorch eager; all frames so far again for each new one, causal attention over time.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: WholeClip(spec, causal=True),
    ),
    "pytorch-bidirectional": Baseline(
        "PyTorch, bidirectional",
        "PyTorch eager; all frames so far again for each new one, every frame attends to every frame.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: WholeClip(spec, causal=False),
    ),
    "pytorch-growing-cache": Baseline(
        "PyTorch, growing cache",
        "PyTorch eager; one frame at a time, keys and values of all frames before concatenated (as the reference"
        " implementation does, with PyTorch's own attention function); glibc's default allocator thresholds.",
        "float32",
        AGREEMENT,
        {},
        GrowingCache,
    ),
    "pytorch-growing-cache-tuned": Baseline(
        "PyTorch, growing cache, tuned",
        "The same with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised.",
        "float32",
        AGREEMENT,
        RAISED_THRESHOLDS,
        GrowingCache,
    ),
    "pytorch-compile": Baseline(
        "torch.compile, ring",
        "torch.compile of a step over a preallocated ring of keys and values, updated in place.",
        "float32",
        AGREEMENT,
        {},
        CompiledRing,
    ),
    "openvino-f32": Baseline(
        "OpenVINO float32, ring",
        "OpenVINO with INFERENCE_PRECISION_HINT=f32; the bundle's graph, its ring a variable of OpenVINO's.",
        "float32",
        AGREEMENT,
        {},
        lambda spec: OpenVinoRing(spec, "f32"),
    ),
    "openvino-default": Baseline(
        "OpenVINO default precision, ring",
        "The same in the precision that OpenVINO chooses for this processor.",
        "the library's default",
        None,
        {},
        lambda spec: OpenVinoRing(spec, None),
    ),
    "framestep-bf16": Baseline(
        "framestep, bfloat16",
        "A session of one stream on the engine onnxruntime:bf16.",
        BFLOAT16_PRODUCTS,
        None,
        {},
        lambda spec: FramestepPath(replace(spec, engine=BFLOAT16)),
    ),
}

# what `--compare` takes: a path, or a path in each of its variants
GROUPS: dict[str, tuple[str, ...]] = {
    "pytorch-recompute": ("pytorch-recompute",),
    "pytorch-bidirectional": ("pytorch-bidirectional",),
    "pytorch-growing-cache": ("pytorch-growing-cache", "pytorch-growing-cache-tuned"),
    "pytorch-compile": ("pytorch-compile",),
    "openvino": ("openvino-f32", "openvino-default"),
    "framestep-bf16": ("framestep-bf16",),
}


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingPackageError("PyTorch is missing: pip install 'framestep[export]'") from None
    return torch


def _checkpoint_source(manifest: Manifest, spec: PathSpec) -> str:
    """Where the checkpoint is: as given, or as the bundle's origin says.

    Raises:
        NoCheckpointError: neither is there.
    """
    origin = manifest.origin.checkpoint
    if spec.checkpoint is not None:
        return spec.checkpoint
    if RANDOM_INIT.fullmatch(origin) or Path(origin).exists():
        return origin
    raise NoCheckpointError(
        f"{spec.name}: needs the checkpoint that the bundle was exported from ('{origin}' is not here);"
        " give it with --checkpoint"
    )


def _load_model(source: str, manifest: Manifest) -> Any:
    from ...export.checkpoint import Checkpoint, read_checkpoint
    from ...export.export import _at_size
    from ...export.streamformer import BASE, TINY, random_model

    random = RANDOM_INIT.fullmatch(source)
    if random is not None:
        sizes = {"base": BASE, "tiny": TINY}
        checkpoint = Checkpoint(random_model(sizes[random[1]], int(random[2])), source)
    else:
        checkpoint = read_checkpoint(source)
    return _at_size(checkpoint, (manifest.frame.height, manifest.frame.width))


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
