"""`framestep build` takes decoder bundles, ahead of time, on a machine without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import decoder_models
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from tensorrt_bundles import NoProgress, readers_of_caches  # noqa: E402

from framestep.benchmarks.gpu.stand_in import stand_in  # noqa: E402
from framestep.export.decoder_checkpoint import read_decoder_checkpoint  # noqa: E402
from framestep.export.decoder_export import DecoderOptions, write_bundle  # noqa: E402
from framestep.export.streamformer import StreamFormerConfig  # noqa: E402
from framestep.export.tensorrt import GraphReport, build  # noqa: E402
from framestep.export.tensorrt_attention import MOST_SLOTS  # noqa: E402
from framestep.export.tensorrt_network import BuildOptions, profiles  # noqa: E402
from framestep.runtime.bundle import Bundle, BundleWriter  # noqa: E402
from framestep.runtime.errors import EngineError  # noqa: E402

LAYERS, CAPACITY, CHUNK, HIDDEN = 2, 64, 32, decoder_models.SIZES["hidden_size"]
OPTIONS = BuildOptions("fp16", 2, "tensorrt_rtx", ("8.6",))
# KV-cache layers, attention layers, and how many of those are fused
DECODER = {"decoder": (3 * LAYERS, LAYERS, LAYERS), "rebase": (LAYERS, 0, 0), "embed": (0, 0, 0)}


def write(
    folder: Path, checkpoint: Path, precision: str, capacity: int = CAPACITY, chunk: int = CHUNK, **options
) -> Bundle:
    with BundleWriter(folder / "out.bundle") as writer:
        read = read_decoder_checkpoint(str(checkpoint))
        write_bundle(read, writer, DecoderOptions(precision, capacity, chunk, **options))
    return Bundle.open(folder / "out.bundle")


def found_in(report) -> dict[str, tuple[int, int, int]]:
    return {item.graph: (item.network.cache_updates, item.network.attentions, item.fused) for item in report.graphs}


def test_every_graph_of_a_decoder_that_sees_becomes_an_engine(tmp_path) -> None:
    checkpoint = decoder_models.save(decoder_models.qwen2_5_vl(), tmp_path / "checkpoint")
    bundle = write(tmp_path, checkpoint, "fp16", frame_size=(56, 84))
    bundle, report = build(bundle, OPTIONS, NoProgress())
    assert found_in(report) == {**DECODER, "vision": (0, 3, 3)}
    assert all(item.network.copied_states == () == item.network.cast_states for item in report.graphs)
    assert report.notes == ()
    entries = {entry.graph: (name, entry) for name, entry in bundle.manifest.engines.items()}
    assert {name: entry.streams for name, (_, entry) in entries.items()} == dict.fromkeys(found_in(report), 2)
    assert all(bundle.file(name).stat().st_size == entry.bytes for name, entry in entries.values())
    assert all(item.network is None for item in build(bundle, OPTIONS, NoProgress())[1].graphs)  # there already


def test_a_model_of_rings_and_a_decoder_is_one_build(tmp_path) -> None:
    tower = StreamFormerConfig((48, 48), 16, 8, 32, 2, 2, 64)
    decoder_models.save_streamformer_videoqa(tmp_path, decoder_models.qwen2(), tower)
    _, report = build(write(tmp_path, tmp_path / "checkpoint", "fp16"), OPTIONS, NoProgress())
    assert found_in(report) == {**DECODER, "backbone": (4, 5, 0), "projector": (0, 0, 0)}
    assert report.notes == ("backbone: TensorRT has no fused attention for fp32: built from separate layers",)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Bundle]:
    """A decoder without eyes, by precision."""
    made = {}
    for precision in ("fp32", "w4"):
        folder = tmp_path_factory.mktemp(precision)
        made[precision] = write(folder, decoder_models.save(decoder_models.qwen2(), folder / "checkpoint"), precision)
    return made


def test_tokens_have_a_profile_for_one_and_one_for_a_chunk(plain) -> None:
    manifest = plain["fp32"].manifest
    one, many = profiles(manifest, manifest.graphs["decoder"], 3)
    assert one["S"] == many["S"] == (1, 3, 3)
    assert (one["T"], many["T"]) == ((1, 1, 1), (2, CHUNK, CHUNK))
    assert [sizes["S"] for sizes in profiles(manifest, manifest.graphs["decoder"], 1)] == [(1, 1, 2)] * 2
    assert [sorted(sizes) for sizes in profiles(manifest, manifest.graphs["rebase"], 3)] == [["C", "S"]]


@pytest.mark.filterwarnings("ignore:.*iming cache:DeprecationWarning")
def test_the_builder_is_given_all_profiles(plain, monkeypatch) -> None:
    given: list[tuple[str, tuple[int, ...], ...]] = []
    add = trt.IBuilderConfig.add_optimization_profile

    def note(config, profile):
        given.append(profile.get_shape("embeddings") if len(given) < 2 else None)
        return add(config, profile)

    monkeypatch.setattr(trt.IBuilderConfig, "add_optimization_profile", note)
    monkeypatch.setattr("framestep.export.tensorrt.profiles", only_decoder)
    with stand_in(plain["fp32"].path, flavour="tensorrt"):
        _, report = build(plain["fp32"], BuildOptions("fp32", 2, "tensorrt"), NoProgress())
    assert [item.graph for item in report.graphs] == ["decoder"]
    assert [[tuple(shape) for shape in shapes] for shapes in given] == [
        [(1, 1, HIDDEN), (2, 1, HIDDEN), (2, 1, HIDDEN)],
        [(1, 2, HIDDEN), (2, CHUNK, HIDDEN), (2, CHUNK, HIDDEN)],
    ]


def only_decoder(manifest, graph, streams):
    return profiles(manifest, graph, streams) if graph.file == "decoder.onnx" else []


def compile_decoder(bundle: Bundle, monkeypatch, **options) -> tuple[GraphReport, bytes]:
    monkeypatch.setattr("framestep.export.tensorrt.profiles", only_decoder)
    bundle, report = build(bundle, replace(OPTIONS, streams=1, **options), NoProgress())
    return report.graphs[0], bundle.file(report.graphs[0].file).read_bytes()


def scores_of(plan: bytes) -> set[bytes]:
    """What the attentions of several rows sum the products of queries and keys in, and those of one row keep it in."""
    several = re.findall(rb"Kernel_traits_v2\w*<\s*fmha::\w+_hmma_(\w+)_traits", plan)
    return {*several, *re.findall(rb"reduce<__myln_(\w+), MaxOp<", plan)}


def test_a_token_reads_the_caches_where_they_are_and_a_chunk_copies_each_once(tmp_path, monkeypatch) -> None:
    checkpoint = decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")
    _, plan = compile_decoder(write(tmp_path, checkpoint, "fp16", capacity=512), monkeypatch)
    read = Counter(readers_of_caches(plan))
    assert read.pop("_gemv_mha_v1") == LAYERS
    assert sum(read.values()) == 2 * LAYERS and not any("Repl" in name for name in read)  # no head's is repeated
    assert plan.count(b"function={ name=_gemm_mha_v2 ") == LAYERS
    assert scores_of(plan) == {b"fp32", b"float"}
    given = re.findall(rb"\n  inputs=\{([^}]*)\}", plan)
    assert sum(names.count(b".present") for names in given) == 2 * 3 * LAYERS and b".past" not in b"".join(given)


def test_attention_with_one_key_head_stays_fused(tmp_path, monkeypatch) -> None:
    checkpoint = decoder_models.save(decoder_models.llama(num_key_value_heads=1), tmp_path / "checkpoint")
    _, plan = compile_decoder(write(tmp_path, checkpoint, "fp16"), monkeypatch)
    assert plan.count(b"function={ name=_gemv_mha_v1 ") == LAYERS == plan.count(b"function={ name=_gemm_mha_v2 ")


def test_both_profiles_share_the_weights(tmp_path, monkeypatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    bundle = write(tmp_path, decoder_models.save(decoder_models.qwen2(**sizes), tmp_path / "checkpoint"), "fp16")
    _, plan = compile_decoder(bundle, monkeypatch)
    found = {}
    for item in onnx.load(bundle.file("decoder.onnx")).graph.initializer:
        matrix = numpy_helper.to_array(item)
        if item.name.startswith("layer") and matrix.ndim == 2:
            found[item.name] = plan.count(matrix[0].tobytes()), plan.count(np.ascontiguousarray(matrix[:, 0]).tobytes())
    assert len(found) == LAYERS * 7
    assert set(found.values()) == {(1, 0)}  # row by row, once


@pytest.mark.parametrize(("vocabulary", "chunk"), [(decoder_models.VOCABULARY, CHUNK), (321, 1)])
def test_int4_weights_are_read_by_the_products_themselves(tmp_path, monkeypatch, vocabulary, chunk) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": vocabulary}
    checkpoint = decoder_models.save(decoder_models.qwen2(**sizes), tmp_path / "checkpoint")
    bundle = write(tmp_path, checkpoint, "fp16+w4", chunk=chunk)
    monkeypatch.setattr("framestep.export.tensorrt.profiles", only_decoder)
    bundle, report = build(bundle, BuildOptions(flavour="tensorrt_rtx", compute_capabilities=("8.6",)), NoProgress())
    (item,) = report.graphs
    assert report.precision == "fp16+w4"  # where nothing is asked for
    assert found_in(report) == {"decoder": DECODER["decoder"]}
    plan = bundle.file(item.file).read_bytes()
    products = re.findall(rb"\n *runtime_fusion=\{ name=(\w+) [^\n]*DequantizeLinear\]", plan)
    in_profiles = (1 if chunk == 1 else 2) * (7 * LAYERS + 1)
    assert len(products) == in_profiles == plan.count(b"fully_connected={")
    assert not re.search(rb"\n *function=\{[^\n]*DequantizeLinear", plan)  # none writes the floats down
    stored = {
        item.name: numpy_helper.to_array(item).astype(np.int8).T
        for item in onnx.load(bundle.file("decoder.onnx")).graph.initializer
        if item.data_type == onnx.TensorProto.INT4
    }
    assert len(stored) == 7 * LAYERS + 1
    packed = {name: (q[:, ::2] & 15 | q[:, 1::2] << 4).astype(np.uint8).tobytes() for name, q in stored.items()}
    assert {name: plan.count(matrix) for name, matrix in packed.items()} == dict.fromkeys(stored, 1)


@pytest.mark.parametrize(
    ("capacity", "single", "scores"), [(MOST_SLOTS, LAYERS, {b"fp32", b"float"}), (MOST_SLOTS + 1, 0, {b"fp32"})]
)
def test_scores_of_a_long_cache_are_float32_too(tmp_path, monkeypatch, capacity, single, scores) -> None:
    """The attention of a single row would keep so many in FP16."""
    checkpoint = decoder_models.save(decoder_models.qwen2(max_position_embeddings=capacity), tmp_path / "checkpoint")
    item, plan = compile_decoder(write(tmp_path, checkpoint, "fp16", capacity=capacity), monkeypatch)
    assert item.fused == LAYERS
    assert plan.count(b"function={ name=_gemv_mha_v1 ") == single
    assert plan.count(b"function={ name=_gemm_mha_v2 ") == 2 * LAYERS - single
    assert scores_of(plan) == scores


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp32", OPTIONS, r"has no fp16 \(it has fp32\); TensorRT takes decoders .* framestep export --precision fp16"),
        ("w4", OPTIONS, r"has no fp16 \(it has w4\); TensorRT takes decoders in fp16, fp16\+w4 and fp32"),
        ("w4", replace(OPTIONS, precision=None), r"has no fp16\+w4 \(it has w4\); .* export --precision fp16\+w4"),
        ("fp32", replace(OPTIONS, precision="fp16+w4"), r"has no fp16\+w4 \(.* export --precision fp16\+w4"),
        ("w4", replace(OPTIONS, precision="fp16+int8"), r"has no fp16\+int8 \(.* export --precision fp16$"),
        ("fp32", BuildOptions("fp32", flavour="tensorrt", attention="triton"), "no package tensorrt"),
    ],
)
def test_what_cannot_be_built_is_one_line(plain, precision, options, message) -> None:
    before = Bundle.open(plain[precision].path).manifest
    with pytest.raises(EngineError, match=message) as error:
        build(plain[precision], options, NoProgress())
    assert "\n" not in str(error.value)
    assert Bundle.open(plain[precision].path).manifest.engines == before.engines


def test_our_kernel_is_for_rings(plain) -> None:
    options = BuildOptions("fp32", flavour="tensorrt", attention="triton")
    with stand_in(plain["fp32"].path, flavour="tensorrt"):
        with pytest.raises(EngineError, match="has no attention over rings, which is what --attention triton replaces"):
            build(plain["fp32"], options, NoProgress())
