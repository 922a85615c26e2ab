"""The operators as PyTorch sees them: schema, fake implementation, checks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_inputs import TOLERANCE, error, ring_inputs

from framestep.kernels import operators, reference, residual_norm, rotary

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def ring_case(device, frames=None, dtype=torch.float32):
    inputs = ring_inputs((2, 3, 2, 32), 8, [3, 19], dtype, device, 0, frames)
    return *inputs.tensors(), inputs.scale


def int8_case(device):
    query, key, value, key_ring, value_ring, position, scale = ring_case(device)
    steps = torch.tensor([0.02, 0.03], device=device)
    rings = [(ring * 40).clamp(-127, 127).to(torch.int8) for ring in (key_ring, value_ring)]
    return query, key, value, *rings, steps, steps.clone(), position, scale


def decode_case(device):
    query = torch.randn(2, 4, 3, 32, device=device)
    key, value, *caches = (torch.randn(2, 2, n, 32, device=device) for n in (3, 3, 64, 64))
    mask = torch.ones(2, 3, 64, dtype=torch.bool, device=device)
    return query, key, value, *caches, torch.tensor([0, 9], device=device), mask, 0.2


def norm_case(device, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(3, 5, 96, generator=generator).to(device) for _ in range(2))
    weight, bias = (torch.randn(96, generator=generator).to(device, dtype) for _ in range(2))
    return x, update.to(dtype), weight, bias, 1e-6


def rotary_case(device, dtype=torch.float16, heads=5, head_dim=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2 * heads * head_dim, generator=generator).to(device, dtype)
    x = x[..., heads * head_dim :].unflatten(-1, (heads, head_dim)).transpose(1, 2)  # a slice of a larger product
    angles = 3 * torch.randn(2, 3, head_dim // 2, generator=generator)
    return x, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        (operators.temporal_attention, ring_case),
        (operators.temporal_attention_int8, int8_case),
        (operators.causal_prefill, lambda device: ring_case(device, frames=5)),
        (operators.decode_attention, decode_case),
        (operators.residual_norm, norm_case),
        (operators.residual_norm, lambda device: (*norm_case(device)[:3], None, 1e-6)),
        (operators.rotary, rotary_case),
    ],
)
def test_opcheck(device, operator, case):
    torch.library.opcheck(operator, case(device), test_utils=CHECKS)


def test_without_compiling_the_compiler_is_not_imported():
    program = (
        "import sys, torch; from framestep.kernels import operators;"
        "operators.residual_norm(*(torch.ones(1, 8),) * 2, torch.ones(8), None, 1e-6); print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_the_ring_is_updated_inside_a_compiled_function(device):
    inputs = ring_case(device)
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    compiled = torch.compile(lambda *given: operators.temporal_attention(*given) * 2, backend="aot_eager")
    found = compiled(*inputs)
    expected = reference.temporal_attention(*copies)
    assert error(found / 2, expected) <= TOLERANCE[torch.float32]
    assert torch.equal(inputs[3], copies[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96, 768])
def test_residual_norm_against_float64(device, dtype, width):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 7, width, generator=generator) + 3).to(device, dtype)
    update, weight, bias = (torch.randn(*s, width, generator=generator).to(device, dtype) for s in ((2, 7), (), ()))
    total, normed = residual_norm.launch(x, update, weight, bias, 1e-6)
    assert error(total, x.double() + update.double()) <= TOLERANCE[dtype]
    expected = torch.nn.functional.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-6)
    assert error(normed, expected) <= TOLERANCE[dtype]


def test_residual_norm_keeps_a_float32_sum_beside_half_precision(device):
    x, update, weight, bias, epsilon = norm_case(device)
    total, normed = residual_norm.launch(x, update, weight, bias, epsilon)
    assert total.dtype == torch.float32 and normed.dtype == torch.float16
    assert torch.equal(total, x + update)
    expected = torch.nn.functional.layer_norm(total.double(), (96,), weight.double(), bias.double(), epsilon)
    assert error(normed, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96, 896])
def test_residual_rms_norm_against_float64(device, dtype, width):
    generator = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(2, 7, width, generator=generator).to(device)
    update, weight = (torch.randn(*s, width, generator=generator).to(device, dtype) for s in ((2, 7), ()))
    for scale in (weight, weight.float()):
        total, normed = residual_norm.launch(x, update, scale, None, 1e-6)
        assert torch.equal(total, x + update)
        wide = total.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        assert normed.dtype == dtype and error(normed, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (5, 32), (14, 64), (9, 80)])
def test_rotary_against_complex_numbers_in_float64(device, dtype, heads, head_dim):
    x, cos, sin = rotary_case(device, dtype, heads, head_dim)
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None]
    for found in (rotary.launch(x, cos, sin), reference.rotary(x, cos, sin)):
        assert found.is_contiguous() and found.dtype == dtype
        assert error(found, torch.cat([pairs.real, pairs.imag], dim=-1)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, cos, sin: (x[..., :31], cos, sin), r"x: expected \[B, H, T, d\] with an even d"),
        (lambda x, cos, sin: (x, cos[:, :2], sin), r"cos: expected shape \[2, 3, 16\], found \[2, 2, 16\]"),
        (lambda x, cos, sin: (x, cos, sin.float()), "expected one dtype, found float16 and float32"),
    ],
)
def test_what_does_not_fit_a_rotation_is_named(change, message):
    with pytest.raises(ValueError, match=f"rotary: .*{message}"):
        operators.rotary(*change(*rotary_case(torch.device("cpu"))))


def changed(case, **replaced):
    names = ("query", "key", "value", "key_ring", "value_ring", "position", "scale")
    return [replaced.get(name, value) for name, value in zip(names, case, strict=True)]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("query", lambda x: x[0], r"query: expected \[S, N, H, d\], found \[3, 2, 32\]"),
        ("query", lambda x: x[..., :8], "expected head_dim 16 to 128, found 8"),
        ("key", lambda x: x[:1], r"key: expected shape \[2, 3, 2, 32\], found \[1, 3, 2, 32\]"),
        ("value", lambda x: x.half(), "expected one dtype, found float32 and float16"),
        ("key_ring", lambda x: x[:, :5], r"key_ring: expected shape \[2, 6, 8, 32\], found \[2, 5, 8, 32\]"),
        ("key_ring", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "contiguous within a stream"),
        ("value_ring", lambda x: x.to(torch.int8), "expected one dtype, found float32 and int8"),
        ("position", lambda x: x.int(), "position: expected contiguous int64 on cpu, found int32"),
        ("position", lambda x: x[:1], r"position: expected shape \[2\], found \[1\]"),
        ("query", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "its last axis contiguous"),
    ],
)
def test_what_does_not_fit_is_named(part, change, message):
    case = ring_case(torch.device("cpu"))
    value = dict(zip(("query", "key", "value", "key_ring", "value_ring", "position"), case, strict=False))[part]
    with pytest.raises(ValueError, match=f"temporal_attention: .*{message}"):
        operators.temporal_attention(*changed(case, **{part: change(value)}))


def test_too_many_tokens_and_heads_that_do_not_divide_are_named():
    query, key, value, *rest = decode_case(torch.device("cpu"))
    with pytest.raises(ValueError, match="expected 1 to 64 tokens, found 65"):
        operators.decode_attention(torch.zeros(2, 4, 65, 32), key, value, *rest)
    with pytest.raises(ValueError, match="expected a multiple of the 2 key heads, found 3 query heads"):
        operators.decode_attention(query[:, :3], key, value, *rest)


def test_the_int8_ring_wants_its_scales():
    case = int8_case(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"key_scale: expected shape \[2\], found \[3\]"):
        operators.temporal_attention_int8(*case[:5], torch.ones(3), *case[6:])
