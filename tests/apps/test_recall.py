"""`framestep recall`: each state by itself, other weights, pruning, and what it refuses."""

from __future__ import annotations

import json

import decoder_models
import dialogue_models
import pytest
from typer.testing import CliRunner

from framestep.apps.cli import app
from framestep.apps.recall import compare
from framestep.runtime.errors import FramestepError
from framestep.runtime.events import Decision

SOURCE = "synthetic:frames=24,fps=1,width=56,height=28"
ASKED = ("--ask", "What?", "--system", "You watch.")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("recall"), decoder_models.qwen2_5_vl()
    made = {}
    for precision in ("fp32", "w4"):
        (folder / precision).mkdir()
        made[precision] = dialogue_models.export(model, folder / precision, capacity=256, precision=precision).path
    return made


def run(*arguments):
    return CliRunner().invoke(app, ["recall", *map(str, arguments), "--json"])


def decisions(states: str) -> list[Decision]:
    names = {"s": "silence", "b": "standby", "r": "response"}
    return [
        Decision(
            turn + 1.0, turn, "silence", {name: 0.8 if name == names[state] else 0.1 for name in names.values()},
            0.1, None, 10, 0,
        )
        for turn, state in enumerate(states)
        if state in names
    ]  # fmt: skip


def test_agreement_hides_what_recall_shows():
    report = compare("a", "b", decisions("sssssssbrr"), decisions("ssssssssrs"))
    assert report.agreement == pytest.approx(0.8)
    found = [(state.state, state.reference, state.found, state.both, state.recall) for state in report.states]
    assert found == [("silence", 7, 9, 7, 1.0), ("standby", 1, 0, 0, 0.0), ("response", 2, 1, 1, 0.5)]
    assert (report.moved_mean, report.moved_max) == pytest.approx((0.07, 0.7))
    assert "response          2      1     1   0.500" in report.as_text()


def test_only_turns_that_both_decided_count_and_a_state_never_taken_has_no_recall():
    report = compare("a", "b", decisions("s.sr"), decisions("sss."))
    assert (report.turns, report.agreement) == (2, 1.0)
    assert [state.recall for state in report.states] == [1.0, None, None]
    with pytest.raises(FramestepError, match="no turn was decided"):
        compare("a", "b", decisions("s."), decisions(".s"))


def test_weights_of_four_bits_are_compared_with_their_reference(bundles):
    result = run(bundles["w4"], "--against", bundles["fp32"], "-s", SOURCE, *ASKED)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["turns"] == 24
    assert sum(state["reference"] for state in report["states"]) == 24
    assert sum(state["found"] for state in report["states"]) == 24
    assert report["agreement"] == sum(state["both"] for state in report["states"]) / 24
    assert 0 < report["moved_mean"] <= report["moved_max"] < 1
    again = json.loads(run(bundles["fp32"], "--against", bundles["fp32"], "-s", SOURCE, *ASKED).stdout)
    assert [state["reference"] for state in again["states"]] == [state["reference"] for state in report["states"]]
    assert {state["recall"] for state in again["states"]} <= {1.0, None}
    assert again["moved_max"] == 0


def test_pruning_is_compared_with_all_tokens(bundles):
    report = json.loads(run(bundles["fp32"], "-s", SOURCE, *ASKED, "--prune", 0.5, "--max-turns", 10).stdout)
    assert (report["turns"], report["visual"]) == (10, 20)
    assert 0 < report["pruned"] < 20
    assert report["moved_max"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "nothing to compare; give --against REFERENCE.bundle, --prune, or both"),
        (("--prune", 2), "prune: expected a cosine similarity"),
        (("--prune", 0.9, "--turn", 0), "turn: expected a number above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(bundles, arguments, message):
    result = run(bundles["fp32"], "-s", SOURCE, *ASKED, *arguments)
    assert isinstance(result.exception, FramestepError)
    assert message in str(result.exception)


def test_a_camera_is_refused(bundles, mjpeg_camera):
    result = run(bundles["fp32"], "-s", mjpeg_camera.address, *ASKED, "--prune", 0.9)
    assert "is live; only a file can be shown to two models alike" in str(result.exception)


def test_a_model_that_does_not_decide_is_refused(tmp_path):
    plain = dialogue_models.export(decoder_models.qwen2_5_vl(), tmp_path, states=False, capacity=256).path
    result = run(plain, "--against", plain, "-s", SOURCE, *ASKED)
    assert "does not decide when to speak; there is nothing to compare" in str(result.exception)


def test_bench_does_not_take_baselines_for_a_decoder(bundles, tmp_path):
    result = CliRunner().invoke(
        app, ["bench", str(bundles["fp32"]), "--compare", "all", "-o", str(tmp_path / "report")]
    )
    assert "'framestep recall' compares the decisions of two bundles" in str(result.exception)
