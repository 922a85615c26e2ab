"""PyTorch's ways to the features of the newest frame: all frames again, a growing cache, a compiled ring.

Sizes in shape comments: T frames, P past frames, N patches, H heads, W window, D hidden, d head_dim.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.errors import EngineError, FramestepError
from ...runtime.manifest import Manifest
from .paths import Array, MissingPackageError, OutOfTimeError, PathSpec, frame_at, window_of

RANDOM_INIT = re.compile(r"random-init:(base|tiny):(\d+)")  # origin of `framestep export --random-init`


class NoCheckpointError(FramestepError):
    """A PyTorch path needs the checkpoint: a bundle holds folded weights only."""


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
    from ...export.export import at_size
    from ...export.streamformer import BASE, TINY, random_model

    random = RANDOM_INIT.fullmatch(source)
    if random is not None:
        sizes = {"base": BASE, "tiny": TINY}
        checkpoint = Checkpoint(random_model(sizes[random[1]], int(random[2])), source)
    else:
        checkpoint = read_checkpoint(source)
    return at_size(checkpoint, (manifest.frame.height, manifest.frame.width))
