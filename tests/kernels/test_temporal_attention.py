"""`temporal_attention` and its int8 variant against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import TOLERANCE, error, ring_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from framestep.kernels import reference, temporal
from framestep.kernels.temporal import Launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def check(device, sizes, window, position, dtype, cut=None, seed=0) -> None:
    inputs = ring_inputs(sizes, window, position, dtype, device, seed)
    wide = inputs.wide()
    expected = reference.temporal_attention(*wide, inputs.scale)
    found = temporal.launch(*inputs.tensors(), inputs.scale, cut=cut)
    assert error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(inputs.key_ring.double(), wide[3])
    assert torch.equal(inputs.value_ring.double(), wide[4])


@FEW
@given(
    streams=st.integers(1, 3),
    patches=st.integers(1, 5),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([32, 40, 64, 72, 128]),
    window=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_agrees_at_any_shape_fill_and_wrap(device, streams, patches, heads, head_dim, window, dtype, data):
    position = data.draw(st.lists(st.integers(0, 3 * window), min_size=streams, max_size=streams))
    check(device, (streams, patches, heads, head_dim), window, position, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 5])
def test_a_split_window_is_merged(device, dtype, splits):
    check(device, (3, 2, 3, 32), 50, [3, 49, 131], dtype, Launch(4, 8, splits, 2, 1))


def test_a_part_of_the_window_that_holds_nothing_yet_counts_nothing(device):
    check(device, (1, 2, 2, 32), 64, [0], torch.float32, Launch(4, 8, 8, 2, 1))


@pytest.mark.parametrize("window", [1, 4096])
def test_the_smallest_and_the_largest_window(device, window):
    check(device, (1, 1, 1, 32), window, [2 * window + 1], torch.float32)


def test_a_position_beyond_32_bits(device):
    check(device, (2, 1, 2, 32), 7, [2**31 + 5, 2**40], torch.float32)


def test_many_streams_at_a_large_window_reach_beyond_32_bit_offsets(device):
    """Two streams 2^31 elements apart; the memory between them is never touched."""
    apart, rows, window, head_dim = 2**31 + 64, 2, 4, 32
    torch.utils.deterministic.fill_uninitialized_memory = False
    held = torch.empty(apart + 2 * rows * window * head_dim, dtype=torch.float16, device=device)
    shape, strides = (2, rows, window, head_dim), (apart, window * head_dim, head_dim, 1)
    inputs = ring_inputs((2, 1, 2, head_dim), window, [9, 6], torch.float16, device, 0)
    wide = inputs.wide()
    far = []
    for index, ring in enumerate((inputs.key_ring, inputs.value_ring)):
        view = held.as_strided(shape, strides, index * rows * window * head_dim)
        far.append(view.copy_(ring))
    expected = reference.temporal_attention(*wide, inputs.scale)
    found = temporal.launch(inputs.query, inputs.key, inputs.value, *far, inputs.position, inputs.scale)
    assert error(found, expected) <= TOLERANCE[torch.float16]
    assert torch.equal(far[0].double(), wide[3])
    assert torch.equal(far[1].double(), wide[4])


def test_a_row_beyond_32_bit_offsets(device):
    """Rows of 4096 * 128 elements: the last of 4097 begins at 2^31; three frames in, hardly any memory is touched."""
    rows, window, head_dim = 4097, 4096, 128
    torch.utils.deterministic.fill_uninitialized_memory = False
    rings = [torch.empty(1, rows, window, head_dim, dtype=torch.int8, device=device) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, rows, 1, head_dim, generator=generator).to(device) for _ in range(3))
    step = torch.tensor([0.03], device=device)
    near = [torch.randint(-127, 128, (1, 2, 4, head_dim), dtype=torch.int8, generator=generator) for _ in range(2)]
    for ring, part in zip(rings, near, strict=True):
        ring[:, -2:, :4] = part.to(device)
    position = torch.tensor([2], device=device)
    cut = Launch(256, 4, 1, 2, 1)
    found = temporal.launch(query, key, value, *rings, position, 0.1, (step, step), cut)
    last = [x[:, -2:].contiguous() for x in (query, key, value)]
    near = [part.to(device) for part in near]
    expected = reference.temporal_attention_int8(*last, *near, step, step, position, 0.1)
    assert error(found[:, -2:], expected) <= 1e-5
    assert all(torch.equal(ring[:, -2:, :4], part) for ring, part in zip(rings, near, strict=True))


@FEW
@given(
    window=st.integers(1, 20), dtype=st.sampled_from(DTYPES), splits=st.sampled_from([None, 3]), seed=st.integers(0, 9)
)
def test_an_int8_ring_with_a_scale_for_each_head(device, window, dtype, splits, seed):
    inputs = ring_inputs((2, 3, 2, 32), window, [window // 2, 2 * window + 1], dtype, device, seed)
    scales = torch.tensor([0.02, 0.03], device=device), torch.tensor([0.025, 0.01], device=device)
    rings = [(ring.float() * 40).clamp(-127, 127).to(torch.int8) for ring in (inputs.key_ring, inputs.value_ring)]
    copies = [ring.clone() for ring in rings]
    given = inputs.query, inputs.key, inputs.value
    cut = splits and Launch(4, 4, splits, 2, 1)
    found = temporal.launch(*given, *rings, inputs.position, inputs.scale, scales, cut)
    expected = reference.temporal_attention_int8(
        inputs.query.double(), inputs.key, inputs.value, *copies, *scales, inputs.position, inputs.scale
    )
    assert error(found, expected) <= TOLERANCE[dtype]
    assert all(torch.equal(ring, copy) for ring, copy in zip(rings, copies, strict=True))


def test_slots_without_a_frame_are_never_read(device):
    inputs = ring_inputs((1, 2, 2, 32), 16, [5], torch.float32, device, 0)
    clean = temporal.launch(*(x.clone() for x in inputs.tensors()), inputs.scale)
    inputs.key_ring[:, :, 5:] = torch.nan  # slot 5 is about to be written
    inputs.value_ring[:, :, 5:] = torch.nan
    assert torch.equal(temporal.launch(*inputs.tensors(), inputs.scale), clean)


def test_a_nan_in_a_valid_slot_is_seen_in_the_result(device):
    inputs = ring_inputs((1, 2, 2, 32), 16, [5], torch.float32, device, 0)
    inputs.value_ring[0, 1, 2] = torch.nan
    found = temporal.launch(*inputs.tensors(), inputs.scale)
    assert found[0, 0, 1].isnan().all()
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize(
    ("streams", "rows", "window", "splits"),
    [(64, 2352, 4096, 1), (1, 12, 4096, 16), (1, 12, 16, 1), (1, 2352, 4096, 2)],
)
def test_a_window_is_split_only_where_the_gpu_would_idle(streams, rows, window, splits):
    assert temporal.plan(streams, rows, window, 64, 2, processors=132).splits == splits
