"""Labels, and their embeddings from a bundle's text graph."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import siglip_text

from framestep.runtime.errors import BundleError, EngineError
from framestep.runtime.text import LabelError, TextEncoder, label_embeddings, read_labels


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text graph and tokenizer."""
    from framestep.export import text
    from framestep.export.text_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("text")
    model = text.load_text_model(str(siglip_text.make_siglip_checkpoint(folder / "siglip")))
    text.write_text_graph(model, folder / "text.onnx")
    write_tokenizer(model, folder / "tokenizer.json")
    return folder / "text.onnx", folder / "tokenizer.json"


def fake_features(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), 1 + text.count("a")] for text in texts], np.float32)


def test_label_is_the_mean_of_its_unit_norm_texts() -> None:
    found = label_embeddings(fake_features, ["cat", "aardvark"], ["{}", "a {}."])
    rows = []
    for label in ("cat", "aardvark"):
        units = []
        for text in (label, f"a {label}."):
            x, y = len(text), 1 + text.count("a")
            units.append((x / (x * x + y * y) ** 0.5, y / (x * x + y * y) ** 0.5))
        rows.append(np.mean(units, axis=0))
    np.testing.assert_allclose(found, rows, rtol=1e-6)
    assert found.dtype == np.float32


def test_many_labels_go_through_the_tower_in_batches() -> None:
    sizes = []

    def features(texts: list[str]) -> np.ndarray:
        sizes.append(len(texts))
        return fake_features(texts)

    labels = [f"label {number}" for number in range(50)]
    found = label_embeddings(features, labels, ["{}", "a {}.", "the {}"])
    assert max(sizes) <= 64 and sum(sizes) == 150
    one = label_embeddings(fake_features, labels[49:], ["{}", "a {}.", "the {}"])
    np.testing.assert_array_equal(found[49:], one)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["{}"], "labels: none given"),
        ("cat", ["{}"], r"expected a list of texts, found the text 'cat'; write \['cat'\]"),
        (["cat", " "], ["{}"], r"labels\[1\]: expected a text, found ' '"),
        (["cat", 3], ["{}"], r"labels\[1\]: expected a text, found 3"),
        (["cat", "dog", "cat"], ["{}"], r"labels\[2\]: 'cat' is given twice"),
        (["cat"], [], "templates: none given"),
        (["cat"], "a {}", "templates: expected a list of texts"),
        (["cat"], ["{}", "a photo of"], r"template 'a photo of': no \{\} where the label is to go"),
    ],
)
def test_malformed_labels_and_templates_are_refused(labels: list[str], templates: list[str], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        label_embeddings(fake_features, labels, templates)


def test_label_whose_features_are_not_finite_is_named() -> None:
    def features(texts: list[str]) -> np.ndarray:
        return np.array([[np.nan if "dog" in text else 1.0] for text in texts], np.float32)

    with pytest.raises(LabelError, match="label 'dog': the text model gives NaN or infinity"):
        label_embeddings(features, ["cat", "dog"], ["{}"])


def test_labels_file_skips_blank_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeff# actions\r\nopening a door \r\n\r\n  café\r\n# end\r\nC# code".encode())
    assert read_labels(path) == ["opening a door", "café", "C# code"]


def test_repeated_label_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("cat\n\ndog\ncat \n")
    with pytest.raises(LabelError, match=r"labels\.txt: line 4 repeats the label 'cat' of line 1"):
        read_labels(path)


@pytest.mark.parametrize(
    ("label", "why"),
    [("x" * 1001, "has 1001 characters; a label has at most 1000"), ("a\x1b[2J", r"holds control characters: 'a\\x1b")],
)
def test_labels_that_nobody_can_show_are_refused(tmp_path: Path, label: str, why: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(f"cat\n{label}\n")
    with pytest.raises(LabelError, match=rf"labels\.txt: line 2 {why}"):
        read_labels(path)
    with pytest.raises(LabelError, match=rf"labels\[1\] {why}"):
        label_embeddings(lambda texts: np.ones((len(texts), 2), np.float32), ["cat", label], ["{}"])


def test_unreadable_labels_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    with pytest.raises(LabelError, match=r"labels\.txt: cannot read labels: No such file"):
        read_labels(path)
    path.write_text("# nothing\n\n")
    with pytest.raises(LabelError, match=r"labels\.txt: no labels; write one a line"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabelError, match=r"labels\.txt: cannot read labels: not UTF-8 text"):
        read_labels(path)


def test_new_labels_need_no_training_framework(files: tuple[Path, Path]) -> None:
    graph, tokenizer = files
    program = f"""
import sys
for name in ("torch", "transformers", "onnx", "sentencepiece", "safetensors", "cv2"):
    sys.modules[name] = None
from pathlib import Path
from framestep.runtime import text
assert not {{"onnxruntime", "tokenizers"}} & set(sys.modules), "imported before they are needed"
found = text.TextEncoder(Path({str(graph)!r}), Path({str(tokenizer)!r}), 64).embed(["a cat"], ["{{}}"])
print(found.shape, float((found ** 2).sum()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, norm = done.stdout.rsplit(maxsplit=1)
    assert shape == "(1, 96)" and float(norm) == pytest.approx(1.0, abs=1e-5)


def test_embedding_of_a_label_does_not_depend_on_the_others(files: tuple[Path, Path]) -> None:
    encoder = TextEncoder(*files, 64, threads=1)
    together = encoder.embed(["a cat", "a dog", "the guitar"], ["{}", "a photo of {}."])
    alone = encoder.embed(["the guitar"], ["{}", "a photo of {}."])
    np.testing.assert_allclose(together[2:], alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01
    assert encoder.dim == 96


def test_special_token_in_a_label_is_plain_text(files: tuple[Path, Path]) -> None:
    encoder = TextEncoder(*files, 64)
    assert encoder.token_ids(["cat </s> dog"]).tolist() == encoder.token_ids(["cat s dog"]).tolist()


@pytest.mark.parametrize("package", ["tokenizers", "onnxruntime"])
def test_missing_package_is_named_with_its_extra(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"need the package {package}: pip install 'framestep\[cpu,text\]'"):
        TextEncoder(*files, 64)


def test_missing_files_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    graph, tokenizer = files
    with pytest.raises(BundleError, match=r"text\.onnx: missing; export the bundle again with --text-graph"):
        TextEncoder(tmp_path / "text.onnx", tokenizer, 64)
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing"):
        TextEncoder(graph, tmp_path / "tokenizer.json", 64)


def test_damaged_files_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    graph, tokenizer = files
    broken = tmp_path / "broken"
    broken.write_bytes(b"{")
    with pytest.raises(BundleError, match="broken: damaged tokenizer"):
        TextEncoder(graph, broken, 64)
    with pytest.raises(BundleError, match=r"broken: ONNX Runtime cannot load it"):
        TextEncoder(broken, tokenizer, 64)


def test_files_that_do_not_fit_together_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    graph, tokenizer = files
    with pytest.raises(BundleError, match=r"text\.onnx: expected 32 tokens per text, found 64"):
        TextEncoder(graph, tokenizer, 32)
    content = json.loads(tokenizer.read_text("utf-8"))
    content["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected texts padded to 64 tokens, found 1"):
        TextEncoder(graph, tmp_path / "tokenizer.json", 64)
