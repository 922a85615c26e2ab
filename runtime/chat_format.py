"""How a dialogue is written down as tokens, and how tokens become text again.

A format is a few pieces of text and ids of special tokens. What a user says is text and nothing else: a question that
contains `<|im_end|>` has no special token in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleError, EngineError
from .manifest import Language
from .text import open_tokenizer

STATES = ("silence", "standby", "response")
HELD = 8  # tokens that may wait for the rest of a character
CHARACTER = 4  # bytes that a character has at most

# The system prompt that Streamo was trained with (maifoundations/Streamo, inference.py): its words are the model's.
STREAMO_SYSTEM = """
You are a helpful assistant specializing in streaming video analysis. 
You will receive input frame by frame, each labeled with absolute time intervals 
in the exact format <Xs-Ys> (e.g., <0s-1s>). Follow these rules precisely:

1. Use </Silence> when:
   - No relevant event has started, OR
   - The current input is irrelevant to the given question.  

2. Use </Standby> when:
   - An event is in progress but has not yet completed, OR
   - The current input is relevant but the question cannot yet be answered.  

3. Use </Response> only when:
   - An event has fully concluded, OR
   - The available information is sufficient to fully answer the question.
   Provide a complete description at this point.  

Do not provide partial answers or speculate beyond the given information.  
Whenever you deliver an answer, begin with </Response>.
"""  # noqa: W291

Part = str | int  # text, or the id of a special token


@dataclass(frozen=True)
class Template:
    """A chat format. `{}` is what it is about; names in `<>` are keys of the manifest's `language.tokens`.

    Attributes:
        system: text that it is opened with where nobody says otherwise.
        opening: before all else.
        user: before what a user says, and with it.
        user_end: after it.
        assistant: before what the model says.
        close: after what the model says.
    """

    system: str
    opening: tuple[str, ...]
    user: tuple[str, ...]
    user_end: tuple[str, ...]
    assistant: tuple[str, ...]
    close: tuple[str, ...]


CHATML = {
    "opening": ("<turn_start>", "system\n{}", "<turn_end>", "\n"),
    "user": ("<turn_start>", "user\n{}"),
    "user_end": ("<turn_end>", "\n"),
    "assistant": ("<turn_start>", "assistant\n"),
    "close": ("<turn_end>", "\n"),
}
TEMPLATES = {
    "streamo": Template(STREAMO_SYSTEM, **CHATML),
    "chatml": Template("You are a helpful assistant.", **CHATML),
    "vicuna": Template(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions.",
        ("<begin>", "{} "),
        ("USER: {}",),
        (),
        (" ASSISTANT:",),
        ("<stop>",),
    ),
    "plain": Template("", ("<begin>", "{}"), ("{}",), (), ("\n",), ("\n",)),
}


class Words:
    """A bundle's tokenizer and chat format.

    Attributes:
        language: of the manifest.
        decides: whether the model says in each turn whether it is silent, waits or answers.
        stop: tokens that end an answer.

    Raises:
        BundleError: the bundle has no tokenizer, a damaged one, or an unknown chat format.
        EngineError: the package `tokenizers` is missing.
    """

    def __init__(self, language: Language, folder: Path) -> None:
        if language.tokenizer is None:
            raise BundleError(
                f"{folder}: has no tokenizer, so it can neither read nor write; export a checkpoint with one"
            )
        if language.chat not in TEMPLATES:
            raise BundleError(f"{folder}: language.chat '{language.chat}' is unknown; expected {', '.join(TEMPLATES)}")
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            raise EngineError("questions need tokenizers: pip install 'framestep[text]'") from None
        self._tokenizer = open_tokenizer(folder / language.tokenizer)
        # it would remember every text that it saw, up to 10,000: some 800 bytes for the time tag of each turn
        if resize := getattr(self._tokenizer.model, "_resize_cache", None):  # of BPE and Unigram
            resize(0)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.language = language
        self.template = TEMPLATES[language.chat]
        self.decides = decides(language)
        self.stop = stop_tokens(language)

    def state(self, name: str) -> int:
        """The token of one of `STATES`."""
        return self.language.tokens[name]

    def opening(self, system: str | None) -> list[int]:
        """What stands before all else; None for the format's own system prompt, "" for no message of one."""
        system = self.template.system if system is None else system
        pattern = self.template.opening if system else [part for part in self.template.opening if part == "<begin>"]
        return self.tokens(fill(pattern, system, self.language))

    def user(self, text: str, *splits: int) -> tuple[list[int], ...]:
        """What opens a user's turn that begins with `text`, cut before it and behind so many of its characters each."""
        parts = fill(self.template.user, text, self.language)
        last = parts[-1]
        assert isinstance(last, str)
        before = self.tokens(parts[:-1])
        encoding = self._tokenizer.encode(last, add_special_tokens=False)
        ids, cuts = list(encoding.ids), [0]
        for border in (len(last) - len(text) + split for split in (0, *splits)):
            cuts.append(next((at for at, (start, _) in enumerate(encoding.offsets) if start >= border), len(ids)))
        first, *others = (ids[cut:stop] for cut, stop in zip(cuts, [*cuts[1:], len(ids)], strict=True))
        return before + first, *others

    def user_end(self) -> list[int]:
        return self.tokens(fill(self.template.user_end, "", self.language))

    def assistant(self) -> list[int]:
        return self.tokens(fill(self.template.assistant, "", self.language))

    def close(self) -> list[int]:
        return self.tokens(fill(self.template.close, "", self.language))

    def tokens(self, parts: Sequence[Part]) -> list[int]:
        """Ids of text and special tokens."""
        ids: list[int] = []
        for part in parts:
            ids += (
                [part]
                if isinstance(part, int)
                else self._tokenizer.encode(well_formed(part), add_special_tokens=False).ids
            )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones; bytes that are no characters become U+FFFD."""
        try:
            found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        except Exception:  # a token without text, of a vocabulary that is smaller than the model's
            found = "\ufffd"
        return found


def decides(language: Language) -> bool:
    """Whether the model says in each turn whether it is silent, waits or answers."""
    return language.cross is None and all(state in language.tokens for state in STATES)


def stop_tokens(language: Language) -> frozenset[int]:
    """Tokens that end an answer."""
    return frozenset({*language.stop, *(language.tokens[name] for name in ("turn_end",) if name in language.tokens)})


def fill(pattern: Sequence[str], text: str, language: Language) -> list[Part]:
    """One of a template's patterns about `text`, with the tokens that `language` has."""
    parts: list[Part] = []
    for piece in pattern:
        if piece == "<stop>":
            parts += language.stop[:1]
        elif piece.startswith("<") and piece.endswith(">"):
            if piece[1:-1] in language.tokens:
                parts.append(language.tokens[piece[1:-1]])
        elif written := piece.replace("{}", text):
            parts.append(written)
        elif piece == "{}":
            parts.append("")
    return parts


class TextStream:
    """Tokens one after the other, and text as soon as it is certain.

    Characters may lie in several tokens, so bytes are held until their character is whole; what never becomes one is
    given out as U+FFFD. The work per token does not depend on how many there were.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._ids: list[int] = []
        self._given = 0  # characters of their text that were given out
        self._held = 0  # tokens since then

    def push(self, token: int) -> str:
        """The text that is certain with this token; "" where more is needed."""
        self._ids.append(token)
        self._held += 1
        text = self._words.text(self._ids)
        unfinished = text.endswith("\ufffd")  # perhaps: its last character
        if unfinished and self._held < HELD:
            return ""
        part = text[self._given : len(text) - unfinished]
        # some tokenizers treat what begins a text in another way: the tokens given out last are decoded along
        self._ids, self._held = self._ids[-(max(self._held, CHARACTER) if unfinished else self._held) :], 0
        self._given = len(self._words.text(self._ids)) - unfinished
        return part

    def flush(self) -> str:
        """What was held."""
        text = self._words.text(self._ids)[self._given :]
        self._ids, self._given, self._held = [], 0, 0
        return text


def well_formed(text: str) -> str:
    """Text with U+FFFD for surrogates, as which Python has what was no UTF-8 on a command line."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
