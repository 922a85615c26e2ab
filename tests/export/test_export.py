"""From a checkpoint to a bundle: sizes, activations, options, and what happens when something goes wrong on the way."""

from __future__ import annotations

import importlib.util
import re
import signal
from dataclasses import replace
from pathlib import Path

import decoder_models
import golden
import numpy as np
import onnx
import pytest
import torch
from command_line import main
from safetensors.torch import save_file
from transformers.activations import ACT2FN

import framestep
from framestep.apps.demo import MODEL
from framestep.export import export as export_module
from framestep.export.checkpoint import Checkpoint, read_checkpoint
from framestep.export.decoder_replay import EXACT_LEVEL, GraphRun
from framestep.export.export import ExportOptions, export_streamformer
from framestep.export.graph import ACTIVATIONS, GraphBuilder, WeightFile
from framestep.export.labelling import LabelOptions
from framestep.export.precision import Precision
from framestep.export.streamformer import TINY, random_model
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import CheckpointError, FramestepError, OutputError, StateError
from framestep.runtime.onnx_files import weight_blocks
from framestep.runtime.text import read_labels


def export(path: Path, options: ExportOptions, **changes: object) -> export_module.ExportReport:
    return export_streamformer(Checkpoint(random_model(replace(TINY, **changes)), "random"), path, options)


def stepped(bundle: Path, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with framestep.load(bundle) as session, session.open_stream() as stream:
        results = [stream.step(frame) for frame in frames]
    return np.stack([r["features"] for r in results]), np.stack([r["pooled"] for r in results])


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_every_activation_is_that_of_transformers(tmp_path, kind):
    import onnxruntime

    if kind not in ACT2FN:
        pytest.skip(f"this version of transformers has no {kind}")
    weights = WeightFile(tmp_path / "x.bin")
    builder = GraphBuilder("x", weights)
    value = builder.activation(builder.node("Identity", builder.input("x", "float32", [101])), kind)
    builder.output(builder.node("Identity", value), "y", "float32", [101])
    builder.save(tmp_path / "x.onnx")
    weights.close()
    x = np.linspace(-12, 12, 101, dtype=np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, ACT2FN[kind](torch.from_numpy(x)).numpy(), atol=2e-5)


@pytest.mark.parametrize("kind", ["gelu", "relu", "gelu_new", "quick_gelu"])
def test_a_model_with_another_activation_exports(tmp_path, kind):
    report = export(tmp_path / "x", ExportOptions(window=3), hidden_act=kind)
    assert report.difference < 1e-4


def test_a_model_without_qkv_bias_exports(tmp_path):
    assert export(tmp_path / "x", ExportOptions(window=3), qkv_bias=False).difference < 1e-4


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (48, 112), (128, 32)])
def test_other_image_sizes_agree_with_pytorch(tmp_path, size):
    """Positions are interpolated here by plain PyTorch, rows as rows."""
    path = export(tmp_path / "x", ExportOptions(window=4, image_size=size)).path
    model = random_model(TINY)
    rows, columns = size[0] // 16, size[1] // 16
    positions = model.embeddings.position_embeddings.data
    if size != (64, 64):
        image = positions.reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
        image = torch.nn.functional.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
        positions = image.permute(0, 2, 3, 1).reshape(1, rows * columns, 96)
    model.embeddings.position_embeddings = torch.nn.Parameter(positions)
    frames = np.random.default_rng(0).integers(0, 256, (7, *size, 3), np.uint8)
    with torch.no_grad():
        features, pooled, _ = model(torch.from_numpy(frames)[None], window=4)
    found = stepped(path, frames)
    golden.assert_close(found[0], features[0].numpy())
    golden.assert_close(found[1], pooled[0].numpy())


@pytest.mark.parametrize("window", [1, 2, 70])
def test_any_window_agrees_with_pytorch(tmp_path, window):
    path = export(tmp_path / "x", ExportOptions(window=window)).path
    frames = np.random.default_rng(0).integers(0, 256, (90, 64, 64, 3), np.uint8)
    with torch.no_grad():
        features, _, _ = random_model(TINY)(torch.from_numpy(frames)[None], window=window)
    golden.assert_close(stepped(path, frames)[0], features[0].numpy())


def test_a_window_beyond_all_memory_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="--window: 1000000000 frames make a state of 6144000000000 bytes a stream; at most"
    ):
        export(tmp_path / "x", ExportOptions(window=10**9))
    assert list(tmp_path.iterdir()) == []


def test_the_window_defaults_to_the_frames_of_the_checkpoint(tmp_path):
    manifest = Bundle.open(export(tmp_path / "x", ExportOptions(rate=4)).path).manifest
    assert {state.capacity for state in manifest.states} == {16}
    assert manifest.rate == 4
    assert manifest.origin.trained_frames == 16


def test_graphs_are_standard_onnx_with_state_as_plain_inputs_and_outputs(golden_bundle):
    model = onnx.load(golden_bundle / "backbone.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    consumers = {name: [n.op_type for n in model.graph.node if name in n.input] for name in
                 [value.name for value in model.graph.input]}  # fmt: skip
    states = [name for name in consumers if name.endswith(".past")]
    assert len(states) == 6
    # TensorRT wants each cache to go straight from a network input to its update
    assert all(consumers[name] == ["TensorScatter"] for name in states)
    assert [n.op_type for n in model.graph.node].count("Attention") == 2 * 3 + 1


def test_a_weight_that_two_graphs_use_is_stored_once(golden_bundle):
    model = onnx.load(golden_bundle / "patch_label.onnx", load_external_data=False)
    places = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {"backbone.bin"}
    assert not (golden_bundle / "label.bin").exists()


def test_a_bundle_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    original = export_module.replay
    monkeypatch.setattr(export_module, "replay", lambda *given: (original(*given)[0] + 0.01, 3))
    with pytest.raises(FramestepError, match=r"not kept, the bundle differs from PyTorch by 1.00e-02 over 3 frames"):
        export(tmp_path / "x", ExportOptions(window=2))
    assert list(tmp_path.iterdir()) == []


def test_the_replay_notices_a_wrong_weight(tmp_path):
    checkpoint = Checkpoint(random_model(TINY), "random")
    bundle = Bundle.open(export_streamformer(checkpoint, tmp_path / "x", ExportOptions(window=4)).path)
    with torch.no_grad():
        checkpoint.model.encoder.layer[1].temporal_attention.attention.qkv.weight[100] *= 1.5
    assert export_module.replay(checkpoint, bundle)[0] > 1e-3


def test_features_of_any_size_agree_to_as_many_digits(tmp_path):
    checkpoint = Checkpoint(random_model(TINY), "random")
    with torch.no_grad():
        checkpoint.model.post_layernorm.weight *= 1e4
    report = export_streamformer(checkpoint, tmp_path / "x", ExportOptions(window=4))
    assert report.difference < 2e-5
    with torch.no_grad():
        checkpoint.model.post_layernorm.weight[3] *= 1.01
    assert export_module.replay(checkpoint, Bundle.open(report.path))[0] > 1e-3


def test_integer_weights_are_those_of_pytorch_rounded(tmp_path):
    model = decoder_models.unfolded_streamformer(TINY)
    report = export_streamformer(Checkpoint(model, "random"), tmp_path / "x", ExportOptions(window=3, precision="w8"))
    assert 1e-3 < report.difference < 0.05 and report.precision == "w8"
    bundle = Bundle.open(report.path)
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    decoder_models.round_streamformer(model)
    with torch.inference_mode():
        features, pooled, _ = model(torch.from_numpy(frames)[None], None, 3, 0)
    run = GraphRun(bundle, ["backbone"], EXACT_LEVEL)
    for position, frame in enumerate(frames):
        found = run.run("backbone", {"frame": frame[None], "position": np.array([position])})
        golden.assert_close(found["features"][0], features[0, position].numpy())
        golden.assert_close(found["pooled"][0], pooled[0, position].numpy())
    seen, drawn = stepped(report.path, frames)
    assert np.linalg.norm(seen - features[0].numpy()) < 0.03 * np.linalg.norm(seen)
    assert np.linalg.norm(drawn - pooled[0].numpy()) < 0.03 * np.linalg.norm(drawn)


def test_integer_weights_from_the_command_line(tmp_path, monkeypatch, capsys):
    text = torch.nn.functional.normalize(torch.randn(3, 96, generator=torch.Generator().manual_seed(0)))
    numbers = {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-1.0)}
    save_file({"text_embeddings": text, **numbers}, tmp_path / "text.safetensors")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n", "utf-8")
    labels = ("--labels", tmp_path / "labels.txt", "--text-embeddings", tmp_path / "text.safetensors")
    paths = [tmp_path / "w8.bundle", tmp_path / "fp32.bundle"]
    for path in paths:
        export = ("export", golden.CHECKPOINT, "-o", path, "--precision", path.stem, *labels)
        assert main(monkeypatch, *export) == 0
    printed = capsys.readouterr().out
    assert re.search(r"its integer weights move features by up to \d\.\d% \(random frames\)", printed)
    assert re.search(r"agrees with PyTorch within \S+ over 18 frames", printed)
    assert main(monkeypatch, "inspect", paths[0]) == 0
    assert re.search(r"weights +INT8: 31 in blocks of 32, 4 in blocks of 64", capsys.readouterr().out)
    frames, outputs = golden.load()["frames"][:20], ("features", "scores", "patch_scores")
    found = {}
    for name, path, engine in (
        ("fp32", paths[1], "onnxruntime"),
        ("w8", paths[0], "auto"),
        ("torch", paths[0], "torch"),
    ):
        with framestep.load(path, engine=engine, outputs=outputs) as session, session.open_stream() as stream:
            found[name] = [stream.step(frame) for frame in frames]
            stream.save_state(tmp_path / name)
            if name == "torch":  # another engine goes on from what this one remembers
                stream.load_state(tmp_path / "w8")
                with pytest.raises(StateError, match="was saved by another model, precision or window"):
                    stream.load_state(tmp_path / "fp32")
    for output in outputs:
        floats, integers, widened = (np.stack([r[output] for r in found[n]]) for n in ("fp32", "w8", "torch"))
        assert 1e-5 < np.linalg.norm(integers - floats) < 0.03 * np.linalg.norm(floats)
        assert np.linalg.norm(widened - floats) < 0.03 * np.linalg.norm(floats)


def test_a_trained_model_with_labels_is_kept_in_integers(tmp_path):
    """Its scores are steep: of noise, a patch's may move by more than a tenth."""
    labels = LabelOptions(read_labels(MODEL / "labels.txt"), text_embeddings=MODEL / "text_embeddings.safetensors")
    options = ExportOptions(precision="w8", resize="stretch")
    report = export_streamformer(read_checkpoint(str(MODEL)), tmp_path / "x", options, labels)
    assert 1e-3 < report.difference < 0.05


def test_integer_weights_that_two_graphs_use_are_stored_once(tmp_path):
    path = export(tmp_path / "x", ExportOptions(window=2, precision="w8")).path
    assert weight_blocks(path / "backbone.onnx") == {32: 3 * 9 + 4, 64: 3 + 1}
    assert weight_blocks(path / "patch_label.onnx") == {32: 3, 64: 1}
    assert not (path / "label.bin").exists()


def test_integer_weights_that_change_too_much_are_not_kept(tmp_path, monkeypatch):
    def write(self, g, name, weight, *stored):
        return original(self, g, name, weight * 2 if name == "layer1.mlp.fc1" else weight, *stored)

    original = Precision._weight
    monkeypatch.setattr(Precision, "_weight", write)
    with pytest.raises(FramestepError, match=r"differs from PyTorch by .* \(at most 1e-01 is accepted in w8\)"):
        export(tmp_path / "x", ExportOptions(window=2, precision="w8"))
    assert list(tmp_path.iterdir()) == []


def test_an_activation_with_weights_of_its_own_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="hidden_act 'prelu' has no ONNX form here; supported are gelu"):
        export(tmp_path / "x", ExportOptions(), hidden_act="prelu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(window=0), "--window: expected at least 1 frame, found 0"),
        (ExportOptions(image_size=(60, 64)), "--image-size: expected multiples of the patch size 16, found 60x64"),
        (ExportOptions(image_size=(0, 64)), "--image-size: expected multiples"),
        (ExportOptions(precision="w4"), "--precision: expected fp32 or w8 of a StreamFormer, found 'w4'; fp16 is"),
        (ExportOptions(rate=0.0), "--rate: expected frames a second above 0"),
        (ExportOptions(rate=float("nan")), "--rate: expected frames a second above 0"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "x", options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/x.bundle: cannot be written"):
        export(tmp_path / "file" / "x.bundle", ExportOptions(window=2))


@pytest.fixture
def usual_signals():
    """Ctrl-C raises, also where the tests run with it ignored; afterwards all is as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stage", ["write_label_graph", "replay"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, capsys, usual_signals, number, status, stage):
    def interrupted(*given):
        assert list(tmp_path.rglob("backbone.onnx"))  # half a bundle is there
        signal.raise_signal(number)

    monkeypatch.setattr(export_module, stage, interrupted)
    assert main(monkeypatch, "export", golden.CHECKPOINT, "-o", tmp_path / "x.bundle") == status
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else find(name))
    assert main(monkeypatch, "export", "absent", "-o", tmp_path / "x.bundle") == 2
    assert (
        capsys.readouterr().err == "framestep: this needs the package transformers: pip install 'framestep[export]'\n"
    )


def test_the_golden_checkpoint_agrees_at_export(tmp_path):
    report = export_streamformer(read_checkpoint(str(golden.CHECKPOINT)), tmp_path / "x", ExportOptions())
    assert report.frames == 18  # the ring fills up and wraps
    assert report.difference < 5e-5
