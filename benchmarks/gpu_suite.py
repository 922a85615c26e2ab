"""Everything that needs a GPU, in one command.

    python benchmarks/gpu_suite.py -o DIR

Needs torch, triton, numpy and onnx, and this checkout, which may have any name and need not be installed. Writes
`gpu.json` and `gpu.md` into DIR and exits with 1 where a result is wrong. Where there is no GPU it says so and runs the
checks that need none.

Each section runs in a process of its own, within a time of its own, so that one that dies or hangs takes nothing with
it.

    --rehearse      every section on the CPU, with small sizes and interpreted kernels
    --only NAME     one section; may be given several times. `tune` runs only so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# name: seconds on a GPU; in the order in which they run. What the targets are judged by comes first: a machine may be
# lost, or the time run out, halfway, and `gpu.json` and `gpu.md` are written anew after each section.
SECTIONS = {
    "checks": 110,  # two thirds of it compiling: a hundred variants of the kernels, from 0.1 to 10 s each
    "step": 75,
    "bandwidth": 95,
    "streams": 60,
    "compare": 115,
    "products": 100,
    "decoding": 30,
    "decoder": 60,
    "prime": 30,
    "tensorrt": 120,
    "onnxruntime": 30,
}
EXTRA = {"tune": 540}
REHEARSAL_SECONDS = 300
GRACE_SECONDS = 15  # past its time a section is stopped
LIMIT_SECONDS = 470
PARTS = "sections"  # folder for what a section has found so far


def import_checkout() -> None:
    """Make this checkout the package `framestep`, whatever its folder is called."""
    found = sys.modules.get("framestep")
    if found is not None and Path(str(found.__file__)).parent == ROOT:
        return
    spec = importlib.util.spec_from_file_location(
        "framestep", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["framestep"] = module
    spec.loader.exec_module(module)


def main() -> int:
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.section is not None:
        return run_section(options)
    import torch

    begin = time.monotonic()
    gpu = torch.cuda.is_available() and not options.rehearse
    if not gpu and not options.rehearse:
        print("There is no GPU here that PyTorch can use: only the checks that need none are run.", flush=True)
    names = options.only or (list(SECTIONS) if gpu or options.rehearse else ["checks"])
    results: dict[str, Any] = {"rehearsal": not gpu, "hardware": {}, "sections": []}
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as work:
        for name in names:
            seconds = float({**SECTIONS, **EXTRA}[name] if gpu else REHEARSAL_SECONDS)
            if gpu and name in SECTIONS:
                seconds = min(seconds, LIMIT_SECONDS - (time.monotonic() - begin) - GRACE_SECONDS)
            results["sections"].append(_start(name, seconds, gpu, Path(work), options.output))
            _write(results, options.output)
            shutil.rmtree(options.output / PARTS, ignore_errors=True)  # all of it is in gpu.json now
    failures = sum(len(section["failures"]) for section in results["sections"])
    checks = sum(len(section["rows"].get("checks", [])) for section in results["sections"])
    print((options.output / "gpu.md").read_text(), flush=True)
    print(f"{checks} comparisons, {failures} failures, {time.monotonic() - begin:.0f} s; written to {options.output}")
    return 1 if failures or not checks else 0


def run_section(options: argparse.Namespace) -> int:
    """In the process of one section."""
    import_checkout()
    from framestep.benchmarks.gpu import bandwidth, checks, compiled, decoding, products, speaking, step, tune
    from framestep.benchmarks.gpu.hardware import find_hardware
    from framestep.benchmarks.gpu.section import Section
    from framestep.benchmarks.gpu.sizes import FULL, SMALL

    hardware = find_hardware(options.rehearse)
    sizes = SMALL if options.rehearse else FULL
    section = Section(options.section, options.output / f"{options.section}.json", options.seconds)
    section.facts["hardware"] = hardware.describe()
    section.save()
    calls = {
        "checks": lambda: checks.run(section, hardware, sizes),
        "bandwidth": lambda: bandwidth.run(section, hardware, sizes),
        "step": lambda: step.run(section, hardware, sizes, options.work),
        "streams": lambda: step.serve(section, hardware, sizes, options.work),
        "tensorrt": lambda: compiled.tensorrt(section, hardware, sizes, options.work),
        "onnxruntime": lambda: compiled.onnxruntime(section, hardware, sizes, options.work),
        "prime": lambda: step.prime(section, hardware, sizes, options.work),
        "decoding": lambda: decoding.run(section, hardware, sizes),
        "products": lambda: products.run(section, hardware, sizes),
        "decoder": lambda: speaking.run(section, hardware, sizes, options.work),
        "compare": lambda: step.compare(section, hardware, sizes, options.work),
        "tune": lambda: tune.run(section, hardware, sizes),
    }
    section.attempt("section", calls[options.section])
    section.save()
    return 0


def _start(name: str, seconds: float, gpu: bool, work: Path, output: Path) -> dict[str, Any]:
    """Run a section in a process of its own, and give what it left."""
    empty = {"name": name, "facts": {}, "rows": {}, "failures": [], "skipped": [], "seconds": 0.0}
    if seconds < GRACE_SECONDS:
        return {**empty, "skipped": ["the whole section: no time left"]}
    parts = output / PARTS
    parts.mkdir(exist_ok=True)
    file = parts / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "-o", str(parts), "--section", name]
    command += ["--seconds", str(seconds), "--work", str(work)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not gpu:
        command.append("--rehearse")
        environment["TRITON_INTERPRET"] = "1"
    print(f"== {name}, at most {seconds:.0f} s", flush=True)
    process = subprocess.Popen(command, env=environment)
    problem = ""
    try:
        status = process.wait(timeout=seconds + GRACE_SECONDS)
        problem = f"the section ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    found: dict[str, Any] = {**empty, **json.loads(file.read_text())} if file.exists() else empty
    if problem:
        found["failures"].append(problem)
    elif process.returncode != 0:
        found["skipped"].append(f"what follows: the section was stopped after {seconds + GRACE_SECONDS:.0f} s")
    return found


def _write(results: dict[str, Any], output: Path) -> None:
    import_checkout()
    from framestep.benchmarks.gpu.report import markdown

    for section in results["sections"]:
        results["hardware"] = section["facts"].pop("hardware", None) or results["hardware"]
    (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "gpu.md").write_text(markdown(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in one command.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--only", action="append", choices=[*SECTIONS, *EXTRA], metavar="NAME", help="a section")
    parser.add_argument("--section", choices=[*SECTIONS, *EXTRA], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
