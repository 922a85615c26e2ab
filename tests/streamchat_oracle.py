"""StreamChat written down a second time, in plain PyTorch, slowly: a recompute of a whole sample in float64.

Every token attends by itself, so that what it sees and where everything stands may differ from token to token. It knows
the checkpoint by the names of its weights alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import SiglipVisionModel


class Oracle:
    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.w = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
        self.tower = SiglipVisionModel.from_pretrained(folder.parent / "siglip").double().eval()
        self.heads = self.config["num_attention_heads"]
        self.groups = self.config["num_key_value_heads"]
        self.d = self.config["hidden_size"] // self.heads

    def logits(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        frames: np.ndarray,
        times: np.ndarray,
        visible: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits [T, V].

        Args:
            tokens: [T].
            positions: [T], or [T, T], row i being where all tokens stand when token i is taken.
            frames: uint8 [M, side, side, 3].
            times: [M], or [T, M] likewise.
            visible: bool [T, M], the frames that each token sees.
            kept: bool [T, T], the tokens that each token sees, all before it by default.
        """
        T, M = visible.shape
        positions = np.broadcast_to(positions, (T, T))
        times = np.broadcast_to(times, (T, M))
        kept = np.tril(np.ones((T, T), bool)) if kept is None else kept
        with torch.no_grad():
            visual = self.frame_path(frames)
            x = self.w["model.embed_tokens.weight"][torch.from_numpy(tokens)]
            for layer in range(self.config["num_hidden_layers"]):
                name = f"model.layers.{layer}"
                if layer in self.config["cross_layers"]:
                    k = self.config["cross_layers"].index(layer)
                    keys, values = visual[k]
                    read = self.cross(
                        layer, self.norm(x, f"{name}.input_layernorm"), keys, values, positions, times, visible
                    )
                    x = x + self.w[f"cross_blocks.{k}.attention_gate"] * read
                x = x + self.attend(layer, self.norm(x, f"{name}.input_layernorm"), positions, kept)
                x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            x = self.norm(x, "model.norm")
            head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
            return (x @ head.T).numpy()

    def frame_path(self, frames: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """For each block keys, not rotated, and values, [M, N, groups, d]."""
        pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
        v = self.tower(pixel_values=pixels).last_hidden_state
        v = self.linear(F.gelu(self.linear(v, "adapter.fc1")), "adapter.fc2")
        found = []
        for k, layer in enumerate(self.config["cross_layers"]):
            name = f"model.layers.{layer}"
            h = self.norm(v, f"{name}.input_layernorm")
            keys, values = (self.linear(h, f"{name}.self_attn.{part}_proj") for part in "kv")
            found.append(tuple(part.unflatten(-1, (self.groups, self.d)) for part in (keys, values)))
            if k + 1 < len(self.config["cross_layers"]):
                h = self.mlp(self.norm(v, f"cross_blocks.{k}.norm"), f"cross_blocks.{k}.mlp")
                v = v + self.w[f"cross_blocks.{k}.mlp_gate"] * h
        return found

    def cross(self, layer, h, keys, values, positions, times, visible) -> Tensor:
        name, N = f"model.layers.{layer}.self_attn", keys.shape[1]
        side = math.isqrt(N)
        grid = np.array([(0, r, c) for r in range(side) for c in range(side)])  # [N, 3]
        moving = (1, 0, 0) if self.config["visual_positions"] == "literal" else (1, 1, 1)
        q = self.linear(h, f"{name}.q_proj").unflatten(-1, (self.heads, self.d))
        rows = []
        for i in range(len(h)):
            seen = np.flatnonzero(visible[i])
            if not len(seen):
                rows.append(torch.zeros(self.heads * self.d, dtype=torch.float64))
                continue
            places = grid[None] + times[i, seen][:, None, None] * np.array(moving)  # [seen, N, 3]
            k = self.rotate(keys[seen], places)
            here = np.full((1, 3), positions[i, i])
            rows.append(self.read(self.rotate(q[i : i + 1], here)[0], k.flatten(0, 1), values[seen].flatten(0, 1)))
        return torch.stack(rows) @ self.w[f"{name}.o_proj.weight"].T

    def attend(self, layer, h, positions, kept) -> Tensor:
        name = f"model.layers.{layer}.self_attn"
        q = self.linear(h, f"{name}.q_proj").unflatten(-1, (self.heads, self.d))
        keys, values = (self.linear(h, f"{name}.{part}_proj").unflatten(-1, (self.groups, self.d)) for part in "kv")
        rows = []
        for i in range(len(h)):
            seen = np.flatnonzero(kept[i])
            k = self.rotate(keys[seen], np.repeat(positions[i, seen][:, None], 3, axis=1))
            here = np.full((1, 3), positions[i, i])
            rows.append(self.read(self.rotate(q[i : i + 1], here)[0], k, values[seen]))
        return torch.stack(rows) @ self.w[f"{name}.o_proj.weight"].T

    def read(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [heads, d], keys and values [rows, groups, d] -> [heads * d]"""
        out = []
        for head in range(self.heads):
            group = head * self.groups // self.heads
            weights = torch.softmax(keys[:, group] @ q[head] / math.sqrt(self.d), dim=0)
            out.append(weights @ values[:, group])
        return torch.cat(out)

    def rotate(self, x: Tensor, places: np.ndarray) -> Tensor:
        """x [..., heads, d] whose rows stand at places [..., 3]: time, row and column."""
        half = self.d // 2
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        axis = np.repeat([0, 1, 2], self.config["mrope_section"])  # of each pair of numbers
        angles = places[..., axis] * theta ** (-np.arange(half) / half)  # [..., half]
        turn = torch.polar(torch.ones(()).double(), torch.from_numpy(angles))[..., None, :]
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = F.silu(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def norm(self, x: Tensor, name: str) -> Tensor:
        epsilon = self.config["rms_norm_eps"]
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * self.w[f"{name}.weight"]
