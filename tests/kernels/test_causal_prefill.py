"""`causal_prefill` against single steps, and against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import triton
from attention_inputs import TOLERANCE, error, ring_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from framestep.kernels import prefill, reference, temporal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    streams=st.integers(1, 2),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([32, 40, 64]),
    window=st.integers(1, 40),
    frames=st.integers(1, 45),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_agrees_at_any_shape_fill_and_wrap(device, streams, heads, head_dim, window, frames, dtype, data):
    position = data.draw(st.lists(st.integers(0, 3 * window), min_size=streams, max_size=streams))
    inputs = ring_inputs((streams, 2, heads, head_dim), window, position, dtype, device, 0, frames)
    wide = inputs.wide()
    expected = reference.causal_prefill(*wide, inputs.scale)
    found = prefill.launch(*inputs.tensors(), inputs.scale)
    assert error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(inputs.key_ring.double(), wide[3])
    assert torch.equal(inputs.value_ring.double(), wide[4])


@pytest.mark.parametrize("frames", [3, 16, 37])
def test_leaves_the_ring_as_single_steps_do_bit_for_bit(device, frames):
    inputs = ring_inputs((2, 2, 2, 32), 16, [0, 21], torch.float16, device, 1, frames)
    query, key, value, key_ring, value_ring, position = (x.clone() for x in inputs.tensors())
    steps = [
        temporal.launch(query[:, t], key[:, t], value[:, t], key_ring, value_ring, position + t, inputs.scale)
        for t in range(frames)
    ]
    found = prefill.launch(*inputs.tensors(), inputs.scale)
    assert torch.equal(inputs.key_ring, key_ring)
    assert torch.equal(inputs.value_ring, value_ring)
    assert error(found, torch.stack(steps, dim=1)) <= TOLERANCE[torch.float16]


def test_many_frames_over_many_tiles(device):
    inputs = ring_inputs((1, 1, 2, 32), 100, [63], torch.float32, device, 2, 130)
    wide = inputs.wide()
    expected = reference.causal_prefill(*wide, inputs.scale)
    assert error(prefill.launch(*inputs.tensors(), inputs.scale), expected) <= TOLERANCE[torch.float32]
    assert torch.equal(inputs.value_ring.double(), wide[4])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_tiles_fit_into_the_shared_memory_of_small_gpus(head_dim, itemsize):
    cut = prefill.plan(1000, 4096, head_dim, itemsize)
    assert min(cut.frames, cut.slots) >= 16
    row = triton.next_power_of_2(head_dim) * itemsize
    assert (cut.frames + 5 * cut.slots) * row <= 99 << 10  # the queries, and keys and values of the tiles in flight
