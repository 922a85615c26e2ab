"""Text towers, tokenizers and label embeddings, compared with transformers and with plain PyTorch."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import siglip_text
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, SiglipModel, SiglipTextModel

from framestep.export import text
from framestep.export.text_tokenizer import write_tokenizer
from framestep.runtime.errors import BundleError, CheckpointError
from framestep.runtime.text import ACTION_TEMPLATES, PATCH_TEMPLATES, LabelError, TextEncoder

LABELS = ["opening a door", "a cat", "riding a bicycle near the café", "T-shirt № 2"]
SENTENCES = [
    "a photo of a cat.",
    "A Photo  of\ta cat!",
    "state-of-the-art: it's 3.14 km² (½)",
    "Zürich, Ångström & œuvre — déjà vu…",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ",
    "the dog </s> <unk> <pad> ▁▁ x",
    "👩🏽‍🚀❤️ 1️⃣ ½️ ™️",
    "caf\u00e9 cafe\u0301 \u1100\u1161\u11a8 각",
    "\u200b\ufeff zero\u00adwidth",
    "",
    " . ",
    "aaaaaaa" * 20,
    "swimming " * 100,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip_text.make_siglip_checkpoint(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> text.TextModel:
    return text.load_text_model(str(checkpoint))


@pytest.fixture(scope="module")
def encoder(model: text.TextModel, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("text")
    text.write_text_graph(model, folder / "text.onnx")
    write_tokenizer(model, folder / "tokenizer.json")
    return TextEncoder(folder / "text.onnx", folder / "tokenizer.json", model.length)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder that the test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "siglip"))


def reference_embeddings(checkpoint: Path, labels: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """As StreamFormer's heads prepare theirs."""
    tower = SiglipTextModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = []
    with torch.no_grad():
        for label in labels:
            texts = [template.format(label) for template in templates]
            ids = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=64)["input_ids"]
            outputs = tower(ids)[1]
            outputs /= outputs.norm(p=2, dim=-1, keepdim=True)
            rows.append(outputs.mean(dim=0))
    return torch.stack(rows).numpy()


def test_default_templates_are_those_of_the_trained_heads() -> None:
    assert len(ACTION_TEMPLATES) == len(set(ACTION_TEMPLATES)) == 28
    assert ACTION_TEMPLATES[0] == "a photo of {}."
    assert ACTION_TEMPLATES[10] == "a video of a person doing {}."
    assert ACTION_TEMPLATES[14] == "a example of {}."
    assert ACTION_TEMPLATES[-1] == "a demonstration of a person practicing {}."
    assert PATCH_TEMPLATES == ("{}",)


def test_whole_model_gives_its_scale_and_bias(model: text.TextModel) -> None:
    assert model.logit_scale == pytest.approx(2.3)
    assert model.logit_bias == pytest.approx(-2.0)
    assert (model.dim, model.length) == (96, 64)


def test_text_tower_alone_has_the_same_features_and_no_scale(model: text.TextModel, tmp_path: Path) -> None:
    tower = SiglipTextModel(model.tower.config)
    tower.load_state_dict(model.tower.state_dict())
    tower.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    alone = text.load_text_model(str(tmp_path))
    assert alone.logit_scale is None and alone.logit_bias is None
    np.testing.assert_array_equal(alone.features(LABELS), model.features(LABELS))


@pytest.mark.parametrize("templates", [ACTION_TEMPLATES, PATCH_TEMPLATES])
def test_label_embeddings_equal_those_of_the_heads(
    checkpoint: Path, model: text.TextModel, templates: tuple[str, ...]
) -> None:
    found = model.embed(LABELS, templates)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_embeddings(checkpoint, LABELS, templates), atol=1e-5)


def test_mean_over_templates_is_not_normalised_again(model: text.TextModel) -> None:
    norms = np.linalg.norm(model.embed(LABELS, ACTION_TEMPLATES), axis=1)
    assert (norms < 0.999).all()


def test_braces_beside_the_placeholder_are_plain_text(model: text.TextModel) -> None:
    found = model.embed(["a {cat}"], ("{} {x}",))
    np.testing.assert_allclose(found, model.embed(["a {cat} {x}"], ("{}",)), atol=1e-6)


def test_text_graph_gives_the_features_of_transformers(checkpoint: Path, encoder: TextEncoder) -> None:
    whole = SiglipModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(LABELS, return_tensors="pt", padding="max_length", max_length=64)["input_ids"]
    with torch.no_grad():
        expected = whole.text_model(ids).pooler_output.numpy()
    found = encoder.features(LABELS)
    assert found.shape == expected.shape == (4, 96)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # or agreement would mean little


def test_embeddings_by_the_text_graph_equal_those_of_the_heads(checkpoint: Path, encoder: TextEncoder) -> None:
    found = encoder.embed(LABELS, ACTION_TEMPLATES)
    expected = reference_embeddings(checkpoint, LABELS, ACTION_TEMPLATES)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_text_graph_is_standard_onnx_with_its_weights_beside_it(model: text.TextModel, tmp_path: Path) -> None:
    text.write_text_graph(model, tmp_path / "text.onnx")
    graph = onnx.load(tmp_path / "text.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 24)]
    assert {file.name for file in tmp_path.iterdir()} == {"text.onnx", "text.bin"}
    names = {tensor.name for tensor in graph.graph.initializer if not tensor.name.startswith("const/")}
    assert names == {
        "text." + key.removeprefix("text_model.")
        for key in load_file(Path(model.source) / "model.safetensors")
        if key.startswith("text_model.")
    }


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_text_graph_follows_the_activation_of_the_checkpoint(copy: Path, tmp_path: Path, activation: str) -> None:
    edit_config(copy, hidden_act=activation)
    model = text.load_text_model(str(copy))
    text.write_text_graph(model, tmp_path / "text.onnx")
    write_tokenizer(model, tmp_path / "tokenizer.json")
    assert text.compare_text_graph(model, tmp_path / "text.onnx", tmp_path / "tokenizer.json") < 2e-4


def test_activation_without_onnx_form_is_refused(copy: Path, tmp_path: Path) -> None:
    model = text.load_text_model(str(copy))
    model.tower.config.hidden_act = "xielu"
    with pytest.raises(CheckpointError, match=r"text_config: hidden_act 'xielu' is not supported"):
        text.write_text_graph(model, tmp_path / "text.onnx")


def test_text_graph_that_disagrees_with_pytorch_is_refused(copy: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    model = text.load_text_model(str(copy))
    text.write_text_graph(model, tmp_path / "text.onnx")
    write_tokenizer(model, tmp_path / "tokenizer.json")
    (bias,) = (value for name, value in model.tower.named_parameters() if name.endswith("head.bias"))
    with torch.no_grad():
        bias.add_(0.001)
    with pytest.raises(BundleError, match=r"text\.onnx: text features differ from PyTorch's by 0\.000\d+, more"):
        text.compare_text_graph(model, tmp_path / "text.onnx", tmp_path / "tokenizer.json")


@pytest.mark.parametrize("sentence", SENTENCES)
def test_converted_tokenizer_gives_the_tokens_of_transformers(
    model: text.TextModel, encoder: TextEncoder, sentence: str
) -> None:
    assert encoder.token_ids([sentence]).tolist() == model.token_ids([sentence]).tolist()


def test_tokens_are_those_that_the_heads_get(checkpoint: Path, encoder: TextEncoder) -> None:
    texts = [template.format(label) for label in LABELS for template in ACTION_TEMPLATES]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = tokenizer(texts, padding="max_length", max_length=64)["input_ids"]
    assert encoder.token_ids(texts).tolist() == expected


# What people write: assigned characters without loose combining marks and Hangul jamo, which come as in decomposed
# text if at all.
_CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Mn", "Me", "Mc", "Cn", "Co", "Cs"]).filter(
    lambda c: (
        not unicodedata.name(c, "").startswith("HANGUL JUNGSEONG")
        and not unicodedata.name(c, "").startswith("HANGUL JONGSEONG")
    )
)
_DECOMPOSED = st.text(st.sampled_from("aeiounçéåÄÖsz ½²ﬁ각한東x'."), max_size=20).map(
    lambda value: unicodedata.normalize("NFD", value)
)
_PIECES = st.lists(st.sampled_from([*SENTENCES, "cat", "ing", " ", "▁", "½"]), max_size=5).map("".join)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(st.text(_CHARACTERS, max_size=40), st.text(max_size=40, alphabet=st.characters(max_codepoint=0x2FF)),
                 _DECOMPOSED, _PIECES))  # fmt: skip
def test_converted_tokenizer_agrees_on_generated_text(
    model: text.TextModel, encoder: TextEncoder, sentence: str
) -> None:
    assert encoder.token_ids([sentence]).tolist() == model.token_ids([sentence]).tolist(), ascii(sentence)


def test_tokenizer_that_converts_differently_is_not_written(copy: Path, tmp_path: Path) -> None:
    model = text.load_text_model(str(copy))
    model.tokenizer.canonicalize_text = lambda value, **_: value.replace("door", "window")
    with pytest.raises(CheckpointError, match=r"SiglipTokenizer cannot be written as tokenizer\.json"):
        write_tokenizer(model, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("side", ["left", "right"])
def test_fast_tokenizer_is_written_with_its_own_padding(tmp_path: Path, side: str) -> None:
    try:
        from transformers import Siglip2Tokenizer
    except ImportError:
        pytest.skip("this version of transformers has no Siglip2Tokenizer")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyzé.", "ca", "cat"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Siglip2Tokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t")], padding_side=side)
    folder = siglip_text.make_siglip_checkpoint(tmp_path / "siglip", vocabulary=len(tokens))
    (folder / "spiece.model").unlink()
    tokenizer.save_pretrained(folder)
    model = text.load_text_model(str(folder))
    text.write_text_graph(model, tmp_path / "text.onnx")
    write_tokenizer(model, tmp_path / "tokenizer.json")
    text.compare_text_graph(model, tmp_path / "text.onnx", tmp_path / "tokenizer.json")
    ids = TextEncoder(tmp_path / "text.onnx", tmp_path / "tokenizer.json", 64).token_ids(["A cat <eos>"])[0]
    assert ids.tolist().index(vocabulary["cat"]) == (57 if side == "left" else 2)
    assert vocabulary["<eos>"] not in ids


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def keep_pieces_only(path: Path) -> None:
    proto = ModelProto.FromString(path.read_bytes())
    path.write_bytes(ModelProto(pieces=proto.pieces).SerializeToString())


HEAD = "text_model.head.weight"
SAID = r"(text_model\.)?head\.weight"  # by the name that it has in this version of transformers
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "another architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "clip"}'),
        r"config\.json: expected a SigLIP model \(model_type 'siglip'\), found 'clip'",
    ),
    "impossible sizes": (lambda f: edit_config(f, num_attention_heads=5), r"text_config cannot be used"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"expected model\.safetensors"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors: damaged"),
    "missing weight": (lambda f: edit_weights(f, lambda w: w.pop(HEAD)), rf"missing {SAID}"),
    "extra weight": (
        lambda f: edit_weights(f, lambda w: w.update({"text_model.extra": torch.ones(2)})),
        r"unexpected extra",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({HEAD: torch.ones(96, 95)})),
        rf"wrong shape {SAID} \(expected \[96, 96\], found \[96, 95\]\)",
    ),
    "NaN": (lambda f: edit_weights(f, lambda w: w[HEAD].fill_(torch.nan)), rf"NaN or infinity in {SAID}"),
    "no tokenizer": (lambda f: (f / "spiece.model").unlink(), r"no tokenizer: neither tokenizer\.json nor"),
    "damaged tokenizer": (lambda f: (f / "spiece.model").write_bytes(b"\xff" * 99), r"damaged tokenizer"),
    "truncated tokenizer": (lambda f: keep_pieces_only(f / "spiece.model"), r"damaged tokenizer \(.* truncated"),
    "tokenizer of another model": (
        lambda f: (
            edit_config(f, vocab_size=100),
            edit_weights(f, lambda w: w.update({EMBEDDING: w[EMBEDDING][:100].clone()})),
        ),
        r"tokenizer does not belong to the weights: it has 240 tokens, text_config\.vocab_size is 100",
    ),
}
EMBEDDING = "text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize("damage", DAMAGE)
def test_unusable_text_model_is_refused_in_one_line(copy: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        text.load_text_model(str(copy))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint file or folder"):
        text.load_text_model(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected the folder of a SigLIP model, found a file"):
        text.load_text_model(str(tmp_path / "file"))


def test_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"a/b: .*the hub did not give it \(no route to host\); check"):
        text.load_text_model("a/b")


def test_hub_id_is_read_from_what_the_hub_gives(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(checkpoint))
    assert text.load_text_model("a/b").source == "a/b"


def test_text_embeddings_are_read_with_scale_and_bias(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    frames, patches = torch.randn(3, 8), torch.randn(3, 8).half()
    save_file({"text_embeddings": frames, "patch_text_embeddings": patches,
               "logit_scale": torch.tensor(2.5), "logit_bias": torch.tensor([-1.5])}, path)  # fmt: skip
    read = text.read_text_embeddings(path, 3, 8)
    np.testing.assert_array_equal(read.text_embeddings, frames.numpy())
    assert read.patch_text_embeddings is not None
    np.testing.assert_array_equal(read.patch_text_embeddings, patches.float().numpy())
    assert (read.logit_scale, read.logit_bias) == (2.5, -1.5)


def test_patch_embeddings_scale_and_bias_are_optional(tmp_path: Path) -> None:
    save_file({"text_embeddings": torch.zeros(3, 8)}, tmp_path / "t.safetensors")
    read = text.read_text_embeddings(tmp_path / "t.safetensors", 3, 8)
    assert (read.patch_text_embeddings, read.logit_scale, read.logit_bias) == (None, None, None)


GOOD = torch.zeros(3, 8)
WRONG_EMBEDDINGS: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"embeddings": GOOD}, r"unknown key 'embeddings'; expected text_embeddings, patch_text_embeddings"),
    ({"patch_text_embeddings": GOOD}, r"missing key 'text_embeddings'; found patch_text_embeddings"),
    ({"text_embeddings": GOOD[:2]}, r"text_embeddings has shape \[2, 8\]; expected \[3, 8\] \(3 labels"),
    ({"text_embeddings": GOOD[:, :7].clone()}, r"text_embeddings has shape \[3, 7\]; expected \[3, 8\]"),
    ({"text_embeddings": GOOD, "patch_text_embeddings": GOOD[0]}, r"patch_text_embeddings has shape \[8\]"),
    ({"text_embeddings": GOOD.long()}, r"text_embeddings is I64; expected F32 or F16"),
    ({"text_embeddings": GOOD * torch.nan}, r"NaN or infinity in text_embeddings"),
    ({"text_embeddings": GOOD, "logit_bias": torch.ones(2)}, r"logit_bias has shape \[2\]; expected one"),
    ({"text_embeddings": GOOD, "logit_scale": torch.tensor(torch.inf)}, r"NaN or infinity in logit_scale"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG_EMBEDDINGS)
def test_wrong_text_embeddings_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "t.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(LabelError, match=rf"t\.safetensors: {message}"):
        text.read_text_embeddings(path, 3, 8)


def test_missing_or_damaged_text_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"t\.safetensors: no such file"):
        text.read_text_embeddings(tmp_path / "t.safetensors", 3, 8)
    (tmp_path / "t.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(LabelError, match=r"t\.safetensors: damaged, or not a safetensors file"):
        text.read_text_embeddings(tmp_path / "t.safetensors", 3, 8)
