"""Tokens a second of a decoder of Qwen2.5-0.5B's size, beside what reading its weights and cache must take.

    python benchmarks/decode.py FOLDER [--tokens 64] [--rounds 5] [--threads N] [--output result.json]

FOLDER takes a checkpoint with random weights, which cost what trained ones do, and bundles of it with INT4 and INT8
weights and a cache of 1,024 tokens; what is there already is used. A token is what a dialogue does for one: the
embedding of the last token, one run of the decoder, the largest logit. The cache is full, and every slot visible. In
turn, in one process: each bundle, and `transformers` with the same weights in float32 and in bfloat16, eager attention,
its own growing cache filled with as many tokens. The median over the rounds of the tokens a second of each counts.

The floor of a token is the bytes that cannot be left out, at the bandwidth that all threads reach in reading memory:
integers and scales of every linear layer and of the head once, and keys and values of every slot once. A shared
machine's bandwidth wanders by half within seconds: it is measured right before and right after each bundle's turn
(`roofline.py`), the better one counts, and what is reported is the median of the shares of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))
from roofline import measure_bandwidth

import framestep
from framestep.runtime.bundle import Bundle
from framestep.runtime.cores import default_threads

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
CAPACITY = 1024
PRECISIONS = ("w4", "w8")
READINGS = 3  # of which the fastest is the bandwidth of that moment
BAR = 0.55  # of the floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="in a round, of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    bundles = prepare(given.folder)
    paths: dict[str, Callable[[int], float]] = {
        precision: Speaker(path, given.threads).speak for precision, path in bundles.items()
    }
    for dtype in ("float32", "bfloat16"):
        paths[f"transformers {dtype}"] = Reference(given.folder / "checkpoint", dtype, given.threads).speak
    read = {name: read_bytes(Bundle.open(path, verify=False)) for name, path in bundles.items()}
    for speak in paths.values():
        speak(4)
    rates: dict[str, list[float]] = {name: [] for name in paths}
    bandwidths: dict[str, list[float]] = {name: [] for name in bundles}
    for _ in range(given.rounds):
        for name, speak in paths.items():
            before = measure_bandwidth(given.threads, READINGS)
            rates[name].append(given.tokens / speak(given.tokens))
            if name in bundles:
                bandwidths[name].append(max(before, measure_bandwidth(given.threads, READINGS)))
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": given.threads,
        "tokens": given.tokens,
        "rounds": given.rounds,
        "capacity": CAPACITY,
        "paths": {},
    }
    for name, values in rates.items():
        row: dict[str, Any] = {"tokens_s": round(statistics.median(values), 2), "all": [round(v, 2) for v in values]}
        if name in bundles:
            row |= {key: round(size / 1e6, 1) for key, size in read[name].items()}
            shares = [rate * sum(read[name].values()) / b for rate, b in zip(values, bandwidths[name], strict=True)]
            row["bandwidth_gb_s"] = [round(value / 1e9, 1) for value in bandwidths[name]]
            row["of_the_floor"] = round(statistics.median(shares), 3)
            row["all_of_the_floor"] = [round(share, 3) for share in shares]
        found["paths"][name] = row
    print(text(found))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def prepare(folder: Path) -> dict[str, Path]:
    """The checkpoint and the bundles, made where they are not there."""
    from framestep.export.decoder_checkpoint import read_decoder_checkpoint
    from framestep.export.decoder_export import DecoderOptions, export_decoder

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SIZES)).to(torch.bfloat16).save_pretrained(checkpoint)
    bundles = {precision: folder / f"{precision}.bundle" for precision in PRECISIONS}
    missing = [precision for precision, path in bundles.items() if not path.exists()]
    if missing:
        read = read_decoder_checkpoint(str(checkpoint))
        for precision in missing:
            begin = time.perf_counter()
            report = export_decoder(read, bundles[precision], DecoderOptions(precision, CAPACITY))
            spent = time.perf_counter() - begin
            print(f"exported {precision} in {spent:.0f} s: {report}", file=sys.stderr)
    return bundles


class Speaker:
    """A bundle that says one token after the other into a full cache."""

    def __init__(self, path: Path, threads: int) -> None:
        self.session = framestep.load(path, threads=threads)
        self.stream = self.session.open_stream()
        self.mask = np.ones(CAPACITY, bool)
        generator = np.random.default_rng(0)
        language = self.session.bundle.manifest.language
        assert language is not None
        for first in range(0, CAPACITY, language.chunk):
            stop = min(first + language.chunk, CAPACITY)
            self.step(generator.integers(0, SIZES["vocab_size"], stop - first), first, np.arange(CAPACITY) < first)
        self.token, self.said = 0, 0

    def speak(self, tokens: int) -> float:
        """Seconds."""
        begin = time.perf_counter()
        for _ in range(tokens):
            self.token = self.step(np.array([self.token]), self.said % CAPACITY, self.mask)
            self.said += 1
        return time.perf_counter() - begin

    def step(self, tokens: np.ndarray, slot: int, mask: np.ndarray) -> int:
        embeddings = self.stream.run("embed", {"tokens": tokens})["embeddings"]
        position_ids = np.arange(slot, slot + len(tokens))[None]
        inputs = {"embeddings": embeddings, "position_ids": position_ids, "write_index": np.array(slot)}
        return int(self.stream.run("decoder", {**inputs, "slot_mask": mask})["logits"].argmax())


class Reference:
    """`transformers`, eager, with its own cache, which grows by a token each time and is cut to the capacity."""

    def __init__(self, checkpoint: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        self.torch = torch
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        self.cache = DynamicCache()
        with torch.inference_mode():
            tokens = torch.randint(0, SIZES["vocab_size"], (1, CAPACITY - 1))
            self.model(tokens, past_key_values=self.cache, logits_to_keep=1)
        self.token = 0

    def speak(self, tokens: int) -> float:
        """Seconds, without those in which the cache is cut."""
        spent = 0.0
        with self.torch.inference_mode():
            for _ in range(tokens):
                begin = time.perf_counter()
                logits = self.model(self.torch.tensor([[self.token]]), past_key_values=self.cache).logits
                self.token = int(logits[0, -1].argmax())
                spent += time.perf_counter() - begin
                self.cache.crop(-1)
        return spent


def read_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes that a token has to read: linear layers with the head, and keys and values."""
    manifest = bundle.manifest
    assert manifest.language is not None
    graph = manifest.graphs[manifest.language.decoder]
    model = onnx.load(bundle.file(graph.file), load_external_data=False)
    tensors = {item.name: item for item in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    lengths = [
        int(entry.value)
        for node in layers
        for name in node.input
        for entry in tensors[name].external_data
        if entry.key == "length"
    ]
    read = {name for node in model.graph.node if node.op_type == "Attention" for name in node.input[1:3]}
    states = {state.name: state.bytes_per_stream() for state in manifest.states}
    cache = sum(states[use.state] for use in graph.states if use.output in read)
    return {"weights_mb": sum(lengths), "cache_mb": cache}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['processor']}, {found['threads']} threads, {found['rounds']} rounds of {found['tokens']} tokens"
        f" over a full cache of {found['capacity']}",
        "",
        "| | tokens/s | least and most | MB a token | GB/s that can be read | of the floor | least and most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["paths"].items():
        line = f"| {name} | {row['tokens_s']} | {min(row['all'])} to {max(row['all'])} |"
        if "of_the_floor" in row:
            bandwidths, shares = row["bandwidth_gb_s"], row["all_of_the_floor"]
            line += f" {row['weights_mb']} + {row['cache_mb']} | {min(bandwidths)} to {max(bandwidths)} |"
            line += f" {row['of_the_floor']:.0%} | {min(shares):.0%} to {max(shares):.0%} |"
        else:
            line += " | | | |"
        lines.append(line)
    lines += ["", f"The bar is {BAR:.0%} of the floor."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
