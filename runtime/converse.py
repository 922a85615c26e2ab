"""Talking about what a source shows, in the way that a bundle's model can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .conversation import Conversation, FrameSource
from .dialogue_options import DialogueOptions
from .errors import FramestepError
from .events import Event, Notice
from .following import Following
from .questions import Question
from .session import Session

ASKED = "this model does not decide when to speak: it answers questions as they are asked"


def open_conversation(
    session: Session, source: FrameSource, options: DialogueOptions | None = None
) -> Conversation | Following:
    """The conversation that the session's model can hold: in turns, or with answers that follow the video.

    Raises:
        FramestepError: options that do not fit the bundle, or one that nobody can talk with.
    """
    language = session.bundle.manifest.language
    if language is not None and language.cross is not None:
        return Following(session, source, options)
    return Conversation(session, source, options)


def converse(
    session: Session,
    source: FrameSource,
    questions: Sequence[str | Question] = (),
    options: DialogueOptions | None = None,
) -> Iterator[Event]:
    """Talk about what a source shows, until it ends.

    Args:
        session: of a bundle with a decoder that sees.
        source: of `open_source`, at the rate that the model is to be shown.
        questions: what to ask, from the beginning or from a second of the stream on.
        options: see `DialogueOptions`.

    Yields:
        What happens; see `runtime/events.py`.

    Raises:
        FramestepError: a question, an option or the bundle is unusable, or the source was lost.
    """
    if isinstance(questions, str):
        raise FramestepError(
            f"questions: expected a list of texts, found the text '{questions}'; write ['{questions}']"
        )
    with open_conversation(session, source, options) as conversation:
        for question in questions:
            conversation.ask(question)
        if not conversation.decides:
            yield Notice(0.0, ASKED)
        yield from conversation
