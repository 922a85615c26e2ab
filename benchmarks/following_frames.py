"""What a token and a frame cost where answers follow the video: after up to ten thousand frames, and as frames arrive.

A small random StreamChat is made here unless a bundle is given: the milliseconds are those of a small model; what this
shows is what they depend on. Run as `python benchmarks/following_frames.py -o FOLDER`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from framestep.apps.bench.following import bench_following
from framestep.runtime.bundle import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a bundle of a StreamChat; default: a small random one")
    parser.add_argument("--frames", default="1,32,100,1000,10000")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--window", type=int, default=32, help="frames that text of the small model sees")
    parser.add_argument("--precision", default="fp32", help="of the small model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    frames = [int(part) for part in arguments.frames.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.bundle or small_bundle(Path(scratch), arguments.window, arguments.precision)
        progress = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        report = bench_following(Bundle.open(path), arguments.output, frames, arguments.samples, progress=progress)
    print(report.as_text())


def small_bundle(folder: Path, window: int, precision: str) -> Path:
    """A random StreamChat of eight layers, two of which see frames of 16 tokens; with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from framestep.export.streamchat_checkpoint import create_streamchat, read_streamchat_checkpoint
    from framestep.export.streamchat_export import StreamChatOptions, export_streamchat

    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = Qwen2Config(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=319,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "siglip")
    Qwen2ForCausalLM(text).save_pretrained(folder / "qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "qwen" / "tokenizer.json"))
    made = create_streamchat(str(folder / "siglip"), str(folder / "qwen"), folder / "streamchat")
    options = StreamChatOptions(precision, 1024, positions=8192, window=window)
    return export_streamchat(read_streamchat_checkpoint(str(made)), folder / "small.bundle", options).path


if __name__ == "__main__":
    main()
