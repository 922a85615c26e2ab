"""The command line: what it prints where, and how it exits."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import main

from framestep.apps import cli
from framestep.apps import run as run_module
from framestep.apps.exporting import agreement
from framestep.apps.latency import Percentiles
from framestep.apps.run import SourceSummary, Summary
from framestep.apps.run_options import RunOptions
from framestep.runtime.errors import BundleError


def summary(**changes) -> Summary:
    latency = Percentiles(1.0, 2.0, 3.0, 4.0)
    values = {
        "bundle": "b",
        "engine": "onnxruntime on cpu",
        "stopped": "every source ended",
        "seconds": 2.0,
        "frames": 10,
        "fps": 5.0,
        "latency_ms": latency,
        "deadline_ms": 3.0,
        "missed_deadlines": 1,
        "dropped": 0,
        "bad_frames": 0,
        "non_finite": 0,
        "events": None,
        "files": {"results": ["out.jsonl"]},
        "sources": [SourceSummary("clip.mp4", 10, 0, 0, 0, latency)],
        "errors": [],
    }
    return Summary(**{**values, **changes})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    """The options of runs; the runs succeed."""
    options: list[RunOptions] = []

    def stand_in(given: RunOptions, status) -> Summary:
        options.append(given)
        return summary()

    monkeypatch.setattr(run_module, "run", stand_in)
    return options


def golden_bundle() -> Path:
    return Path(__file__).parents[1] / "data" / "steps.bundle"


def test_run_prints_a_summary(asked, monkeypatch, capsys) -> None:
    assert main(monkeypatch, "run", "b.bundle", "--source", "clip.mp4") == 0
    printed = capsys.readouterr()
    assert "10 frames" in printed.out and "out.jsonl" in printed.out and printed.err == ""
    (options,) = asked
    assert options.bundle == Path("b.bundle") and options.sources == ("clip.mp4",)
    assert (options.on_threshold, options.off_threshold) == (0.5, 0.375)


def test_json_is_one_object_on_standard_output(asked, monkeypatch, capsys) -> None:
    assert main(monkeypatch, "run", "b", "-s", "clip.mp4", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["frames"] == 10 and found["latency_ms"] == {"p50": 1.0, "p95": 2.0, "p99": 3.0, "max": 4.0}
    assert printed.err == ""


def test_every_option_reaches_the_run(asked, monkeypatch) -> None:
    arguments = (
        "run b -s 0 -s rtsp://x --output o.jsonl --events e.jsonl --record r.mp4 --overlay all --show "
        "--save-features f.npz --save-masks m --outputs pooled,scores --on 0.7 --off 0.2 --rate 4 --max-frames 9 "
        "--deadline-ms 50 --engine onnxruntime --device cpu --threads 2 --width 640 --height 480 "
        "--camera-fps 30 --fourcc MJPG"
    )
    assert main(monkeypatch, *arguments.split()) == 0
    assert asked == [
        RunOptions(
            bundle=Path("b"),
            sources=("0", "rtsp://x"),
            output=Path("o.jsonl"),
            events=Path("e.jsonl"),
            record=Path("r.mp4"),
            overlay="all",
            show=True,
            save_features=Path("f.npz"),
            save_masks=Path("m"),
            outputs=("pooled", "scores"),
            on=0.7,
            off=0.2,
            rate=4.0,
            max_frames=9,
            deadline_ms=50.0,
            engine="onnxruntime",
            device="cpu",
            threads=2,
            width=640,
            height=480,
            camera_fps=30.0,
            fourcc="MJPG",
        )
    ]


def test_a_run_that_lost_something_exits_2(monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_module, "run", lambda *_: summary(errors=["out.mp4: disk nearly full"]))
    assert main(monkeypatch, "run", "b", "-s", "clip.mp4", "--json") == 2
    assert json.loads(capsys.readouterr().out)["errors"] == ["out.mp4: disk nearly full"]


def test_an_error_raised_on_purpose_is_one_line(monkeypatch, capsys) -> None:
    def fail(*_) -> None:
        raise BundleError("b: not a\nbundle")

    monkeypatch.setattr(run_module, "run", fail)
    assert main(monkeypatch, "run", "b", "-s", "clip.mp4") == 2
    printed = capsys.readouterr()
    assert printed.err == "framestep: b: not a bundle\n" and printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "b"), "--source"),
        (("run", "b", "-s", "0", "--sauce", "1"), "--sauce"),
        (("run", "b", "-s", "0", "--max-frames", "0"), "--max-frames"),
        (("run", "b", "-s", "0", "--rate", "fast"), "--rate"),
        (("walk",), "walk"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(monkeypatch, capsys, arguments, message) -> None:
    assert main(monkeypatch, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("framestep: ") and message in printed and printed.count("\n") == 1
    assert f"(see `framestep{' run' if arguments[0] == 'run' else ''} --help`)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", golden_bundle(), "-s", "synthetic", "--threads", 9999), "--threads: expected 1 to "),
        (("run", golden_bundle(), "-s", "synthetic", "--camera-fps", 0), "--camera-fps is 0.0: must be greater than 0"),
        (
            ("run", golden_bundle(), "-s", "synthetic", "--camera-fps", "inf"),
            "--camera-fps is inf: must be greater than 0",
        ),
        (("chat", golden_bundle(), "-s", "synthetic", "--response-from", 3), "--response-from: expected a probability"),
        (("run", golden_bundle(), "-s", "no: file"), "source no: file: no such file"),  # an argument of no option
        (("run", golden_bundle(), "-s", "~no-such-user/x.mp4"), "source ~no-such-user/x.mp4: no such file"),
    ],
)
def test_an_error_names_the_option_that_was_typed(monkeypatch, capsys, arguments, message) -> None:
    assert main(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"framestep: {message}")


@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_an_output_that_exists_is_told_before_anything_is_read(monkeypatch, capsys, tmp_path, command) -> None:
    (tmp_path / "old.bundle").mkdir()
    arguments = {"export": ["checkpoint"], "calibrate": [str(golden_bundle()), "--video", "synthetic"]}[command]
    monkeypatch.setattr("framestep.export.checkpoint.find_checkpoint", unreachable)
    monkeypatch.setattr("framestep.calibration.clips.read_clips", unreachable)
    assert main(monkeypatch, command, *arguments, "-o", str(tmp_path / "old.bundle")) == 2
    assert "old.bundle: exists already; choose another name or give --force" in capsys.readouterr().err


def test_a_bundle_is_no_checkpoint(monkeypatch, capsys, tmp_path) -> None:
    assert main(monkeypatch, "export", str(golden_bundle()), "-o", str(tmp_path / "new.bundle")) == 2
    assert "steps.bundle: is a bundle already; export takes the checkpoint" in capsys.readouterr().err


def test_export_says_what_it_is_at(monkeypatch, capsys, tmp_path) -> None:
    assert main(monkeypatch, "export", "--random-init", "tiny", "-o", str(tmp_path / "new.bundle")) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["writing graphs and weights", "comparing the bundle with PyTorch"]
    assert printed.out.startswith(str(tmp_path / "new.bundle"))


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"difference": 8.6e-6, "frames_replayed": 18}, "agrees with PyTorch within 8.6e-06 over 18 frames"),
        (
            {"difference": 8e-7, "quantization_error": 0.125, "tokens_replayed": 14},
            "agrees with PyTorch within 8.0e-07 over 14 tokens; its integer weights move logits by up to 12.5%",
        ),
        ({"quantization_error": 0.5, "tokens_replayed": 12}, "its integer weights move logits by up to 50.0%"),
        ({"quantization_error": 0.02, "frames_replayed": 18}, "its integer weights move features by up to 2.0%"),
    ],
)
def test_what_integers_change_is_not_called_agreement(facts, text) -> None:
    assert agreement(facts).startswith(text)


def unreachable(*arguments, **options) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("module", "told", "advice"),
    [
        ("cv2", "No module named 'cv2'", "pip install --upgrade opencv-python"),
        ("cv2.gapi", "No module named 'cv2.gapi'", "pip install --upgrade opencv-python"),
        ("cv2", "libGL.so.1: cannot open shared object file", "apt install libgl1 libglib2.0-0"),
        ("other", "No module named 'other'", None),
    ],
)
def test_a_missing_opencv_is_one_line(monkeypatch, capsys, module, told, advice) -> None:
    def stand_in(given: RunOptions, status) -> Summary:
        raise ImportError(told, name=module)

    monkeypatch.setattr(run_module, "run", stand_in)
    if advice is None:
        with pytest.raises(ImportError):
            cli._exit_status(["run", "b", "-s", "0"])
        return
    assert cli._exit_status(["run", "b", "-s", "0"]) == 2
    assert capsys.readouterr().err.endswith(f"({told}): {advice}\n")


def test_an_interrupt_exits_130(monkeypatch, capsys) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupt)
    assert main(monkeypatch, "run", "b", "-s", "clip.mp4") == 130
    assert capsys.readouterr().err.strip() == "framestep: interrupted"


def test_an_interrupt_while_modules_load_is_one_line() -> None:
    code = """
import sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from framestep.__main__ import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "framestep: interrupted\n")


@pytest.mark.parametrize(("arguments", "status", "last"), [("--version", 0, "framestep "), ("none", 2, "framestep: ")])
def test_a_camera_that_is_stuck_in_opencv_does_not_outlive_python(arguments, status, last) -> None:
    code = f"""
import sys, threading
from framestep.__main__ import main
from framestep.runtime.sources.live import _Reader

class Last:
    def __del__(self):  # while Python shuts down, where a thread that comes back from C++ aborts the process
        print("too late", flush=True)

sys.modules["last"] = Last()
_Reader(lambda reader: threading.Event().wait(), 0.0).start()
sys.argv = ["framestep", "{arguments}"]
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == status
    assert (found.stdout + found.stderr).startswith(last) and "too late" not in found.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 745. GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1500000000000 bytes."),
    ],
)
def test_a_lack_of_memory_is_one_line(monkeypatch, capsys, error) -> None:
    def hungry(*_) -> None:
        raise error

    monkeypatch.setattr(run_module, "run", hungry)
    assert main(monkeypatch, "run", "b", "-s", "clip.mp4") == 2
    assert capsys.readouterr().err == f"framestep: not enough memory: {error}\n"


@pytest.mark.parametrize("option", ["--config", "--capacity"])
def test_random_weights_have_no_config_and_no_cache_of_tokens(monkeypatch, capsys, tmp_path, option) -> None:
    arguments = ["export", "--random-init", "tiny", "-o", str(tmp_path / "b"), option, "7"]
    assert main(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"framestep: {option}: ")


GIVE_ONE = "give a CHECKPOINT, or --random-init base|tiny for random weights, and not both"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), GIVE_ONE),
        (("checkpoint", "--random-init", "tiny"), GIVE_ONE),
        (("--random-init", "huge"), "--random-init: expected base or tiny, found 'huge'"),
        (("--random-init", "tiny", "--resize", "zoom"), "--resize: expected crop, stretch or letterbox, found 'zoom'"),
        (
            ("--random-init", "tiny", "--image-size", "64by64"),
            "--image-size: expected H or HxW in pixels, found '64by64'",
        ),
    ],
)
def test_export_names_the_option_that_makes_no_sense(monkeypatch, capsys, tmp_path, arguments, message) -> None:
    assert main(monkeypatch, "export", *arguments, "-o", str(tmp_path / "new.bundle")) == 2
    assert capsys.readouterr().err == f"framestep: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_shows_its_traceback(monkeypatch) -> None:
    def bug(*_) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "run", bug)
    monkeypatch.setattr(sys, "argv", ["framestep", "run", "b", "-s", "clip.mp4"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("run", "--help")])
def test_help_is_shown(monkeypatch, capsys, arguments) -> None:
    assert main(monkeypatch, *arguments) == 0
    assert "framestep" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from framestep.apps import cli; cli.app; "
        "print([name for name in ('cv2', 'numpy', 'torch', 'onnxruntime') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_it_is_a_module_too(tmp_path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "framestep", "frobnicate"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("framestep: No such command 'frobnicate'") and found.stderr.count("\n") == 1


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import framestep

    assert main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"framestep {framestep.__version__}\n"


def test_a_file_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given):
        raise PermissionError(13, "Permission denied", "/somewhere/backbone.bin")

    monkeypatch.setattr(run_module, "run", refused)
    assert main(monkeypatch, "run", "x.bundle", "--source", "clip.mp4") == 2
    assert capsys.readouterr().err == "framestep: /somewhere/backbone.bin: Permission denied\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number) -> None:
    def full(*given):
        raise OSError(number, os.strerror(number))  # as a write says it, which knows no name

    monkeypatch.setattr(run_module, "run", full)
    assert main(monkeypatch, "run", "x.bundle", "--source", "clip.mp4") == 2
    assert capsys.readouterr().err == f"framestep: {os.strerror(number)}\n"
