"""What a turn of a dialogue costs from the first to the ten thousandth, and what pruning changes.

A small random Qwen2.5-VL is exported here unless a bundle is given: the milliseconds are those of a small model; that
they do not grow is what this shows. Run as `python benchmarks/decoder_turns.py -o FOLDER`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from framestep.apps.bench.dialogue import FRAMES, QUESTION, SYSTEM, bench_dialogue
from framestep.runtime.bundle import Bundle
from framestep.runtime.chat_format import Words
from framestep.runtime.dialogue import Dialogue
from framestep.runtime.dialogue_options import NEVER, DialogueOptions
from framestep.runtime.events import Decision
from framestep.runtime.session import Session
from framestep.runtime.speaking import Seen

FRAME = (56, 112)  # pixels of the small model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a bundle that decides when to speak; default: a small random one")
    parser.add_argument("--turns", default="1,50,200,1000,2000,5000,10000")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--capacity", type=int, default=1024, help="of the small model's cache, in tokens")
    parser.add_argument("--beside", default="50,2000,10000", help="turns whose cost is compared, dialogues in turn")
    parser.add_argument("--beside-samples", type=int, default=300)
    parser.add_argument("--prune", type=float, nargs="*", default=[0.99, 0.9, 0.7], help="similarities to compare")
    parser.add_argument("--prune-turns", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    turns = [int(part) for part in arguments.turns.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.bundle or small_bundle(Path(scratch), arguments.capacity)
        bundle = Bundle.open(path)
        progress = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        report = bench_dialogue(bundle, arguments.output, turns, arguments.samples, progress=progress)
        lines = [report.as_text()]
        if arguments.beside:
            beside = [int(part) for part in arguments.beside.split(",")]
            lines.append(beside_report(bundle, beside, arguments.beside_samples))
        if arguments.prune:
            lines.append(prune_report(bundle, arguments.prune, arguments.prune_turns))
    (arguments.output / "report.md").write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


def small_bundle(folder: Path, capacity: int) -> Path:
    """A random Qwen2.5-VL of two layers, with a tokenizer of bytes and the three states."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from framestep.export.decoder_checkpoint import SPECIAL_TOKENS, read_decoder_checkpoint
    from framestep.export.decoder_export import DecoderOptions, export_decoder

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": rope, "eos_token_id": 2, "bos_token_id": 1}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "window_size": 56,
              "out_hidden_size": 128, "fullatt_block_indexes": [1]}  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # so large that frames make a difference to what is decided
                weight.copy_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder / "checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.save(str(folder / "checkpoint" / "tokenizer.json"))
    options = DecoderOptions(capacity=capacity, positions=8192, frame_size=FRAME)
    return export_decoder(read_decoder_checkpoint(str(folder / "checkpoint")), folder / "small.bundle", options).path


def beside_report(bundle: Bundle, turns: list[int], samples: int) -> str:
    """Dialogues of different ages, one turn of each in turn: what a machine does meanwhile, it does to all of them."""
    silent = DialogueOptions(system=SYSTEM, response_from=NEVER, standby_from=NEVER)
    with Session(bundle, streams=len(turns)) as session:
        manifest = session.bundle.manifest
        assert manifest.language is not None
        assert manifest.language.visual is not None
        words, frames = Words(manifest.language, bundle.path), _shapes(session, FRAMES)
        dialogues = []
        for _ in turns:
            stream = session.open_stream()
            visual = [stream.step(frame)[manifest.language.visual] for frame in frames]
            dialogues.append(Dialogue(stream, manifest, words, silent))
            dialogues[-1].ask(QUESTION)

        def take(dialogue: Dialogue, turn: int) -> tuple[float, int]:
            """Milliseconds to the decision, and tokens."""
            taken = dialogue.decoder.taken
            seen = Seen(turn, float(turn), turn + 1.0, (visual[turn % FRAMES],), time.perf_counter())
            (decision,) = (event for event in dialogue.take([seen]) if isinstance(event, Decision))
            return decision.seconds * 1e3, dialogue.decoder.taken - taken

        for dialogue, until in zip(dialogues, turns, strict=True):
            for turn in range(until):
                take(dialogue, turn)
        found = [
            [take(dialogue, until + sample) for dialogue, until in zip(dialogues, turns, strict=True)]
            for sample in range(samples)
        ]
    milliseconds, tokens = np.moveaxis(np.array(found), -1, 0)
    ratios = np.median(milliseconds / milliseconds[:, :1], axis=0)
    lines = [
        f"Dialogues of different ages side by side, {samples} turns each, one of each in turn.",
        "",
        f"| from turn | decision p50 / p99, ms | tokens | of turn {turns[0]}, median of neighbours |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for column, turn in enumerate(turns):
        p50, p99 = np.percentile(milliseconds[:, column], (50, 99))
        lines.append(f"| {turn} | {p50:.2f} / {p99:.2f} | {np.median(tokens[:, column]):g} | {ratios[column]:.3f} |")
    return "\n".join([*lines, ""])


def prune_report(bundle: Bundle, similarities: list[float], turns: int) -> str:
    """Tokens saved and decisions changed on moving shapes, against the same dialogue with every token."""
    lines = [
        "| pruned from | visual tokens left out | decisions changed | probability to answer moved, mean / max |",
        "| ---: | ---: | ---: | ---: |",
    ]
    with Session(bundle) as session, session.open_stream() as stream:
        frames = _shapes(session, turns)
        manifest = session.bundle.manifest
        assert manifest.language is not None
        assert manifest.language.visual is not None
        visual = [stream.step(frame)[manifest.language.visual] for frame in frames]
        words = Words(manifest.language, bundle.path)
        whole = _decisions(stream, manifest, words, visual, None)
        states = Counter(decision.state for decision in whole)
        for similarity in similarities:
            pruned = _decisions(stream, manifest, words, visual, similarity)
            left_out, total = sum(decision.pruned for decision in pruned), sum(map(len, visual))
            changed = sum(a.state != b.state for a, b in zip(whole, pruned, strict=True))
            moved = np.abs([_response(a) - _response(b) for a, b in zip(whole, pruned, strict=True)])
            lines.append(
                f"| {similarity:g} | {left_out} of {total} ({left_out / total:.0%}) | {changed} of {turns} |"
                f" {moved.mean():.3f} / {moved.max():.3f} |"
            )
    spread = ", ".join(f"{count} {state}" for state, count in states.items())
    title = f"Pruning over {turns} turns of moving shapes, one frame each; with every token: {spread}."
    return "\n".join([title, "", *lines, ""])


def _response(decision: Decision) -> float:
    assert decision.probabilities is not None
    return decision.probabilities["response"]


def _decisions(stream: Any, manifest: Any, words: Words, visual: list[Any], prune: float | None) -> list[Decision]:
    dialogue = Dialogue(stream, manifest, words, DialogueOptions(system=SYSTEM, prune=prune, max_tokens=1))
    dialogue.ask(QUESTION)
    found = []
    for number, seen in enumerate(visual):
        events = dialogue.take([Seen(number, float(number), number + 1.0, (seen,), 0.0)])
        found += [event for event in events if isinstance(event, Decision)]
    return found


def _shapes(session: Session, count: int) -> list[np.ndarray]:
    from framestep.runtime.sources import open_source

    height, width = session.frame.height, session.frame.width
    with open_source(f"synthetic:frames={count},fps=1,width={width},height={height}") as source:
        return [frame.rgb for frame in source]


if __name__ == "__main__":
    main()
