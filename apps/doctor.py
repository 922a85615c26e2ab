"""What this machine has, and what to install for the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..runtime.counted import counted
from .stopping import stop_on_signals


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        status: "ok", "absent" (something optional is not there) or "problem" (something needed does not work).
        advice: what to do about it, where there is something.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at Python, the packages, the GPU and the cameras. Takes a second or two; changes nothing."""
    looks: list[Callable[[], Finding]] = [
        _python,
        _processor,
        _native_library,
        _onnxruntime,
        _onnxruntime_cuda,
        _gpu,
        _cuda,
        _tensorrt,
        _opencv,
        _gstreamer,
        _display,
        _cameras,
        lambda: _package("torch", "export", "exporting checkpoints"),
        lambda: _package("onnx", "export", "exporting checkpoints"),
        lambda: _package("triton", "torch", "--engine torch on an NVIDIA GPU"),
        lambda: _package("transformers", "export", "label texts from a SigLIP model"),
        lambda: _package("tokenizers", "text", "new labels from a bundle's text graph"),
    ]
    findings: list[Finding] = []
    # A Ctrl-C raised while a package loads may come out of it as an ImportError: it waits for the end of the look.
    with stop_on_signals() as stopping:
        for look in looks:
            if not stopping.asked:
                findings.append(_finding(look))
    stopping.obey()
    return findings


def _finding(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # a broken package must not hide what the others are
        name = getattr(look, "__name__", "look").strip("_")
        return Finding(name, "problem", f"{type(error).__name__}: {error}".splitlines()[0])


def table(findings: list[Finding]) -> Table:
    """The findings for a person."""
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(no_wrap=True)
    rows.add_column(style="bold", overflow="fold")
    rows.add_column(overflow="fold")
    marks = {"ok": Text("ok", "green"), "absent": Text("--", "yellow"), "problem": Text("!!", "red")}
    for finding in findings:
        told = Text(finding.found)  # no markup: pip install 'framestep[cpu]' is to be read whole
        if finding.advice:
            told.append(f"\n{finding.advice}", "dim")
        rows.add_row(marks[finding.status], Text(finding.name), told)
    return rows


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _processor() -> Finding:
    from ..runtime.cores import default_threads, usable_processors

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    usable, threads = usable_processors(), default_threads()
    fewer = "" if threads == usable else f", of which a session takes {counted(threads, 'thread')}"
    return Finding("processor", "ok", f"{model}, {counted(usable, 'core')} usable{fewer}")


def _native_library() -> Finding:
    from ..runtime.errors import FramestepError
    from ..runtime.library import LIBRARY, library

    try:
        library()
    except FramestepError as error:
        return Finding("native library", "problem", str(error))
    return Finding("native library", "ok", str(LIBRARY))


def _onnxruntime() -> Finding:
    if not _installed("onnxruntime"):
        return Finding("ONNX Runtime", "problem", "not installed", "pip install 'framestep[cpu]' (or 'framestep[gpu]')")
    import onnxruntime

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding("ONNX Runtime", "ok", f"{onnxruntime.__version__}, providers {providers}")


def _onnxruntime_cuda() -> Finding:
    if _installed("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return Finding("ONNX Runtime CUDA", "ok", "available: framestep run --device cuda")
    advice = "on a machine with an NVIDIA GPU: pip uninstall onnxruntime, then pip install 'framestep[gpu]'"
    return Finding("ONNX Runtime CUDA", "absent", "no CUDA provider", advice)


def _gpu() -> Finding:
    if Path("/proc/device-tree/model").exists():
        model = Path("/proc/device-tree/model").read_text(errors="replace").strip("\0 \n")
        if "jetson" in model.lower() or "nvidia" in model.lower():
            return Finding("GPU", "ok", model)
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "absent", "no NVIDIA driver (nvidia-smi not found)")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        return Finding("GPU", "problem", done.stdout.strip() or done.stderr.strip(), "check the NVIDIA driver")
    return Finding("GPU", "ok", "; ".join(done.stdout.strip().splitlines()))


def _cuda() -> Finding:
    nvcc = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
    if nvcc is None:
        return Finding("CUDA toolkit", "absent", "no nvcc (needed only to build extensions)")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=False)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return Finding("CUDA toolkit", "ok", lines[0].strip() if lines else nvcc)


def _tensorrt() -> Finding:
    from ..runtime.engines.tensorrt_package import INSTALL, import_flavour, installed_flavours
    from ..runtime.errors import EngineError

    found = installed_flavours()
    if not found:
        return Finding("TensorRT", "absent", "not installed; for `framestep build` and --engine tensorrt", INSTALL)
    try:
        versions = ", ".join(f"{flavour} {import_flavour(flavour).__version__}" for flavour in found)
    except EngineError as error:
        return Finding("TensorRT", "problem", str(error))
    needed = {"pycuda": "pycuda", "cuda": "cuda-bindings"}
    missing = [name for module, name in needed.items() if not _installed(module)]
    if missing:
        return Finding("TensorRT", "ok", f"{versions}: builds engines; to run them {', '.join(missing)} is missing")
    return Finding("TensorRT", "ok", versions)


def _opencv() -> Finding:
    from ..runtime.sources.opencv import what_to_install

    if not _installed("cv2"):
        return Finding("OpenCV", "problem", "not installed", "pip install opencv-python")
    try:
        import cv2
    except ImportError as error:
        return Finding("OpenCV", "problem", f"cannot be loaded: {error}", what_to_install(error))

    wanted = ("FFMPEG", "V4L/V4L2", "GStreamer")
    lines = [line.strip() for line in cv2.getBuildInformation().splitlines()]
    has = [name for name in wanted if any(line.startswith(f"{name}:") and "YES" in line for line in lines)]
    return Finding("OpenCV", "ok", f"{cv2.__version__}, video through {', '.join(has) or 'nothing'}")


def _gstreamer() -> Finding:
    from ..runtime.errors import SourceError
    from ..runtime.sources import has_gstreamer

    try:
        works = has_gstreamer()
    except SourceError:
        return Finding("GStreamer sources", "absent", "no OpenCV that can be loaded")
    if works:
        return Finding("GStreamer sources", "ok", "gst:PIPELINE works")
    advice = (
        "pip's OpenCV has none; the system's has (apt install python3-opencv, and a virtual environment made with"
        " --system-site-packages; on a Jetson JetPack brings it)"
    )
    return Finding("GStreamer sources", "absent", "OpenCV was built without GStreamer", advice)


def _display() -> Finding:
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return Finding("display", "ok", "framestep run --show works")
    return Finding("display", "absent", "none; use --record instead of --show")


def _cameras() -> Finding:
    from ..runtime.sources import list_cameras

    cameras = list_cameras()
    if not cameras:
        return Finding("cameras", "absent", "no /dev/video*", "plug one in, or use a file, an address or `synthetic`")
    return Finding("cameras", "ok", "; ".join(f"{c.path} ({c.name})" if c.name else c.path for c in cameras))


def _package(name: str, extra: str, purpose: str) -> Finding:
    if not _installed(name):
        return Finding(name, "absent", f"not installed; for {purpose}", f"pip install 'framestep[{extra}]'")
    version = importlib.metadata.version(name)
    oldest = _oldest(name, extra)
    if oldest and _numbers(version) < _numbers(oldest):
        advice = f"pip install --upgrade 'framestep[{extra}]'"
        return Finding(name, "absent", f"{version} is too old for {purpose}: {oldest} or later", advice)
    return Finding(name, "ok", f"{version}, for {purpose}")


def _oldest(name: str, extra: str) -> str | None:
    """The first version of a package that an extra of ours takes."""
    wanted = re.compile(rf"{name}>=([\d.]+).*\bextra == ['\"]{extra}['\"]")
    try:
        stated = importlib.metadata.requires("framestep") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is run as it lies there
        return None
    return next((found[1] for found in map(wanted.match, stated) if found), None)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]*\d", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
