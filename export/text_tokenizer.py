"""Writing the tokenizer of a SigLIP as one `tokenizer.json`, which gives the same tokens without `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CheckpointError
from ..runtime.text import open_tokenizer
from .text import PROBES, TextModel, sentencepiece_proto

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What Python calls whitespace and `string.punctuation`, as character classes of the `tokenizers` package.
WHITESPACE = r"[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
PUNCTUATION = r"[!-/:-@\[-`{-~]"
# `str.lower` writes a sigma at the end of a word differently; lowercasing one character at a time cannot
FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)Σ(?!\p{Case_Ignorable}*\p{Cased})"
SPACE = "▁"  # as sentencepiece writes it


def write_tokenizer(model: TextModel, path: Path) -> None:
    """Write the tokenizer as one `tokenizer.json` for the `tokenizers` package, padding included.

    Raises:
        CheckpointError: it cannot be converted, or gives other tokens than the original.
    """
    if getattr(model.tokenizer, "is_fast", False):
        tokenizer = _from_fast(model)
    elif hasattr(model.tokenizer, "sp_model"):
        tokenizer = _from_sentencepiece(model)
    else:
        kind = type(model.tokenizer).__name__
        raise CheckpointError(
            f"{model.source}: {kind} has neither a tokenizer.json nor a sentencepiece model; "
            "export without --text-graph"
        )
    tokenizer.save(str(path), pretty=False)
    texts = list(PROBES)
    converted = open_tokenizer(path).encode_batch(texts)
    for text, expected, found in zip(texts, model.token_ids(texts), converted, strict=True):
        if expected.tolist() != found.ids:
            path.unlink()
            kind = type(model.tokenizer).__name__
            raise CheckpointError(
                f"{model.source}: {kind} cannot be written as tokenizer.json: its tokens differ on {text!r};"
                " export without --text-graph"
            )


def _from_fast(model: TextModel) -> Tokenizer:
    from tokenizers import Tokenizer

    original = model.tokenizer
    tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
    tokenizer.enable_truncation(model.length, direction=original.truncation_side)
    tokenizer.enable_padding(
        length=model.length,
        pad_id=original.pad_token_id,
        pad_token=original.pad_token,
        direction=original.padding_side,
    )
    return tokenizer


def _from_sentencepiece(model: TextModel) -> Tokenizer:
    """`transformers.SiglipTokenizer`: canonicalisation, then a sentencepiece unigram model.

    The result differs from the original only on text that nobody writes: several combining marks on a letter,
    half-composed Hangul, and letters that Unicode gained lately.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, processors

    original = model.tokenizer
    proto = sentencepiece_proto(original)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != trainer.UNIGRAM or trainer.treat_whitespace_as_suffix:
        raise CheckpointError(
            f"{model.source}: its sentencepiece model is not a unigram model with spaces as prefixes;"
            " export without --text-graph"
        )
    # canonicalisation by `SiglipTokenizer`
    steps = [normalizers.Replace(SPACE, " "), normalizers.Prepend(" ")]
    if original.do_lower_case:
        steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    steps += [
        normalizers.Replace(Regex(PUNCTUATION), ""),
        normalizers.Replace(Regex(f"{WHITESPACE}+"), " "),
    ]
    # normalisation by sentencepiece
    steps += _character_map(rules.precompiled_charsmap)
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(" $"), "")]
    steps += [normalizers.Replace(" ", SPACE)]

    piece = type(proto.pieces[0])
    # sentencepiece never finds these in a text; a trailing space makes them unfindable here too
    reserved = (piece.UNKNOWN, piece.CONTROL, piece.UNUSED)
    vocabulary = [(p.piece + " " if p.type in reserved else p.piece, p.score) for p in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {original.eos_token}", special_tokens=[(original.eos_token, original.eos_token_id)]
    )
    tokenizer.enable_truncation(model.length)
    tokenizer.enable_padding(length=model.length, pad_id=original.pad_token_id, pad_token=original.pad_token)
    return tokenizer


def _character_map(charsmap: bytes) -> list[Any]:
    """sentencepiece's replacement of the longest matching sequences.

    `Precompiled` looks up grapheme clusters and single characters only. So sequences are composed first, and
    a character that has a replacement is set apart from a mark that follows it, by a control character that
    the map removes: the lookup would drop the mark.
    """
    from tokenizers import Regex, normalizers

    if not charsmap:
        return []
    precompiled = normalizers.Precompiled(charsmap)
    steps: list[Any] = []
    if precompiled.normalize_str("e\u0301") == "é":
        steps.append(normalizers.NFC())
    if precompiled.normalize_str("\x01") == "":
        characters = (chr(code) for code in range(0x80, 0x10000) if not 0xD800 <= code < 0xE000)
        replaced = "".join(f"\\x{{{ord(c):x}}}" for c in characters if precompiled.normalize_str(c) != c)
        steps.append(normalizers.Replace(Regex(f"(?<=[{replaced}])(?=[\\p{{M}}\\x{{200d}}])"), "\x01"))
    return [*steps, precompiled]
