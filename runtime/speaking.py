"""What a model is shown of a turn, and the answer that it speaks about it, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .chat_format import TextStream, Words
from .decoding import Array, CapacityError, Decoder, Piece
from .dialogue_options import DialogueOptions
from .events import Answer, AnswerText, Event
from .sampling import Sampler

Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Seen:
    """A turn as the model sees it.

    Attributes:
        number: of the turn.
        start, stop: seconds of the stream.
        visual: of each frame, float32 [tokens, D].
        captured: when the last frame was read from its source, on the dialogue's clock.
        live: whether its source goes on meanwhile.
    """

    number: int
    start: float
    stop: float
    visual: Sequence[Array]
    captured: float
    live: bool = False


class Speaker:
    """Gives answers.

    Args:
        decoder: takes tokens in.
        words: its tokenizer and chat format.
        options: how tokens are chosen, and how many at most.
        clock: seconds.

    Attributes:
        stopped: an answer that is being given ends with its next token; may be set by any thread or a signal handler.
    """

    def __init__(self, decoder: Decoder, words: Words, options: DialogueOptions, clock: Clock) -> None:
        self._decoder, self._words, self._clock = decoder, words, clock
        self._sampler = Sampler(options.temperature, options.top_p, options.seed, options.top_k)
        self._max_tokens = options.max_tokens
        self.stopped = False

    def answer(self, seen: Seen, start: Sequence[Piece], taken: float) -> Iterator[Event]:
        """Take `start` in, then generate tokens until one ends the answer, or it is stopped.

        Args:
            seen: the turn that is answered.
            taken: when it was, on the clock; from there on the first token counts where the source waits for it.
        """
        decoder, words, turn = self._decoder, self._words, start[-1].turn
        begun, since = self._clock(), seen.captured if seen.live else taken
        stream = TextStream(words)
        pieces, text, count, first_token, reason = start, "", 0, None, "stop"
        while True:
            try:
                token = self._sampler(decoder.take(pieces))
            except CapacityError:
                reason = "capacity"
                break
            if token in words.stop:
                break
            if count == self._max_tokens or self.stopped:
                reason = "length" if count == self._max_tokens else "interrupted"
                break
            count += 1
            if first_token is None:
                first_token = self._clock() - since
            if part := stream.push(token):
                text += part
                yield AnswerText(seen.stop, seen.number, part)
            pieces = [decoder.text(turn, [token])]
        if part := stream.flush():
            text += part
            yield AnswerText(seen.stop, seen.number, part)
        yield Answer(seen.stop, seen.number, text.strip(), reason, count, first_token, self._clock() - begun)
