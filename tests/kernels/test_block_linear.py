"""`block_linear` and `widen_blocks` against float64 products with the integers times their scales."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st

from framestep.kernels import block_linear, operators, reference
from framestep.kernels.block_linear import Launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def matrix(device, bits, blocks, block, outputs, scale_dtype=torch.float32, seed=0):
    """Integers int8 [K, N] of the whole range, both ends among them, scales of both signs, and the matrix [K, N]."""
    generator = torch.Generator().manual_seed(seed)
    half, inputs = 1 << bits - 1, blocks * block
    integers = torch.randint(-half, half, (inputs, outputs), generator=generator, dtype=torch.int8)
    integers.view(-1)[:: max(1, integers.numel() // 7)] = -half
    integers.view(-1)[1 :: max(1, integers.numel() // 5)] = half - 1
    scale = (0.1 * torch.randn(blocks, outputs, generator=generator)).to(scale_dtype)
    wide = integers.double().view(blocks, block, outputs) * scale.double()[:, None]
    return integers.to(device), scale.to(device), wide.flatten(0, 1).to(device)


def random(device, *shape, dtype, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128]),
    blocks=st.integers(1, 7),
    outputs=st.sampled_from([1, 7, 16, 33, 70]),
    tokens=st.sampled_from([1, 2, 8, 9, 17, 64]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
    biased=st.booleans(),
    cut=st.sampled_from([None, Launch(16, 2, 1, 4, 3), Launch(32, 4, 3, 4, 2)]),
)
def test_agrees_at_any_shape(device, bits, block, blocks, outputs, tokens, dtype, scale_dtype, biased, cut):
    integers, scale, wide = matrix(device, bits, blocks, block, outputs, scale_dtype)
    x = random(device, tokens, 2 * blocks * block, dtype=dtype)[:, : blocks * block]  # rows that lie apart
    bias = random(device, outputs, dtype=dtype, seed=2) if biased else None
    found = block_linear.launch(x, reference.pack_blocks(integers, bits), scale, bias, bits, cut)
    expected = x.double() @ wide + (0 if bias is None else bias.double())
    assert found.shape == expected.shape and found.dtype == dtype and found.is_contiguous()
    assert error(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_is_exact(device, bits, dtype):
    """An identity for x, and scales of one: what comes out is the integers."""
    half = 1 << bits - 1
    integers = torch.arange(-half, half, device=device, dtype=torch.int8).repeat(64 // bits).view(64, -1)
    packed = reference.pack_blocks(integers, bits)
    scale = torch.ones(2, integers.shape[1], device=device)
    found = block_linear.launch(torch.eye(64, device=device, dtype=dtype), packed, scale, None, bits)
    assert torch.equal(found.double(), integers.double())


def test_sums_that_cancel_are_not_rounded_on_the_way(device):
    """In half precision neighbours of the sum of one sign are 8 apart."""
    integers = torch.full((256, 16), 7, device=device, dtype=torch.int8)
    scale = torch.full((8, 16), 0.123, device=device)
    scale[4:] *= -1
    x = torch.full((1, 256), 100.0, device=device, dtype=torch.float16)
    x[0, 0] += 0.125
    found = block_linear.launch(x, reference.pack_blocks(integers, 4), scale, None, 4)
    torch.testing.assert_close(found.float(), torch.full((1, 16), 7 * 0.123 * 0.125, device=device), rtol=1e-2, atol=0)


def test_a_float32_input_keeps_all_its_digits(device):
    integers, scale, wide = matrix(device, 8, 9, 32, 40)
    x = random(device, 5, 288, dtype=torch.float32)
    found = block_linear.launch(x, reference.pack_blocks(integers, 8), scale, None, 8)
    assert error(found, x.double() @ wide) <= 5e-7


def test_what_no_row_or_output_asks_for_is_neither_read_nor_written(device):
    integers, scale, _ = matrix(device, 4, 3, 32, 20)
    x = torch.full((4, 200), torch.nan, device=device)
    x[:2, :96] = 1
    found = block_linear.launch(x[:2, :96], reference.pack_blocks(integers, 4), scale, None, 4)
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "blocks", "block"), [(4, 3, 32), (4, 2, 128), (8, 5, 32), (8, 3, 64)])
def test_widening_writes_the_matrix_it_stands_for(device, dtype, bits, blocks, block):
    integers, scale, wide = matrix(device, bits, blocks, block, 75)
    packed = reference.pack_blocks(integers, bits)
    for first, rows in ((0, 75), (10, 40), (74, 1)):
        found = torch.full((rows, blocks * block), torch.nan, dtype=dtype, device=device)
        block_linear.widen(packed, scale, found, bits, first)
        expected = wide.t()[first : first + rows].float().to(dtype)
        # the interpreter cuts bfloat16 off where a GPU rounds it
        torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_is_unpacked_again(bits):
    integers, scale, wide = matrix(torch.device("cpu"), bits, 7, 32, 11)
    packed = reference.pack_blocks(integers, bits)
    assert packed.shape == (4 if bits == 4 else 7, 11, 8)
    assert torch.equal(reference.unpack_blocks(packed, scale.double(), 224, bits), wide.t())


@pytest.mark.parametrize(
    ("tokens", "units", "outputs", "rows", "splits"),
    [
        (1, 14, 151936, 64, 1),  # the head of 0.5 billion weights
        (1, 14, 896, 16, 1),
        (1, 76, 896, 16, 1),
        (1, 56, 37888, 64, 1),  # of 7 billion weights
        (1, 296, 3584, 16, 2),
        (64, 296, 3584, 16, 2),
    ],
)
def test_programs_fill_a_gpu_before_sums_are_split(tokens, units, outputs, rows, splits):
    cut = block_linear.plan(tokens, units, outputs, 2, processors=132)
    assert (cut.rows, cut.splits) == (rows, splits)


def case(device, bits=4, dtype=torch.float16):
    integers, scale, _ = matrix(device, bits, 3, 32, 10)
    x, bias = random(device, 3, 96, dtype=dtype), random(device, 10, dtype=dtype, seed=2)
    return x, reference.pack_blocks(integers, bits), scale, bias, bits


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_are_as_pytorch_wants_them(device, bits):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, weight, scale, bias, _ = case(device, bits)
    torch.library.opcheck(operators.block_linear, (x, weight, scale, bias, bits), test_utils=checks)
    torch.library.opcheck(operators.block_linear, (x, weight, scale, None, bits), test_utils=checks)
    out = torch.zeros(4, 96, device=device)
    torch.library.opcheck(operators.widen_blocks, (weight, scale, out, bits, 5), test_utils=checks)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, lambda x: x[0], r"x: expected \[T, K\] with 1 to 64 rows, found \[96\]"),
        (0, lambda x: x.repeat(22, 1), r"x: expected \[T, K\] with 1 to 64 rows, found \[66, 96\]"),
        (0, lambda x: x.double(), "expected float16, bfloat16 or float32, found float64"),
        (0, lambda x: x.t().contiguous().t(), "x: expected its last axis contiguous"),
        (1, lambda x: x.long(), r"weight: expected int32 \[U, N, 8\], found int64 \[2, 10, 8\]"),
        (1, lambda x: x[:1], r"weight: expected shape \[2, 10, 8\], found \[1, 10, 8\]"),
        (1, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "weight: expected contiguous on cpu"),
        (2, lambda x: x[:2], r"scale: expected \[K / B, 10\] with B 32, 64 or 128 for K = 96, found \[2, 10\]"),
        (2, lambda x: x.bfloat16(), "scale: expected float16 or float32, found bfloat16"),
        (3, lambda x: x[:9], r"bias: expected shape \[10\], found \[9\]"),
        (3, lambda x: x.float(), "expected one dtype, found float16 and float32"),
        (4, lambda x: 2, "expected 4 or 8 bits, found 2"),
    ],
)
def test_what_does_not_fit_is_named(part, change, message):
    given = list(case(torch.device("cpu")))
    given[part] = change(given[part])
    with pytest.raises(ValueError, match=f"^block_linear: {message}"):
        operators.block_linear(*given)


def test_rows_to_widen_beyond_the_outputs_are_named():
    _, weight, scale, _, bits = case(torch.device("cpu"))
    with pytest.raises(ValueError, match="widen_blocks: expected rows within the 10 outputs, found 8 to 11"):
        operators.widen_blocks(weight, scale, torch.zeros(3, 96), bits, 8)
    with pytest.raises(ValueError, match="widen_blocks: out: expected contiguous on cpu"):
        operators.widen_blocks(weight, scale, torch.zeros(96, 3).t(), bits, 0)
