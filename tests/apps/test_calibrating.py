"""`framestep calibrate` on the command line."""

from __future__ import annotations

import json

import pytest
from command_line import main

from framestep.runtime.bundle import Bundle

SCENE = "synthetic:seed=3,frames=60,width=96,height=64"


def test_a_bundle_comes_out_that_runs_and_tells_of_itself(golden_bundle, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "int8.bundle"
    assert main(monkeypatch, "calibrate", golden_bundle, "--video", SCENE, "-o", out, "--drift-frames", "120") == 0
    told = capsys.readouterr()
    assert "int8  cosine of pooled 0.99" in told.out and "report.md" in told.out
    assert "observing 60 frames of 1 clip\n" in told.err
    assert main(monkeypatch, "run", out, "--source", SCENE, "--max-frames", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["engine"].endswith("int8")
    assert main(monkeypatch, "inspect", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["precisions"] == ["int8"]
    assert facts["calibration"]["accuracy"][0]["cosine"] > 0.99
    assert main(monkeypatch, "inspect", out) == 0
    assert "calibrated" in capsys.readouterr().out


def test_json_and_every_option(golden_bundle, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["calibrate", golden_bundle, "--video", SCENE, "--check", SCENE, "-o", tmp_path / "q.bundle", "--json"]
    arguments += ["--precision", "fp16", "--precision", "int8", "--keep-float", "--method", "entropy", "--smooth"]
    assert main(monkeypatch, *arguments, "--frames", "24", "--min-cosine", "0.5", "--drift-frames", "0") == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert told.err == ""
    assert (
        facts["precisions"] == ["fp16", "int8", "fp32"] == list(Bundle.open(tmp_path / "q.bundle").manifest.precisions)
    )
    assert facts["frames"] == 24 and facts["method"] == "entropy" and facts["smoothed_norms"] > 0
    assert facts["trials"][0]["kept"] == [] and facts["drift"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "absent.mp4"], "absent.mp4: no such file"),
        (
            ["--video", SCENE, "--precision", "int4"],
            "--precision: expected int8, fp16, fp16+int8, int8+kv8, fp32+kv8, fp16+kv8, found 'int4'",
        ),
        (["--video", SCENE, "--method", "guess"], "--method: expected minmax, percentile, entropy, found 'guess'"),
        (["--video", SCENE, "--max-drop", "0.5"], "--max-drop: needs the truth about every frame"),
        (["--video", SCENE, "--frames", "3"], "too few frames to calibrate on: 3;"),
    ],
)
def test_what_cannot_be_done_is_one_line(golden_bundle, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    assert main(monkeypatch, "calibrate", golden_bundle, "-o", tmp_path / "q.bundle", *arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("framestep: ") and message in told
    assert not list(tmp_path.iterdir())


def test_a_bundle_does_not_lose_its_float_graphs_to_itself(golden_bundle, tmp_path, monkeypatch, capsys) -> None:
    same = tmp_path / "same.bundle"
    same.symlink_to(golden_bundle)
    arguments = ["calibrate", golden_bundle, "--video", "absent.mp4", "-o", same, "--force"]
    assert main(monkeypatch, *arguments) == 2
    assert "same.bundle: is the bundle itself, whose float32 graphs would be lost" in capsys.readouterr().err
    assert main(monkeypatch, *arguments, "--keep-float") == 2
    assert "absent.mp4: no such file" in capsys.readouterr().err
