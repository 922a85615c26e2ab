"""The operators of ours that stand in derived graphs: their kernels against float64, and which nodes they replace."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path
from typing import Any

import decoder_models
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_parts import ROOT, Parts

from framestep.calibration.memory import quantize_memory
from framestep.export.block_quantize import dequantize_blocks, quantize_blocks, to_onnx
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.runtime.bundle import Bundle

STEPS = ROOT / "tests" / "data" / "steps.bundle"
SIMD = ["baseline", "avx2", "avx512"]

hypothesis_settings = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def simd_of(parts: Parts, name: str) -> int:
    if SIMD.index(name) > parts.library.parts_fastest_simd():
        pytest.skip("this processor has no such instructions")
    return SIMD.index(name)


def pointers(*arrays: np.ndarray | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if array is None else array.ctypes.data) for array in arrays]


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def some_byte(visible: np.ndarray, seed: int) -> np.ndarray:
    """A mask as a program in C may have it: of what is true, any byte but 0."""
    return visible.astype(np.uint8) * np.uint8(1 + seed % 255)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# Attention over a ring


def ring_inputs(seed: int, rows: int, window: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"query": (rows, width), "new_key": (rows, width), "new_value": (rows, width)}
    shapes |= {"key": (rows, window, width), "value": (rows, window, width)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ring_attention(
    parts: Parts, simd: int, arrays: dict[str, np.ndarray], visible: np.ndarray, slot: int, scale: float
) -> np.ndarray:
    result = np.full_like(arrays["query"], np.nan)
    rows, window, width = arrays["key"].shape
    names = ("query", "new_key", "new_value", "key", "value")
    given_arrays = pointers(*(arrays[name] for name in names), result, visible)
    parts.library.parts_ring_attention(simd, *given_arrays, *sizes(rows, window, width, slot), ctypes.c_float(scale))
    return result


@pytest.mark.parametrize("simd", SIMD)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    window=st.integers(1, 70),
    width=st.integers(1, 140),
    scale=st.floats(0.01, 3),
)
@hypothesis_settings
def test_ring_attention_is_that_of_float64_and_writes_one_slot(
    parts: Parts, simd: str, seed: int, rows: int, window: int, width: int, scale: float
) -> None:
    arrays = ring_inputs(seed, rows, window, width)
    rng = np.random.default_rng(seed + 1)
    visible = rng.random(window) < 0.7
    slot = int(rng.integers(window))
    visible[slot] = True
    hidden = ~visible
    arrays["key"][:, hidden], arrays["value"][:, hidden] = np.nan, np.inf  # never read
    key, value = arrays["key"].copy(), arrays["value"].copy()
    key[:, slot], value[:, slot] = arrays["new_key"], arrays["new_value"]

    result = ring_attention(parts, simd_of(parts, simd), arrays, some_byte(visible, seed), slot, scale)

    scores = scale * np.einsum("rd,rwd->rw", arrays["query"], key[:, visible], dtype=np.float64)
    expected = np.einsum("rw,rwd->rd", softmax(scores), value[:, visible], dtype=np.float64)
    largest = np.abs(scores).max()
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * (5 + largest))
    np.testing.assert_array_equal(arrays["key"], key)
    np.testing.assert_array_equal(arrays["value"], value)


def integer_rings(seed: int, rows: int, window: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = ring_inputs(seed, rows, window, width)
    for name in ("key", "value"):
        arrays[name] = rng.integers(-128, 128, (rows, window, width), np.int8)
        arrays[f"{name}_scale"] = rng.uniform(0.001, 0.05, rows).astype(np.float32)
    return arrays


def integer_ring_attention(
    parts: Parts, simd: int, arrays: dict[str, np.ndarray], visible: np.ndarray, slot: int, scale: float
) -> np.ndarray:
    result = np.full_like(arrays["query"], np.nan)
    rows, window, width = arrays["key"].shape
    names = ("query", "new_key", "new_value", "key", "value", "key_scale", "value_scale")
    given_arrays = pointers(*(arrays[name] for name in names), result, visible)
    parts.library.parts_integer_ring_attention(
        simd, *given_arrays, *sizes(rows, window, width, slot), ctypes.c_float(scale)
    )
    return result


def quantized(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """As ONNX defines QuantizeLinear without a zero point."""
    return np.clip(np.rint(x / scales[:, None]), -128, 127).astype(np.int8)


@pytest.mark.parametrize("simd", SIMD)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    window=st.integers(1, 70),
    width=st.integers(1, 140),
    scale=st.floats(0.01, 3),
)
@hypothesis_settings
def test_attention_over_a_ring_of_integers_is_that_of_float64_and_writes_one_slot(
    parts: Parts, simd: str, seed: int, rows: int, window: int, width: int, scale: float
) -> None:
    arrays = integer_rings(seed, rows, window, width)
    rng = np.random.default_rng(seed + 1)
    visible = rng.random(window) < 0.7
    slot = int(rng.integers(window))
    visible[slot] = True
    key, value = arrays["key"].copy(), arrays["value"].copy()
    key[:, slot] = quantized(arrays["new_key"], arrays["key_scale"])
    value[:, slot] = quantized(arrays["new_value"], arrays["value_scale"])

    result = integer_ring_attention(parts, simd_of(parts, simd), arrays, some_byte(visible, seed), slot, scale)

    keys = key[:, visible] * arrays["key_scale"][:, None, None].astype(np.float64)
    values = value[:, visible] * arrays["value_scale"][:, None, None].astype(np.float64)
    scores = scale * np.einsum("rd,rwd->rw", arrays["query"], keys)
    expected = np.einsum("rw,rwd->rd", softmax(scores), values)
    sums = scale * np.einsum("rd,rwd->rw", np.abs(arrays["query"]), np.abs(keys))  # what rounding goes by
    np.testing.assert_allclose(result, expected, rtol=0, atol=4e-6 * (5 + sums.max()))
    np.testing.assert_array_equal(arrays["key"], key)
    np.testing.assert_array_equal(arrays["value"], value)


@pytest.mark.parametrize("simd", SIMD)
def test_what_a_ring_of_integers_is_given_is_rounded_half_to_even_and_held_in_its_range(
    parts: Parts, simd: str
) -> None:
    x = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 127.6, 3e38, np.inf, -127.5, -128.4, -129, -3e38, -np.inf, 0]
    )
    arrays = integer_rings(0, 1, 2, len(x))
    arrays["new_key"][:] = arrays["new_value"][:] = x * 0.25
    arrays["key_scale"][:] = arrays["value_scale"][:] = 0.25
    integer_ring_attention(parts, simd_of(parts, simd), arrays, np.ones(2, bool), 1, 1.0)
    expected = [0, 2, 2, 0, -2, 126, 127, 127, 127, 127, -128, -128, -128, -128, -128, 0]
    np.testing.assert_array_equal(arrays["key"][0, 1], expected)
    np.testing.assert_array_equal(arrays["value"][0, 1], expected)


def test_ring_attention_without_a_visible_slot_is_zero(parts: Parts) -> None:
    arrays = ring_inputs(0, 3, 4, 8)
    result = ring_attention(parts, parts.library.parts_fastest_simd(), arrays, np.zeros(4, bool), 1, 1.0)
    np.testing.assert_array_equal(result, 0)


# Attention over a linear cache


@pytest.mark.parametrize("simd", SIMD)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 4),
    slots=st.integers(1, 90),
    half=st.integers(1, 70),
    scale=st.floats(0.01, 1),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
@hypothesis_settings
def test_cached_attention_rotates_its_queries_and_is_that_of_float64(
    parts: Parts, simd: str, seed: int, heads: int, slots: int, half: int, scale: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((rows, 2 * half)).astype(np.float32) for rows in (heads, slots, slots))
    angles = rng.random(half) * 7
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    visible = rng.random(slots) < share
    key[~visible], value[~visible] = np.nan, np.inf  # never read
    result = np.full_like(query, np.nan)
    mask = some_byte(visible, seed)
    arrays = pointers(query, cosines, sines, key, value, result, mask)
    numbers = (*sizes(heads, slots, 2 * half), ctypes.c_float(scale))
    parts.library.parts_cached_attention(simd_of(parts, simd), *arrays, *numbers)

    if not visible.any():
        return np.testing.assert_array_equal(result, 0)
    turned = (query[:, :half] + 1j * query[:, half:]) * np.exp(1j * angles)
    scores = scale * np.concatenate([turned.real, turned.imag], axis=1) @ key[visible].astype(np.float64).T
    expected = softmax(scores) @ value[visible].astype(np.float64)
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-6 * (5 + np.abs(scores).max()))


@pytest.mark.parametrize("simd", SIMD)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 8),
    heads=st.integers(1, 4),
    others=st.integers(0, 3),
    slots=st.integers(1, 90),
    half=st.integers(1, 70),
    scale=st.floats(0.01, 1),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
@hypothesis_settings
def test_attention_of_a_chunk_is_that_of_each_token(
    parts: Parts, simd: str, seed: int, tokens: int, heads: int, others: int, slots: int, half: int, scale: float, share: float
) -> None:  # fmt: skip
    """`others`: heads of other keys that lie between a token's heads and the next token's."""
    rng = np.random.default_rng(seed)
    width = 2 * half
    query = rng.standard_normal((tokens, heads + others, width)).astype(np.float32)
    key, value = (rng.standard_normal((slots, width)).astype(np.float32) for _ in range(2))
    angles = rng.random((tokens, half)) * 7
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    visible = rng.random((tokens, slots)) < share * rng.integers(0, 2, (tokens, 1))  # some tokens see nothing
    unseen = ~visible.any(axis=0)
    key[unseen], value[unseen] = np.nan, np.inf  # no part of any sum
    result = np.full_like(query, 99)
    mask = some_byte(visible, seed)
    arrays = pointers(query, cosines, sines, key, value, result, mask)
    numbers = (*sizes(query[0].size, tokens, heads, slots, width), ctypes.c_float(scale))
    parts.library.parts_chunk_attention(simd_of(parts, simd), *arrays, *numbers)

    assert (result[:, heads:] == 99).all()
    for token in range(tokens):
        seen = visible[token]
        if not seen.any():
            np.testing.assert_array_equal(result[token, :heads], 0)
            continue
        turned = (query[token, :heads, :half] + 1j * query[token, :heads, half:]) * np.exp(1j * angles[token])
        scores = scale * np.concatenate([turned.real, turned.imag], axis=1) @ key[seen].astype(np.float64).T
        expected = softmax(scores) @ value[seen].astype(np.float64)
        tolerance = 3e-6 * (5 + np.abs(scores).max())
        np.testing.assert_allclose(result[token, :heads], expected, rtol=0, atol=tolerance)


# Products with integers in blocks


BLOCK_SIMD = ["avx2", "avx512_vnni"]
MOST_IN_BLOCK = 1 << 16


def block_simd_of(parts: Parts, name: str) -> int:
    if not parts.library.parts_multiplies_blocks(BLOCK_SIMD.index(name)):
        pytest.skip("this processor has no such instructions")
    return BLOCK_SIMD.index(name)


@pytest.mark.parametrize("simd", BLOCK_SIMD)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([8, 4]),
    blocks=st.integers(1, 5),
    block=st.sampled_from([32, 64, 128]),
    outputs=st.integers(1, 70),
    rows=st.integers(1, 21),
    part=st.integers(1, 5),
    biased=st.booleans(),
)
@hypothesis_settings
def test_products_are_those_of_float64_with_rows_rounded_to_integers(
    parts: Parts, simd: str, seed: int, bits: int, blocks: int, block: int, outputs: int, rows: int, part: int, biased: bool
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs = blocks * block
    lowest = {8: -128, 4: -8}[bits]
    integers = rng.integers(lowest, -lowest, (inputs, outputs)).astype(np.int8)
    scales = rng.standard_normal((blocks, outputs)).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32) if biased else None
    x = (rng.standard_normal((rows, inputs)) * np.exp(rng.normal(0, 3, (rows, 1)))).astype(np.float32)
    x[rng.random(rows) < 0.1] = 0
    tensor = onnx.numpy_helper.from_array(to_onnx(integers, bits))
    stored = np.frombuffer(tensor.raw_data, np.uint8).copy()
    rounded, y = np.full((rows, inputs), 99, np.int8), np.full((rows, outputs), np.nan, np.float32)
    parts.library.parts_multiply(
        block_simd_of(parts, simd), bits, *sizes(inputs, outputs, block), *pointers(stored, scales, bias, x), *sizes(rows, part),
        *pointers(rounded, y),
    )  # fmt: skip

    of_blocks = x.reshape(rows, blocks, block)
    steps = np.abs(of_blocks).max(axis=2, keepdims=True) / 127
    whole = rounded.reshape(rows, blocks, block)
    assert np.abs(whole.astype(int)).max() <= 127
    assert (np.abs(whole * steps - of_blocks) <= 0.501 * steps).all()
    weights = integers.reshape(blocks, block, outputs) * scales[:, None].astype(np.float64)
    products = np.einsum("rbi,bio->rbo", whole * steps.astype(np.float64), weights)
    expected = products.sum(axis=1) + (0 if bias is None else bias)
    largest = np.einsum("rbi,bio->ro", np.abs(whole * steps.astype(np.float64)), np.abs(weights))
    largest += 0 if bias is None else np.abs(bias)
    assert (np.abs(y - expected) <= 1e-6 * largest).all()


@pytest.mark.parametrize("simd", BLOCK_SIMD)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_sums_of_the_largest_block_are_exact(parts: Parts, simd: str, rows: int) -> None:
    inputs = MOST_IN_BLOCK
    stored, scales = np.full((inputs, 16), -128, np.int8), np.ones((1, 16), np.float32)
    x = np.ones((rows, inputs), np.float32)
    y, rounded = np.empty((rows, 16), np.float32), np.empty((rows, inputs), np.int8)
    parts.library.parts_multiply(
        block_simd_of(parts, simd), 8, *sizes(inputs, 16, inputs), *pointers(stored, scales, None, x), *sizes(rows, 1),
        *pointers(rounded, y),
    )  # fmt: skip
    np.testing.assert_allclose(y, -128.0 * inputs, rtol=1e-6)


@pytest.mark.parametrize(("block", "replaced"), [(MOST_IN_BLOCK, True), (2 * MOST_IN_BLOCK, False)])
def test_blocks_whose_sums_have_more_than_32_bits_keep_their_nodes(
    parts: Parts, tmp_path: Path, block: int, replaced: bool
) -> None:
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["integers", "scales"], ["matrix"], axis=0, block_size=block),
        onnx.helper.make_node("MatMul", ["x", "matrix"], ["y"]),
    ]
    constants = [constant(np.zeros((block, 1), np.int8), "integers"), constant(np.ones((1, 1), np.float32), "scales")]
    ports = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["S", size])]
        for name, size in (("x", block), ("y", 1))
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "one", *ports, constants))
    assert (derive(parts, model, tmp_path, set()) is not None) == replaced


# Products in float32 and in bfloat16


@pytest.fixture
def bfloat16(parts: Parts) -> Parts:
    if not parts.library.parts_multiplies_bfloat16():
        pytest.skip("this processor has no such instructions")
    return parts


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 150),
    transposed=st.booleans(),
    rows=st.integers(1, 21),
    part=st.integers(1, 4),
    biased=st.booleans(),
    gelu=st.booleans(),
)
@hypothesis_settings
def test_products_are_those_of_float64_with_both_operands_rounded(
    parts: Parts,
    kind: type,
    seed: int,
    inputs: int,
    outputs: int,
    transposed: bool,
    rows: int,
    part: int,
    biased: bool,
    gelu: bool,
) -> None:
    in_float32 = kind is np.float32
    if not (parts.library.parts_multiplies_floats() if in_float32 else parts.library.parts_multiplies_bfloat16()):
        pytest.skip("this processor has no such instructions")
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((inputs, outputs)) * np.exp(rng.normal(0, 3, outputs))).astype(np.float32)
    x = (rng.standard_normal((rows, inputs)) * np.exp(rng.normal(0, 3, (rows, 1)))).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32) if biased else None
    y, rounded = np.full((rows, outputs), np.nan, np.float32), np.full((rows, inputs + inputs % 2), 99, kind)
    stored = np.ascontiguousarray(matrix.T) if transposed else matrix
    operands = (
        *sizes(inputs, outputs),
        int(transposed),
        *pointers(stored, bias),
        int(gelu),
        *pointers(x),
        *sizes(rows, part),
    )
    if in_float32:
        parts.library.parts_multiply_floats(*operands, *pointers(y))
    else:
        parts.library.parts_multiply_bfloat16(*operands, *pointers(rounded, y))
        assert np.array_equal(rounded[:, :inputs], x.astype(kind))
    left, right = (array.astype(kind).astype(np.float64) for array in (x, matrix))
    expected = left @ right + (0 if bias is None else bias)
    largest = np.abs(left) @ np.abs(right) + (0 if bias is None else np.abs(bias))
    assert (np.abs(y - (tanh_gelu(expected) if gelu else expected)) <= 2e-6 * largest).all()


@pytest.fixture(params=["avx2", "avx512_vnni"])
def integer_parts(parts: Parts, request: pytest.FixtureRequest) -> tuple[Parts, int]:
    """The library, and its kernels."""
    simd = request.param_index
    if not parts.library.parts_multiplies_integers(simd):
        pytest.skip("this processor has no such instructions")
    return parts, simd


def multiply_integers(
    integer_parts: tuple[Parts, int],
    x: np.ndarray,
    matrix: np.ndarray,
    input_scale: np.float32,
    scales: np.ndarray,
    bias: np.ndarray | None = None,
    gelu: bool = False,
    part: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The products, and x as it was rounded."""
    (rows, inputs), outputs = x.shape, matrix.shape[1]
    y, rounded = np.full((rows, outputs), 99, np.float32), np.full((rows, (inputs + 3) // 4 * 8 + 4), 99, np.uint8)
    parts, simd = integer_parts
    parts.library.parts_multiply_integers(
        simd, *sizes(inputs, outputs), *pointers(matrix, bias), int(gelu), *pointers(x), *sizes(rows, part),
        *pointers(rounded, y), ctypes.c_float(input_scale), *pointers(scales)
    )  # fmt: skip
    if simd == 0:  # with AVX2 they have 16 bits, else 128 is added
        return y, rounded[:, : 2 * inputs].copy().view(np.int16)
    return y, rounded[:, :inputs].astype(int) - 128


@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 150),
    rows=st.integers(1, 21),
    part=st.integers(1, 4),
    biased=st.booleans(),
    gelu=st.booleans(),
)
@hypothesis_settings
def test_products_of_integers_are_exact_and_then_scaled(
    integer_parts: tuple[Parts, int],
    seed: int,
    inputs: int,
    outputs: int,
    rows: int,
    part: int,
    biased: bool,
    gelu: bool,
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.choice([-128, -127, 0, 127, rng.integers(-128, 128)], (inputs, outputs)).astype(np.int8)
    input_scale = np.float32(rng.uniform(1e-4, 10))
    scales = np.exp(rng.normal(-5, 3, outputs)).astype(np.float32)
    x = (input_scale * rng.uniform(-160, 160, (rows, inputs))).astype(np.float32)
    x.flat[:4] = np.array([np.inf, -np.inf, 3e38, 2.5 * input_scale])[: x.size]  # too large, and a tie
    bias = rng.standard_normal(outputs).astype(np.float32) if biased else None
    y, rounded = multiply_integers(integer_parts, x, matrix, input_scale, scales, bias, gelu, part)
    with np.errstate(over="ignore"):
        integers = np.clip(np.rint(x / input_scale), -128, 127).astype(np.int64)
    np.testing.assert_array_equal(rounded, integers)
    scaled = (integers @ matrix.astype(np.int64)) * (scales * input_scale).astype(np.float64)
    expected = scaled + (0 if bias is None else bias)
    largest = np.abs(scaled) + (0 if bias is None else np.abs(bias))
    assert (np.abs(y - (tanh_gelu(expected) if gelu else expected)) <= 1e-6 * largest).all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("number", [np.nan, -np.nan])
@pytest.mark.parametrize("inputs", [1, 16, 37])
def test_nan_in_a_row_makes_its_products_of_integers_nan_and_no_others(
    integer_parts: tuple[Parts, int], inputs: int, number: float, gelu: bool
) -> None:
    """In each place of a row, also where no integer follows that fills it up; infinity is rounded like what is too large."""
    rng = np.random.default_rng(0)
    matrix, scales = rng.integers(-128, 128, (inputs, 50)).astype(np.int8), np.full(50, 0.01, np.float32)
    clean = rng.standard_normal((13, inputs)).astype(np.float32)
    clean[4, 0], clean[5, -1] = np.inf, -np.inf
    expected, _ = multiply_integers(integer_parts, clean, matrix, np.float32(0.02), scales, gelu=gelu)
    assert np.isfinite(expected).all()
    for place in range(inputs):
        x = clean.copy()
        x[[2, 12], place] = number
        y, _ = multiply_integers(integer_parts, x, matrix, np.float32(0.02), scales, gelu=gelu)
        hit = np.isin(np.arange(13), [2, 12])
        assert np.isnan(y[hit]).all()
        np.testing.assert_array_equal(y[~hit], expected[~hit])


@pytest.mark.parametrize("kind", ["floats", "bfloat16"])
def test_gelu_of_any_number_is_that_of_float64_by_the_hyperbolic_tangent(parts: Parts, kind: str) -> None:
    if not getattr(parts.library, f"parts_multiplies_{kind}")():
        pytest.skip("this processor has no such instructions")
    numbers = np.concatenate([np.linspace(-12, 12, 100_001), np.geomspace(1e-38, 3e38, 999), [0, np.inf]])
    bias = np.concatenate([numbers, -numbers[:-1]]).astype(np.float32)
    count, y, none = len(bias), np.empty(len(bias), np.float32), np.zeros(1, np.float32)
    rounded = [np.empty(2, np.uint16)] if kind == "bfloat16" else []
    getattr(parts.library, f"parts_multiply_{kind}")(
        *sizes(1, count), 0, *pointers(np.zeros(count, np.float32), bias), 1, *pointers(none), *sizes(1, 100),
        *pointers(*rounded, y)
    )  # fmt: skip
    np.testing.assert_allclose(y, tanh_gelu(bias.astype(np.float64)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rest", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_every_number_is_rounded_to_the_nearest_ties_to_even_and_small_ones_to_zero(bfloat16: Parts, rest: int) -> None:
    """All upper halves of float32, as x and as a matrix of one row, whose products with 1 are itself."""
    numbers = ((np.arange(1 << 16, dtype=np.uint32) << 16) | rest).view(np.float32)
    with np.errstate(all="ignore"):
        expected = np.where(np.abs(numbers) < np.finfo(np.float32).tiny, 0, numbers).astype(ml_dtypes.bfloat16)
    expected = expected.astype(np.float32)
    rounded, y = np.empty(1 << 16, ml_dtypes.bfloat16), np.empty(1, np.float32)
    column = np.zeros_like(numbers)
    bfloat16.library.parts_multiply_bfloat16(
        *sizes(1 << 16, 1), 0, *pointers(column, None), 0, *pointers(numbers), *sizes(1, 1), *pointers(rounded, y)
    )
    np.testing.assert_array_equal(rounded.astype(np.float32), expected)
    one, kept, products = np.ones(1, np.float32), np.empty(2, np.uint16), np.empty_like(numbers)
    bfloat16.library.parts_multiply_bfloat16(
        *sizes(1, 1 << 16), 0, *pointers(numbers, None), 0, *pointers(one), *sizes(1, 100), *pointers(kept, products)
    )
    np.testing.assert_array_equal(products, expected)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "matrix"])
def test_a_number_that_is_not_finite_stays_so_in_bfloat16(bfloat16: Parts, number: float, place: str) -> None:
    x, matrix = np.ones((9, 6), np.float32), np.ones((6, 50), np.float32)
    {"x": x, "matrix": matrix}[place][5, 4] = number
    rounded, y = np.empty((9, 6), np.uint16), np.empty((9, 50), np.float32)
    bfloat16.library.parts_multiply_bfloat16(
        *sizes(6, 50), 0, *pointers(matrix, None), 0, *pointers(x), *sizes(9, 1), *pointers(rounded, y)
    )
    hit = np.zeros((9, 50), bool)
    hit[5 if place == "x" else slice(None), 4 if place == "matrix" else slice(None)] = True
    assert np.isfinite(y[~hit]).all()
    np.testing.assert_array_equal(y[hit], number)


def test_a_kernel_s_thread_without_memory_fails_the_call_and_not_the_process(parts: Parts) -> None:
    assert parts("kernel_without_memory") == b"std::bad_alloc"


# Derived graphs


def derive(
    parts: Parts, model: onnx.ModelProto, folder: Path, rings: set[str] | None = None, products: str = ""
) -> onnx.ModelProto | None:
    """What the library makes of a graph; None where it leaves it as it is."""
    past = {port.name for port in model.graph.input if port.name.endswith(".past")}
    path, out = folder / "graph.onnx", folder / "derived.onnx"
    path.write_bytes(model.SerializeToString())
    of_rings, caches = (",".join(sorted(names)).encode() for names in (past if rings is None else rings, past))
    text = parts("derived_graph", os.fsencode(path), of_rings, caches, products.encode(), os.fsencode(out))
    return None if text == b"none" else onnx.load(out, load_external_data=False)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture
def backbone() -> onnx.ModelProto:
    return onnx.load(STEPS / "backbone.onnx", load_external_data=False)


@pytest.mark.parametrize("file", ["backbone.onnx", "backbone.int8.onnx"])
def test_the_derived_graph_has_one_node_for_each_pair_of_rings(parts: Parts, tmp_path: Path, file: str) -> None:
    model = onnx.load(STEPS / file, load_external_data=False)
    layers = operators(model)["TensorScatter"] // 2
    spatial = operators(model)["Attention"] - layers
    derived = derive(parts, model, tmp_path)
    assert derived is not None
    found = operators(derived)
    assert found["RingAttention"] == layers > 0
    assert found["Attention"] == spatial and "TensorScatter" not in found
    kept = [node for node in model.graph.node if node.op_type != "TensorScatter"]
    ours = [node for node in derived.graph.node if node.op_type != "RingAttention"]
    temporal = [node for node in kept if node.op_type == "Attention" and "temporal" in node.name]
    assert ours == [node for node in kept if node not in temporal]
    assert derived.graph.initializer == model.graph.initializer
    assert derived.graph.input == model.graph.input and derived.graph.output == model.graph.output
    assert {(one.domain, one.version) for one in derived.opset_import} == {("", 24), ("framestep", 1)}


def first(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def read_elsewhere(model: onnx.ModelProto, value: str) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", [value], ["seen_elsewhere"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_attribute(first(model, "TensorScatter"), "axis", 1),
        lambda model: set_attribute(first(model, "TensorScatter"), "mode", "circular"),
        lambda model: set_attribute(first(model, "Attention"), "is_causal", 1),
        lambda model: read_elsewhere(model, first(model, "TensorScatter").output[0]),
    ],
    ids=["another axis", "another mode", "a causal mask", "a ring with another reader"],
)
def test_a_ring_that_is_used_otherwise_keeps_its_nodes(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto, change: Any
) -> None:
    before = operators(backbone)["TensorScatter"] // 2
    change(backbone)
    derived = derive(parts, backbone, tmp_path)
    assert derived is not None and operators(derived)["RingAttention"] == before - 1


@pytest.fixture
def remembering_integers(backbone: onnx.ModelProto) -> onnx.ModelProto:
    """The backbone with its rings as INT8."""
    uses = Bundle.open(STEPS).manifest.at("fp32").graphs["backbone"].states
    quantize_memory(backbone, uses, {use.state: np.full(2, 0.02, np.float32) for use in uses})
    return backbone


def test_rings_of_integers_become_one_node_with_their_scales(
    parts: Parts, tmp_path: Path, remembering_integers: onnx.ModelProto
) -> None:
    model = remembering_integers
    layers = operators(model)["TensorScatter"] // 2
    derived = derive(parts, model, tmp_path)
    assert derived is not None
    found = operators(derived)
    assert found["IntegerRingAttention"] == layers > 0
    assert not {"TensorScatter", "QuantizeLinear", "DequantizeLinear", "RingAttention"} & found.keys()
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {name for node in derived.graph.node if "Ring" in node.op_type for name in node.input[7:]} == scales
    assert derived.graph.input == model.graph.input and derived.graph.output == model.graph.output


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_attribute(first(model, "QuantizeLinear"), "axis", 2),
        lambda model: set_attribute(first(model, "QuantizeLinear"), "output_dtype", onnx.TensorProto.UINT8),
        lambda model: set_attribute(first(model, "DequantizeLinear"), "axis", 3),
        lambda model: set_attribute(first(model, "DequantizeLinear"), "block_size", 2),
        lambda model: first(model, "DequantizeLinear").input.append("zero"),
        lambda model: first(model, "DequantizeLinear").input.__setitem__(1, "another"),
        lambda model: read_elsewhere(model, first(model, "TensorScatter").output[0]),
        lambda model: read_elsewhere(model, first(model, "DequantizeLinear").output[0]),
        lambda model: read_elsewhere(model, first(model, "QuantizeLinear").output[0]),
    ],
    ids=[
        "axis",
        "bytes",
        "axis of reading",
        "blocks",
        "zero point",
        "scale",
        "ring read",
        "floats read",
        "integers read",
    ],
)
def test_a_ring_of_integers_that_is_used_otherwise_keeps_its_nodes(
    parts: Parts, tmp_path: Path, remembering_integers: onnx.ModelProto, change: Any
) -> None:
    before = operators(remembering_integers)["TensorScatter"] // 2
    change(remembering_integers)
    derived = derive(parts, remembering_integers, tmp_path)
    assert derived is not None and operators(derived)["IntegerRingAttention"] == before - 1


def test_a_graph_without_rings_is_left_as_it_is(parts: Parts, tmp_path: Path, backbone: onnx.ModelProto) -> None:
    assert derive(parts, backbone, tmp_path, rings=set()) is None


def constant_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    matrices = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def test_products_of_floats_become_nodes_of_ours_where_they_are_asked_for(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto
) -> None:
    products = constant_products(backbone)
    assert len(products) > 10
    derived = derive(parts, backbone, tmp_path, set(), "floats")
    assert derived is not None and not constant_products(derived)
    ours = [node for node in derived.graph.node if node.op_type == "Bfloat16Products"]
    assert [node.input[0] for node in ours] == list(dict.fromkeys(node.input[0] for node in products))
    made = {name for node in ours for name in node.output}
    assert len(made) == len(products)
    added = {node.input[0]: node.output[0] for node in backbone.graph.node if node.op_type == "Add"}
    biases = {item.name for item in backbone.graph.initializer if len(item.dims) == 1}
    sums = {node.input[0] for node in backbone.graph.node if node.op_type == "Add" and node.input[1] in biases}
    last = [added[name] if name in sums else name for name in (node.output[0] for node in products)]
    activated = {node.input[0]: node.output[0] for node in backbone.graph.node if node.op_type == "Gelu"}
    assert activated and made == {activated.get(name, name) for name in last}
    kept = {item.name for item in derived.graph.initializer}
    assert kept.isdisjoint(node.input[1] for node in products)
    read = {name for node in derived.graph.node for name in node.input}
    assert read <= kept | {name for node in derived.graph.node for name in node.output} | {
        port.name for port in derived.graph.input
    }


@pytest.mark.parametrize("change", ["by the error function", "read twice"])
def test_another_gelu_is_computed_as_before(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto, change: str
) -> None:
    gelu = first(backbone, "Gelu")
    if change == "read twice":
        read_elsewhere(backbone, gelu.input[0])
    else:
        set_attribute(gelu, "approximate", "none")
    derived = derive(parts, backbone, tmp_path, set(), "floats")
    assert derived is not None and gelu in derived.graph.node
    assert operators(derived)["Gelu"] == 1


def constant(item: np.ndarray, name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(item, name)


@pytest.fixture
def integers() -> onnx.ModelProto:
    """Two products of one x, of which the first has a bias and a GELU, and one of another x."""
    rng, make = np.random.default_rng(0), onnx.helper.make_node
    constants = [
        constant(np.array(0, np.int8), "zero"),
        constant(np.array(0.02, np.float32), "scale"),
        constant(rng.standard_normal(48).astype(np.float32), "bias"),
    ]
    nodes = []
    for name, x in (("first", "x"), ("second", "x"), ("third", "z")):
        matrix = rng.integers(-127, 128, (32, 48)).astype(np.int8)
        constants.append(constant(matrix, f"{name}.int8"))
        constants.append(constant(rng.uniform(1e-3, 1e-2, 48).astype(np.float32), f"{name}.scale"))
        nodes += [
            make("QuantizeLinear", [x, "scale", "zero"], [f"{name}.rounded"]),
            make("DequantizeLinear", [f"{name}.rounded", "scale", "zero"], [f"{name}.x"]),
            make("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [f"{name}.matrix"], axis=1),
            make("MatMul", [f"{name}.x", f"{name}.matrix"], [f"{name}.y"]),
        ]
    nodes += [make("Add", ["first.y", "bias"], ["sum"]), make("Gelu", ["sum"], ["activated"], approximate="tanh")]
    ports = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", size]) for name in names]
        for names, size in ((("x", "z"), 32), (("activated", "second.y", "third.y"), 48))
    ]
    graph = onnx.helper.make_graph(nodes, "graph", *ports, constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11)


def test_products_of_integers_become_nodes_of_ours(parts: Parts, tmp_path: Path, integers: onnx.ModelProto) -> None:
    derived = derive(parts, integers, tmp_path, set(), "integers")
    assert derived is not None
    assert [(node.op_type, list(node.input), list(node.output)) for node in derived.graph.node] == [
        ("IntegerProducts", ["x"], ["activated", "second.y"]),
        ("IntegerProducts", ["z"], ["third.y"]),
    ]
    assert not derived.graph.initializer


def test_a_constant_that_is_an_input_or_an_output_of_the_graph_as_well_keeps_its_numbers(
    parts: Parts, tmp_path: Path, integers: onnx.ModelProto
) -> None:
    """As an input, which older models make of each, it would have to be given otherwise."""
    integers.graph.input.append(onnx.helper.make_tensor_value_info("first.int8", onnx.TensorProto.INT8, [32, 48]))
    integers.graph.output.append(onnx.helper.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, [48]))
    derived = derive(parts, integers, tmp_path, set(), "integers")
    assert derived is not None and operators(derived) == {"IntegerProducts": 2}
    assert {item.name for item in derived.graph.initializer} == {"first.int8", "bias"}


def replace_constant(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    next(item for item in model.graph.initializer if item.name == name).CopyFrom(constant(array, name))


def other_scale(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(constant(np.array(0.03, np.float32), "other"))
    first(model, "DequantizeLinear").input[1] = "other"


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda model: replace_constant(model, "zero", np.array(3, np.int8)), 3),
        (lambda model: replace_constant(model, "zero", np.array(0, np.uint8)), 3),
        (lambda model: replace_constant(model, "scale", np.array([0.02, 0.03], np.float32)), 3),
        (lambda model: replace_constant(model, "scale", np.array(0, np.float32)), 3),
        (lambda model: replace_constant(model, "scale", np.array(np.nan, np.float32)), 3),
        (lambda model: number_by_number(model, "scale"), 3),
        (lambda model: replace_constant(model, "first.int8", np.zeros((32, 48), np.uint8)), 1),
        (lambda model: replace_constant(model, "first.scale", np.ones(32, np.float32)), 1),
        (lambda model: replace_constant(model, "first.int8", np.zeros((2**17, 48), np.int8)), 1),
        (lambda model: set_attribute(model.graph.node[2], "axis", 0), 1),
        (lambda model: set_attribute(model.graph.node[2], "block_size", 32), 1),
        (lambda model: set_attribute(model.graph.node[0], "saturate", 1), 1),
        (lambda model: read_elsewhere(model, "first.rounded"), 1),
        (lambda model: read_elsewhere(model, "first.matrix"), 1),
        (other_scale, 1),
    ],
    ids=["a zero point", "unsigned", "two scales", "scale 0", "no scale", "a scale that is not bytes", "an unsigned matrix",
         "scales of inputs", "too many inputs", "another axis", "blocks", "another attribute", "x read elsewhere",
         "a matrix read elsewhere", "another scale"],
)  # fmt: skip
def test_other_products_of_integers_keep_their_nodes(
    parts: Parts, tmp_path: Path, integers: onnx.ModelProto, change: Any, left: int
) -> None:
    change(integers)
    derived = derive(parts, integers, tmp_path, set(), "integers")
    assert operators(integers if derived is None else derived)["MatMul"] == left


@pytest.mark.parametrize("change", ["a bias of another shape", "a product that is read twice"])
def test_what_is_more_than_a_bias_is_added_as_before(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto, change: str
) -> None:
    biases = {item.name: item for item in backbone.graph.initializer if len(item.dims) == 1}
    products = {node.output[0] for node in constant_products(backbone)}
    addition = next(
        node for node in backbone.graph.node if node.op_type == "Add" and node.input[0] in products and node.input[1] in biases
    )  # fmt: skip
    if change == "a bias of another shape":
        biases[addition.input[1]].dims.insert(0, 1)
    else:
        read_elsewhere(backbone, addition.input[0])
    derived = derive(parts, backbone, tmp_path, set(), "floats")
    assert derived is not None and addition in derived.graph.node
    assert any(addition.input[0] in node.output for node in derived.graph.node if node.op_type == "Bfloat16Products")


def number_by_number(model: onnx.ModelProto, name: str) -> None:
    """A constant's numbers as fields of their own, which ONNX allows as well as bytes."""
    item = next(item for item in model.graph.initializer if item.name == name)
    count = int(np.prod(item.dims))
    item.CopyFrom(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, item.dims, np.zeros(count)))


def too_large(model: onnx.ModelProto, name: str) -> None:
    next(item for item in model.graph.initializer if item.name == name).dims[:] = [2**31, 2**31]


@pytest.mark.parametrize("change", [number_by_number, too_large])
def test_a_matrix_that_is_not_bytes_or_too_large_keeps_its_product(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto, change: Any
) -> None:
    product = constant_products(backbone)[0]
    change(backbone, product.input[1])
    derived = derive(parts, backbone, tmp_path, set(), "floats")
    assert derived is not None and constant_products(derived) == [product]


def test_a_bias_that_is_not_bytes_is_added_as_before(parts: Parts, tmp_path: Path, backbone: onnx.ModelProto) -> None:
    products = {node.output[0] for node in constant_products(backbone)}
    biases = {item.name for item in backbone.graph.initializer if len(item.dims) == 1}
    addition = next(
        node for node in backbone.graph.node if node.op_type == "Add" and node.input[0] in products and node.input[1] in biases
    )  # fmt: skip
    number_by_number(backbone, addition.input[1])
    derived = derive(parts, backbone, tmp_path, set(), "floats")
    assert derived is not None and addition in derived.graph.node and not constant_products(derived)


@pytest.mark.parametrize("attribute", ["then_branch", "branches"])
def test_a_graph_whose_nodes_have_graphs_is_left_as_it_is(
    parts: Parts, tmp_path: Path, backbone: onnx.ModelProto, attribute: str
) -> None:
    """Those read its values too: here the matrix of a product."""
    read = onnx.helper.make_node("Identity", [constant_products(backbone)[0].input[1]], ["inside"])
    inner = onnx.helper.make_graph([read], "inner", [], [onnx.ValueInfoProto(name="inside")])
    node = onnx.helper.make_node("If", ["condition"], ["seen"])
    node.attribute.append(onnx.helper.make_attribute(attribute, inner if attribute == "then_branch" else [inner]))
    backbone.graph.node.append(node)
    assert derive(parts, backbone, tmp_path, products="floats") is None


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(decoder_models.qwen2(), folder / "checkpoint")))
    export_decoder(checkpoint, folder / "out.bundle", DecoderOptions("w4", 64))
    return folder / "out.bundle" / "decoder.onnx"


@pytest.fixture
def decoder(decoder_file: Path) -> onnx.ModelProto:
    return onnx.load(decoder_file, load_external_data=False)


LAYERS = decoder_models.SIZES["num_hidden_layers"]


def test_a_decoders_caches_and_products_become_nodes_of_ours(
    parts: Parts, tmp_path: Path, decoder: onnx.ModelProto
) -> None:
    derived = derive(parts, decoder, tmp_path)
    assert derived is not None
    found = operators(derived)
    assert found["CachedAttention"] == LAYERS
    assert found["BlockProducts"] == 4 * LAYERS + 1  # queries, keys and values; output; gate and up; down; the head
    for gone in ("Attention", "TensorScatter", "RotaryEmbedding", "Transpose", "MatMul", "DequantizeLinear", "Reshape"):
        assert gone not in found
    together = first(derived, "BlockProducts")
    assert list(together.output) == [f"layer0/layer0.{name}.Add" for name in ("query", "key", "value")]
    numbers = [
        onnx.helper.get_attribute_value(n.attribute[0]) for n in derived.graph.node if n.op_type == "BlockProducts"
    ]
    assert numbers == list(range(4 * LAYERS + 1))
    assert {port.name for port in derived.graph.output} == {port.name for port in decoder.graph.output}
    left = {item.name for item in derived.graph.initializer}
    assert not [name for name in left if name.endswith((".scale", ".bias")) or "query.weight" in name]
    used = {name for node in derived.graph.node for name in node.input}
    made = {name for node in derived.graph.node for name in node.output}
    assert left <= used
    assert used <= made | left | {port.name for port in derived.graph.input}


def bias_of_two_axes(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == "layer0.query.bias")
    tensor.dims[:] = [1, *tensor.dims]


@pytest.mark.parametrize(
    "change, caches, products, additions",
    [
        (lambda model: set_attribute(first(model, "TensorScatter"), "axis", 1), -1, 0, 0),
        (lambda model: set_attribute(first(model, "RotaryEmbedding"), "interleaved", 1), -1, 0, 0),
        (lambda model: set_attribute(first(model, "Transpose"), "perm", [0, 1, 2, 3]), -1, 0, 0),
        (lambda model: set_attribute(first(model, "Reshape"), "allowzero", 1), -1, 0, 0),
        (lambda model: set_attribute(first(model, "Attention"), "softcap", 1.0), -1, 0, 0),
        (lambda model: read_elsewhere(model, first(model, "Attention").output[0]), -1, 0, 0),
        (lambda model: read_elsewhere(model, first(model, "RotaryEmbedding").output[0]), -1, 0, 0),
        (lambda model: read_elsewhere(model, first(model, "TensorScatter").input[0]), -1, 0, 0),
        (lambda model: read_elsewhere(model, first(model, "MatMul").output[0]), 0, 0, 1),
        (bias_of_two_axes, 0, 0, 1),
        (lambda model: set_attribute(first(model, "DequantizeLinear"), "axis", 1), 0, 1, 1),
        (lambda model: set_attribute(first(model, "DequantizeLinear"), "block_size", 16), 0, 1, 1),
        (lambda model: first(model, "DequantizeLinear").input.append("zero_point"), 0, 1, 1),
        (lambda model: read_elsewhere(model, first(model, "DequantizeLinear").output[0]), 0, 1, 1),
    ],
    ids=[
        "another axis", "pairs side by side", "another order", "zeros that count", "a soft cap", "a result read twice",
        "a rotated row read twice", "a cache read twice", "a product read twice", "a bias of two axes",
        "blocks along outputs", "small blocks", "a zero point", "a matrix read twice",
    ],
)  # fmt: skip
def test_what_a_decoder_uses_otherwise_keeps_its_nodes(
    parts: Parts,
    tmp_path: Path,
    decoder: onnx.ModelProto,
    change: Any,
    caches: int,
    products: int,
    additions: int,
) -> None:
    before = operators(derive(parts, decoder, tmp_path))
    change(decoder)
    derived = derive(parts, decoder, tmp_path)
    assert derived is not None
    found = operators(derived)
    assert found["CachedAttention"] == before["CachedAttention"] + caches
    assert found["MatMul"] == found["DequantizeLinear"] == products
    assert found["Add"] == before["Add"] + additions


@pytest.mark.parametrize("simd", BLOCK_SIMD)
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_makes_its_row_so(parts: Parts, simd: str, number: float) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    x[1, 5] = number
    stored, scales = np.full((64, 16), 3, np.uint8), np.ones((2, 16), np.float32)
    y, rounded = np.empty((3, 16), np.float32), np.empty((3, 64), np.int8)
    parts.library.parts_multiply(
        block_simd_of(parts, simd), 8, *sizes(64, 16, 32), *pointers(stored, scales, None, x), *sizes(3, 1),
        *pointers(rounded, y),
    )  # fmt: skip
    assert np.isfinite(y[[0, 2]]).all()
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("simd", BLOCK_SIMD)
def test_blocks_are_read_as_the_graph_stores_them(parts: Parts, simd: str) -> None:
    """Odd outputs: of a row of INT4 the last integer shares its byte with the next row's first."""
    weight = np.random.default_rng(0).standard_normal((37, 64)).astype(np.float32)
    integers, scales = quantize_blocks(torch.from_numpy(weight), 4)
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(integers.T).astype(ml_dtypes.int4))
    stored, columns = np.frombuffer(tensor.raw_data, np.uint8).copy(), np.ascontiguousarray(scales.T)
    x = np.zeros((64, 64), np.float32)
    np.fill_diagonal(x, 1)
    y, rounded = np.empty((64, 37), np.float32), np.empty((64, 64), np.int8)
    parts.library.parts_multiply(
        block_simd_of(parts, simd),
        4,
        *sizes(64, 37, 32),
        *pointers(stored, columns, None, x),
        *sizes(64, 1),
        *pointers(rounded, y),
    )
    np.testing.assert_allclose(y, dequantize_blocks(integers, scales).T, rtol=1e-6)


@given(
    decodes=st.booleans(),
    cut=st.integers(1, 20000),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
)
@hypothesis_settings
def test_a_damaged_graph_gives_no_crash(
    parts: Parts,
    tmp_path_factory: pytest.TempPathFactory,
    decoder_file: Path,
    decodes: bool,
    cut: int,
    flips: list[tuple[int, int]],
) -> None:
    content = bytearray((decoder_file if decodes else STEPS / "backbone.onnx").read_bytes())
    for place, byte in flips:
        content[place % len(content)] = byte
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "graph.onnx").write_bytes(content[: max(1, len(content) - cut)])
    rings, caches = b"layer0.key.past", b"decoder.layer0.key.past,decoder.layer0.raw_key.past,decoder.layer0.value.past"
    names = rings, caches, b"floats"
    parts("derived_graph", os.fsencode(folder / "graph.onnx"), *names, os.fsencode(folder / "derived.onnx"))
