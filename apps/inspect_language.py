"""What a bundle says of its decoder: memory, weights, special tokens, and how a dialogue is written down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.chat_format import STATES, TEMPLATES, Part, decides, fill, stop_tokens
from ..runtime.counted import counted
from ..runtime.decoding import visual_tokens
from ..runtime.errors import BundleError
from ..runtime.manifest import Language, graphs_for
from ..runtime.onnx_files import weight_blocks

WEIGHTS = {"fp32": "float32", "fp16": "float16", "w8": "INT8", "w4": "INT4", "fp16+w4": "INT4"}
ESTABLISHED = 60  # characters of a system prompt that are shown to a person


def describe_language(bundle: Bundle) -> dict[str, Any] | None:
    """What a decoder holds and knows, as plain data; None of a bundle without one.

    Raises:
        BundleError: its tokenizer or its graph is damaged.
    """
    language = bundle.manifest.language
    if language is None:
        return None
    graphs, cross = bundle.manifest.graphs, language.cross
    rings = set() if cross is None else {use.state for use in graphs[cross.graph].states}
    capacity = max(s.capacity for s in bundle.manifest.states if s.kind == "linear" and s.name not in rings)
    texts = _special_texts(bundle, language)
    named = {name: {"id": token, "text": texts.get(token)} for name, token in language.tokens.items()}
    template = TEMPLATES.get(language.chat)
    return {
        "capacity": capacity,
        "positions": language.positions,
        "chunk": language.chunk,
        "weights": WEIGHTS.get(bundle.manifest.precision, bundle.manifest.precision),
        "weight_blocks": weight_blocks(bundle.file(graphs[language.decoder].file)),
        "seeing_weight_blocks": blocks_of(bundle, _eyes(bundle, language)),
        "decides": decides(language),
        "frames": next((state.capacity - 1 for state in bundle.manifest.states if state.name in rings), None),
        "frame_tokens": visual_tokens(bundle.manifest) if cross is None else None,
        "grid": bundle.manifest.grid,
        "tokenizer": language.tokenizer,
        "tokens": named,
        "stop": [{"id": token, "text": texts.get(token)} for token in sorted(stop_tokens(language))],
        "chat": language.chat,
        "system": None if template is None else template.system,
        "turn": None if template is None else _turn(bundle, language, texts),
    }


def language_rows(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for a person: names, and what is to be said; "" is what stands above again."""
    yield (
        "speaks",
        f"{told['capacity']} tokens in the cache, positions up to {told['positions']}, at most"
        f" {counted(told['chunk'], 'token')} a step",
    )
    if told["frames"] is not None:
        yield "", f"attends to the newest {counted(told['frames'], 'frame')} at every token"
    yield "", "decides when to speak" if told["decides"] else "answers when asked; it has no tokens to decide when"
    yield "weights", in_blocks(told["weights"], told["weight_blocks"])
    if told["seeing_weight_blocks"]:
        yield "", in_blocks("of what sees", told["seeing_weight_blocks"])
    for names, what in ((STATES, "state"), (None, "special")):
        chosen = {n: t for n, t in told["tokens"].items() if (n in STATES) == (names is not None)}
        if chosen:
            yield f"{what} tokens", ", ".join(f"{name} {_token(token)}" for name, token in chosen.items())
    yield "answers end", " or ".join(map(_token, told["stop"])) or "only at their longest: no token stops them"
    if told["tokenizer"] is None:
        yield "chat", "none: this bundle has no tokenizer, so it can neither read nor write"
        return
    if told["turn"] is None:
        yield "chat", f"'{told['chat']}', which this framestep does not know"
        return
    system = " ".join(told["system"].split())
    short = system if len(system) <= ESTABLISHED else system[: ESTABLISHED - 1] + "\N{HORIZONTAL ELLIPSIS}"
    prompt = f"system prompt of {counted(len(told['system']), 'character')}: {short}" if system else "no system prompt"
    yield "chat", f"{told['chat']}; {prompt}"
    for number, line in enumerate(told["turn"].rstrip("\n").split("\n")):
        yield "turn" if number == 0 else "", line


def blocks_of(bundle: Bundle, graphs: Iterable[str]) -> dict[int, int]:
    """Of some graphs: how many weights lie in blocks of integers, by the block's size.

    Raises:
        BundleError: a file is not an ONNX graph.
    """
    found: Counter[int] = Counter()
    for name in graphs:
        found.update(weight_blocks(bundle.file(bundle.manifest.graphs[name].file)))
    return dict(found)


def in_blocks(what: str, blocks: dict[int, int]) -> str:
    told = ", ".join(f"{count} in blocks of {size}" for size, count in sorted(blocks.items()))
    return f"{what}: {told}" if told else what


def _eyes(bundle: Bundle, language: Language) -> list[str]:
    """The graphs between a frame and what text reads of it."""
    if language.cross is not None:
        return [language.cross.graph]
    return graphs_for(bundle.manifest, [] if language.visual is None else [language.visual])


def _turn(bundle: Bundle, language: Language, texts: dict[int, str]) -> str:
    """A turn as it is written down. Capitals stand for what is said."""
    template, tokens = TEMPLATES[language.chat], language.tokens

    def parts(pattern: tuple[str, ...], text: str = "") -> list[Part]:
        return fill(pattern, text, language)

    frame: list[Part] = []
    if language.cross is None and language.visual is not None:
        marks = [[tokens[name]] if name in tokens else [] for name in ("vision_start", "vision_end")]
        frame = [*marks[0], f"[{counted(visual_tokens(bundle.manifest), 'token')} of a frame]", *marks[1]]
    if decides(language):  # see `Dialogue`
        user = [*parts(template.user, "QUESTION\n<7s-8s>\n"), *frame]
        said: list[Part] = [tokens["response"], " ANSWER"]
    else:  # see `Answering` and `Following`
        newline: list[Part] = [tokens["newline"]] if frame and "newline" in tokens else []
        user = [*parts(template.user), *frame, *newline, "\nQUESTION" if frame else "QUESTION"]
        said = ["ANSWER"]
    whole = [*user, *parts(template.user_end), *parts(template.assistant), *said, *parts(template.close)]
    names = {token: f"<{name}>" for name, token in tokens.items()}
    return "".join(part if isinstance(part, str) else texts.get(part, names.get(part, f"<{part}>")) for part in whole)


def _special_texts(bundle: Bundle, language: Language) -> dict[int, str]:
    """Texts of the tokenizer's special tokens, by their ids."""
    if language.tokenizer is None:
        return {}
    path = bundle.file(language.tokenizer)
    try:
        added = json.loads(path.read_text("utf-8")).get("added_tokens") or []
        return {int(token["id"]): str(token["content"]) for token in added}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise BundleError(f"{path}: damaged tokenizer") from None


def _token(token: dict[str, Any]) -> str:
    return f"{token['id']}" if token["text"] is None else f"{token['text']} ({token['id']})"
