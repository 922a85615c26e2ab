"""Train the demo's model: `python -m framestep.apps.demo.train`.

A small StreamFormer learns to say what a shape in `scenes` does. It trains the way it will run: every frame attends to
the `window` last frames and no others, clips are longer than the window, and in most of them the time embedding is the
last one already, as it is in a stream without end. The loss is the reference's: a sigmoid for each label of each frame.
Label embeddings are orthonormal and random, for no text model takes part; they are saved beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
SCENE_FRAMES = 96
UNTOLD = GRACE // 2 + 1  # first frames of a training clip, whose names depend on frames before it; not learned from
HELD_OUT = 1_000_000_000  # seeds from here on are never trained on
HELD_OUT_FRAMES = 320


@dataclass(frozen=True)
class Budget:
    """How much training there is; the same for every window."""

    steps: int = 3800
    clips: int = 8  # a step
    frames: int = 40  # a clip
    scenes: int = 2400
    learning_rate: float = 1.3e-3
    warmup: int = 200
    weight_decay: float = 0.05


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
    size = config.image_size[0]
    frames = torch.empty(budget.scenes, SCENE_FRAMES, size, size, 3, dtype=torch.uint8)
    labels = torch.empty(budget.scenes, SCENE_FRAMES, dtype=torch.int64)
    for index in range(budget.scenes):
        scene = draw_scene(seed * 100_000 + index, SCENE_FRAMES, size)
        frames[index], labels[index] = torch.from_numpy(scene.frames), torch.from_numpy(scene.labels)
    print(f"window {window}: {frames.shape[0] * frames.shape[1]} frames drawn in {time.perf_counter() - start:.0f} s")
    model = random_model(config, seed).train()
    _see_waves(model)
    scorer = Scorer(config.hidden_size, generator)
    parameters = [*model.parameters(), *scorer.parameters()]
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
        clips, names = _batch(frames, labels, budget, rng)
        position = 0 if rng.random() < 0.25 else config.num_frames
        _, pooled, _ = model(clips, None, window, position)
        logits = scorer(pooled)
        targets = F.one_hot(names, len(LABELS)).to(logits) * 2 - 1
        loss = -F.logsigmoid(targets * logits).sum(-1)[:, UNTOLD:].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
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


def _batch(frames: Tensor, labels: Tensor, budget: Budget, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Clips uint8 [B, T, size, size, 3] and labels [B, T], mirrored, turned and recoloured at random."""
    clips, names = [], []
    for _ in range(budget.clips):
        scene = rng.integers(len(frames))
        first = rng.integers(frames.shape[1] - budget.frames + 1)
        clip, name = frames[scene, first : first + budget.frames], labels[scene, first : first + budget.frames]
        for axis, renamed in ((2, MIRRORED), (1, FLIPPED)):
            if rng.random() < 0.5:
                clip, name = clip.flip(axis), renamed[name]
        if rng.random() < 0.5:
            clip, name = clip.transpose(1, 2), TRANSPOSED[name]
        clip = clip[..., torch.from_numpy(rng.permutation(3))]
        clips.append(clip)
        names.append(name)
    return torch.stack(clips), torch.stack(names)


def _renamed(**names: str) -> Tensor:
    both = {**names, **{new: old for old, new in names.items()}}
    return torch.tensor([LABELS.index(both.get(label, label)) for label in LABELS])


MIRRORED = _renamed(left="right", clockwise="anticlockwise")
FLIPPED = _renamed(up="down", clockwise="anticlockwise")
TRANSPOSED = _renamed(left="up", right="down", clockwise="anticlockwise")


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
