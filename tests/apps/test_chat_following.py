"""`framestep chat`, `bench` and `export` with a model whose answers follow the video."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import dialogue_models
import numpy as np
import pytest
import streamchat_models
import torch
from typer.testing import CliRunner

import framestep
from framestep.apps.cli import app
from framestep.runtime.events import Answer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = streamchat_models.save(folder)
    dialogue_models.byte_tokenizer(states=False).save(str(checkpoint / "tokenizer.json"))
    path = folder / "out.bundle"
    arguments = ["export", str(checkpoint), "-o", str(path), "--window", "5", "--capacity", "96", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    return path


def test_chat_needs_no_option_that_the_user_must_know(bundle, tmp_path):
    output = tmp_path / "events.jsonl"
    arguments = ["chat", str(bundle), "--source", "synthetic:frames=60", "--ask", "What is happening?", "--max-tokens", "9",
                 "--output", str(output)]  # fmt: skip
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "? What is happening?" in found.output
    assert "1 answer of 9 tokens (the source ended)" in found.output and "decision" not in found.output
    events = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("Asked") == kinds.count("Answer") == 1
    shown = [event for event in events if event["event"] == "FrameShown"]
    assert len(shown) > 5
    assert all(event["frame"] <= shown[-1]["index"] for event in events if event["event"] == "Spoken")


def test_what_the_page_makes_is_exported_and_talked_with(tmp_path, monkeypatch):
    """The page's own Python and commands, of small random models."""
    page = (Path(__file__).parents[2] / "docs" / "streamchat.md").read_text("utf-8")
    create, small, train = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "streamchat.md", "exec"), {})
    dialogue_models.byte_tokenizer().save("qwen2.5-folder/tokenizer.json")
    exec(compile(create, "streamchat.md", "exec"), {})
    T, first = 10, np.array([0, 3, 5])
    sample = {"tokens": torch.arange(T), "positions": torch.arange(T), "times": torch.from_numpy(first),
              "frames": torch.zeros(3, 224, 224, 3, dtype=torch.uint8), "first_tokens": first}  # fmt: skip
    exec(compile(train, "streamchat.md", "exec"), sample)
    assert sample["logits"].shape == (1, T, 320)
    for line in commands.replace("--source 0", "--source synthetic:frames=10").splitlines():
        found = CliRunner().invoke(app, shlex.split(line)[1:])
        assert found.exit_code == 0, found.output
    assert "? What is happening?" in found.output
    # the tokenizer has the three states, of which such a model takes no notice
    assert "answers when asked" in CliRunner().invoke(app, ["inspect", "streamchat.bundle"]).output


def test_inspect_tells_how_many_frames_text_attends_to(bundle):
    found = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    language = json.loads(found.stdout)["language"]
    assert (language["frames"], language["capacity"], language["decides"]) == (5, 96, False)
    assert "newest 5 frames at every token" in CliRunner().invoke(app, ["inspect", str(bundle)]).output


def test_run_says_how_to_use_it(bundle):
    found = CliRunner().invoke(app, ["run", str(bundle), "--source", "synthetic"])
    assert str(found.exception) == f"{bundle}: a streamchat is talked with: framestep chat {bundle}"


def test_turns_that_are_none_are_not_counted(bundle):
    found = CliRunner().invoke(app, ["chat", str(bundle), "--source", "nowhere.mp4", "--max-turns", "3"])
    assert "--max-turns: this model is asked and decides nothing turn by turn" in str(found.exception)


def test_recall_says_that_it_decides_nothing(bundle):
    found = CliRunner().invoke(
        app, ["recall", str(bundle), "--against", str(bundle), "-s", "synthetic", "--ask", "What?"]
    )
    assert str(found.exception) == f"{bundle}: does not decide when to speak; there is nothing to compare"


def test_converse_follows(bundle):
    with framestep.load(bundle) as session, framestep.open_source("synthetic:frames=20", rate=session.rate) as source:
        events = list(framestep.converse(session, source, ["What?"]))
    assert sum(isinstance(event, Answer) for event in events) == 1


def test_bench_measures_tokens_and_frames(bundle, tmp_path, monkeypatch):
    from framestep.apps.bench import following

    monkeypatch.setattr(following, "SHORTEST_S", 0.1)
    monkeypatch.setattr(following, "RATES", (5.0, 30.0))
    arguments = ["bench", str(bundle), "-o", str(tmp_path), "--frames", "1,20", "--samples", "4", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [row["frames"] for row in report["passed"]] == [1, 20]
    assert [row["rate"] for row in report["rates"]] == [5.0]
    assert "30 frames a second was not measured: rate: the bundle keeps 5 frames" in report["notes"][-1]
    assert report["prompt"]["tokens"] == report["prompt"]["frames"] * 4
    assert "The other way" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--window", "4"], "--window: 4 is less than one second of video at 5 frames a second; expected at least 5"),
        (["--resize", "crop"], "--resize: only a StreamFormer has it"),
        (["--frame-size", "56"], "--frame-size: a StreamChat's tower is its own"),
    ],
)
def test_options_of_others_are_refused_in_one_line(bundle, tmp_path, options, message):
    checkpoint = str(bundle.parent / "streamchat")
    found = CliRunner().invoke(app, ["export", checkpoint, "-o", str(tmp_path / "b"), *options])
    assert found.exit_code != 0
    assert message in str(found.exception)
