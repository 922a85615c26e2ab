"""Each fold changes the weights and not the result; every test compares with the unfolded modules of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framestep.export.streamformer import TINY, StreamFormer, random_model
from framestep.export.streamformer_graph import (
    fold_attention,
    fold_patch_embedding,
    fold_pooling,
    fold_temporal,
    interpolate_positions,
)


@pytest.fixture
def model() -> StreamFormer:
    model = random_model(TINY, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def apply(x: torch.Tensor, linear) -> torch.Tensor:
    return torch.nn.functional.linear(x, linear.weight) + (0 if linear.bias is None else linear.bias)


def attend(projections, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Plain softmax attention with the folded projections; the scale is in the query."""
    q, k, v = (apply(x, p).unflatten(-1, (heads, -1)).transpose(1, 2) for p in
               (projections.query, projections.key, projections.value))  # fmt: skip
    mixed = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
    return apply(mixed.transpose(1, 2).flatten(2), projections.output)


def test_lora_folds_into_its_base_weight():
    torch.manual_seed(0)
    with torch.no_grad():
        model = StreamFormer(TINY, lora_rank=8)
        attention = model.encoder.layer[0].attention
        x = torch.randn(2, 16, 96)
        expected = attention.mix(*attention.project(x))
        assert torch.allclose(attend(fold_attention(attention), x, 4), expected, atol=1e-5)


def test_attention_scale_folds_into_the_query(model):
    with torch.no_grad():
        attention = model.encoder.layer[1].attention
        x = torch.randn(2, 16, 96)
        expected = attention.mix(*attention.project(x))
        assert torch.allclose(attend(fold_attention(attention), x, 4), expected, atol=1e-4)


def test_key_and_value_need_no_bias_of_their_own(model):
    folded = fold_attention(model.encoder.layer[0].attention)
    assert folded.key.bias is None
    assert folded.value.bias is None
    assert folded.query.bias is not None


def test_pooling_folds_its_scale_and_biases(model):
    with torch.no_grad():
        x = torch.randn(2, 16, 96)
        expected = model.head.attention(x, x, x, need_weights=False)[0]
        assert torch.allclose(attend(fold_pooling(model.head.attention), x, 4), expected, atol=1e-4)


def test_attention_without_qkv_bias_folds():
    from dataclasses import replace

    with torch.no_grad():
        attention = random_model(replace(TINY, qkv_bias=False)).encoder.layer[0].attention
        x = torch.randn(1, 16, 96)
        expected = attention.mix(*attention.project(x))
        assert torch.allclose(attend(fold_attention(attention), x, 4), expected, atol=1e-5)


def test_temporal_output_dense_and_gate_fold_into_one_matrix(model):
    with torch.no_grad():
        layer = model.encoder.layer[0]
        x = torch.randn(5, 7, 96)
        attention = layer.temporal_attention
        inner = attention.mix(*attention.project(x))  # the output projection is in it
        expected = layer.temporal_attention_gating.tanh() * layer.temporal_dense(inner)
        assert torch.allclose(attend(fold_temporal(layer), x, 4), expected, atol=1e-4)


def test_pixel_normalisation_and_position_fold_into_the_patch_embedding(model):
    frames = torch.randint(0, 256, (1, 1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.embeddings(frames, 0)[0, 0] - model.embeddings.time_embeddings[0, 0]
        patches = frames[0, 0].float().unflatten(0, (4, 16)).unflatten(2, (4, 16))  # [4, 16, 4, 16, 3]
        patches = patches.permute(0, 2, 1, 3, 4).reshape(16, -1)
        folded = fold_patch_embedding(model, (4, 4))
        assert torch.allclose(apply(patches, folded), expected, atol=1e-4)


def test_positions_interpolate_as_the_reference_does_for_square_grids():
    positions = torch.randn(16, 96)
    image = positions.reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=(6, 6), mode="bicubic", antialias=True)
    expected = expected.permute(0, 2, 3, 1).reshape(36, 96)
    assert torch.equal(interpolate_positions(positions, (6, 6)), expected)


def test_rectangular_positions_keep_rows_as_rows():
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)  # the embedding is the row's number
    stretched = interpolate_positions(rows, (4, 8)).reshape(4, 8)
    assert np.allclose(stretched, np.arange(4.0)[:, None], atol=1e-5)
