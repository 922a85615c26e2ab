"""`framestep chat`: transcript, events, summary, questions on standard input, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import decoder_models
import dialogue_models
import pytest
from typer.testing import CliRunner

import framestep.apps.chat as chat_module
from framestep.apps.chat import ChatOptions, Transcript, chat, standard_input
from framestep.apps.cli import app
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import FramestepError
from framestep.runtime.events import Answer, AnswerText, Asked, Decision, Notice, Withdrawn
from framestep.runtime.sources import open_source

SOURCE = "synthetic:frames=12,fps=2,width=56,height=28"
SYSTEM = ("--system", "You watch.")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model = decoder_models.qwen2_5_vl()
    return dialogue_models.export(model, tmp_path_factory.mktemp("chat"), capacity=256).path


def run(*arguments: str, lines: str = ""):
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=lines)


def test_a_video_is_talked_about_to_its_end(bundle, tmp_path):
    output = tmp_path / "events.jsonl"
    result = run(bundle, "-s", SOURCE, "--ask", "What?", *SYSTEM, "--max-tokens", 3, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["turns"], summary["stopped"]) == (6, "the source ended")
    assert sum(summary["states"].values()) == 6
    events = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert events[0] == {"event": "Asked", "time": 1.0, "text": "What?"}
    decisions = [event for event in events if event["event"] == "Decision"]
    assert [event["turn"] for event in decisions] == list(range(6))
    assert all(set(event["probabilities"]) == {"silence", "standby", "response"} for event in decisions)
    answers = [event for event in events if event["event"] == "Answer"]
    assert summary["answers"] == len(answers) == summary["states"].get("response", 0)
    assert summary["taken"] > 0
    assert summary["lag_ms"]["max"] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_events_that_cannot_be_written_are_one_line_and_the_talk_goes_on(bundle):
    result = run(bundle, "-s", SOURCE, "--ask", "What?", *SYSTEM, "--max-tokens", 3, "--output", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["warning: /dev/full: cannot be written: No space left on device"]
    assert "6 turns" in result.stdout and "/dev/full" not in result.stdout


def test_two_frames_a_second_are_two_pictures_a_turn(bundle):
    one, two = (
        json.loads(run(bundle, "-s", SOURCE, *SYSTEM, "--rate", rate, "--json").stdout)["taken"] for rate in (1, 2)
    )
    # two tokens and two marks more in each of six turns; the model says nothing where nobody asks
    assert two - one == 6 * 4


@pytest.mark.parametrize("eviction", ["slots", "cut"])
def test_a_long_video_is_forgotten_as_asked(bundle, eviction):
    source = "synthetic:frames=40,fps=1,width=56,height=28"
    result = run(bundle, "-s", source, *SYSTEM, "--eviction", eviction, "--json")
    summary = json.loads(result.stdout)
    assert summary["forgotten"] > 20
    assert (summary["taken"] > 3000) == (eviction == "cut")


def test_it_stops_after_max_turns(bundle):
    summary = json.loads(run(bundle, "-s", SOURCE, *SYSTEM, "--max-turns", 2, "--json").stdout)
    assert (summary["turns"], summary["stopped"]) == (2, "reached --max-turns")


def test_a_chat_without_a_question_says_that_nothing_is_decided(bundle):
    result = run(bundle, "-s", SOURCE, *SYSTEM, "--max-turns", 2)
    assert result.exit_code == 0, result.output
    assert "! no question stands: nothing is decided until one is asked" in result.output


def test_what_the_guide_makes_without_a_checkpoint_can_be_talked_with(tmp_path, monkeypatch):
    """The page's own Python and commands."""
    page = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile(program, "decoders.md", "exec"), {})
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    for line in commands.splitlines():
        found = CliRunner().invoke(app, shlex.split(line)[1:])
        assert found.exit_code == 0, found.output
    assert "? Tell me when the light turns green." in found.output and "12 turns (the source ended)" in found.output


def test_pruned_tokens_are_counted(bundle):
    still = "synthetic:frames=6,fps=1,width=56,height=28"
    summary = json.loads(run(bundle, "-s", still, *SYSTEM, "--prune", 0.01, "--json").stdout)
    assert 0 < summary["pruned"] < 12


def test_lines_of_standard_input_are_questions_while_it_goes_on(bundle, monkeypatch):
    asked, written, reports = threading.Event(), [], []

    def lines():
        yield "What?"
        yield ""
        yield "far too long " * 100
        yield "And now?"
        asked.set()

    def open_when_asked(*arguments, **options):
        source = open_source(*arguments, **options)
        read = source.read
        source.read = lambda timeout: read(timeout) if asked.wait(20) else None
        return source

    monkeypatch.setattr(chat_module, "open_source", open_when_asked)
    options = ChatOptions(bundle=bundle, source=SOURCE, dialogue=DialogueOptions(system="You watch.", max_tokens=2))
    chat(options, written.append, reports.append, lines())
    text = "".join(written)
    assert "? What?" in text
    assert "? And now?" in text
    (report,) = reports
    assert "does not fit: the cache holds 256 tokens" in report


def test_standard_input_may_be_a_folder_or_give_nothing_for_a_while(monkeypatch, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: folder))
    assert "".join(standard_input()) == ""
    os.close(folder)
    output, given = os.pipe()
    os.set_blocking(output, False)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: output))
    later = threading.Timer(0.1, lambda: (os.write(given, b"What?\n"), os.close(given)))
    later.start()
    assert list(standard_input()) == ["What?", ""]
    later.join()
    os.close(output)


def test_commands_list_and_withdraw_questions(bundle, monkeypatch):
    begun, done, written, reports = threading.Event(), threading.Event(), [], []

    def lines():
        yield "Where?"
        begun.set()
        while "? Where?" not in "".join(written):
            done.wait(0.01)
        yield from ("/questions", "/forget 1", "/forget 7", "/forget me", "/what now", " /usr", "/questions")
        yield from ("Never?", "/forget 4", "/questions")
        done.set()

    def open_when_asked(*arguments, **options):
        source = open_source(*arguments, **options)
        read, count = source.read, iter(range(100))
        source.read = lambda timeout: read(timeout) if (done if next(count) > 1 else begun).wait(20) else None
        return source

    monkeypatch.setattr(chat_module, "open_source", open_when_asked)
    dialogue = DialogueOptions(system="You watch.", max_tokens=2, response_from=1.0)
    options = ChatOptions(bundle=bundle, source=SOURCE, questions=("What?",), dialogue=dialogue)
    chat(options, written.append, reports.append, lines())
    text = "".join(written)
    assert "            1: What?\n            2: Where?\n" in text
    assert "            2: Where?\n            3: /usr\n" in text
    assert text.count("s  ? withdrawn: What?\n") == 1
    assert "            withdrawn before it was asked: Never?\n            2: Where?\n" in text
    assert text.count("Never?") == 1
    assert text.count("s  ? /usr\n") == 1
    assert reports[0] == "there is no question 7; expected 2"
    assert [report.split(":")[0] for report in reports[1:]] == [
        "'/forget me' is no command",
        "'/what now' is no command",
    ]


def test_the_transcript_tells_changes_of_state_and_answers_as_they_grow():
    written = []
    transcript = Transcript(written.append)
    shares = {"silence": 0.8, "standby": 0.1, "response": 0.1}
    decision = {"probabilities": shares, "seconds": 0.1, "tokens": 9, "pruned": 0}
    transcript.show(Asked(1.0, "What?"))
    transcript.show(Decision(1.0, turn=0, state="silence", lag=None, **decision))
    transcript.show(Decision(2.0, turn=1, state="silence", lag=None, **decision))
    transcript.show(Decision(3.0, turn=2, state="standby", lag=None, **decision))
    transcript.show(Decision(4.0, turn=3, state="response", lag=0.25, **decision))
    transcript.show(AnswerText(4.0, 3, "A red "))
    transcript.show(AnswerText(4.0, 3, "ball"))
    transcript.show(Answer(4.0, 3, "A red ball", "length", 3, 0.3, 0.5))
    transcript.show(Notice(5.0, "2 turns dropped"))
    transcript.show(AnswerText(6.0, 5, "Blue"))
    transcript.list_questions({2: "What?"})
    transcript.show(AnswerText(6.0, 5, " now"))
    transcript.show(Withdrawn(7.0, "What?"))
    transcript.show(AnswerText(8.0, 7, "a\x1b[2J\tb\x9b"))
    transcript.list_questions({})
    assert "".join(written).splitlines() == [
        "     1.0 s  ? What?",
        "     1.0 s  [silence]",
        "     3.0 s  [standby]",
        "     4.0 s  [response] (lag 0.25 s)",
        "     4.0 s  A red ball",
        "     4.0 s  ! the answer was cut off: length",
        "     5.0 s  ! 2 turns dropped",
        "     6.0 s  Blue",
        "            2: What?",
        "     6.0 s   now",
        "     7.0 s  ? withdrawn: What?",
        "     8.0 s  a\ufffd[2J\tb\ufffd",  # what a terminal would obey
        "            there are no questions",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-s", "nowhere.mp4"), "source nowhere.mp4: no such file"),
        (("-s", SOURCE, "--ask", "why " * 300), r"the question 'why why .*…' does not fit: the cache holds 256 tokens"),
        (("-s", SOURCE, "--ask", " "), "a question is empty"),
        (("-s", SOURCE, "--eviction", "lru"), "eviction: expected slots or cut"),
        (("-s", SOURCE, "--turn", 0), "turn: expected a number above 0"),
        (("-s", SOURCE, "--output", "nowhere/events.jsonl"), "--output nowhere/events.jsonl: cannot be written"),
        (("-s", SOURCE, "--top-p", 3), "top_p: expected more than 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(bundle, arguments, message):
    result = run(bundle, *SYSTEM, *arguments)
    assert isinstance(result.exception, FramestepError)
    assert re.search(message, str(result.exception))
    assert "\n" not in str(result.exception)


def test_neither_the_bundle_nor_the_source_is_written_over(bundle, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"a video")
    manifest = (bundle / "manifest.json").read_bytes()
    for output, message in ((bundle / "manifest.json", "lies in the bundle"), (video, "is also the file of --source")):
        result = run(bundle, "-s", video, "--output", output)
        assert message in str(result.exception)
    assert (bundle / "manifest.json").read_bytes() == manifest and video.read_bytes() == b"a video"


def test_run_says_how_to_talk_with_it(bundle, tmp_path):
    arguments = ["run", str(bundle), "-s", SOURCE, "--max-frames", "2"]
    said = f"warning: {bundle}: a qwen2_5_vl is talked with: framestep chat {bundle}; this only encodes its frames"
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.stderr.splitlines()[:1]) == (0, [said])
    found = CliRunner().invoke(app, [*arguments, "--save-features", str(tmp_path / "frames.npz")])
    assert (found.exit_code, found.stderr) == (0, "")


def test_a_bundle_that_does_not_speak_is_refused(golden_bundle):
    result = run(golden_bundle, "-s", SOURCE)
    assert "has no language decoder, so nobody can talk about a video with it" in str(result.exception)
