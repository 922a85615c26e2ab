"""TensorRT for RTX builds the engines of real bundles here, where there is no GPU; what it makes of them is looked at."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from tensorrt_bundles import NoProgress, add_quantized, weight_bytes  # noqa: E402

from framestep.benchmarks.gpu.stand_in import stand_in  # noqa: E402
from framestep.export.checkpoint import Checkpoint  # noqa: E402
from framestep.export.export import ExportOptions, write_streamformer  # noqa: E402
from framestep.export.streamformer import BASE, random_model  # noqa: E402
from framestep.export.tensorrt import build  # noqa: E402
from framestep.export.tensorrt_network import BuildError, BuildOptions  # noqa: E402
from framestep.runtime.bundle import Bundle, BundleWriter, file_entry  # noqa: E402
from framestep.runtime.errors import BundleError, EngineError  # noqa: E402
from framestep.runtime.manifest import FrameSpec, Graph, Manifest, Origin, Port, State, StateUse  # noqa: E402

CARDS = ("8.6", "8.9", "12.0")
MOST_SECONDS = 60.0  # of the processor: about 12 on this project's machines
# of the engine, over the weights' bytes; with room for several streams its kernels weigh more, see benchmarks/NOTES.md
MOST_BYTES = {("fp16", 4): 1.1, ("fp16+int8", 1): 1.1, ("fp16+int8", 4): 1.13}


@pytest.fixture(scope="module")
def golden(golden_bundle, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "golden.bundle"
    shutil.copytree(golden_bundle, path)
    add_quantized(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.bundle"
    with BundleWriter(path) as writer:
        write_streamformer(Checkpoint(random_model(BASE), "random"), writer, ExportOptions(window=16))
    assert add_quantized(path) == 12 * 10 + 6
    return path


@pytest.mark.parametrize(("precision", "streams"), MOST_BYTES)
def test_the_base_model_becomes_an_engine_that_updates_its_caches_in_place(base, precision, streams) -> None:
    progress = NoProgress()
    begin = time.process_time()
    bundle, report = build(
        Bundle.open(base, verify=False), BuildOptions(precision, streams, compute_capabilities=CARDS), progress
    )
    backbone = next(item for item in report.graphs if item.graph == "backbone")
    layers = BASE.num_hidden_layers
    assert backbone.network is not None
    assert backbone.network.cache_updates == 2 * layers
    assert backbone.network.copied_states == () == backbone.network.cast_states
    assert backbone.network.attentions == 2 * layers + 1 == backbone.fused
    assert backbone.bytes < MOST_BYTES[precision, streams] * weight_bytes(bundle, precision, "backbone")
    assert time.process_time() - begin < MOST_SECONDS
    assert report.compute_capabilities == CARDS
    assert report.state_bytes == bundle.manifest.at(precision).states[0].bytes_per_stream() * 2 * layers
    assert progress.graphs == ["backbone", "label", "patch_label"]
    assert progress.started[0][:2] == ("Building engine", None)
    assert progress.steps > 100
    assert progress.open == []


def products_of_integers(engine: Path) -> dict[str, str]:
    """The matrix products of an engine whose matrix is INT8, and the type of what they write."""
    plan = engine.read_bytes()
    types = dict(re.findall(rb' name="([^"]+)" [^\n]* type=(\w+) \}\n', plan))
    products = re.findall(rb'fully_connected=\{ name="([^"]+)" output=\{"([^"]+)" \} input=\{"[^"]+" "([^"]+)"', plan)
    return {name.decode(): types[made].decode() for name, made, matrix in products if types[matrix] == b"int8"}


def test_sums_of_integers_are_written_as_float32(golden) -> None:
    options = BuildOptions("fp16+int8", compute_capabilities=CARDS, again=True)
    bundle, report = build(Bundle.open(golden), options, NoProgress())
    found = products_of_integers(bundle.file(report.graphs[0].file))
    assert sum(len(names.split("+")) for names in found) == 3 * 10 + 6  # those of one input are one product
    assert set(found.values()) == {"float"}


@pytest.mark.parametrize("precision", ["fp16", "fp16+int8", "fp32"])
def test_a_step_of_an_engine_copies_no_cache(golden, precision) -> None:
    options = BuildOptions(precision, compute_capabilities=CARDS, again=True)
    bundle, report = build(Bundle.open(golden), options, NoProgress())
    plan = bundle.file(report.graphs[0].file).read_bytes()
    given = re.search(rb"\n  inputs=\{([^}]*)\}", plan)[1].decode()  # an output's name: input and output are one
    for use in bundle.manifest.at(precision).graphs["backbone"].states:
        assert f'"{use.output}.1"' in given
    assert ".past" not in given


def test_a_graph_that_sums_integers_in_half_precision_is_refused(golden, tmp_path) -> None:
    path = tmp_path / "half.bundle"
    shutil.copytree(golden, path)
    bundle = Bundle.open(path, verify=False)
    name = bundle.manifest.at("fp16+int8").graphs["backbone"].file
    model = onnx.load(path / name)
    scales = {item.input[1] for item in model.graph.node if item.op_type == "DequantizeLinear"}
    for item in model.graph.initializer:
        if item.name in scales:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), item.name))
    onnx.save(model, path / name)
    bundle.rewrite_manifest(
        replace(bundle.manifest, files={**bundle.manifest.files, name: file_entry(path / name)}, engines={})
    )
    with pytest.raises(BuildError, match=r"sums products of integers in FP16.*calibrate the bundle again"):
        build(Bundle.open(path, verify=False), BuildOptions("fp16+int8", compute_capabilities=CARDS), NoProgress())


@pytest.mark.parametrize("precision", ["fp16", "fp16+int8", "fp32"])
def test_the_golden_model_becomes_an_engine(golden, precision) -> None:
    bundle, report = build(Bundle.open(golden), BuildOptions(precision, 2, compute_capabilities=CARDS), NoProgress())
    backbone = report.graphs[0]
    assert backbone.network is not None
    assert (backbone.network.cache_updates, backbone.network.attentions) == (6, 7)
    assert backbone.network.copied_states == () == backbone.network.cast_states
    assert backbone.fused == (0 if precision == "fp32" else 7)
    assert [note for note in report.notes if "separate layers" in note] == (
        ["backbone: TensorRT has no fused attention for fp32: built from separate layers"]
        if precision == "fp32"
        else []
    )
    entry = bundle.manifest.engines[backbone.file]
    assert (entry.precision, entry.streams, entry.compute_capabilities) == (precision, 2, CARDS)
    assert entry.attention == ("decomposed" if precision == "fp32" else "native")
    assert bundle.file(backbone.file).stat().st_size == entry.bytes == backbone.bytes
    # the whole bundle still opens, every file checked, and what was built is not built again
    again, second = build(Bundle.open(golden), BuildOptions(precision, 2, compute_capabilities=CARDS), NoProgress())
    assert all(item.network is None and item.seconds == 0 for item in second.graphs)
    assert [item.file for item in second.graphs] == [item.file for item in report.graphs]
    assert again.manifest == bundle.manifest


@pytest.fixture
def copied(golden_bundle, tmp_path) -> Path:
    path = tmp_path / "golden.bundle"
    shutil.copytree(golden_bundle, path)
    return path


def files(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def test_fp16_is_derived_once_and_then_is_a_precision_of_the_bundle(copied) -> None:
    key = Bundle.open(copied).state_key()
    bundle, report = build(Bundle.open(copied), BuildOptions(), NoProgress())
    assert report.notes == ("the bundle had no fp16: derived from its fp32 graphs and added",)
    assert report.compute_capabilities == ("8.0+",)  # no GPU here: one engine for all
    assert bundle.manifest.precisions == ("fp32", "fp16")
    assert {state.dtype for state in bundle.manifest.at("fp16").states} == {"float16"}
    assert Bundle.open(copied).state_key() == key  # saved states stay valid
    _, second = build(Bundle.open(copied), BuildOptions(again=True), NoProgress())
    assert second.notes == ()
    assert second.graphs[0].network is not None


def test_auto_attention_is_native_where_there_are_no_plugins(copied) -> None:
    bundle, report = build(Bundle.open(copied), BuildOptions("fp32", attention="auto"), NoProgress())
    assert "attention: native, because TensorRT for RTX has no plugin layers" in report.notes
    assert {entry.attention for entry in bundle.manifest.engines.values()} <= {"native", "decomposed"}


def test_an_engine_of_changed_weights_is_replaced(copied) -> None:
    bundle, report = build(Bundle.open(copied), BuildOptions("fp32"), NoProgress())
    old = report.graphs[0].file
    model = onnx.load(copied / "backbone.onnx", load_external_data=False)
    model.producer_version = "2"
    onnx.save(model, copied / "backbone.onnx")
    entries = {**bundle.manifest.files, "backbone.onnx": file_entry(copied / "backbone.onnx")}
    changed = bundle.rewrite_manifest(replace(bundle.manifest, files=entries))
    bundle, second = build(changed, BuildOptions("fp32"), NoProgress())
    assert second.graphs[0].file != old and not (copied / old).exists()
    assert [item.network is None for item in second.graphs] == [False, True, True]
    assert old not in bundle.manifest.engines


@pytest.mark.filterwarnings("ignore:.*iming cache:DeprecationWarning")
def test_the_full_package_takes_the_same_path(copied) -> None:
    """TensorRT for RTX in the place of the full package: its builder, and a GPU to build for."""
    with stand_in(copied, flavour="tensorrt") as machine:
        options = BuildOptions("fp16", flavour="tensorrt", workspace=1 << 28)
        bundle, report = build(Bundle.open(copied), options, NoProgress())
        assert (report.flavour, report.version, report.compute_capabilities) == ("tensorrt", "11.4.0.106", ("8.6",))
        assert report.graphs[0].activations == 4096 and report.graphs[0].engine_layers == 3
        assert report.bytes_per_stream == report.state_bytes + 4096
        assert (copied.parent / "golden.bundle.timing").stat().st_size > 0  # beside the bundle
        wide = replace(options, hardware_compatible=True)
        assert build(bundle, wide, NoProgress())[1].compute_capabilities == ("8.0+",)
        with pytest.raises(EngineError, match=r"builds for the GPU at hand, which has 8\.6, not 8\.7"):
            build(bundle, replace(options, compute_capabilities=("8.7",)), NoProgress())
        assert machine.memory == {} and machine.contexts == 0
        machine.lost = True
        with pytest.raises(EngineError, match="builds for the GPU at hand, and there is none"):
            build(bundle, options, NoProgress())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions("int8"), r"--precision: expected fp16, fp16\+int8, fp16\+w4, fp32, found 'int8'"),
        (BuildOptions("fp16+int8"), r"has no fp16\+int8 .* 'framestep calibrate --precision fp16\+int8'"),
        (BuildOptions("fp16+w4"), r"has no fp16\+w4 .*; only language decoders are exported in it"),
        (BuildOptions(attention="flash"), "--attention: expected native, triton, auto, found 'flash'"),
        (BuildOptions(streams=0), "--streams: expected at least 1, found 0"),
        (BuildOptions(compute_capabilities=("8.7",)), r"builds for 7\.5, .*, not for 8\.7"),
        (BuildOptions(hardware_compatible=True, compute_capabilities=("8.6",)), "give no --compute-capability with it"),
        (BuildOptions(version_compatible=True), "--version-compatible: TensorRT for RTX does not have it"),
        (BuildOptions(flavour="openvino"), "flavour 'openvino' is unknown; expected auto, tensorrt, tensorrt_rtx"),
        (BuildOptions(flavour="tensorrt"), "TensorRT is not installed .no package tensorrt.: pip install tensorrt-rtx"),
        (BuildOptions("fp32", workspace=1), r"fits into the workspace limit .*; raise --workspace"),
        (BuildOptions(attention="triton"), "TensorRT for RTX has no plugin layers"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_changes_nothing(copied, options, message) -> None:
    before = files(copied)
    with pytest.raises(EngineError, match=message):
        build(Bundle.open(copied), options, NoProgress())
    assert files(copied) == before


def test_without_tensorrt_it_says_what_to_install(copied, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="^TensorRT is not installed: pip install tensorrt-rtx"):
        build(Bundle.open(copied), BuildOptions(), NoProgress())


def test_an_older_tensorrt_is_refused(copied) -> None:
    with stand_in(copied, flavour="tensorrt"):
        import tensorrt

        tensorrt.__version__ = "10.14.1"
        with pytest.raises(EngineError, match=r"TensorRT 10\.14\.1 is too old: 10\.15 is the first"):
            build(Bundle.open(copied), BuildOptions(flavour="tensorrt"), NoProgress())


def test_a_stopped_build_ends_and_leaves_no_engine(copied) -> None:
    class Stopping(NoProgress):
        def step(self, phase: str, done: int) -> None:
            raise KeyboardInterrupt

    before = files(copied)
    with pytest.raises(KeyboardInterrupt):
        build(Bundle.open(copied), BuildOptions("fp32"), Stopping())
    assert files(copied) == before


@pytest.mark.filterwarnings("ignore:.*iming cache:DeprecationWarning")
def test_too_little_memory_to_build_says_how_much(copied, monkeypatch) -> None:
    def fail(self, network, config):
        self.logger.log(trt.ILogger.ERROR, "Requested amount of GPU memory (123456 bytes) could not be allocated.")

    monkeypatch.setattr(trt.Builder, "build_serialized_network", fail)
    with stand_in(copied, flavour="tensorrt", free=777):
        with pytest.raises(BuildError, match="123456 bytes were asked for, 777 are free"):
            build(Bundle.open(copied), BuildOptions("fp32", flavour="tensorrt"), NoProgress())


# Graphs of other models


def bundle_of(path: Path, nodes, inputs, outputs, states=(), constants=(), graph_states=(), opset=24) -> Bundle:
    """A bundle with one hand-written graph. Ports are (name, role, dtype, shape)."""
    kinds = {
        "bool": TensorProto.BOOL,
        "float16": TensorProto.FLOAT16,
        "float32": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
    }

    def info(name, dtype, shape):
        return helper.make_tensor_value_info(name, kinds[dtype], shape)

    by_name = {state.name: state for state in states}
    ins = [info(name, dtype, shape) for name, _, dtype, shape in inputs]
    outs = [info(name, dtype, shape) for name, _, dtype, shape in outputs]
    for use in graph_states:
        state = by_name[use.state]
        ins.append(info(use.input, state.dtype, state.shape))
        outs.append(info(use.output, state.dtype, state.shape))
    graph = helper.make_graph(nodes, "g", ins, outs, list(constants))
    with BundleWriter(path) as writer:
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), writer.folder / "g.onnx")
        made = Graph(
            "g.onnx", tuple(Port(*port) for port in inputs), tuple(Port(*port) for port in outputs), tuple(graph_states)
        )
        manifest = Manifest(
            "framestep", 1, "test", "fp16", FrameSpec(8, 8), {"g": made}, tuple(states), Origin("test", "0"), rate=None
        )
        writer.finish(manifest)
    return Bundle.open(path)


def test_a_refusal_of_the_parser_names_node_operator_and_opset(tmp_path) -> None:
    nodes = [helper.make_node("StringNormalizer", ["position"], ["y"], name="middle")]
    bundle = bundle_of(
        tmp_path / "b", nodes, [("position", "position", "int64", ("S",))], [("y", "output", "int64", ("S",))]
    )
    with pytest.raises(
        BuildError,
        match=r"g\.onnx: .* cannot read it \(ONNX opset ai\.onnx 24\): node 'middle' \(StringNormalizer\): .",
    ):
        build(bundle, BuildOptions(), NoProgress())


def test_an_input_that_tensorrt_ignores_is_refused(tmp_path) -> None:
    nodes = [helper.make_node("Identity", ["position"], ["y"])]
    inputs = [("position", "position", "int64", ("S",)), ("write_index", "write_index", "int64", ("S",))]
    bundle = bundle_of(tmp_path / "b", nodes, inputs, [("y", "output", "int64", ("S",))])
    with pytest.raises(BuildError, match="TensorRT ignores the input 'write_index'"):
        build(bundle, BuildOptions(), NoProgress())


def test_a_decoders_cache_is_updated_in_place_and_another_state_is_named(tmp_path) -> None:
    """Grouped queries over a linear cache that an input steers, and beside it a state that is simply replaced."""
    heads, kv_heads, capacity, size = 4, 2, 32, 16
    nodes = [
        helper.make_node("TensorScatter", ["k.past", "k_new", "write_index"], ["k.present"], name="k_update", axis=2),
        helper.make_node("TensorScatter", ["v.past", "v_new", "write_index"], ["v.present"], name="v_update", axis=2),
        helper.make_node("Attention", ["query", "k.present", "v.present", "slot_mask"], ["y"], name="attention"),
        helper.make_node("Add", ["sum.past", "query"], ["sum.present"], name="add"),
    ]
    caches = [State(name, "linear", ("S", kv_heads, capacity, size), 2, capacity, 1, "float16") for name in ("k", "v")]
    total = State("sum", "linear", ("S", heads, 1, size), 2, 1, 1, "float16")
    inputs = [
        ("query", "embeddings", "float16", ("S", heads, 1, size)),
        ("k_new", "embeddings", "float16", ("S", kv_heads, 1, size)),
        ("v_new", "embeddings", "float16", ("S", kv_heads, 1, size)),
        ("write_index", "write_index", "int64", ("S",)),
        ("slot_mask", "slot_mask", "bool", ("S", 1, 1, capacity)),
    ]
    uses = [StateUse(name, f"{name}.past", f"{name}.present") for name in ("k", "v", "sum")]
    bundle = bundle_of(
        tmp_path / "b", nodes, inputs, [("y", "output", "float16", ("S", heads, 1, size))], (*caches, total), (), uses
    )
    _, report = build(bundle, BuildOptions(streams=2), NoProgress())
    network = report.graphs[0].network
    assert network is not None
    assert (network.cache_updates, network.copied_states, network.attentions) == (2, ("sum",), 1)
    assert report.graphs[0].fused == 1
    assert report.notes == ("g: copied in every step, not updated in place: sum",)


def test_fp16_from_a_bundle_without_fp32_is_refused(tmp_path) -> None:
    nodes = [helper.make_node("Identity", ["position"], ["y"])]
    ports = [("position", "position", "int64", ("S",))], [("y", "output", "int64", ("S",))]
    bundle = bundle_of(tmp_path / "b", nodes, *ports)
    other = bundle.rewrite_manifest(replace(bundle.manifest, precision="int8"))
    with pytest.raises(BundleError, match="fp16 is derived from fp32, and this bundle has int8"):
        build(other, BuildOptions(), NoProgress())
    other = bundle.rewrite_manifest(replace(bundle.manifest, precision="w8"))
    with pytest.raises(EngineError, match=r"has no fp16 \(it has w8\); .* framestep export --precision fp32"):
        build(other, BuildOptions(), NoProgress())
