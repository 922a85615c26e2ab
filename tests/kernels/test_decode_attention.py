"""`decode_attention` against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st

from framestep.kernels import decode, reference
from framestep.kernels.decode import Launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(device, B, Hq, Hkv, T, C, d, write, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query, key, value = random(B, T, Hq, d).transpose(1, 2), *(random(B, T, Hkv, d).transpose(1, 2) for _ in range(2))
    caches = [random(B, Hkv, C, d) for _ in range(2)]
    write_index = torch.tensor(write, device=device)
    slots = torch.arange(C, device=device)
    mask = slots <= (write_index[:, None] + torch.arange(T, device=device))[:, :, None]  # causal
    return query, key, value, *caches, write_index, mask


def in_parts(splits):
    return splits and Launch(16, 32, splits, 3)


def check(given, splits=None):
    query, key, value, key_cache, value_cache, write_index, mask = given
    copies = [key_cache.double(), value_cache.double()]
    expected = reference.decode_attention(
        query.double(), key.double(), value.double(), *copies, write_index, mask, query.shape[-1] ** -0.5
    )
    found = decode.launch(*given, query.shape[-1] ** -0.5, in_parts(splits))
    assert error(found, expected) <= TOLERANCE[query.dtype]
    assert torch.equal(key_cache.double(), copies[0])
    assert torch.equal(value_cache.double(), copies[1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sequences=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    queries=st.sampled_from([(1, 1), (1, 64), (3, 5), (3, 17), (7, 1), (7, 2), (7, 17)]),
    capacity=st.integers(64, 150),
    head_dim=st.sampled_from([32, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    splits=st.sampled_from([None, 3]),
    data=st.data(),
)
def test_agrees_at_any_shape_and_fill(device, sequences, kv_heads, queries, capacity, head_dim, dtype, splits, data):
    group, tokens = queries  # heads that share a key, and tokens
    places = st.integers(0, capacity - tokens)
    write = data.draw(st.lists(places, min_size=sequences, max_size=sequences))
    check(inputs(device, sequences, kv_heads * group, kv_heads, tokens, capacity, head_dim, write, dtype), splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_any_mask_and_a_token_that_sees_nothing_gets_zeros(device, splits):
    query, key, value, *caches, write, _ = inputs(device, 2, 4, 2, 5, 96, 32, [40, 0], torch.float32)
    mask = torch.rand(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    mask[0, 1] = False
    given = query, key, value, *caches, write, mask
    check(given, splits)
    assert not decode.launch(*given, 0.2, in_parts(splits))[0, :, 1].any()


def test_a_mask_shared_by_all_tokens_is_not_copied(device):
    query, key, value, *caches, write, _ = inputs(device, 1, 2, 1, 4, 64, 32, [9], torch.float32)
    shared = (torch.arange(64, device=device) < 30)[None, None].expand(1, 4, 64)
    check((query, key, value, *caches, write, shared))


@pytest.mark.parametrize("hidden", [slice(64, None), slice(0, 64), slice(64, 192)])
def test_tiles_of_which_nothing_is_visible_are_never_read(device, hidden):
    query, key, value, *caches, write, mask = inputs(device, 1, 2, 1, 1, 256, 32, [255], torch.float32)
    mask[:, :, hidden] = False
    for cache in caches:
        cache[:, :, hidden] = torch.nan
    for cut in (Launch(16, 32, 1, 3), Launch(16, 64, 1, 3), Launch(16, 64, 3, 2)):
        assert decode.launch(query, key, value, *caches, write, mask, 0.2, cut).isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_slots_that_are_written_are_never_read(device, splits):
    query, key, value, *caches, write, mask = inputs(device, 1, 2, 1, 5, 256, 32, [126], torch.float32)
    for cache in caches:
        cache[:, :, 126:131] = torch.nan
    assert decode.launch(query, key, value, *caches, write, mask, 0.2, in_parts(splits)).isfinite().all()


@pytest.mark.parametrize(
    ("key_heads", "queries", "capacity", "splits"),
    [(2, 7, 4096, 32), (2, 7, 512, 4), (64, 7, 4096, 8), (256, 4, 4096, 2), (1000, 7, 4096, 1), (2, 448, 4096, 18)],
)
def test_parts_of_a_cache_run_side_by_side_and_none_waits(key_heads, queries, capacity, splits):
    assert decode.plan(key_heads, queries, capacity, 64, 2, processors=132).splits == splits
