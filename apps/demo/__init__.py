"""The demo: a small trained model that sees motion, from its checkpoint to an annotated video, in float32 and in INT8.

`scenes` draws what it sees, `train` made the model in `model/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import OutputError
from ...runtime.sources import open_source
from ...runtime.sources.opencv import as_opencv_takes
from ..calibrating import CalibrateArguments, calibrate
from ..exporting import ExportArguments, LabelArguments, export
from ..output_places import check_outside_bundles
from ..run import STOPPED_BY_USER, Summary, run
from ..run_options import RunOptions
from ..status import status_for
from ..video_recorder import VideoRecorder
from .scenes import FPS, LABELS, draw_scene

MODEL = Path(__file__).parent / "model"
SEED = 2_000_000_000  # of the clips drawn here; none was trained on
SHOWN = (480, 400)  # side in pixels and frames of the clip that is annotated
CHECKED = (128, 320)  # the same of those that accuracy is measured on
CLIPS = 4
MAX_DROP = 0.5  # percentage points


def demo(
    folder: Path, source: str | None = None, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Make clips, bundles, an annotated video and results in `folder`.

    Args:
        folder: made if needed; what an earlier demo left there is replaced.
        source: what to run on instead of the drawn clip.
        progress: takes a line about each stage.

    Returns:
        What was made and measured, by name.
    """
    check_outside_bundles(folder, "--output")
    if source is not None:
        open_source(source).close()  # a wrong name is told now, not after all that precedes the run
    clips = folder / "clips"
    try:
        clips.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
    progress("drawing clips")
    for number in range(CLIPS):
        draw_clip(clips / f"{number}.mp4", SEED + 1 + number, *CHECKED)
    truth = None
    if source is None:
        source = str(folder / "clip.mp4")
        truth = draw_clip(Path(source), SEED, *SHOWN)
    float_bundle, bundle = folder / "demo.fp32.bundle", folder / "demo.bundle"
    for path in (float_bundle, bundle):
        shutil.rmtree(path, ignore_errors=True)
    labelling = LabelArguments(labels=MODEL / "labels.txt", text_embeddings=MODEL / "text_embeddings.safetensors")
    progress("exporting the model, and checking the bundle against PyTorch")
    export(ExportArguments(str(MODEL), float_bundle, resize="stretch", rate=None, labelling=labelling))
    calibration = calibrate(CalibrateArguments(float_bundle, bundle, (str(clips),), max_drop=MAX_DROP), progress)
    accuracy = calibration["accuracy"][0]
    progress(f"running float32 and INT8 on {source}")
    float_run = _run(float_bundle, source, folder)  # its files make room for INT8's: both are timed at the same work
    int8_run = _run(bundle, source, folder)
    facts: dict[str, Any] = {
        "bundle": str(bundle),
        "source": source,
        "video": str(folder / "annotated.mp4"),
        "picture": str(_picture(folder / "annotated.mp4", folder / "annotated.png")),
        "results": str(folder / "results.jsonl"),
        "events": str(folder / "events.jsonl"),
        "report": str(bundle / "report.md"),
        "frames": int8_run.frames,
        "accuracy": {"fp32": accuracy["reference_accuracy"], "int8": accuracy["accuracy"]},
        "bytes": {"fp32": calibration["bytes_before"], "int8": calibration["bytes"]},
        "latency_ms": {"fp32": float_run.latency_ms.as_dict(), "int8": int8_run.latency_ms.as_dict()},
    }
    if truth is not None:
        facts["accuracy_of_clip"] = _accuracy(folder / "results.jsonl", truth)
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a person, with a table of what each precision costs."""
    lines = [
        f"{name:>8}  {facts[name]}" for name in ("bundle", "source", "video", "picture", "results", "events", "report")
    ]
    if "accuracy_of_clip" in facts:
        lines.append(
            f"{'clip':>8}  {facts['frames']} frames, {facts['accuracy_of_clip']:.1%} with the right label on top"
        )
    lines += ["", f"{'':>8}  {'accuracy':>8}  {'MB':>5}  {'p50':>6}  {'p95':>6}  {'p99':>6}  ms a frame"]
    for precision, latency in facts["latency_ms"].items():
        times = "  ".join(f"{latency[name]:6.2f}" for name in ("p50", "p95", "p99"))
        accuracy, size = facts["accuracy"][precision], facts["bytes"][precision] / 1e6
        lines.append(f"{precision:>8}  {accuracy:>8.1%}  {size:5.2f}  {times}")
    lines.append(f"{'':>8}  accuracy over {CLIPS} other clips of {CHECKED[1]} frames, no frame left out")
    return "\n".join(lines)


def draw_clip(path: Path, seed: int, size: int, frames: int) -> np.ndarray:
    """Draw a scene into a video file, and the label of each frame into `NAME.labels.txt` beside it.

    Returns:
        The labels, int64 [frames].
    """
    scene = draw_scene(seed, frames, size)
    recorder = VideoRecorder(path, FPS)
    try:
        for index, rgb in enumerate(scene.frames):
            recorder.write(np.ascontiguousarray(rgb[..., ::-1]), index / FPS)
    finally:
        recorder.close()
    path.with_suffix(".labels.txt").write_text("".join(f"{LABELS[label]}\n" for label in scene.labels), "utf-8")
    return scene.labels


def _run(bundle: Path, source: str, folder: Path) -> Summary:
    options = RunOptions(
        bundle=bundle,
        sources=(source,),
        engine="auto",
        device="auto",
        output=folder / "results.jsonl",
        events=folder / "events.jsonl",
        record=folder / "annotated.mp4",
    )
    summary = run(options, status_for(quiet=True))
    if summary.stopped == STOPPED_BY_USER:
        raise KeyboardInterrupt  # what would follow speaks of all frames
    if summary.errors:
        raise OutputError(summary.errors[0])
    return summary


def _accuracy(results: Path, truth: np.ndarray) -> float:
    """Share of frames whose highest score is the true label's."""
    hits = []
    for record in map(json.loads, results.read_text("utf-8").splitlines()):
        best = max(record["scores"], key=record["scores"].__getitem__)
        hits.append(best == LABELS[truth[record["index"]]])
    return float(np.mean(hits))


def _picture(video: Path, path: Path) -> Path:
    """A frame from a quarter of the way into a video."""
    import cv2

    capture = cv2.VideoCapture(as_opencv_takes(video))
    capture.set(cv2.CAP_PROP_POS_FRAMES, capture.get(cv2.CAP_PROP_FRAME_COUNT) // 4)
    read, bgr = capture.read()
    capture.release()
    if not read:
        raise OutputError(f"{path}: no picture could be taken from {video}")
    path.write_bytes(cv2.imencode(path.suffix, bgr)[1].tobytes())
    return path
