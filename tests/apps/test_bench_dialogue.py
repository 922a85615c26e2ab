"""`framestep bench` on a bundle with a decoder."""

from __future__ import annotations

import json
import re

import decoder_models
import dialogue_models
import pytest
from typer.testing import CliRunner

from framestep.apps.cli import app
from framestep.runtime.errors import FramestepError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model = decoder_models.qwen2_5_vl()
    return dialogue_models.export(model, tmp_path_factory.mktemp("bench"), capacity=200).path


def test_a_turn_takes_the_same_work_however_many_there_were_and_with_cut_it_does_not(bundle, tmp_path):
    arguments = [
        "bench",
        str(bundle),
        "-o",
        str(tmp_path / "report"),
        "--frames",
        "2,20,60",
        "--samples",
        "10",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert json.loads(result.stdout) == report
    assert [(row["turn"], row["turns"]) for row in report["slots"]] == [(2, 2), (20, 10), (60, 10)]
    assert report["slots"][1]["tokens"] == report["slots"][2]["tokens"]
    assert report["cut"][2]["tokens"] > 2 * report["slots"][2]["tokens"]
    assert report["forgotten"] > 40
    assert report["frame_tokens"] == 2
    assert report["tokens_a_second"] > 0
    assert all(row["decision_ms"][1] is row["decision_ms"][2] is None for row in report["slots"])  # of 10 turns at most
    told = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert re.search(r"\| slots \| 60 \| [\d.]+ / – / [\d.]+ \|", told)


def test_what_cannot_be_talked_with_has_no_turns_to_measure(tmp_path):
    blind = dialogue_models.export(decoder_models.qwen2(), tmp_path, capacity=64).path
    result = CliRunner().invoke(app, ["bench", str(blind), "-o", str(tmp_path / "report")])
    assert isinstance(result.exception, FramestepError)
    assert "there are no turns to measure" in str(result.exception)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--streams", "4"), ("--processes", "2"), ("--steady", "3"), ("--every-frame",), ("--budget-s", "3")],
)
def test_options_of_other_models_are_not_passed_over(bundle, tmp_path, arguments):
    result = CliRunner().invoke(app, ["bench", str(bundle), "-o", str(tmp_path / "report"), *arguments])
    assert str(result.exception).startswith(f"{arguments[0]}: a decoder is measured by turns")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "folder, arguments, message",
    [
        ("report", ("--checkpoint", "nowhere"), "--checkpoint: is what PyTorch's baselines run"),
        ("out.bundle", (), "lies in the bundle"),
        ("out.bundle/report", (), "lies in the bundle"),
    ],
)
def test_a_report_that_would_mislead_or_lie_in_the_bundle_is_refused(bundle, folder, arguments, message):
    before = sorted(bundle.iterdir())
    result = CliRunner().invoke(app, ["bench", str(bundle), "-o", str(bundle.parent / folder), *arguments])
    assert message in str(result.exception)
    assert sorted(bundle.iterdir()) == before
