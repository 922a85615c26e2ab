"""Every command of docs/c-api.md runs as pasted, in one terminal, and the page's program says what Python says."""

from __future__ import annotations

import json
import shutil
import subprocess

import c_api_page
import numpy as np
import pytest

import framestep


@pytest.mark.parametrize("number", range(len(c_api_page.COMMANDS)))
def test_commands_run_as_pasted(reader, number):
    assert number < len(reader.results), "not reached: commands before it failed"
    done = reader.results[number]
    assert done.returncode == 0, done.stdout + done.stderr
    if "runtime/native" not in c_api_page.COMMANDS[number]:  # what compilers to come may warn of is not for this test
        assert "warning" not in done.stderr


def test_every_block_is_of_a_kind_that_is_tried():
    assert {kind for kind, _ in c_api_page.BLOCKS} == {"bash", "c", "cmake"}


def test_the_program_says_what_python_says(reader):
    ran = [done for done in reader.results if "onnxruntime on cpu" in done.stdout]
    assert len(ran) == 2  # as built with pkg-config and as built with CMake
    with framestep.load(c_api_page.BUNDLE, engine="onnxruntime", outputs=("scores",)) as session:
        stream = session.open_stream()
        expected = []
        for number in range(20):
            rgb = np.zeros((240, 320, 3), np.uint8)
            rgb[100:160, 10 * number : 10 * number + 60] = 255
            scores = stream.step(rgb)["scores"]
            expected.append((number, session.labels[scores.argmax()], float(scores.max())))
    for done in ran:
        lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
        assert [(int(position), label) for position, label, _ in lines] == [row[:2] for row in expected]
        np.testing.assert_allclose([float(score) for _, _, score in lines], [row[2] for row in expected], atol=1e-4)


def test_the_pipe_left_a_line_for_each_frame(reader):
    lines = [json.loads(line) for line in (reader.folder / "results.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == list(range(len(lines)))
    assert len(lines) in (12, 13)  # 40 frames at 25 a second, sampled at 8: where the first one lies is ffmpeg's choice
    assert all(list(line["scores"]) == ["a", "b", "c"] for line in lines)


def test_what_was_installed_is_whole_and_can_be_moved(reader, tmp_path):
    installed = reader.folder / ".local"
    files = sorted(str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file())
    assert files == [
        "include/framestep.h",
        "lib/cmake/framestep/framestep-config-release.cmake",
        "lib/cmake/framestep/framestep-config-version.cmake",
        "lib/cmake/framestep/framestep-config.cmake",
        "lib/libframestep.so",
        "lib/pkgconfig/framestep.pc",
    ]
    moved = tmp_path / "elsewhere"
    shutil.copytree(installed, moved)
    command = ["pkg-config", "--cflags", "--libs", "framestep"]
    environment = {**reader.env, "PKG_CONFIG_PATH": str(moved / "lib" / "pkgconfig")}
    flags = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    places = {flag[:2]: flag[2:] for flag in flags if flag[:2] in ("-I", "-L")}
    assert (moved / "include").samefile(places["-I"])
    assert (moved / "lib").samefile(places["-L"])
    assert "-lframestep" in flags
