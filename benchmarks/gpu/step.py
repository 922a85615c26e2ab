"""The whole step of the base model through the engine: right, how fast at which position, and how many streams."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...export.checkpoint import Checkpoint
from ...export.export import ExportOptions, write_streamformer
from ...export.streamformer import StreamFormer, random_model
from ...runtime.bundle import Bundle, BundleWriter
from ...runtime.session import Session
from .baselines import GrowingStep, RingStep
from .hardware import Hardware, spread
from .section import Section
from .sizes import Sizes

OUTPUTS = ("features", "pooled")
# On a CPU fp32, fp16 and bf16 are off by 1.3e-6, 2e-3 and 1.5e-2. TF32 has the bits of fp16, and may cut, not round.
LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 5e-3, "bf16": 4e-2}
FRAME_SECONDS = 1 / 30
WARM_RUNS = 20


def model_and_bundle(sizes: Sizes, work: Path) -> tuple[StreamFormer, Bundle]:
    """A model with random weights, and its bundle, written once for all sections."""
    model = random_model(sizes.model)
    path = work / "model.bundle"
    if not path.exists():
        with BundleWriter(path) as writer:
            write_streamformer(Checkpoint(model, "random"), writer, ExportOptions(window=sizes.window))
    return model, Bundle.open(path, verify=False)


def run(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """Correctness in every precision, and latency by position."""
    begin = time.perf_counter()
    model, bundle = model_and_bundle(sizes, work)
    section.facts["export_seconds"] = round(time.perf_counter() - begin, 1)
    frames = _frames(sizes, sizes.window + 6)
    expected = _reference(model, frames, sizes.window, hardware.device)
    for precision in sizes.precisions:
        section.attempt(
            precision, lambda p=precision: _precision(section, hardware, sizes, bundle, p, frames, expected)
        )
        hardware.free()


def serve(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """Frames a second over many streams, and how many streams keep 30 frames a second."""
    _, bundle = model_and_bundle(sizes, work)
    for streams in sizes.served:
        if section.left() < 12:
            section.skip(f"{streams} streams: no time left")
            continue
        if not section.attempt(f"{streams} streams", lambda n=streams: _serve(section, hardware, sizes, bundle, n)):
            return
        hardware.free()
        if section.rows["streams"][-1]["p99_ms"] > FRAME_SECONDS * 1e3:
            break
    kept = [row["streams"] for row in section.rows["streams"] if row["p99_ms"] <= FRAME_SECONDS * 1e3]
    section.facts["streams_at_30_fps"] = max(kept, default=0)
    section.save()


def prime(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """A clip at once against its frames one by one."""
    _, bundle = model_and_bundle(sizes, work)
    with _session(bundle, hardware, "fp16", 2) as session:
        stepped, primed = session.open_stream(), session.open_stream()
        for count in sizes.primed:
            frames = list(_frames(sizes, count))
            for _ in range(2):  # the first time is that of compiling and of libraries
                stepped.reset()
                primed.reset()
                begin = time.perf_counter()
                for frame in frames:
                    one_by_one = stepped.step(frame)
                between = time.perf_counter()
                at_once = primed.prime(frames)
                end = time.perf_counter()
            section.add("prime", frames=count, steps_ms=(between - begin) * 1e3, prime_ms=(end - between) * 1e3)
            for name in OUTPUTS:
                section.check(f"prime {count}: {name}", _error(at_once[name], one_by_one[name]), 1e-2)


def compare(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """PyTorch's own ways to do the step, from the frame on the host to the results on the host."""
    model, _ = model_and_bundle(sizes, work)
    device = hardware.device
    frame = torch.from_numpy(_frames(sizes, 1)[0])
    for dtype in (torch.float16, torch.float32):
        growing = GrowingStep(model, dtype, device).eval()
        for position in sizes.positions:
            if section.left() < 10:
                section.skip(f"growing cache at {position}: no time left")
                continue
            growing.fill(position)
            _eager(section, hardware, f"eager, growing cache, {_plain(dtype)}", growing, frame, position, 20)
        del growing
        hardware.free()
    ring = RingStep(model, sizes.window, torch.float16, device).eval()
    _check_ring(section, sizes, model, device)
    if section.left() > 20:
        section.attempt("torch.compile", lambda: _compiled(section, hardware, sizes, ring, frame))
    else:
        section.skip("torch.compile: no time left")
    for position in sizes.positions:
        _eager(section, hardware, "eager, ring, float16", ring, frame, position, 50)


def _precision(
    section: Section,
    hardware: Hardware,
    sizes: Sizes,
    bundle: Bundle,
    precision: str,
    frames: np.ndarray[Any, Any],
    expected: dict[str, Tensor],
) -> None:
    hardware.free()
    begin = time.perf_counter()
    with _session(bundle, hardware, precision, 1) as session:
        stream = session.open_stream()
        results = [stream.step(frame) for frame in frames]
        loaded = time.perf_counter() - begin
        for name in OUTPUTS:
            found = np.stack([result[name] for result in results])
            section.check(f"step {precision}: {name}", _error(found, expected[name].numpy()), LIMITS[precision])
        engine = session._engine
        wall: dict[int, list[float]] = {position: [] for position in sizes.positions}
        rounds = 8 if precision == "fp16" and not hardware.rehearsal else 2
        for _ in range(rounds):  # in turns, so that a drift of the clocks meets every position
            for position in sizes.positions:
                engine.positions[0] = position
                hardware.wall(lambda: engine.run_range(0, 1), WARM_RUNS)
                wall[position] += hardware.wall(lambda: engine.run_range(0, 1), max(2, sizes.runs // 8))
        for position, spent in wall.items():
            section.add("step", precision=precision, position=position, **spread(spent))
        section.facts[f"{precision}_load_seconds"] = round(loaded, 2)
        section.facts[f"{precision}_peak_bytes"] = hardware.peak_bytes()
        if precision == "fp16":
            stream.reset()
            rgb = frames[0]
            hardware.wall(lambda: stream.step(rgb), WARM_RUNS)
            section.add("session", **spread(hardware.wall(lambda: stream.step(rgb), sizes.runs)))
            if not hardware.rehearsal:
                _profile(section, engine)


def _profile(section: Section, engine: Any) -> None:
    """Where a step's time goes on the device, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    runs = 10
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(runs):
                engine.run_range(0, 1)
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    except (RuntimeError, AttributeError) as problem:  # a machine may not let its counters be read
        section.skip(f"profile: {str(problem)[:200]}")
        return
    section.facts["kernels"] = sum(event.count for event in events) / runs
    section.facts["kernels_microseconds"] = sum(event.self_device_time_total for event in events) / runs
    for event in events[:24]:
        spent = event.self_device_time_total / runs
        section.add("kernels", name=event.key[:90], count=event.count / runs, microseconds=spent)


def _serve(section: Section, hardware: Hardware, sizes: Sizes, bundle: Bundle, streams: int) -> None:
    # the features of many streams are megabytes that a server would leave on the device
    with Session(bundle, "torch:fp16", hardware.device.type, streams, ("pooled",)) as session:
        engine = session._engine
        engine.frames[:] = np.random.default_rng(0).integers(0, 256, engine.frames.shape, np.uint8)
        engine.positions[:] = np.arange(streams) + 5 * sizes.window
        hardware.wall(lambda: engine.run_range(0, streams), 5)
        once = hardware.wall(lambda: engine.run_range(0, streams), 2)[-1]
        spent = hardware.wall(lambda: engine.run_range(0, streams), max(20, min(300, int(1.5 / once))))
        found = spread(spent)
        if not np.isfinite(engine.outputs["pooled"]).all():
            section.fail(f"{streams} streams: the result is not finite")
        section.add(
            "streams",
            streams=streams,
            **found,
            frames_per_second=streams / (found["p50_ms"] / 1e3),
            peak_gigabytes=hardware.peak_bytes() / 1e9,
        )


def _eager(
    section: Section,
    hardware: Hardware,
    name: str,
    step: torch.nn.Module,
    frame: Tensor,
    position: int,
    count: int,
) -> None:
    with torch.inference_mode():
        call = _whole(hardware, step, frame, position)
        hardware.wall(call, 3)
        section.add("baselines", name=name, position=position, **spread(hardware.wall(call, count)))


def _compiled(section: Section, hardware: Hardware, sizes: Sizes, ring: RingStep, frame: Tensor) -> None:
    backend = {"backend": "aot_eager"} if hardware.rehearsal else {"mode": "reduce-overhead"}
    compiled = torch.compile(ring, fullgraph=True, dynamic=False, **backend)
    begin = time.perf_counter()
    with torch.no_grad():
        for position in sizes.positions:
            call = _whole(hardware, compiled, frame, position)
            hardware.wall(call, 10)
            if "compile_seconds" not in section.facts:
                section.facts["compile_seconds"] = round(time.perf_counter() - begin, 1)
            found = spread(hardware.wall(call, 200))
            section.add("baselines", name="torch.compile, reduce-overhead, ring, float16", position=position, **found)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    section.facts["compile_cudagraph_skips"] = skips  # more than none: it ran without CUDA graphs
    section.save()


def _whole(hardware: Hardware, step: Any, frame: Tensor, position: int) -> Any:
    """A frame from pinned memory, the step, its results in pinned memory, and the wait for them."""
    pinned = hardware.device.type == "cuda"
    host_frame = frame[None].pin_memory() if pinned else frame[None]
    device_frame = host_frame.to(hardware.device)
    device_position = torch.tensor([position], device=hardware.device)
    hosts: list[Tensor] = []

    def call() -> None:
        device_frame.copy_(host_frame, non_blocking=True)
        results = step(device_frame, device_position)
        if not hosts:
            hosts.extend(torch.empty(x.shape, dtype=torch.float32, pin_memory=pinned) for x in results)
        for host, result in zip(hosts, results, strict=True):
            host.copy_(result.float(), non_blocking=True)
        hardware.synchronize()

    return call


def _check_ring(section: Section, sizes: Sizes, model: StreamFormer, device: torch.device) -> None:
    """The baseline has to compute the same, or its time says nothing."""
    frames = _frames(sizes, 5)
    expected = _reference(model, frames, sizes.window, device)
    ring = RingStep(model, sizes.window, torch.float32, device).eval()
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=False):
        for index, frame in enumerate(frames):
            position = torch.tensor([index], device=device)
            features, pooled = ring(torch.from_numpy(frame)[None].to(device), position)
    section.check("baseline ring: features", _error(features[0].cpu().numpy(), expected["features"][-1].numpy()), 1e-4)
    section.check("baseline ring: pooled", _error(pooled[0].cpu().numpy(), expected["pooled"][-1].numpy()), 1e-4)


def _reference(
    model: StreamFormer, frames: np.ndarray[Any, Any], window: int, device: torch.device
) -> dict[str, Tensor]:
    """The defining module in float32 with a growing cache under the window's mask."""
    features, pooled = [], []
    cache = None
    torch.set_float32_matmul_precision("highest")
    model = model.to(device)
    # without cuDNN, whose convolutions round float32 to TF32
    with torch.inference_mode(), device, torch.backends.cudnn.flags(enabled=False):
        for index, frame in enumerate(frames):
            given = torch.from_numpy(frame).to(device)[None, None]
            one, two, cache = model(given, cache, window, index)
            features.append(one[0, 0].cpu())
            pooled.append(two[0, 0].cpu())
    model.to("cpu")
    return {"features": torch.stack(features), "pooled": torch.stack(pooled)}


def _session(bundle: Bundle, hardware: Hardware, precision: str, streams: int) -> Session:
    return Session(bundle, f"torch:{precision}", hardware.device.type, streams, OUTPUTS)


def _frames(sizes: Sizes, count: int) -> np.ndarray[Any, Any]:
    height, width = sizes.model.image_size
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def _error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Relative error in the 2-norm; infinite where a number is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found - wide) / np.linalg.norm(wide))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
