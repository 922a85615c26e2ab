"""What `framestep inspect` shows of a bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import decoder_models
import dialogue_models
import numpy as np
import pytest
from command_line import main, printed

from framestep.apps.inspect import describe, table
from framestep.apps.inspect_language import describe_language
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.runtime.answering import Answering
from framestep.runtime.bundle import Bundle
from framestep.runtime.chat_format import Words
from framestep.runtime.dialogue import Dialogue
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import BundleError
from framestep.runtime.speaking import Seen

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


def test_labels_are_shown_as_they_are_written(labelled: Path) -> None:
    assert ", ".join(LABELS) in printed(table(Bundle.open(labelled)))


def test_a_bundle_without_labels_says_how_to_add_some(golden_bundle: Path) -> None:
    text = printed(table(Bundle.open(golden_bundle)))
    assert "framestep label" in text
    assert not any(line.startswith("labels") for line in text.splitlines())


def test_the_table_tells_the_graphs_the_state_and_the_origin(golden_bundle: Path) -> None:
    text = printed(table(Bundle.open(golden_bundle)))
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
    assert found["window"] == 16 and found["path"] == str(labelled)
    # K and V of 3 layers: 16 patches of 4 heads, 16 slots, head_dim 24, float32
    assert found["bytes_per_stream"] == 2 * 3 * 16 * 4 * 16 * 24 * 4


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


class Written:
    """A stream whose decoder says what it is told; it notes which tokens went in, with -1 for those of frames."""

    def __init__(self, told: list[int]) -> None:
        self.told, self.tokens = told, []

    def run(self, graph: str, inputs: dict) -> dict:
        if graph == "embed":
            return {"embeddings": np.tile(inputs["tokens"][:, None].astype(np.float32), (1, 64))}
        self.tokens += inputs["embeddings"][:, 0].astype(int).tolist()
        logits = np.zeros(decoder_models.VOCABULARY, np.float32)
        logits[self.told.pop(0)] = 1.0
        return {"logits": logits}


@pytest.mark.parametrize("decides", [True, False])
def test_the_turn_shown_is_what_a_dialogue_writes(tmp_path: Path, decides: bool) -> None:
    bundle = dialogue_models.export(decoder_models.qwen2_5_vl(), tmp_path, states=decides, capacity=160)
    tokenizer = dialogue_models.byte_tokenizer(states=decides)
    words = Words(bundle.manifest.language, bundle.path)
    said = [dialogue_models.RESPONSE] if decides else []
    said += tokenizer.encode(" ANSWER" if decides else "ANSWER", add_special_tokens=False).ids
    stream = Written([*said, dialogue_models.END, dialogue_models.SILENCE])
    options = DialogueOptions(system="You watch.")
    dialogue = (Dialogue if decides else Answering)(stream, bundle.manifest, words, options)
    dialogue.ask("QUESTION")
    for number in (7, 8):  # what ends a turn is taken in with the next one
        list(dialogue.take([Seen(number, float(number), number + 1.0, (np.full((2, 64), -1, np.float32),), 0.0)]))
    opening = words.opening("You watch.")
    assert stream.tokens[: len(opening)] == opening
    texts = {decoder_models.VISION_START: "<vision_start>", decoder_models.VISION_END: "<vision_end>", -1: "*"}
    written = "".join(
        texts.get(token) or tokenizer.decode([token], skip_special_tokens=False)
        for token in stream.tokens[len(opening) :]
    )
    told = describe(bundle)["language"]
    shown = told["turn"].replace("[2 tokens of a frame]", "**")
    assert (told["decides"], told["chat"]) == ((True, "streamo") if decides else (False, "chatml"))
    if decides:
        assert written.startswith(shown)
    else:
        assert written == shown.removesuffix("<|im_end|>\n")


def test_a_decoder_tells_its_memory_and_its_tokens(tmp_path: Path) -> None:
    bundle = dialogue_models.export(
        decoder_models.qwen2_5_vl(), tmp_path, capacity=96, chunk=40, positions=300, precision="w4"
    )
    lines = printed(table(Bundle.open(bundle.path)))
    assert "96 tokens in the cache, positions up to 300, at most 40 tokens a step" in lines
    assert "decides when to speak" in lines
    # two layers of seven products and the head, but for those whose inputs no block of 32 divides
    assert "INT4: 15 in blocks of 32" in lines
    assert "of what sees: " in lines
    assert "silence </Silence> (258), standby </Standby> (259), response </Response> (260)" in lines
    assert "<|im_end|> (257)" in lines
    assert "system prompt of 845 characters: You are a helpful assistant" in lines
    turn = lines.splitlines()
    first = next(at for at, line in enumerate(turn) if line.startswith("turn"))
    assert [line.split()[-1] for line in turn[first + 1 : first + 3]] == ["QUESTION", "<7s-8s>"]


def test_a_decoder_without_tokenizer_says_that_it_cannot_speak(tmp_path: Path) -> None:
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")))
    path = export_decoder(checkpoint, tmp_path / "out.bundle", DecoderOptions(capacity=64)).path
    assert "none: this bundle has no tokenizer, so it can neither read nor write" in printed(table(Bundle.open(path)))
    assert "float32" in printed(table(Bundle.open(path)))


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens": [{}]}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    bundle = dialogue_models.export(decoder_models.qwen2(), tmp_path, capacity=64)
    (bundle.path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json: damaged tokenizer$"):
        describe_language(bundle)
