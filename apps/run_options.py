"""What `framestep run` is asked for, and whether it can be done; checked before anything is opened."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from ..runtime.errors import FramestepError, OutputError
from ..runtime.manifest import Manifest
from ..runtime.outputs import frame_outputs
from ..runtime.sources import at_home
from .annotate import check_overlay
from .events import EventDetector
from .output_places import check_new_folder, check_outside_bundles, check_writable, identity

LARGEST_LISTED = 4096  # values of one output that fit into a line of JSON
DEFAULT_ON = 0.5
OFF_PER_ON = 0.75
MOST_MASK_LABELS = 255  # the byte 255 marks what the model did not see


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `framestep run` was asked for; see its help."""

    bundle: Path
    sources: tuple[str, ...]
    engine: str
    device: str
    on: float | None = None  # None: DEFAULT_ON
    off: float | None = None  # None: OFF_PER_ON of `on`
    width: int | None = None
    height: int | None = None
    camera_fps: float | None = None
    fourcc: str | None = None
    rate: float | None = None  # None: the bundle's; 0: every frame
    threads: int | None = None
    precision: str = "auto"
    outputs: tuple[str, ...] = ()
    output: Path | None = None
    events: Path | None = None
    record: Path | None = None
    overlay: str | None = None
    show: bool = False
    save_features: Path | None = None
    save_masks: Path | None = None
    max_frames: int | None = None
    deadline_ms: float | None = None

    @property
    def on_threshold(self) -> float:
        return DEFAULT_ON if self.on is None else self.on

    @property
    def off_threshold(self) -> float:
        return self.on_threshold * OFF_PER_ON if self.off is None else self.off


@dataclass(frozen=True)
class Plan:
    """What to fetch from the session, and where it goes.

    Attributes:
        note: what one should know who asked for no output of a model that gives no scores.
    """

    options: RunOptions
    labels: tuple[str, ...]
    background: str | None
    fetched: tuple[str, ...]
    listed: tuple[str, ...]
    saved: tuple[str, ...]
    rate: float | None
    note: str | None = None


def plan_run(options: RunOptions, manifest: Manifest) -> Plan:
    """Checks every option that can be checked without opening a source."""
    labels = manifest.labels.names if manifest.labels is not None else ()
    sizes = {
        name: _values(output.port.shape, len(labels))
        for name, output in frame_outputs(manifest).items()
        if labels or not output.labelled
    }
    if manifest.language is not None and manifest.language.cross is not None:
        raise FramestepError(f"{options.bundle}: a {manifest.family} is talked with: framestep chat {options.bundle}")
    if not sizes:
        raise FramestepError(f"{options.bundle}: a {manifest.family} sees no frames; there is nothing to run on video")
    if options.deadline_ms is not None and not math.isfinite(options.deadline_ms):
        raise FramestepError(f"--deadline-ms {options.deadline_ms:g}: must be finite; leave it out for none")
    EventDetector((), options.on_threshold, options.off_threshold)
    if options.on is not None and options.events is None and options.record is None and not options.show:
        raise FramestepError(
            f"--on {options.on:g}: says when a label is present; add --events FILE.jsonl or --record FILE.mp4"
        )
    if options.off is not None and options.events is None:
        raise FramestepError(f"--off {options.off:g}: says when segments end; add --events FILE.jsonl")
    for name in options.outputs:
        if name not in sizes:
            raise FramestepError(f"--outputs '{name}': no such output; this bundle has {', '.join(sizes)}")
        if sizes[name] > LARGEST_LISTED and options.save_features is None:
            raise FramestepError(
                f"--outputs {name}: {sizes[name]} values a frame are too many for a line of JSON "
                f"(at most {LARGEST_LISTED}); save them with --save-features FILE.npz"
            )
    if options.outputs and options.output is None and options.save_features is None:
        raise FramestepError(
            f"--outputs {','.join(options.outputs)}: goes into a file; "
            f"add --output FILE.jsonl or --save-features FILE.npz"
        )
    for option, path in (("--events", options.events), ("--save-masks", options.save_masks)):
        if path is not None and not labels:
            raise FramestepError(
                f"{option} {path}: this bundle has no labels; add some with `framestep label BUNDLE --labels FILE`"
            )
    if options.save_masks is not None and len(labels) > MOST_MASK_LABELS:
        raise FramestepError(
            f"--save-masks {options.save_masks}: a mask's pixels are bytes, which tell {MOST_MASK_LABELS} labels apart;"
            f" this bundle has {len(labels)}"
        )
    if options.overlay is not None:
        check_overlay(options.overlay, labels)
        if options.record is None and not options.show:
            raise FramestepError(f"--overlay {options.overlay}: is drawn into --record FILE.mp4 or --show; add one")
    _check_files(options)
    if options.show:
        _check_window()

    listed = tuple(name for name in options.outputs if sizes[name] <= LARGEST_LISTED)
    if not options.outputs and labels:
        listed = ("scores",)
    saved: tuple[str, ...] = ()
    if options.save_features is not None:
        saved = options.outputs or tuple(name for name in sizes if name != "patch_scores")
    wanted = [*listed, *saved]
    if labels:
        wanted.append("scores")
    if options.overlay is not None or options.save_masks is not None:
        wanted.append("patch_scores")
    fetched = tuple(dict.fromkeys(wanted)) or (min(sizes, key=lambda name: sizes[name]),)
    background = manifest.labels.background if manifest.labels is not None else None
    rate = manifest.rate if options.rate is None else (options.rate or None)
    note = None if labels or options.outputs or saved else _why_no_scores(options.bundle, manifest)
    return Plan(options, labels, background, fetched, listed, saved, rate, note)


def _why_no_scores(bundle: Path, manifest: Manifest) -> str:
    if manifest.language is not None:
        return f"{bundle}: a {manifest.family} is talked with: framestep chat {bundle}; this only encodes its frames"
    return f"{bundle}: has no labels, so it gives no scores; `framestep label {bundle} --labels FILE` adds some"


def _values(shape: Sequence[int | str], labels: int) -> int:
    """Values a frame of an output; the first axis is the streams'."""
    count = 1
    for size in shape[1:]:
        count *= labels if size == "C" else int(size)
    return count


def _check_files(options: RunOptions) -> None:
    asked = {
        "--output": [options.output] if options.output is not None else [],
        "--events": [options.events] if options.events is not None else [],
        "--record": paths_for(options.record, options.sources),
        "--save-features": paths_for(options.save_features, options.sources),
        "--save-masks": [options.save_masks] if options.save_masks is not None else [],
    }
    for option, suffix in (("--record", ".mp4"), ("--save-features", ".npz")):
        for path in asked[option]:
            if path.suffix.lower() != suffix:
                raise OutputError(f"{option} {path}: is written as {suffix[1:]}; name it *{suffix}")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise OutputError(f"{option} {path}: is a device or a pipe; name a file")
    taken = {identity(at_home(source)): "--source" for source in options.sources}
    for option, paths in asked.items():
        for path in paths:
            check_outside_bundles(path, option)
            if option == "--save-masks":
                check_new_folder(path, option)
            else:
                check_writable(path, option)
            other = taken.setdefault(identity(path), option)
            if other != option:
                raise OutputError(f"{option} {path}: is also the file of {other}; name another")


def paths_for(path: Path | None, sources: Sequence[str]) -> list[Path]:
    """One file per source: `out.mp4`, or with several sources `out.0.mp4`, `out.1.mp4`, and so on."""
    if path is None:
        return []
    if len(sources) == 1:
        return [path]
    return [path.with_suffix(f".{number}{path.suffix}") for number in range(len(sources))]


def _check_window() -> None:
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise FramestepError("--show: no display here (DISPLAY and WAYLAND_DISPLAY are not set); use --record FILE.mp4")
    try:
        cv2.namedWindow("framestep", cv2.WINDOW_NORMAL)
        cv2.destroyWindow("framestep")
    except cv2.error:
        raise FramestepError(
            "--show: this OpenCV cannot open windows; replace opencv-python-headless by opencv-python, "
            "or use --record FILE.mp4"
        ) from None
