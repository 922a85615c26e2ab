"""Train the demo's model: `python -m framestep.apps.demo.train`.

`--window 1 -o DIR` trains the same model without a memory, to compare with; its report is kept as
`model/training_window_1.json`.

A small StreamFormer learns to say what a shape in `scenes` does. It trains the way it will run: every frame attends to
the `window` last frames and no others, clips are longer than the window, and in most of them the time embedding is the
last one already, as it is in a stream without end. The loss is the reference's: a sigmoid for each label of each frame.
Label embeddings are orthonormal and random, for no text model takes part; they are saved beside the weights. While
the model trains, a second head also tells where the shape is and how it changed, from the same pooled features: what
motion looks like is learned several times sooner than from names alone. It is thrown away afterwards. No clip is seen
twice: a second process draws them while the first one learns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...export.streamformer import StreamFormer, StreamFormerConfig, random_model
from .scenes import GRACE, LABELS, draw_scene

CONFIG = StreamFormerConfig(
    image_size=(64, 64),
    patch_size=16,
    num_frames=16,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    hidden_act="gelu_pytorch_tanh",
)
TRACKED = 12  # numbers that the second head tells: `Scene.state` and `Scene.change`
UNTOLD = GRACE // 2 + 1  # first frames of a training clip, whose names depend on frames before it; not learned from
HELD_OUT = 1_000_000_000  # seeds from here on are never trained on
HELD_OUT_FRAMES = 320


@dataclass(frozen=True)
class Budget:
    """How much training there is; the same for every window."""

    steps: int = 3900
    clips: int = 8  # a step
    frames: int = 40  # a clip
    learning_rate: float = 1.6e-3
    warmup: int = 200
    weight_decay: float = 0.05
    tracking: float = 1.0  # weight of the second head's loss


class Scorer(nn.Module):
    """Logits of labels: exp(logit_scale) * cosine(pooled, embedding) + logit_bias."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        embeddings = torch.linalg.qr(torch.randn(hidden, len(LABELS), generator=generator))[0].T.contiguous()
        self.register_buffer("embeddings", embeddings)  # [C, D], orthonormal
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-2.5))

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [..., D] -> logits [..., C]"""
        return self.logit_scale.exp() * F.normalize(pooled, dim=-1) @ self.embeddings.T + self.logit_bias


def train(window: int, budget: Budget, seed: int, config: StreamFormerConfig = CONFIG) -> tuple[StreamFormer, Scorer]:
    """Train from random weights. The same arguments give the same model on the same machine with as many threads."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    clips = _Clips(seed, budget.frames, config.image_size[0])
    batches = iter(DataLoader(clips, budget.clips, num_workers=1, prefetch_factor=16))
    model = random_model(config, seed).train()
    _see_waves(model)
    scorer = Scorer(config.hidden_size, generator)
    tracker = nn.Linear(config.hidden_size, TRACKED)
    parameters = [*model.parameters(), *scorer.parameters(), *tracker.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": budget.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=budget.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, budget))
    hits = loss_sum = 0.0
    for step in range(budget.steps):
        frames, names, track = next(batches)
        position = 0 if rng.random() < 0.25 else config.num_frames
        _, pooled, _ = model(frames, None, window, position)
        logits = scorer(pooled)
        targets = F.one_hot(names, len(LABELS)).to(logits) * 2 - 1
        loss = -F.logsigmoid(targets * logits).sum(-1)[:, UNTOLD:].mean()
        error = (tracker(F.layer_norm(pooled, pooled.shape[-1:])) - track).square()[:, UNTOLD:].mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + budget.tracking * error).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits += (logits.argmax(-1) == names)[:, UNTOLD:].float().mean().item()
        loss_sum += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"{step + 1:6d} {seconds:6.0f} s  loss {loss_sum / 100:.3f}  accuracy {hits / 100:.3f}", flush=True)
            hits = loss_sum = 0.0
    return model.eval(), scorer.eval()


@torch.inference_mode()
def evaluate(model: StreamFormer, scorer: Scorer, window: int, streams: int) -> dict[str, Any]:
    """Accuracy over every frame of held-out streams, none left out."""
    config = model.config
    confusion = np.zeros((len(LABELS), len(LABELS)), np.int64)
    for index in range(streams):
        scene = draw_scene(HELD_OUT + index, HELD_OUT_FRAMES, config.image_size[0])
        _, pooled, _ = model(torch.from_numpy(scene.frames)[None], None, window)
        np.add.at(confusion, (scene.labels, scorer(pooled[0]).argmax(-1).numpy()), 1)
    by_label = np.diag(confusion) / np.maximum(confusion.sum(1), 1)
    return {
        "window": window,
        "streams": streams,
        "frames": int(confusion.sum()),
        "accuracy": round(float(np.trace(confusion) / confusion.sum()), 4),
        "accuracy_by_label": {name: round(float(value), 3) for name, value in zip(LABELS, by_label, strict=True)},
    }


def save(model: StreamFormer, scorer: Scorer, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` as the reference publishes them, and the labels."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n", "utf-8")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    embeddings = {
        "text_embeddings": scorer.embeddings,
        "logit_scale": scorer.logit_scale.data,
        "logit_bias": scorer.logit_bias.data,
    }
    save_file(embeddings, folder / "text_embeddings.safetensors")
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n", "utf-8")


def _rate(step: int, budget: Budget) -> float:
    if step < budget.warmup:
        return (step + 1) / budget.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - budget.warmup) / max(1, budget.steps - budget.warmup)))


@torch.no_grad()
def _see_waves(model: StreamFormer) -> None:
    """Begin with a patch embedding that sees the long waves of a patch (a cosine transform), not random grain."""
    projection = model.embeddings.patch_embeddings.projection
    P, D = projection.kernel_size[0], projection.out_channels
    places = (torch.arange(P) + 0.5) * torch.pi / P
    waves = torch.cos(torch.arange(P)[:, None] * places) * (2 / P) ** 0.5  # [frequency, place]
    order = sorted(((u, v) for u in range(P) for v in range(P)), key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv))
    for index in range(D):  # brightness three times as often as the differences of colours
        kind, at = index % 5, index // 5
        u, v = order[at * 3 + kind if kind < 3 else at]
        colours = torch.tensor([[0.58, 0.58, 0.58], [0.7, 0.0, -0.7], [0.4, -0.8, 0.4]][max(0, kind - 2)])
        projection.weight[index] = 0.3 * colours[:, None, None] * torch.outer(waves[u], waves[v])


class _Clips(IterableDataset):
    """Clips without end: frames uint8 [T, size, size, 3], labels [T] and tracks [T, 12]."""

    def __init__(self, seed: int, frames: int, size: int) -> None:
        self._seed, self._frames, self._size = seed, frames, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in itertools.count():
            scene = draw_scene(self._seed * 10_000_000 + index, self._frames, self._size)
            track = np.hstack([scene.state, scene.change])
            yield torch.from_numpy(scene.frames), torch.from_numpy(scene.labels), torch.from_numpy(track)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", "-o", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--window", type=int, default=16, help="frames that one frame attends to, itself included")
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, default=40, help="held-out streams to evaluate on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    model, scorer = train(arguments.window, Budget(steps=arguments.steps), arguments.seed)
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, time.process_time() / 60
    save(model, scorer, arguments.output)
    report = {
        **evaluate(model, scorer, arguments.window, arguments.streams),
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
