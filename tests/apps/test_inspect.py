"""What `framestep inspect` shows of a bundle."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from framestep.apps import cli
from framestep.apps.inspect import describe, table
from framestep.runtime.bundle import Bundle

LABELS = ("[person]", "a [/b] cat", "[bold]", "Größe 猫", "background")


@pytest.fixture(scope="module")
def labelled(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    from framestep.export.labelling import LabelOptions, label_bundle

    folder = tmp_path_factory.mktemp("inspected")
    shutil.copytree(golden_bundle, folder / "golden.bundle")
    embeddings = np.eye(len(LABELS), 96, dtype=np.float32)
    scale, bias = np.array(2.0, np.float32), np.array(0.0, np.float32)
    save_file({"text_embeddings": embeddings, "logit_scale": scale, "logit_bias": bias}, folder / "texts.safetensors")
    options = LabelOptions(LABELS, text_embeddings=folder / "texts.safetensors", background="background")
    return label_bundle(Bundle.open(folder / "golden.bundle"), options).path


def printed(bundle: Path) -> str:
    console = Console(file=StringIO(), width=300)
    console.print(table(Bundle.open(bundle)))
    return console.file.getvalue()


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["framestep", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_labels_are_shown_as_they_are_written(labelled: Path) -> None:
    assert ", ".join(LABELS) in printed(labelled)


def test_a_bundle_without_labels_says_how_to_add_some(golden_bundle: Path) -> None:
    text = printed(golden_bundle)
    assert "framestep label" in text
    assert not any(line.startswith("labels") for line in text.splitlines())


def test_the_table_tells_the_graphs_the_state_and_the_origin(golden_bundle: Path) -> None:
    text = printed(golden_bundle)
    facts = describe(Bundle.open(golden_bundle))
    assert "features: float32 [S, 16, 96]" in text
    assert "uint8" in text and "graph backbone" in text
    assert f"{facts['states']} tensors" in text and "per stream" in text
    assert "16 frames, the current one included" in text
    assert "every frame" in text and str(facts["origin"]) in text


def test_the_window_is_the_one_exported(golden_bundle: Path, long_golden_bundle: Path) -> None:
    assert describe(Bundle.open(golden_bundle))["window"] == 16
    long = describe(Bundle.open(long_golden_bundle))
    assert long["window"] == 40
    assert any("window of 40 frames is longer than the 16" in note for note in long["notes"])


def test_a_slot_may_hold_several_rows(golden_bundle: Path) -> None:
    bundle = Bundle.open(golden_bundle)
    states = tuple(replace(state, rows_per_slot=4) for state in bundle.manifest.states)
    assert describe(replace(bundle, manifest=replace(bundle.manifest, states=states)))["window"] == 16


def test_json_is_one_object_with_every_label(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], labelled: Path
) -> None:
    assert main(monkeypatch, "inspect", str(labelled), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == list(LABELS) and found["background"] == "background"
    assert found["window"] == 16 and found["bytes_per_stream"] > 0 and found["path"] == str(labelled)


def test_json_without_labels_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], golden_bundle: Path
) -> None:
    assert main(monkeypatch, "inspect", str(golden_bundle), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == [] and found["background"] is None


def test_the_command_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], labelled: Path
) -> None:
    assert main(monkeypatch, "inspect", str(labelled)) == 0
    text = capsys.readouterr().out
    assert "[person]" in text and "remembers" in text


def test_what_is_no_bundle_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(monkeypatch, "inspect", str(tmp_path / "no.bundle")) == 2
    error = capsys.readouterr().err
    assert error.startswith("framestep: ") and "no.bundle" in error and error.count("\n") == 1
