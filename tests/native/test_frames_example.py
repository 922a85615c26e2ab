"""examples/frames.c, fed by a pipe: recorded results and goldens, partial frames, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import c_api_page
import golden
import numpy as np
import pytest

import framestep

OUTPUTS = ("features", "pooled", "scores", "patch_scores")
SAME = 1e-6
GOLDEN_SIZE = ("--width", "64", "--height", "64")


@pytest.fixture
def frames(reader, examples):
    """Runs the program: frames in, the parsed lines out."""

    def run(data: bytes | np.ndarray, *words: str, status: int = 0, told: str = "") -> Any:
        data = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        command = [str(examples / "frames"), *words]
        done = subprocess.run(command, input=data, env=reader.env, capture_output=True, check=False, timeout=60)
        assert done.returncode == status, done.stderr.decode()
        if status == 0:
            assert done.stderr.decode() == told
        else:
            message = done.stderr.decode()
            assert message.startswith("frames: ")
            assert message.count("\n") == 1
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return lines if status == 0 else (lines, message)

    return run


def in_full(*names: str) -> list[str]:
    return [word for name in names for word in ("--output", name)]


def array(lines: list[dict[str, Any]], name: str, *shape: int) -> np.ndarray:
    rows = [list(line[name].values()) if name == "scores" else line[name] for line in lines]
    return np.array(rows, np.float32).reshape(len(lines), *shape)


@pytest.mark.parametrize(("engine", "precision", "tolerance"), golden.RECORDED_STEPS)
def test_a_pipe_gives_what_was_recorded(reader, examples, tmp_path, engine, precision, tolerance):
    """Three streams alone and together, as they were recorded; how many run in one step shows in the last digits."""
    program = str(tmp_path / "steps_from_pipe")
    source = str(Path(__file__).parent / "steps_from_pipe.c")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "framestep"], env=reader.env, capture_output=True, text=True, check=True
    ).stdout.split()
    rpath = f"-Wl,-rpath,{reader.folder}/.local/lib"
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", source, "-o", program, *flags, rpath], check=True)
    with np.load(golden.CHECKPOINT.parent / "steps.npz") as arrays:
        recorded = {name: arrays[name] for name in arrays.files}
    pictures, positions, steps, order = golden.load()["frames"], [0, 0, 0], b"", []
    for advance in recorded["advance"]:
        steps += bytes([sum(1 << slot for slot in range(3) if advance[slot])])
        for slot in np.flatnonzero(advance):
            steps += pictures[(7 * slot + positions[slot]) % 40].tobytes()
            order.append([slot, positions[slot]])
            positions[slot] += 1
    assert order == recorded["streams_and_positions"].tolist()
    command = [program, str(c_api_page.BUNDLE), engine, precision, "64"]
    done = subprocess.run(command, input=steps, env=reader.env, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    shapes = {"features": (16, 96), "pooled": (96,), "scores": (3,), "patch_scores": (3, 4, 4)}
    kind = np.dtype([("position", "<i8"), *((name, "<f4", shape) for name, shape in shapes.items())])
    found = np.frombuffer(done.stdout, kind)
    assert found["position"].tolist() == [position for _, position in order]
    for name in shapes:
        array = found[name][:, ::5] if name == "features" else found[name]  # as recorded
        assert float(np.abs(array - recorded[f"{precision}_{name}"]).max()) <= tolerance


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_example_gives_what_python_gives(frames, precision):
    pictures = golden.load()["frames"][:20]
    lines = frames(pictures, *GOLDEN_SIZE, "--precision", precision, *in_full(*OUTPUTS), str(c_api_page.BUNDLE))
    assert [line["position"] for line in lines] == list(range(20))
    assert list(lines[0]["scores"]) == ["a", "b", "c"]
    options = {"engine": "onnxruntime", "outputs": OUTPUTS, "precision": precision}
    with framestep.load(c_api_page.BUNDLE, **options) as session:
        stream = session.open_stream()
        for number, picture in enumerate(pictures):
            result = stream.step(picture)
            for name in OUTPUTS:
                found = array(lines[number : number + 1], name, *result[name].shape)[0]
                assert float(np.abs(found - result[name]).max()) <= SAME


@pytest.mark.parametrize(
    ("window", "prefix", "count"), [(16, "window_", 40), (40, "", 40), (40, "full_", 16)], ids=["window", "all", "full"]
)
def test_a_pipe_gives_the_goldens(frames, golden_bundle, long_golden_bundle, window, prefix, count):
    arrays = golden.load()
    bundle = golden_bundle if window == 16 else long_golden_bundle
    lines = frames(arrays["frames"][:count], *GOLDEN_SIZE, *in_full("features", "pooled"), str(bundle))
    golden.assert_close(array(lines, "features", 16, 96), arrays[f"{prefix}last_hidden_state"])
    golden.assert_close(array(lines, "pooled", 96), arrays[f"{prefix}pooler_output"])


@pytest.mark.parametrize("layout", ["rgb", "bgr", "grey"])
def test_frames_of_any_size_and_format_give_what_python_gives(frames, layout):
    rgb = np.random.default_rng(5).integers(0, 256, (3, 90, 121, 3), np.uint8)
    if layout == "grey":
        rgb[:] = rgb[..., :1]
    sent = {"rgb": rgb, "bgr": rgb[..., ::-1], "grey": rgb[..., 0]}[layout]
    words = ("--width", "121", "--height", "90", "--format", layout, *in_full("pooled"), str(c_api_page.BUNDLE))
    found = array(frames(sent, *words), "pooled", 96)
    with framestep.load(c_api_page.BUNDLE, engine="onnxruntime", outputs=("pooled",)) as session:
        stream = session.open_stream()
        expected = np.stack([stream.step(frame)["pooled"] for frame in rgb])
    assert float(np.abs(found - expected).max()) <= SAME


def test_scores_without_labels_say_where_labels_come_from(frames, golden_bundle):
    pictures = golden.load()["frames"][:1]
    lines, message = frames(pictures, *GOLDEN_SIZE, *in_full("scores"), str(golden_bundle), status=1)
    assert lines == [] and "needs labels; set them before the first step, or add them to the bundle with 'fr" in message


def test_a_bundle_without_labels_gives_shapes_and_norms(frames, golden_bundle):
    pictures = golden.load()["frames"][:2]
    told = f"frames: {golden_bundle} has no labels ('framestep label' adds them): shapes and norms instead of scores\n"
    (line, second) = frames(pictures, *GOLDEN_SIZE, str(golden_bundle), told=told)
    assert set(line) == {"position", "latency_ms", "features", "pooled"}
    assert line["latency_ms"] > 0
    assert (line["features"]["shape"], line["pooled"]["shape"]) == ([16, 96], [96])
    full = frames(pictures, *GOLDEN_SIZE, *in_full("pooled"), str(golden_bundle))
    assert second["pooled"]["norm"] == pytest.approx(np.linalg.norm(full[1]["pooled"]), rel=1e-6)


def test_a_frame_that_comes_in_pieces_is_one_frame(reader, examples):
    data = golden.load()["frames"][:2].tobytes()
    command = [str(examples / "frames"), *GOLDEN_SIZE, str(c_api_page.BUNDLE)]
    with subprocess.Popen(command, env=reader.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None and program.stdout is not None
        for start in range(0, len(data), 5000):
            program.stdin.write(data[start : start + 5000])
            program.stdin.flush()
            time.sleep(0.001)
            if start == 10_000:  # the first frame is whole: its line comes while the pipe stays open
                assert json.loads(program.stdout.readline())["position"] == 0
        program.stdin.close()
        assert json.loads(program.stdout.readline())["position"] == 1
    assert program.returncode == 0


def test_names_of_labels_are_json(frames, tmp_path):
    bundle = labelled_anew(tmp_path / "named.bundle", ['a "quoted" one', "back\\slash", "tab\tund Straße 🚪"])
    (line,) = frames(golden.load()["frames"][:1], *GOLDEN_SIZE, str(bundle))
    assert list(line["scores"]) == ['a "quoted" one', "back\\slash", "tab\tund Straße 🚪"]


def labelled_anew(path: Path, names: list[str]) -> Path:
    """The recorded bundle with other names for its labels."""
    shutil.copytree(c_api_page.BUNDLE, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["labels"].update(names=names, background=None)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_standard_input_that_ends_within_a_frame_is_one_line(frames):
    data = golden.load()["frames"][:2].tobytes()
    lines, message = frames(data[:-100], *GOLDEN_SIZE, str(c_api_page.BUNDLE), status=1)
    assert [line["position"] for line in lines] == [0]
    assert message == (
        "frames: standard input ended within frame 1, after 12188 of 12288 bytes; check --width, --height and --format\n"
    )
    lines, message = frames(b"", *GOLDEN_SIZE, str(c_api_page.BUNDLE), status=1)
    assert (lines, message) == ([], "frames: standard input ended before the first frame\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --width, --height and a bundle"),
        (("--width", "64", "x"), "expected --width, --height and a bundle"),
        (("--width", "0"), "--width is '0': expected 1 to 16384 pixels"),
        (("--width", "64.5"), "--width is '64.5'"),
        (("--height", "99999999999999999999"), "--height is '99999999999999999999'"),
        (("--width", ""), "--width is ''"),
        (("--format", "yuv"), "--format is 'yuv': expected rgb, bgr or grey"),
        (("--height",), "--height needs a value"),
        (("--colour", "red"), "--colour is unknown"),
        (("one", "two"), "'two': one bundle was named already"),
        (in_full(*"abcdefghijklmnopq"), "--output: at most 16 outputs"),
    ],
)
def test_wrong_options_are_refused(frames, words, message):
    lines, found = frames(b"", *words, status=2)
    assert lines == []
    assert message in found


def test_what_the_library_refuses_is_one_line(frames, reader, tmp_path, monkeypatch):
    bundle = str(c_api_page.BUNDLE)
    for words, message in (
        ((str(tmp_path / "absent"),), "absent"),
        (("--output", "depth", bundle), "depth"),
        (("--precision", "int3", bundle), "int3"),
    ):
        _, found = frames(b"", *GOLDEN_SIZE, *words, status=1)
        assert message in found
    monkeypatch.setitem(reader.env, "FRAMESTEP_ONNXRUNTIME", str(tmp_path / "libnone.so"))
    _, found = frames(b"", *GOLDEN_SIZE, bundle, status=1)
    assert "ONNX Runtime's shared library was not found" in found
    assert "libnone.so" in found


def test_a_full_disk_is_one_line(reader, examples):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [str(examples / "frames"), *GOLDEN_SIZE, str(c_api_page.BUNDLE)]
    data = golden.load()["frames"][:3].tobytes()
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, input=data, env=reader.env, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"frames: standard output cannot be written\n")
