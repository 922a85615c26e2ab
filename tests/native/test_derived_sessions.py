"""Sessions over derived graphs: products whose constants lie in a file, are shared, or stand in graphs of other shapes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from native_parts import cpu_has, cpu_multiplies_integers, own_operators
from onnx import TensorProto, helper, numpy_helper

import framestep
from framestep.runtime.bundle import file_entry
from framestep.runtime.errors import FramestepError

BLOCK, X_SCALE = 32, np.float32(0.03)
ENGINES = {"bfloat16": "onnxruntime:bf16"}
OPERATORS = {
    "blocks": "BlockProducts",
    "integers": "IntegerProducts",
    "float32": "FloatProducts",
    "bfloat16": "Bfloat16Products",
}
in_float32 = pytest.param(
    "float32", marks=pytest.mark.skipif(not cpu_has("avx512f"), reason="this processor has no AVX-512")
)
in_bfloat16 = pytest.param(
    "bfloat16", marks=pytest.mark.skipif(not cpu_has("avx512_bf16"), reason="this processor has no AVX512-BF16")
)
in_integers = pytest.param(
    "integers", marks=pytest.mark.skipif(not cpu_multiplies_integers(), reason="ONNX Runtime's products are taken here")
)
in_blocks = pytest.param(
    "blocks", marks=pytest.mark.skipif(not cpu_has("avx2", "fma"), reason="this processor has no AVX2")
)
kinds = pytest.mark.parametrize("kind", [in_blocks, in_integers, in_float32, in_bfloat16])

Shapes = dict[str, list[str | int]]


class GraphBundle:
    """A bundle of one graph, `graph`, that is run by itself; axes `T` are of any size, and that of streams is added."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.engine = folder / "one.bundle", ENGINES.get(kind, "onnxruntime")
        self.kind, self.of_floats = kind, kind in ("float32", "bfloat16")
        self.folder.mkdir()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.imports = [helper.make_opsetid("", 24)]

    def external(self, name: str, kind: int, shape: tuple[int, ...], offset: int, length: int | None) -> None:
        """A constant in the file `weights.bin`."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
        self.constants.append(tensor)

    def product(self, x: str, y: str, shape: tuple[int, int], length: bool = True) -> None:
        """y = x times the matrix of this shape that `weights.bin` begins with, INT8 or float32."""
        inputs, outputs = shape
        numbers = inputs * outputs
        if self.of_floats:
            self.external(f"{y}.matrix", TensorProto.FLOAT, shape, 0, 4 * numbers if length else None)
            self.nodes.append(helper.make_node("MatMul", [x, f"{y}.matrix"], [y]))
            return
        self.external(f"{y}.integers", TensorProto.INT8, shape, 0, numbers if length else None)
        scales = np.full((inputs // BLOCK, outputs) if self.kind == "blocks" else outputs, 0.01, np.float32)
        self.constants.append(numpy_helper.from_array(scales, f"{y}.scales"))
        names, blocks = [f"{y}.integers", f"{y}.scales"], {"axis": 0, "block_size": BLOCK}
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", names, [f"{y}.matrix"], **(blocks if self.kind == "blocks" else {"axis": 1})
            )
        )
        if self.kind == "integers":
            rounding = [f"{y}.x_scale", f"{y}.zero"]
            self.constants.append(numpy_helper.from_array(np.array(X_SCALE), rounding[0]))
            self.constants.append(numpy_helper.from_array(np.array(0, np.int8), rounding[1]))
            self.nodes.append(helper.make_node("QuantizeLinear", [x, *rounding], [f"{y}.rounded"]))
            self.nodes.append(helper.make_node("DequantizeLinear", [f"{y}.rounded", *rounding], [f"{y}.x"]))
            x = f"{y}.x"
        self.nodes.append(helper.make_node("MatMul", [x, f"{y}.matrix"], [y]))

    def write(self, inputs: Shapes, outputs: Shapes) -> None:
        rng = np.random.default_rng(0)
        weights = rng.integers(-127, 128, 1 << 14).astype(np.int8)
        if self.of_floats:
            weights = rng.standard_normal(1 << 12).astype(np.float32)
        (self.folder / "weights.bin").write_bytes(weights.tobytes())
        infos = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["S", *shape]) for name, shape in ports.items()]
            for ports in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *infos, self.constants)
        model = helper.make_model(graph, opset_imports=self.imports, ir_version=11)
        (self.folder / "graph.onnx").write_bytes(model.SerializeToString())
        ports = [
            [{"name": n, "role": role, "dtype": "float32", "shape": ["S", *shape]} for n, shape in given.items()]
            for role, given in (("embeddings", inputs), ("output", outputs))
        ]
        manifest = {
            "format": "framestep", "version": 1, "family": "streamformer", "precision": "int8" if self.kind == "integers" else "fp32",
            "frame": {"height": 64, "width": 64, "resize": "crop"},
            "graphs": {"graph": {"file": "graph.onnx", "inputs": ports[0], "outputs": ports[1], "states": []}},
            "states": [], "origin": {"checkpoint": "none", "framestep": "0.1.0"}, "rate": None, "grid": [4, 4],
            "scoring": None, "labels": None, "text": None, "variants": {},
            "files": {
                name: {"bytes": entry.bytes, "sha256": entry.sha256}
                for name in ("graph.onnx", "weights.bin") for entry in [file_entry(self.folder / name)]
            },
        }  # fmt: skip
        (self.folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    def run(self, inputs: dict[str, np.ndarray], path: str = "", engine: str = "") -> tuple[dict[str, np.ndarray], int]:
        """What the graph gives, and how many of its parts operators of ours ran."""
        opened = framestep.load(path or self.folder, engine=engine or self.engine, device="cpu", graphs=["graph"])
        with opened as session, session.open_stream() as stream:
            found = stream.run("graph", inputs)
            return {name: np.array(array) for name, array in found.items()}, own_operators(session)["graph"]

    def check(self, inputs: dict[str, np.ndarray], operators: int) -> None:
        """The same as ONNX Runtime gives with its own operators, within the rounding of 8 bits."""
        found, count = self.run(inputs)
        expected, _ = self.run(inputs, engine="onnxruntime:plain")
        assert count == operators
        for name, array in expected.items():
            assert found[name].shape == array.shape
            assert np.linalg.norm(found[name] - array) < 2e-2 * np.linalg.norm(array)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path, kind: str) -> GraphBundle:
    return GraphBundle(tmp_path, kind)


@kinds
def test_a_bundle_can_be_named_from_within(bundle: GraphBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.product("x", "y", (64, 32))
    bundle.write({"x": ["T", 64]}, {"y": ["T", 32]})
    monkeypatch.chdir(bundle.folder)
    x = numbers(3, 64)
    here, there = bundle.run({"x": x}, "."), bundle.run({"x": x})
    np.testing.assert_array_equal(here[0]["y"], there[0]["y"])


@kinds
def test_matrices_of_the_same_bytes_and_another_shape_are_two(bundle: GraphBundle) -> None:
    bundle.product("wide", "few", (64, 16))
    bundle.product("narrow", "many", (32, 32))
    bundle.write({"wide": ["T", 64], "narrow": ["T", 32]}, {"few": ["T", 16], "many": ["T", 32]})
    bundle.check({"wide": numbers(3, 64), "narrow": numbers(3, 32)}, 2)


@kinds
def test_a_matrix_that_two_products_read_is_read_by_both(bundle: GraphBundle) -> None:
    bundle.product("x", "once", (32, 32))
    again = onnx.NodeProto.FromString(bundle.nodes[-1].SerializeToString())
    again.input[0], again.output[0] = "once", "twice"
    bundle.nodes.append(again)
    bundle.write({"x": ["T", 32]}, {"once": ["T", 32], "twice": ["T", 32]})
    # of integers only where one product alone reads what the dequantizer makes
    bundle.check({"x": numbers(5, 32)}, 2 if bundle.of_floats else 0)


@kinds
def test_the_length_of_a_constant_may_be_left_to_its_shape(bundle: GraphBundle) -> None:
    bundle.product("x", "y", (64, 50), length=False)
    bundle.write({"x": ["T", 64]}, {"y": ["T", 50]})
    bundle.check({"x": numbers(3, 64)}, 1)


@kinds
def test_a_place_in_a_file_means_nothing_where_the_numbers_are_in_the_graph(bundle: GraphBundle) -> None:
    bundle.product("x", "y", (64, 32))
    matrix = next(item for item in bundle.constants if item.external_data)
    matrix.data_location = TensorProto.DEFAULT
    kept = np.float32 if bundle.of_floats else np.int8
    matrix.raw_data = np.random.default_rng(2).integers(-9, 10, (64, 32)).astype(kept).tobytes()
    bundle.write({"x": ["T", 64]}, {"y": ["T", 32]})
    bundle.check({"x": numbers(3, 64)}, 1)


@kinds
def test_x_may_have_more_axes(bundle: GraphBundle) -> None:
    bundle.product("x", "y", (64, 50))
    bundle.write({"x": ["T", 2, 3, 64]}, {"y": ["T", 2, 3, 50]})
    bundle.check({"x": numbers(4, 2, 3, 64)}, 1)


@kinds
@pytest.mark.parametrize("length", [100, 1 << 40])
def test_a_constant_of_another_length_is_refused_by_its_files_name(bundle: GraphBundle, length: int) -> None:
    bundle.product("x", "y", (64, 50))
    for entry in bundle.constants[0].external_data:
        entry.value = str(length) if entry.key == "length" else entry.value
    bundle.write({"x": ["T", 64]}, {"y": ["T", 50]})
    with pytest.raises(FramestepError, match=r"weights\.bin: (a graph's constant has 100 bytes|ends at byte 16384)"):
        bundle.run({"x": numbers(3, 64)})


@kinds
def test_an_operator_of_ours_in_a_file_that_names_fewer_results_is_refused(bundle: GraphBundle) -> None:
    bundle.product("x", "y", (64, 32))
    bundle.product("x", "z", (64, 32))
    own = OPERATORS[bundle.kind]
    bundle.nodes.append(helper.make_node(own, ["x"], ["forged"], domain="framestep", products=0))
    bundle.imports.append(helper.make_opsetid("framestep", 1))
    bundle.write({"x": ["T", 64]}, {name: ["T", 32] for name in ("y", "z", "forged")})
    with pytest.raises(FramestepError, match=f"{own}: "):
        bundle.run({"x": numbers(3, 64)})


@kinds
def test_products_that_take_one_x_for_two_sizes_are_refused_and_read_nothing_else(bundle: GraphBundle) -> None:
    bundle.product("x", "y", (32, 32))
    bundle.product("x", "z", (64, 48))
    bundle.write({"x": ["T", 32]}, {"y": ["T", 32], "z": ["T", 48]})
    with pytest.raises(FramestepError, match=f"{OPERATORS[bundle.kind]}: x has no rows of 64 numbers"):
        bundle.run({"x": numbers(3, 32)})


@pytest.mark.parametrize("kind", [in_integers, in_float32, in_bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 5, 255, 256, 257, 515])
def test_any_number_of_rows_is_multiplied(bundle: GraphBundle, rows: int) -> None:
    bundle.product("x", "y", (33, 49))
    bundle.write({"x": ["T", 33]}, {"y": ["T", 49]})
    x = numbers(rows, 33)
    found, count = bundle.run({"x": x})
    stored = np.float32 if bundle.of_floats else np.int8
    matrix = np.frombuffer((bundle.folder / "weights.bin").read_bytes(), stored)[: 33 * 49].reshape(33, 49)
    if bundle.kind == "integers":
        left, right = np.clip(np.rint(x / X_SCALE), -128, 127) * X_SCALE.astype(np.float64), matrix * 0.01
    else:
        kept = ml_dtypes.bfloat16 if bundle.kind == "bfloat16" else np.float32
        left, right = (array.astype(kept).astype(np.float64) for array in (x, matrix))
    assert count == 1
    assert (np.abs(found["y"] - left @ right) <= 1e-6 * (np.abs(left) @ np.abs(right))).all()


@pytest.mark.parametrize("kind", [in_float32, in_bfloat16])
@pytest.mark.parametrize(
    ("attributes", "bias", "operators"),
    [({}, [32], 1), ({"transB": 1}, [32], 1), ({}, [1, 32], 0), ({"beta": 0.5}, [32], 0), ({"transA": 0}, [32], 0)],
    ids=["biased", "transposed", "a bias of two axes", "a share of a bias", "an attribute more"],
)
def test_a_gemm_is_replaced_where_it_is_a_product_with_a_bias(
    bundle: GraphBundle, attributes: dict[str, float], bias: list[int], operators: int
) -> None:
    bundle.product("other", "z", (64, 32))
    shape = (32, 64) if "transB" in attributes else (64, 32)
    bundle.external("matrix", TensorProto.FLOAT, shape, 0, None)
    bundle.constants.append(numpy_helper.from_array(numbers(*bias), "bias"))
    bundle.nodes.append(helper.make_node("Gemm", ["x", "matrix", "bias"], ["sum"], **attributes))
    bundle.constants.append(numpy_helper.from_array(numbers(32) + 1, "more"))
    bundle.nodes.append(helper.make_node("Add", ["sum", "more"], ["y"]))  # a product takes one
    bundle.write({"x": [64], "other": ["T", 64]}, {"y": [32], "z": ["T", 32]})
    bundle.check({"x": numbers(64), "other": numbers(2, 64)}, 1 + operators)


def test_a_cache_whose_queries_have_no_heads_is_refused(tmp_path: Path) -> None:
    bundle = GraphBundle(tmp_path, "float32")
    bundle.product("x", "y", (64, 32))
    rows, half, cache = (1, 5, 8), (1, 5, 4), (1, 1, 16, 8)
    shapes = [("query", (1, 5, 0)), ("key", rows), ("value", rows), ("cosines", half), ("sines", half)]
    shapes += [("past_raw", cache), ("past_key", cache), ("past_value", cache)]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes}
    arrays |= {"index": np.zeros(1, np.int64), "mask": np.ones((1, 1, 5, 16), bool)}
    bundle.constants += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    outputs = ["nothing", "raw", "keys", "values"]
    bundle.nodes.append(helper.make_node("CachedAttention", list(arrays), outputs, domain="framestep", scale=1.0))
    bundle.imports.append(helper.make_opsetid("framestep", 1))
    bundle.write({"x": ["T", 64]}, {"y": ["T", 32], "raw": [1, 16, 8]})
    with pytest.raises(FramestepError, match="CachedAttention: the inputs' shapes do not belong together"):
        bundle.run({"x": numbers(5, 64)})


def ring_of(kind: type) -> dict[str, np.ndarray]:
    """What a ring's operator reads beside the query: of one stream, 3 rows, a window of 4."""
    arrays = {"past_key": np.zeros((1, 3, 4, 8), kind), "new_key": numbers(1, 3, 1, 8)}
    arrays |= {"past_value": np.zeros((1, 3, 4, 8), kind), "new_value": numbers(1, 3, 1, 8)}
    arrays |= {"index": np.array([2]), "mask": np.ones((1, 1, 1, 4), bool)}
    return arrays | (
        {"key_scale": np.ones(3, np.float32), "value_scale": np.ones(3, np.float32)} if kind is np.int8 else {}
    )


def run_ring(folder: Path, kind: type, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bundle = GraphBundle(folder, "float32")
    bundle.constants += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    own = "IntegerRingAttention" if kind is np.int8 else "RingAttention"
    outputs = ["result", "present_key", "present_value"]
    bundle.nodes.append(helper.make_node(own, ["query", *arrays], outputs, domain="framestep", scale=1.0))
    bundle.imports.append(helper.make_opsetid("framestep", 1))
    bundle.write({"query": [3, 1, 8]}, {"result": [3, 1, 8]})
    return bundle.run({"query": numbers(3, 1, 8)})[0]


@pytest.mark.parametrize("kind", [np.float32, np.int8])
@pytest.mark.parametrize(
    ("name", "array", "why"),
    [
        ("index", np.array([4]), "a slot outside the ring"),
        ("index", np.array([-1]), "a slot outside the ring"),
        ("index", np.array([2, 2]), "the inputs' shapes do not belong together"),
        ("mask", np.ones((1, 1, 1, 5), bool), "the inputs' shapes do not belong together"),
        ("new_key", numbers(1, 3, 1, 7), "the inputs' shapes do not belong together"),
        ("new_value", numbers(1, 2, 1, 8), "the inputs' shapes do not belong together"),
    ],
    ids=["behind", "before", "two slots", "another window", "narrow keys", "few values"],
)
def test_a_ring_refuses_what_does_not_fit_it(
    tmp_path: Path, kind: type, name: str, array: np.ndarray, why: str
) -> None:
    with pytest.raises(FramestepError, match=f"RingAttention: {why}"):
        run_ring(tmp_path, kind, ring_of(kind) | {name: array})


@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_ring_of_integers_refuses_scales_that_are_not_those_of_its_rows(
    tmp_path: Path, name: str, count: int
) -> None:
    with pytest.raises(FramestepError, match="IntegerRingAttention: the scales are not those of the rings' rows"):
        run_ring(tmp_path, np.int8, ring_of(np.int8) | {name: np.ones(count, np.float32)})


@pytest.mark.parametrize("kind", [np.float32, np.int8])
def test_a_ring_takes_what_fits_it(tmp_path: Path, kind: type) -> None:
    assert np.abs(run_ring(tmp_path, kind, ring_of(kind))["result"]).max() > 0
