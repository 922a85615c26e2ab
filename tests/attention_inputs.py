"""Random inputs for the attention kernels, and the measure of their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class RingInputs:
    """query, key, value [S, N, H, d] or [S, T, N, H, d], rings [S, N * H, W, d], position [S]."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_ring: Tensor
    value_ring: Tensor
    position: Tensor
    scale: float

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.key_ring, self.value_ring, self.position

    def wide(self) -> tuple[Tensor, ...]:
        """Copies in float64."""
        return tuple(x.double() if x.is_floating_point() else x for x in self.tensors())


def ring_inputs(
    sizes: tuple[int, int, int, int],
    window: int,
    position: list[int],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    frames: int | None = None,
) -> RingInputs:
    """Inputs whose rings hold garbage where no frame has been yet; query, key and value are slices of one product."""
    S, N, H, d = sizes
    generator = torch.Generator().manual_seed(seed)
    lead = (S, N) if frames is None else (S, frames, N)
    qkv = torch.randn(*lead, 3, H, d, generator=generator).to(device, dtype)
    query, key, value = qkv.unbind(-3)
    rings = torch.randn(2, S, N * H, window, d, generator=generator).to(device, dtype)
    held = torch.tensor(position)[:, None] > torch.arange(window)  # [S, W]
    rings[:, ~held.all(1)] = rings[:, ~held.all(1)].masked_fill(
        ~held[~held.all(1)][None, :, None, :, None].to(device), 99
    )
    positions = torch.tensor(position, device=device)
    return RingInputs(query, key, value, rings[0], rings[1], positions, d**-0.5)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm; infinite where a number is not finite."""
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())
