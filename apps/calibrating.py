"""The work of `framestep calibrate`: from what a person typed to the calibration's options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle, check_replaceable
from ..runtime.counted import counted
from ..runtime.errors import FramestepError, OutputError

MOST_CHECKED = 4000  # frames of the clips that accuracy is measured on


@dataclass(frozen=True)
class CalibrateArguments:
    """What `framestep calibrate` was given; names as on the command line."""

    bundle: Path
    output: Path
    video: tuple[str, ...]
    check: tuple[str, ...] = ()
    frames: int = 256
    precision: tuple[str, ...] = ()
    keep_float: bool = False
    method: str = "percentile"
    smooth: bool = False
    max_drop: float | None = None
    min_cosine: float | None = None
    drift_frames: int = 1100
    force: bool = False


def calibrate(arguments: CalibrateArguments, progress: Callable[[str], None]) -> dict[str, Any]:
    """Quantize a bundle.

    Returns:
        Facts for the report: path, bytes before and after, and everything in `report.json`.
    """
    _need_calibration_packages()
    from ..calibration.calibrate import CalibrationOptions
    from ..calibration.calibrate import calibrate as calibrate_bundle
    from ..calibration.clips import read_clips

    bundle = Bundle.open(arguments.bundle)
    options = CalibrationOptions(
        precisions=tuple(dict.fromkeys(arguments.precision)) or CalibrationOptions.precisions,
        keep_float=arguments.keep_float,
        method=arguments.method,
        smooth=arguments.smooth,
        max_drop=arguments.max_drop,
        min_cosine=arguments.min_cosine,
        drift_frames=arguments.drift_frames,
    )
    check_replaceable(arguments.output, arguments.force)  # before clips are read
    if arguments.output.resolve() == bundle.path.resolve() and not arguments.keep_float:
        raise OutputError(
            f"{arguments.output}: is the bundle itself, whose float32 graphs would be lost;"
            " name another or give --keep-float"
        )
    clips = read_clips(arguments.video, bundle.manifest, arguments.frames)
    if arguments.check:
        check = read_clips(arguments.check, bundle.manifest, MOST_CHECKED)
    else:
        labelled = bundle.manifest.labels is not None and any(clip.truth is not None for clip in clips)
        check = read_clips(arguments.video, bundle.manifest, MOST_CHECKED) if labelled else clips
    report = calibrate_bundle(bundle, clips, check, arguments.output, options, arguments.force, progress)
    written = Bundle.open(arguments.output, verify=False).manifest
    return {
        "bundle": str(arguments.output),
        "precisions": list(written.precisions),
        "bytes": sum(entry.bytes for entry in written.files.values()),
        "bytes_before": sum(entry.bytes for entry in bundle.manifest.files.values()),
        **report.as_dict(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    lines = [
        f"{facts['bundle']}: {', '.join(facts['precisions'])}; {facts['bytes'] / 1e6:.1f} MB"
        f" ({facts['bytes'] / facts['bytes_before']:.2f} of {facts['source']}),"
        f" ranges from {counted(facts['frames'], 'frame')} in {facts['calibration_seconds']:g} s"
    ]
    for item in facts["accuracy"]:
        text = f"{item['precision']:>9}  cosine of pooled {item['cosine']:.5f}, lowest {item['lowest_cosine']:.5f}"
        if item["agreement"] is not None:
            text += f"; same best label {item['agreement']:.2%}"
        if item["accuracy"] is not None:
            text += f"; accuracy {item['accuracy']:.2%} (fp32 {item['reference_accuracy']:.2%})"
        if item["ms"] is not None:
            text += f"; p50 {item['ms']:.1f} ms (fp32 {item['reference_ms']:.1f})"
        lines.append(text)
    for item in facts["drift"]:
        lines.append(
            f"{'drift':>9}  {item['precision']} over {counted(item['frames'], 'frame')}:"
            f" cosine {item['early_cosine']:.5f} early, {item['late_cosine']:.5f} late"
        )
    if facts["kept"]:
        lines.append(f"{'in float':>9}  {', '.join(facts['kept'])}")
    for item in facts["integer_products"]:
        if item["in_float"]:
            lines.append(f"{'warning':>9}  onnxruntime:plain runs these in float: {', '.join(item['in_float'])}")
    lines.append(f"{'report':>9}  {Path(facts['bundle']) / 'report.md'}")
    return "\n".join(lines)


def _need_calibration_packages() -> None:
    for module, extra in (("onnx", "export"), ("onnxruntime", "cpu")):
        try:
            __import__(module)
        except ImportError:
            raise FramestepError(f"this needs the package {module}: pip install 'framestep[{extra}]'") from None
