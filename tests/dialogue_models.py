"""Small random models that see and speak, with a tokenizer of bytes, and an oracle in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoder_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.runtime.bundle import Bundle

FRAME = (28, 56)  # pixels: one row of two merged patches, two tokens
START, END, SILENCE, STANDBY, RESPONSE = 256, 257, 258, 259, 260


def byte_tokenizer(states: bool = True, chat: bool = True) -> Tokenizer:
    """A token for each byte, then ChatML's two and the three states."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*(["<|im_start|>", "<|im_end|>"] if chat else []), *(decoder_models.STATES if states else [])]
    if special:
        tokenizer.add_special_tokens(special)
    return tokenizer


def export(model: Any, folder: Path, states: bool = True, chat: bool = True, **options: Any) -> Bundle:
    """A bundle of a model with the byte tokenizer."""
    path = decoder_models.save(model, folder / "checkpoint")
    byte_tokenizer(states, chat).save(str(path / "tokenizer.json"))
    checkpoint = read_decoder_checkpoint(str(path))
    if checkpoint.vision is not None:
        options = {"frame_size": FRAME, **options}
    return Bundle.open(export_decoder(checkpoint, folder / "out.bundle", DecoderOptions(**options)).path)


class Oracle:
    """A plain full recompute of everything that a decoder was ever given, under what each token was allowed to see.

    It takes the weights of a `transformers` text model by name and shares no code with what it checks. Of each step it
    keeps which tokens were visible, and at which positions all of them stood then.

    Args:
        model: Qwen2 or the text model of a Qwen2.5-VL.
    """

    def __init__(self, model: Any) -> None:
        self.model, config = model, getattr(model.config, "text_config", model.config)
        self.config = config
        self.weights = {
            name.split("language_model.")[-1].removeprefix("model."): value.detach().double()
            for name, value in model.state_dict().items()
        }
        rope = config.rope_parameters
        self.theta, self.sections = rope["rope_theta"], rope.get("mrope_section")
        self.embeddings: list[torch.Tensor] = []  # of the tokens of every step, [T, D]
        # of every step: number of its first token, numbers of the older ones that it saw, positions of all then [R, N]
        self.steps: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.slots: dict[int, int] = {}  # what is in a slot: number of a token
        self.positions = torch.zeros(0)  # of every token now, [R, N]

    @property
    def count(self) -> int:
        """Tokens so far."""
        return sum(map(len, self.embeddings))

    def step(self, embeddings: Any, position_ids: Any, write_index: int, slot_mask: Any) -> None:
        """Note what a run of the decoder's graph was given."""
        written, first = range(write_index, write_index + len(embeddings)), self.count
        old = [self.slots[slot] for slot in slot_mask.nonzero()[0] if slot not in written]
        self.slots |= {slot: first + offset for offset, slot in enumerate(written)}
        self.embeddings.append(torch.from_numpy(embeddings).double())
        new = torch.from_numpy(position_ids).clone()
        self.positions = torch.cat([self.positions, new], dim=1) if first else new
        self.steps.append((first, torch.tensor(old, dtype=torch.long), self.positions.clone()))

    def rebase(self, slot_positions: Any) -> None:
        for slot, token in self.slots.items():
            self.positions[:, token] = torch.from_numpy(slot_positions[:, slot])

    def logits(self) -> torch.Tensor:
        """After every token, [N, V]."""
        config, w = self.config, self.weights
        N, H, G = self.count, config.num_attention_heads, config.num_key_value_heads
        d = getattr(config, "head_dim", None) or config.hidden_size // H
        x = torch.cat(self.embeddings)
        for layer in range(config.num_hidden_layers):
            name = f"layers.{layer}."
            h = self._norm(x, w[name + "input_layernorm.weight"])
            q, k, v = (self._linear(h, f"{name}self_attn.{part}_proj") for part in "qkv")
            q, k, v = q.view(N, H, d), k.view(N, G, d), v.view(N, G, d)
            out = []
            for (first, old, at), rows in zip(self.steps, self.embeddings, strict=True):
                new = torch.arange(first, first + len(rows))
                others = torch.cat([old, new])
                query = self._rotate(q[new], at[:, new])  # [T, H, d]
                keys = self._rotate(k[others], at[:, others]).repeat_interleave(H // G, dim=1)  # [n, H, d]
                values = v[others].repeat_interleave(H // G, dim=1)
                scores = torch.einsum("thd,nhd->htn", query, keys) * d**-0.5
                share = scores.masked_fill(others > new[:, None], -torch.inf).softmax(dim=-1)
                # an older token has a smaller number, whatever its slot and position
                out.append(torch.einsum("htn,nhd->thd", share, values))
            x = x + self._linear(torch.cat(out).flatten(1), f"{name}self_attn.o_proj")
            h = self._norm(x, w[name + "post_attention_layernorm.weight"])
            gate, up = (self._linear(h, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self._linear(torch.nn.functional.silu(gate) * up, f"{name}mlp.down_proj")
        x = self._norm(x, w["norm.weight"])
        head = w["embed_tokens.weight"] if "lm_head.weight" not in w else w["lm_head.weight"]
        return x @ head.T

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(name + ".bias")
        return x @ self.weights[name + ".weight"].T + (0 if bias is None else bias)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [n, heads, d] at positions [R, n]."""
        half = x.shape[-1] // 2
        frequencies = self.theta ** -(torch.arange(half, dtype=torch.double) / half)
        rows = torch.zeros(half, dtype=torch.long)
        if self.sections:
            rows = torch.repeat_interleave(torch.arange(3), torch.tensor(self.sections))
        angles = positions[rows].T.double() * frequencies  # [n, d / 2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Recorded:
    """A stream whose runs of the decoder are noted, with the logits that they gave."""

    def __init__(self, stream: Any, oracle: Oracle | None = None) -> None:
        self.stream, self.oracle = stream, oracle
        self.logits: list[Any] = []
        self.last: list[int] = []  # number of the token that each of them follows
        self.lengths: list[int] = []
        self.runs: dict[str, int] = {}

    def run(self, graph: str, inputs: Any) -> Any:
        self.runs[graph] = self.runs.get(graph, 0) + 1
        if graph == "rebase" and self.oracle is not None:
            self.oracle.rebase(inputs["slot_positions"])
        if graph == "decoder":
            self.lengths.append(len(inputs["embeddings"]))
            if self.oracle is not None:
                at = int(inputs["write_index"])
                self.oracle.step(inputs["embeddings"], inputs["position_ids"], at, inputs["slot_mask"])
                self.last.append(self.oracle.count - 1)
        found = self.stream.run(graph, inputs)
        if graph == "decoder":
            self.logits.append(found["logits"])
        return found
