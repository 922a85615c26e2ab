"""Scores of frames and patches against a plain PyTorch computation, with a small random SigLIP text tower."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from siglip_text import make_siglip_checkpoint
from torch.nn.functional import layer_norm, linear

import framestep
from framestep.export import half, labelling
from framestep.export.checkpoint import read_checkpoint
from framestep.export.export import ExportOptions, export_streamformer
from framestep.export.labelling import LabelOptions, label_bundle
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import CheckpointError
from framestep.runtime.text import ACTION_TEMPLATES, LabelError

LABELS = ("opening a door", "a red car", "walking the dog")
OTHERS = ("nothing happens", "a cat", "a blue boat", "running")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    return make_siglip_checkpoint(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory) -> Path:
    """The golden weights as a training checkpoint with two task heads; TaskVIS has projections of its own."""
    weights = load_file(golden.CHECKPOINT / "model.safetensors")
    model = {f"timesformer.{key}": value for key, value in weights.items()}
    model["logit_scale"], model["logit_bias"] = torch.tensor(2.0), torch.tensor(-1.0)
    model["task_heads.SSV2.logit_scale"], model["task_heads.SSV2.logit_bias"] = torch.tensor(1.1), torch.tensor(0.3)
    generator = torch.Generator().manual_seed(1)
    head = {
        "logit_scale": torch.tensor(1.7),
        "logit_bias": torch.tensor(-0.4),
        "w_v.weight": torch.randn(96, 96, generator=generator) / 10,
        "w_v.bias": torch.randn(96, generator=generator),
        "v_proj.weight": torch.randn(96, 96, generator=generator) / 10,
        "v_proj.bias": torch.randn(96, generator=generator),
        "head_layernorm.weight": torch.rand(96, generator=generator) + 0.5,
        "head_layernorm.bias": torch.randn(96, generator=generator),
        "head_mlp.fc1.weight": torch.randn(192, 96, generator=generator) / 10,
        "head_mlp.fc1.bias": torch.randn(192, generator=generator),
        "head_mlp.fc2.weight": torch.randn(96, 192, generator=generator) / 10,
        "head_mlp.fc2.bias": torch.randn(96, generator=generator),
    }
    model.update({f"task_heads.TaskVIS.{key}": value for key, value in head.items()})
    folder = tmp_path_factory.mktemp("training")
    torch.save({"model": model}, folder / "checkpoint-1.pth")
    (folder / "config.json").write_bytes((golden.CHECKPOINT / "config.json").read_bytes())
    return folder


def export(source: Path, path: Path, labels: LabelOptions | None, head: str | None = None) -> Path:
    return export_streamformer(read_checkpoint(str(source)), path, ExportOptions(head=head), labels).path


def reference_text(text_model: Path, labels, templates) -> torch.Tensor:
    """Mean over templates of unit-norm SigLIP text features [C, D], as the reference's heads compute them."""
    from transformers import AutoTokenizer, SiglipModel

    model = SiglipModel.from_pretrained(text_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    rows = []
    for label in labels:
        texts = [template.format(label) for template in templates]
        ids = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=64, truncation=True)["input_ids"]
        with torch.no_grad():
            features = model.text_model(ids).pooler_output
        rows.append((features / features.norm(dim=-1, keepdim=True)).mean(0))
    return torch.stack(rows)


def reference_scores(result, text, patch_text, scale, bias, head: dict[str, torch.Tensor]) -> tuple:
    """(scores [C], patch_scores [C, 4, 4]) from features and pooled, in plain PyTorch."""
    pooled, features = torch.from_numpy(result["pooled"]), torch.from_numpy(result["features"])
    scores = torch.sigmoid(np.exp(scale) * (text @ (pooled / pooled.norm())) + bias)
    x = linear(linear(features, head["w_v.weight"], head["w_v.bias"]), head["v_proj.weight"], head["v_proj.bias"])
    h = layer_norm(x, (96,), head["head_layernorm.weight"], head["head_layernorm.bias"], 1e-6)
    h = torch.nn.functional.gelu(linear(h, head["head_mlp.fc1.weight"], head["head_mlp.fc1.bias"]), approximate="tanh")
    x = x + linear(h, head["head_mlp.fc2.weight"], head["head_mlp.fc2.bias"])
    x = x / x.norm(dim=-1, keepdim=True)
    patch_scores = torch.sigmoid(np.exp(scale) * (x @ patch_text.T) + bias).T.reshape(-1, 4, 4)
    return scores.numpy(), patch_scores.numpy()


def pooling_projections() -> dict[str, torch.Tensor]:
    """The projections that a task head copies from the pooling head."""
    weights = load_file(golden.CHECKPOINT / "model.safetensors")
    return {
        "w_v.weight": weights["head.attention.in_proj_weight"][192:],
        "w_v.bias": weights["head.attention.in_proj_bias"][192:],
        "v_proj.weight": weights["head.attention.out_proj.weight"],
        "v_proj.bias": weights["head.attention.out_proj.bias"],
        "head_layernorm.weight": weights["head.layernorm.weight"],
        "head_layernorm.bias": weights["head.layernorm.bias"],
        **{f"head_mlp.{part}": weights[f"head.mlp.{part}"] for part in
           ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
    }  # fmt: skip


def assert_scores(bundle: Path, text, patch_text, scale, bias, head, labels=None) -> None:
    outputs = ("features", "pooled", "scores", "patch_scores")
    with framestep.load(bundle, outputs=outputs, streams=2) as session:
        session.open_stream()
        stream = session.open_stream()
        if labels is not None:
            session.set_labels(labels)
        for frame in golden.load()["frames"][:5]:
            result = stream.step(frame)
            scores, patch_scores = reference_scores(result, text, patch_text, scale, bias, head)
            golden.assert_close(result["scores"], scores)
            golden.assert_close(result["patch_scores"], patch_scores)
    assert scores.std() > 1e-3  # labels that all score alike would prove nothing


def siglip_numbers(text_model: Path) -> tuple[float, float]:
    weights = load_file(text_model / "model.safetensors")
    return float(weights["logit_scale"]), float(weights["logit_bias"])


def test_scores_of_a_published_checkpoint_are_siglips_and_marked_uncalibrated(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model)))
    text = reference_text(text_model, LABELS, ACTION_TEMPLATES)
    patch_text = reference_text(text_model, LABELS, ("{}",))
    assert_scores(bundle, text, patch_text, *siglip_numbers(text_model), pooling_projections())
    scoring = Bundle.open(bundle).manifest.scoring
    assert scoring is not None
    assert not scoring.calibrated


def test_scores_of_unlikely_labels_keep_their_digits(tmp_path):
    numbers = {"logit_scale": torch.tensor(1.0), "logit_bias": torch.tensor(-22.0)}
    save_file({"text_embeddings": torch.eye(96)[:3].contiguous(), **numbers}, tmp_path / "t.safetensors")
    options = LabelOptions(LABELS, text_embeddings=tmp_path / "t.safetensors")
    bundle = export(golden.CHECKPOINT, tmp_path / "x", options)
    with framestep.load(bundle, outputs=["pooled", "scores"]) as session, session.open_stream() as stream:
        result = stream.step(golden.load()["frames"][0])
    pooled = result["pooled"].astype(np.float64)
    logits = np.exp(1.0) * pooled[:3] / np.linalg.norm(pooled) - 22
    np.testing.assert_allclose(result["scores"], 1 / (1 + np.exp(-logits)), rtol=1e-4)


@pytest.mark.parametrize(("name", "numbers"), [("SSV2", (1.1, 0.3)), ("TaskVIS", (1.7, -0.4))])
def test_a_task_head_brings_its_own_numbers_and_projections(training_checkpoint, text_model, tmp_path, name, numbers):
    bundle = export(training_checkpoint, tmp_path / "x", LabelOptions(LABELS, str(text_model)), head=name)
    weights = torch.load(training_checkpoint / "checkpoint-1.pth")["model"]
    own = {key.removeprefix("task_heads.TaskVIS."): value for key, value in weights.items() if "TaskVIS" in key}
    head = own if name == "TaskVIS" else pooling_projections()
    text = reference_text(text_model, LABELS, ACTION_TEMPLATES)
    patch_text = reference_text(text_model, LABELS, ("{}",))
    assert_scores(bundle, text, patch_text, *numbers, head)
    scoring = Bundle.open(bundle).manifest.scoring
    assert scoring is not None
    assert (scoring.head, scoring.calibrated) == (name, True)


def test_an_unknown_head_is_named_with_those_that_exist(training_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="--head: 'X' is not in the checkpoint; it has SSV2, TaskVIS"):
        export(training_checkpoint, tmp_path / "x", None, head="X")
    with pytest.raises(CheckpointError, match="only training checkpoints carry task heads"):
        export(golden.CHECKPOINT, tmp_path / "x", None, head="X")
    assert list(tmp_path.iterdir()) == []


def test_relabelling_changes_the_scores_and_keeps_backbone_and_saved_states(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model)))
    before = {p.name: p.stat().st_mtime_ns for p in bundle.glob("backbone*")}
    with framestep.load(bundle) as session, session.open_stream() as stream:
        stream.step(golden.load()["frames"][0])
        stream.save_state(tmp_path / "state")
    templates = ("a film of {}", "{} here")
    label_bundle(Bundle.open(bundle), LabelOptions(OTHERS, str(text_model), templates=templates))
    text = reference_text(text_model, OTHERS, templates)
    patch_text = reference_text(text_model, OTHERS, ("{}",))
    assert_scores(bundle, text, patch_text, *siglip_numbers(text_model), pooling_projections())
    assert {p.name: p.stat().st_mtime_ns for p in bundle.glob("backbone*")} == before
    assert len(list(bundle.glob("labels-*"))) == 1
    with framestep.load(bundle) as session, session.open_stream() as stream:
        stream.load_state(tmp_path / "state")
        assert stream.position == 1
        assert session.labels == OTHERS


def test_a_bundle_with_a_text_graph_takes_new_labels_at_run_time_and_on_disk(text_model, tmp_path):
    options = LabelOptions(LABELS, str(text_model), text_graph=True)
    bundle = export(golden.CHECKPOINT, tmp_path / "x", options)
    text = reference_text(text_model, OTHERS, ACTION_TEMPLATES)
    patch_text = reference_text(text_model, OTHERS, ("{}",))
    numbers = siglip_numbers(text_model)
    assert_scores(bundle, text, patch_text, *numbers, pooling_projections(), labels=OTHERS)
    label_bundle(Bundle.open(bundle), LabelOptions(OTHERS))
    assert_scores(bundle, text, patch_text, *numbers, pooling_projections())


def test_a_text_graph_without_labels_waits_for_them(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions((), str(text_model), text_graph=True))
    frame = golden.load()["frames"][0]
    with framestep.load(bundle, outputs=["scores"]) as session, session.open_stream() as stream:
        with pytest.raises(framestep.FramestepError, match="needs labels"):
            stream.step(frame)
        session.set_labels(["a cat", "a dog"], background="nothing")
        assert session.labels == ("a cat", "a dog", "nothing")
        assert stream.step(frame)["scores"].shape == (3,)


def test_labels_may_change_between_frames_while_the_memory_stays(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model), text_graph=True))
    arrays = golden.load()
    with framestep.load(bundle, outputs=["pooled", "scores"]) as session, session.open_stream() as stream:
        for index, frame in enumerate(arrays["frames"][:16]):
            if index == 7:
                session.set_labels(OTHERS)
            result = stream.step(frame)
            golden.assert_close(result["pooled"], arrays["window_pooler_output"][index])
            assert result["scores"].shape == ((3,) if index < 7 else (4,))


def test_ready_embeddings_need_no_text_model(text_model, tmp_path):
    text = reference_text(text_model, LABELS, ("{}",))
    save_file(
        {"text_embeddings": text, "logit_scale": torch.tensor(1.5), "logit_bias": torch.tensor(0.1)},
        tmp_path / "t.safetensors",
    )
    options = LabelOptions(LABELS, text_embeddings=tmp_path / "t.safetensors")
    bundle = export(golden.CHECKPOINT, tmp_path / "x", options)
    assert_scores(bundle, text, text, 1.5, 0.1, pooling_projections())


def test_a_background_competes_but_is_kept_apart(text_model, tmp_path):
    options = LabelOptions(LABELS, str(text_model), background="background")
    with framestep.load(export(golden.CHECKPOINT, tmp_path / "x", options)) as session:
        assert session.labels == (*LABELS, "background")
        assert session.background == "background"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (LabelOptions(LABELS), LabelError, "--labels: needs --text-model or --text-embeddings"),
        (LabelOptions(LABELS, "/nowhere"), CheckpointError, "/nowhere: no such checkpoint file or folder"),
        (LabelOptions(LABELS, text_embeddings=Path("/nowhere")), LabelError, "/nowhere: no such file"),
    ],
)
def test_labels_that_cannot_be_embedded_leave_no_bundle(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export(golden.CHECKPOINT, tmp_path / "x", options)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_relabelling_keeps_the_old_labels(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model)))
    before = json.loads((bundle / "manifest.json").read_text())
    with pytest.raises(LabelError, match="a cat"):
        label_bundle(Bundle.open(bundle), LabelOptions(["a cat", "a cat"], str(text_model)))
    with pytest.raises(LabelError, match="no text graph"):
        label_bundle(Bundle.open(bundle), LabelOptions(["a cat"]))
    assert json.loads((bundle / "manifest.json").read_text()) == before
    Bundle.open(bundle)


@pytest.mark.parametrize("step", ["text_tokenizer.write_tokenizer", "text.compare_text_graph"])
def test_a_text_graph_that_fails_half_way_keeps_the_bundle(text_model, tmp_path, monkeypatch, step):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model), text_graph=True))
    before = sorted(path.name for path in bundle.iterdir())

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"framestep.export.{step}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label_bundle(Bundle.open(bundle), LabelOptions(OTHERS, str(text_model), text_graph=True))
    assert sorted(path.name for path in bundle.iterdir()) == before
    with framestep.load(bundle) as session:
        assert session.labels == LABELS
        session.set_labels(OTHERS)


@pytest.fixture
def small(tmp_path) -> tuple[Path, LabelOptions]:
    """A copy of a small bundle, and other labels for it."""
    steps = Path(__file__).parents[1] / "data" / "steps.bundle"
    hidden = Bundle.open(steps).manifest.graphs["label"].inputs
    width = next(port.shape[1] for port in hidden if port.role == "text_embeddings")
    save_file({"text_embeddings": torch.eye(len(OTHERS), width)}, tmp_path / "others.safetensors")
    options = LabelOptions(OTHERS, text_embeddings=tmp_path / "others.safetensors")
    return Path(shutil.copytree(steps, tmp_path / "steps.bundle")), options


def test_labels_and_another_precision_may_come_at_once(small, monkeypatch):
    bundle, options = small
    rounded, opened = half.to_half, Bundle.open(bundle)

    def label_meanwhile(model, states):
        if Bundle.open(bundle).manifest.labels.names != OTHERS:
            label_bundle(opened, options)
        rounded(model, states)

    monkeypatch.setattr(half, "to_half", label_meanwhile)
    half.add_half(opened)
    found = Bundle.open(bundle).manifest
    assert found.labels.names == OTHERS
    assert "fp16" in found.precisions


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_added_while_a_bundle_is_labelled_stays(small, monkeypatch, fails):
    bundle, options = small
    opened = Bundle.open(bundle)
    labelled = labelling.write_labels

    def build_meanwhile(*given):
        made = labelled(*given)
        half.add_half(opened)
        (bundle / "engines").mkdir()
        if fails:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(labelling, "write_labels", build_meanwhile)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        label_bundle(opened, options)
    found = Bundle.open(bundle)  # every file is there
    assert "fp16" in found.manifest.precisions
    assert (found.manifest.labels.names == OTHERS) is not fails
    embeddings = {path.name for path in bundle.glob("labels-*")}
    assert embeddings == {found.manifest.labels.file}


def test_export_notices_a_wrong_score_graph(text_model, tmp_path, monkeypatch):
    from framestep.export import export as export_module

    class Twisted(export_module.PatchProjections):
        def forward(self, features):
            return super().forward(features) + torch.randn(96, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(export_module, "PatchProjections", Twisted)
    with pytest.raises(framestep.FramestepError, match="not kept, the bundle differs from PyTorch"):
        export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(text_model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.pop("w_v.bias"), "task head TaskVIS: the weights do not fit the config: missing w_v.bias"),
        (lambda head: head.pop("head_mlp.fc1.weight"), "missing head_mlp.fc1.weight"),
        (
            lambda head: head.update({"w_v.weight": torch.zeros(96, 5)}),
            r"w_v.weight \(expected \[96, 96\], found \[96, 5\]",
        ),
        (lambda head: head.update({"stray": torch.zeros(1)}), "unexpected stray"),
        (lambda head: head.update({"logit_scale": torch.zeros(3)}), r"TaskVIS.logit_scale has shape \[3\]"),
    ],
)
def test_every_weight_of_a_task_head_is_accounted_for(training_checkpoint, tmp_path, change, message):
    content = torch.load(training_checkpoint / "checkpoint-1.pth")
    prefix = "task_heads.TaskVIS."
    head = {key.removeprefix(prefix): value for key, value in content["model"].items() if key.startswith(prefix)}
    rest = {key: value for key, value in content["model"].items() if not key.startswith(prefix)}
    change(head)
    torch.save({"model": {**rest, **{prefix + key: value for key, value in head.items()}}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(tmp_path / "c.pth"), golden.CHECKPOINT / "config.json")


def test_a_text_in_place_of_a_list_of_labels_is_refused(text_model, tmp_path):
    bundle = export(golden.CHECKPOINT, tmp_path / "x", LabelOptions((), str(text_model), text_graph=True))
    with framestep.load(bundle) as session:
        for labels in ("car", []):
            with pytest.raises(LabelError):
                session.set_labels(labels, background="nothing")


def test_a_text_model_of_another_size_is_refused(tmp_path):
    other = make_siglip_checkpoint(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match="text features have size 64; the model's hidden size is 96"):
        export(golden.CHECKPOINT, tmp_path / "x", LabelOptions(LABELS, str(other)))
