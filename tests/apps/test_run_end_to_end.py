"""`framestep run` as a user calls it: a real bundle, real sources, and a process of its own where that makes a difference."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import golden
import numpy as np
import pytest
from command_line import lines_of, main, video_frames

PATIENCE_S = 120  # with a process that hangs
LABELS = ("a rocket", "an astronaut", "a control room", "background")
RUN = (sys.executable, "-c", "from framestep.apps.cli import main; main()", "run")


@pytest.fixture(scope="module")
def bundle(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden bundle with labels whose embeddings are random."""
    from safetensors.numpy import save_file

    from framestep.export.labelling import LabelOptions, label_bundle
    from framestep.runtime.bundle import Bundle

    folder = tmp_path_factory.mktemp("labelled")
    shutil.copytree(golden_bundle, folder / "golden.bundle")
    embeddings = np.random.default_rng(0).normal(size=(len(LABELS), 96)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scale, bias = np.array(2.0, np.float32), np.array(0.0, np.float32)
    save_file({"text_embeddings": embeddings, "logit_scale": scale, "logit_bias": bias}, folder / "texts.safetensors")
    options = LabelOptions(LABELS, text_embeddings=folder / "texts.safetensors", background="background")
    return label_bundle(Bundle.open(folder / "golden.bundle"), options).path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """325 frames of real footage where the checkout lies beside it, of moving shapes elsewhere."""
    if footage := golden.real_footage():
        return footage
    path = tmp_path_factory.mktemp("clip") / "shapes.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 180))
    for i in range(325):
        picture = np.full((180, 320, 3), 60, np.uint8)
        cv2.circle(picture, (i % 320, 90), 30, (40, 200, 240), cv2.FILLED)
        writer.write(picture)
    writer.release()
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs in this process, and gives the summary."""

    def run(bundle: Path, *arguments: str) -> dict[str, Any]:
        assert main(monkeypatch, "run", bundle, *arguments, "--json") == 0
        told = capfd.readouterr()
        assert told.err == ""
        summary: dict[str, Any] = json.loads(told.out)
        return summary

    return run


def files(folder: Path) -> list[str]:
    return ["--output", f"{folder}/out.jsonl", "--events", f"{folder}/events.jsonl", "--record", f"{folder}/out.mp4"]


def test_a_video_file_gives_every_result_and_an_annotated_video(bundle: Path, clip: Path, tmp_path: Path) -> None:
    saved_to = tmp_path / "out.npz"
    found = subprocess.run(
        [*RUN, bundle, "--source", clip, *files(tmp_path), "--json", "--overlay", "all", "--save-features", saved_to],
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (0, "")
    summary = json.loads(found.stdout)
    assert summary["frames"] == 325 and summary["bad_frames"] == summary["dropped"] == 0
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["index"] for line in lines] == [line["position"] for line in lines] == list(range(325))
    assert all(set(line["scores"]) == set(LABELS) for line in lines)
    assert video_frames(tmp_path / "out.mp4") == 325
    with np.load(saved_to, allow_pickle=False) as saved:
        assert saved["features"].shape == (325, 16, 96) and saved["pooled"].shape == (325, 96)
        scores = [list(line["scores"].values()) for line in lines]
        np.testing.assert_allclose(saved["scores"], scores, rtol=1e-4)
    for event in lines_of(tmp_path / "events.jsonl"):
        assert event["label"] in LABELS[:3] and event["start"] <= event["peak"] <= event["end"]


def test_several_sources_of_one_session_each_get_what_they_get_alone(
    bundle: Path, tmp_path: Path, here: Callable[..., dict[str, Any]]
) -> None:
    long, short = shapes(tmp_path / "long.mp4", 24, 1), shapes(tmp_path / "short.mp4", 9, 4)
    sources = {str(long): 24, str(short): 9, "synthetic:frames=15,seed=3,width=160,height=120": 15}
    (tmp_path / "alone").mkdir()
    alone = {}
    for name, count in sources.items():
        here(bundle, *files(tmp_path / "alone"), "--source", name)
        alone[name] = lines_of(tmp_path / "alone" / "out.jsonl")
        assert len(alone[name]) == count

    asked = [argument for name in sources for argument in ("--source", name)]
    saved = ["--save-features", f"{tmp_path}/out.npz", "--save-masks", f"{tmp_path}/masks"]
    summary = here(bundle, *files(tmp_path), *asked, *saved, "--overlay", "all")
    assert summary["stopped"] == "every source ended" and summary["frames"] == 48
    assert [(source["source"], source["frames"]) for source in summary["sources"]] == list(sources.items())
    for number, (name, count) in enumerate(sources.items()):
        lines = [line for line in lines_of(tmp_path / "out.jsonl") if line["stream"] == number]
        assert [line["index"] for line in lines] == [line["position"] for line in lines] == list(range(count))
        assert {line["source"] for line in lines} == {name}
        for line, expected in zip(lines, alone[name], strict=True):
            assert line["timestamp"] == expected["timestamp"]
            assert line["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        assert video_frames(tmp_path / f"out.{number}.mp4") == count
        with np.load(tmp_path / f"out.{number}.npz", allow_pickle=False) as arrays:
            assert arrays["pooled"].shape == (count, 96) and arrays["indices"].tolist() == list(range(count))
        masks = sorted((tmp_path / "masks").glob(f"{number}.*.png"))
        assert [path.name for path in masks] == [f"{number}.{index:06d}.png" for index in range(count)]
    assert alone[str(long)][3]["scores"] != pytest.approx(alone[str(short)][3]["scores"], abs=1e-4)
    mask = cv2.imread(str(tmp_path / "masks" / "2.000000.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (120, 160) and set(np.unique(mask)) <= {0, 1, 2, 3, 255}
    assert (mask[:, 60:100] < 255).all() and (
        mask[:, :15] == 255
    ).all()  # of 4:3 the model sees the square in the middle


def test_results_go_to_standard_output_and_the_summary_to_standard_error(bundle: Path, tmp_path: Path) -> None:
    command = [*RUN, bundle, "--source", "synthetic:frames=3", "--output", "-"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0 and "3 frames in" in found.stderr
    assert [json.loads(line)["position"] for line in found.stdout.splitlines()] == [0, 1, 2]
    assert not list(tmp_path.iterdir())
    log = tmp_path / "log.jsonl"
    for already in (1, 4):  # lines
        with log.open("ab") as file:
            if already == 1:
                file.write(b'{"position": 7}\n')
                file.flush()
            assert subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL).returncode == 0
        positions = [line["position"] for line in lines_of(log)]
        assert positions[0] == 7 and positions[already:] == [0, 1, 2]
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("framestep: --output -: --json writes to standard output too")


def test_the_bundle_is_never_overwritten(bundle: Path, monkeypatch, capsys) -> None:
    before = (bundle / "manifest.json").read_bytes()
    written = bundle / "manifest.json"
    assert main(monkeypatch, "run", bundle, "--source", "synthetic:frames=2", "--output", written) == 2
    told = capsys.readouterr().err
    assert "lies in the bundle" in told and told.count("\n") == 1
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        [
            "run",
            "BUNDLE",
            "--source",
            "synthetic:frames=3",
            "--output",
            "o.jsonl",
            "--record",
            "o.mp4",
            "--overlay",
            "all",
        ],
        ["inspect", "BUNDLE"],
        ["inspect", "BUNDLE", "--json"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_running_needs_neither_torch_nor_onnx_nor_transformers(
    bundle: Path, tmp_path: Path, command: list[str]
) -> None:
    code = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "transformers", "safetensors", "tokenizers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
def find(name, package=None):
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find
from framestep.apps.cli import main
main()
"""
    arguments = [str(bundle) if argument == "BUNDLE" else argument for argument in command]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    if command[0] == "run":
        assert len(lines_of(tmp_path / "o.jsonl")) == 3 and video_frames(tmp_path / "o.mp4") == 3
    if command[0] == "doctor":
        assert "framestep[export]" in found.stdout


def test_a_camera_that_goes_away_and_returns_gives_its_results(bundle: Path, mjpeg_camera: Any, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, bundle, "--source", mjpeg_camera.address, *files(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    alarm = threading.Timer(PATIENCE_S, process.kill)  # then the lines below end
    alarm.start()
    try:
        wait_for_lines(tmp_path / "out.jsonl", 20)
        mjpeg_camera.stop()
        told = [next(process.stderr)]
        mjpeg_camera.start()
        while "back after" not in told[-1]:
            told.append(next(process.stderr))
        wait_for_lines(tmp_path / "out.jsonl", len(lines_of(tmp_path / "out.jsonl")) + 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        alarm.cancel()
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert all(line.startswith(f"warning: {mjpeg_camera.address}: ") for line in told)
    assert "trying again in 1 s" in told[0]
    summary = json.loads(out)
    lines = lines_of(tmp_path / "out.jsonl")
    assert (summary["stopped"], summary["frames"]) == ("stopped by user", len(lines))
    times = [line["timestamp"] for line in lines]
    assert times == sorted(times) and max(np.diff(times)) > 1  # the pause before the camera is tried again
    assert video_frames(tmp_path / "out.mp4") > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_files_and_exits_0(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*RUN, bundle, "--source", "synthetic:frames=1000000", *files(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_lines(tmp_path / "out.jsonl", 20)
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    summary = json.loads(out)
    assert summary["stopped"] == "stopped by user"
    assert len(lines_of(tmp_path / "out.jsonl")) == video_frames(tmp_path / "out.mp4") == summary["frames"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "out.jsonl", "out.mp4"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--source", "nowhere.mp4"], "nowhere.mp4"),
        (["--source", "synthetic", "--output", "nowhere/out.jsonl"], "--output nowhere/out.jsonl"),
        (["--source", "synthetic", "--overlay", "a bird", "--record", "o.mp4"], "--overlay a bird"),
        (["--source", "synthetic", "--engine", "steam"], "steam"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    bundle: Path, tmp_path: Path, monkeypatch, capfd, arguments: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, "run", bundle, *arguments) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("framestep: ") and named in told.err and told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_exit_2(bundle: Path) -> None:
    found = subprocess.run(
        [*RUN, bundle, "--source", "synthetic", "--output", "/dev/full"], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr == "framestep: /dev/full: cannot be written: No space left on device\n"


def shapes(path: Path, frames: int, step: int) -> Path:
    """A video of a disc that moves by `step` pixels a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (160, 120))
    for i in range(frames):
        picture = np.full((120, 160, 3), 60, np.uint8)
        cv2.circle(picture, (30 + i * step, 60), 20, (40, 40 * step, 240), cv2.FILLED)
        writer.write(picture)
    writer.release()
    return path


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{path} does not come to {count} lines"
        time.sleep(0.02)
