"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter (asked for in the conftest above)."""

from __future__ import annotations

from collections.abc import Iterator

import interpreted_products
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def bfloat16_products() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with interpreted_products.bfloat16_products():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
