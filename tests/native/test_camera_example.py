"""examples/camera.cpp: its conversions against OpenCV's, and the program with a stand-in for the kernel's camera."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from c_api_page import BUNDLE, ROOT
from v4l2_stand_in import DEVICE, HEIGHT, WIDTH, yuyv_picture

import framestep

JPEG = Path("/usr/include/jpeglib.h").exists()
needs_jpeg = pytest.mark.skipif(not JPEG, reason="needs libjpeg's header")
SOURCES = ROOT / "examples"
FIGURES = re.compile(r"camera: (\d+) frames stepped, (\d+) dropped; a step took [\d.]+ ms \(p50\), [\d.]+ ms \(p99\)")
UNPLUGGED = f"camera: {DEVICE}: the camera was unplugged or failed (No such device)"


# Conversions


class Pixels:
    """pixels.cpp, compiled with libjpeg or without."""

    def __init__(self, folder: Path, *flags: str) -> None:
        path = folder / "pixels.so"
        sources = [SOURCES / "pixels.cpp", Path(__file__).parent / "pixels_for_tests.cpp"]
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCES}", *map(str, sources), "-o", str(path)]
        subprocess.run([*command, *flags], check=True)
        self._library = ctypes.CDLL(str(path))

    def yuyv(self, packed: np.ndarray, width: int) -> np.ndarray:
        """`packed` is uint8 [height, stride]."""
        rgb = np.empty((len(packed), width, 3), np.uint8)
        size = ctypes.c_size_t(packed.strides[0])
        self._library.convert_yuyv(ctypes.c_void_p(packed.ctypes.data), width, len(packed), size, rgb.ctypes)
        return rgb

    def jpeg(self, data: bytes) -> np.ndarray | None:
        room = np.empty(3 << 16, np.uint8)
        width, height = ctypes.c_int(), ctypes.c_int()
        bytes_, space = ctypes.c_size_t(len(data)), ctypes.c_size_t(room.size)
        size = ctypes.byref(width), ctypes.byref(height)
        if not self._library.convert_jpeg(data, bytes_, room.ctypes, space, *size):
            return None
        return room[: height.value * width.value * 3].reshape(height.value, width.value, 3)


@pytest.fixture(scope="module")
def pixels(stand_in, tmp_path_factory):
    flags = ["-DEXAMPLES_HAVE_JPEG", "-ljpeg"] if JPEG else []
    return Pixels(tmp_path_factory.mktemp("pixels"), *flags)


def difference(found: np.ndarray | None, expected: np.ndarray) -> int:
    assert found is not None
    assert found.shape == expected.shape
    return int(np.abs(found.astype(int) - expected).max())


def test_yuyv_becomes_what_opencv_makes_of_it(pixels):
    every = np.arange(256, dtype=np.uint8)
    black = 16  # OpenCV takes what is darker for black; the formula goes on below
    luma, u, v = (axis.ravel() for axis in np.meshgrid(every[black::3], every[::5], every[::5], indexing="ij"))
    packed = np.stack([luma, u, luma[::-1], v], axis=1).reshape(-1, 52 * 4)  # [80 * 52, bytes of 52 pairs of pixels]
    rgb = cv2.cvtColor(packed.reshape(len(packed), -1, 2), cv2.COLOR_YUV2RGB_YUYV)
    assert difference(pixels.yuyv(packed, rgb.shape[1]), rgb) <= 1


def test_rows_of_yuyv_may_have_gaps(pixels):
    picture = yuyv_picture().reshape(HEIGHT, 2 * WIDTH)
    gapped = np.full((HEIGHT, 2 * WIDTH + 10), 255, np.uint8)
    gapped[:, : 2 * WIDTH] = picture
    assert np.array_equal(pixels.yuyv(gapped, WIDTH), pixels.yuyv(picture, WIDTH))


def encoded(bgr: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def without_huffman_tables(jpeg: bytes) -> bytes:
    """As cameras send their frames: the tables are the standard's, and left away."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept += b"" if jpeg[at + 1] == 0xC4 else jpeg[at:end]
        at = end
    return kept + jpeg[at:]


@needs_jpeg
def test_jpeg_becomes_what_opencv_makes_of_it(pixels):
    bgr = cv2.cvtColor(yuyv_picture(), cv2.COLOR_YUV2BGR_YUYV)
    for picture in (bgr, bgr[:41, :53], np.ascontiguousarray(bgr[..., 0])):
        data = encoded(picture)
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert difference(pixels.jpeg(data), expected) <= 3
        bare = without_huffman_tables(data)
        assert len(bare) < len(data) - 100
        assert difference(pixels.jpeg(bare), expected) <= 3
        assert difference(pixels.jpeg(data + b"\0" * 64), expected) <= 3  # the driver's buffer is longer


@needs_jpeg
def test_a_damaged_jpeg_is_refused_and_never_more_than_that(pixels):
    data = encoded(cv2.cvtColor(yuyv_picture(), cv2.COLOR_YUV2BGR_YUYV))
    for length in range(0, len(data) - 2, 7):
        assert pixels.jpeg(data[:length]) is None
    generator = np.random.default_rng(3)
    for _ in range(300):  # some are still pictures
        changed = bytearray(data)
        for at in generator.integers(0, len(data), 3):
            changed[at] = generator.integers(256)
        pixels.jpeg(bytes(changed))


# The program


@pytest.fixture
def camera(reader, examples, stand_in):
    """Runs the program on the stand-in until the camera is unplugged or the words end it."""

    def run(*words: str, program: Path = examples / "camera", **settings: object) -> subprocess.CompletedProcess[str]:
        environment = {**reader.env, **stand_in.environment(**settings)}
        command = [str(program), "--device", DEVICE, *words, str(BUNDLE)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert "stand-in:" not in done.stderr  # no call that a driver would refuse
        return done

    return run


def figures(done: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Frames stepped and dropped, as the program says at its end."""
    found = FIGURES.search(done.stderr)
    assert found, done.stderr
    return int(found[1]), int(found[2])


def expected_labels(rgb: np.ndarray, count: int) -> list[tuple[str, float]]:
    with framestep.load(BUNDLE, engine="onnxruntime", outputs=("scores",)) as session:
        stream = session.open_stream()
        scores = [stream.step(rgb)["scores"] for _ in range(count)]
        return [(session.labels[row.argmax()], float(row.max())) for row in scores]


def assert_labels(done: subprocess.CompletedProcess[str], rgb: np.ndarray) -> None:
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [int(position) for position, _, _ in lines] == list(range(len(lines)))
    expected = expected_labels(rgb, len(lines))
    assert [label for _, label, _ in lines] == [label for label, _ in expected]
    np.testing.assert_allclose([float(line[2]) for line in lines], [score for _, score in expected], atol=1e-4)


def test_a_cameras_frames_get_the_labels_that_python_gives_them(camera, pixels):
    done = camera("--frames", "12")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
    assert_labels(done, pixels.yuyv(yuyv_picture().reshape(HEIGHT, 2 * WIDTH), WIDTH))
    assert f"camera: {DEVICE}, {WIDTH}x{HEIGHT}, yuyv" in done.stderr


@needs_jpeg
def test_mjpeg_is_decoded_and_damaged_frames_are_left_out(camera, pixels, tmp_path):
    data = encoded(cv2.cvtColor(yuyv_picture(), cv2.COLOR_YUV2BGR_YUYV))
    (tmp_path / "jpeg").write_bytes(without_huffman_tables(data))
    rgb = pixels.jpeg(data)
    for words, settings in ((["--format", "mjpeg"], {}), ([], {"formats": "NV12,MJPG", "fault": "short"})):
        done = camera(*words, frame=tmp_path / "jpeg", period_us=5000, **settings)
        assert done.stderr.splitlines()[0] == f"camera: {DEVICE}, {WIDTH}x{HEIGHT}, mjpeg"
        assert_labels(done, rgb)
        stepped, dropped = figures(done)
        assert stepped + dropped == 30
        assert dropped >= (15 if settings else 0)


@pytest.mark.parametrize(
    ("settings", "count", "least_dropped"),
    [
        ({}, 30, 0),
        ({"fault": "gap"}, 33, 3),  # the driver's own losses count
        ({"fault": "damaged"}, 30, 15),
        ({"fault": "short"}, 30, 15),
        ({"frames": 400, "period_us": 100}, 400, 100),  # faster than the model
    ],
    ids=["steady", "gap", "damaged", "short", "fast"],
)
def test_every_frame_is_stepped_or_counted_as_dropped(camera, settings, count, least_dropped):
    done = camera(**settings)
    stepped, dropped = figures(done)
    assert stepped + dropped == count
    assert dropped >= least_dropped
    assert stepped == len(done.stdout.splitlines()) > 0


def test_the_model_sees_no_more_frames_than_its_rate(camera, reader, examples, stand_in, tmp_path):
    bundle = tmp_path / "slow.bundle"
    shutil.copytree(BUNDLE, bundle)
    text = (bundle / "manifest.json").read_text()
    assert '"rate": null' in text
    (bundle / "manifest.json").write_text(text.replace('"rate": null', '"rate": 50.0'))
    environment = {**reader.env, **stand_in.environment(frames=200)}  # in 0.4 s
    command = [str(examples / "camera"), "--device", DEVICE, str(bundle)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    stepped, dropped = figures(done)
    assert 2 <= stepped <= 30
    assert stepped + dropped < 100  # those that were not due are not dropped


def test_an_unplugged_camera_is_one_line(camera):
    done = camera()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == UNPLUGGED


def test_ctrl_c_ends_it_and_leaves_nothing_behind(reader, examples, stand_in, tmp_path):
    log = tmp_path / "calls"
    environment = {**reader.env, **stand_in.environment(frames=0, log=log)}
    command = [str(examples / "camera"), "--device", DEVICE, str(BUNDLE)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        for _ in range(5):
            assert program.stdout.readline()
        os.kill(program.pid, signal.SIGINT)
        _, stderr = program.communicate(timeout=30)
    assert program.returncode == 0
    assert FIGURES.fullmatch(stderr.splitlines()[-1])
    assert "stand-in:" not in stderr
    buffers = 4
    expected = ["open", "QUERYCAP", "S_FMT", "REQBUFS", *["QUERYBUF", "mmap"] * buffers, "STREAMON"]
    assert log.read_text().split() == [*expected, "STREAMOFF", *["munmap"] * buffers, "close"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fault": "busy"}, "is in use by another program"),
        ({"fault": "output"}, "does not capture video; a camera may have several devices, try its others"),
        ({"fault": "read"}, "has no streaming buffers, which this program needs"),
        ({"fault": "other-format"}, "gives NV12 where YUYV was asked for"),
        ({"fault": "few-buffers"}, "has 2 buffers, and this program needs 3"),
        ({"fault": "no-bandwidth"}, "the USB bus has no bandwidth left; take --format mjpeg or a smaller size"),
        ({"formats": "NV12,GREY"}, "does not offer YUYV or MJPEG, only NV12, GREY"),
        ({"formats": ""}, "names no format that it can send"),
        ({"size": "63x48"}, "gives frames of 63x48, which cannot be"),
        ({"device": "/dev/another"}, "there is no such camera; v4l2-ctl --list-devices names those that are there"),
    ],
)
def test_a_camera_that_cannot_be_used_is_one_line(camera, tmp_path, settings, message):
    if settings.get("device") and Path(DEVICE).exists():
        pytest.skip("there is a camera here")
    done = camera(log=tmp_path / "calls", **settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"camera: {DEVICE}: {message}\n"
    if "device" not in settings:
        assert (tmp_path / "calls").read_text().split()[-1] == "close"


def test_a_camera_that_sends_nothing_is_one_line(camera):
    start = time.monotonic()
    done = camera(frames=-1)
    assert time.monotonic() - start >= 5
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"camera: {DEVICE}: has sent no usable frame for 5 seconds"


def test_what_is_no_camera_and_a_bundle_without_labels_are_one_line(reader, examples, golden_bundle):
    for words, message in (
        (("--device", os.devnull, str(BUNDLE)), "/dev/null: is not a V4L2 camera"),
        (("--device", "/", str(BUNDLE)), "/: cannot be opened: Is a directory"),
        (
            (str(golden_bundle),),
            f"{golden_bundle}: has no labels; framestep label {golden_bundle} --labels FILE gives it",
        ),
        (("/absent",), "/absent"),
    ):
        command = [str(examples / "camera"), *words]
        done = subprocess.run(command, env=reader.env, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith(f"camera: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a bundle"),
        (("--format", "nv12", "b"), "--format is 'nv12': expected yuyv or mjpeg"),
        (("--width", "0", "b"), "--width is '0': expected 1 to 16384"),
        (("--frames", "many", "b"), "--frames is 'many'"),
        (("b", "--height"), "--height needs a value"),
        (("--fps", "30", "b"), "--fps is unknown"),
        (("b", "c"), "'c': one bundle was named already"),
    ],
)
def test_wrong_options_are_refused(reader, examples, words, message):
    done = subprocess.run(
        [str(examples / "camera"), *words], env=reader.env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"camera: {message}")
    assert done.stderr.count("\n") == 1


def test_built_without_libjpeg_it_reads_yuyv_and_says_what_mjpeg_needs(camera, reader, tmp_path):
    sources = [str(SOURCES / name) for name in ("camera.cpp", "pixels.cpp", "v4l2_camera.cpp")]
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "framestep"], env=reader.env, capture_output=True, text=True, check=True
    ).stdout.split()
    library = reader.folder / ".local" / "lib"
    program = tmp_path / "camera"
    command = ["g++", "-std=c++17", *sources, "-o", str(program), *flags, f"-Wl,-rpath,{library}", "-lpthread"]
    subprocess.run(command, check=True)
    assert camera("--frames", "2", program=program).returncode == 0
    done = camera(program=program, formats="MJPG")
    message = "would send MJPEG, and this program was built without libjpeg; install libjpeg-dev and build again"
    assert (done.returncode, done.stderr) == (1, f"camera: {DEVICE}: {message}\n")
    done = camera("--format", "mjpeg", program=program)
    assert "take --format yuyv, or install libjpeg-dev" in done.stderr
