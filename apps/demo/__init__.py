"""The demo: export a small model, run it on a video, and leave results to look at.

The weights are random, so the labels mean nothing yet; all else is the real path from checkpoint to annotated video.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import OutputError
from ..runtime.sources import MOTIONS, open_source
from .exporting import ExportArguments, LabelArguments, export
from .record import VideoRecorder
from .run import run
from .run_options import RunOptions
from .status import status_for

SCENE = "synthetic:seed=7,frames=300,width=640,height=360,fps=25"
HIDDEN = 96  # of the tiny model


def demo(folder: Path, source: str | None = None) -> dict[str, Any]:
    """Make a clip, a bundle, an annotated video and results in `folder`.

    Args:
        folder: made if needed; what an earlier demo left there is replaced.
        source: what to run on instead of the drawn clip.

    Returns:
        What was made, by name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
    if source is None:
        source = str(_draw_clip(folder / "clip.mp4"))
    bundle = folder / "tiny.bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    labelling = LabelArguments(labels=_write_labels(folder), text_embeddings=_write_embeddings(folder))
    export(ExportArguments(None, bundle, random_init="tiny", labelling=labelling))
    options = RunOptions(
        bundle=bundle,
        sources=(source,),
        engine="auto",
        device="auto",
        on=0.55,
        output=folder / "results.jsonl",
        events=folder / "events.jsonl",
        record=folder / "annotated.mp4",
        overlay=MOTIONS[0],
    )
    summary = run(options, status_for(quiet=True))
    return {
        "note": "random weights: the labels mean nothing yet",
        "bundle": str(bundle),
        "source": source,
        "video": str(options.record),
        "picture": str(_picture(folder / "annotated.mp4", folder / "annotated.png")),
        "results": str(options.output),
        "events": str(options.events),
        "frames": summary.frames,
        "p50_ms": round(summary.latency_ms.p50, 2),
        "p99_ms": round(summary.latency_ms.p99, 2),
    }


def _draw_clip(path: Path) -> Path:
    with open_source(SCENE) as scene:
        recorder = VideoRecorder(path, scene.fps)
        try:
            for frame in scene:
                recorder.write(np.ascontiguousarray(frame.rgb[..., ::-1]), frame.timestamp)
        finally:
            recorder.close()
    return path


def _picture(video: Path, path: Path) -> Path:
    """A frame from the middle of a video."""
    import cv2

    capture = cv2.VideoCapture(str(video))
    capture.set(cv2.CAP_PROP_POS_FRAMES, capture.get(cv2.CAP_PROP_FRAME_COUNT) // 2)
    read, bgr = capture.read()
    capture.release()
    if not read or not cv2.imwrite(str(path), bgr):
        raise OutputError(f"{path}: no picture could be taken from {video}")
    return path


def _write_labels(folder: Path) -> Path:
    path = folder / "labels.txt"
    path.write_text("\n".join(MOTIONS) + "\n", "utf-8")
    return path


def _write_embeddings(folder: Path) -> Path:
    """Random directions in place of a text model, which cannot be fetched here."""
    from safetensors.numpy import save_file

    rows = np.random.default_rng(0).standard_normal((len(MOTIONS), HIDDEN)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    path = folder / "text_embeddings.safetensors"
    numbers = {"logit_scale": np.float32(1.5), "logit_bias": np.float32(0)}
    save_file({"text_embeddings": rows, **{key: np.array(value) for key, value in numbers.items()}}, path)
    return path
