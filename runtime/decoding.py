"""A language decoder over one stream: what its cache holds, where, and what is forgotten when room is needed.

Slots are not positions. Tokens go to whatever slots are free; the mask says which hold something, and positions say in
which order the model takes them. What is remembered and forgotten as one is a `Turn`: when room is needed, the oldest
turn's bits of the mask are cleared and its slots are used again, while all others stay where they are, in memory and in
position. Nothing here grows with the length of a stream.

Sizes in shape comments: T new tokens, C slots, D hidden, R rows of position ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .counted import counted
from .errors import BundleError, FramestepError
from .manifest import Manifest

Array = npt.NDArray[Any]
EVICTIONS = ("slots", "cut")


class CapacityError(FramestepError):
    """Something does not fit into the cache, however much else is forgotten. Nothing was written."""


class GraphRunner(Protocol):
    """What a decoder needs of a stream; see `Stream.run`."""

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(eq=False)
class Turn:
    """Tokens that are forgotten as one.

    Attributes:
        pinned: it is never forgotten.
        remnant: it was forgotten but for what is kept of it.
        slots: where its tokens are, in the order in which they were written.
        kept: for each of them, whether it stays when the turn is forgotten.
        parts: for each of them, the part of the turn that it belongs to; see `Decoder.forget_part`.
        first, stop: its positions.
        pieces: what it is made of, where a cut will need that again.
    """

    pinned: bool = False
    remnant: bool = False
    slots: list[int] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    first: int = 0
    stop: int = 0
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of tokens to take in.

    Attributes:
        turn: to which they belong.
        embeddings: float32 [T, D].
        offsets: int64 [R, T], their positions behind where the piece begins.
        span: positions that the piece takes.
        kept: whether they stay when their turn is forgotten; only of text.
        part: number of a part that can be forgotten by itself; 0 is what cannot.
    """

    turn: Turn
    embeddings: Array
    offsets: Array
    span: int
    kept: bool = False
    part: int = 0


class Decoder:
    """Takes tokens in and gives logits.

    Args:
        stream: runs the bundle's graphs; its decoder states are this decoder's alone.
        manifest: of the bundle, in one precision; it has `language`.
        eviction: "slots" clears the oldest turn's bits and moves nothing; "cut" drops the oldest turns and takes all
            others in again behind what is pinned at the beginning, as those do who resend a dialogue to a server that
            caches prefixes.

    Attributes:
        capacity: slots.
        position: the next token's.
        turns: what is remembered, the oldest first.
        steps: runs of the decoder's graph so far, and `taken` the tokens that went through it.
        forgotten: turns forgotten so far.
        rebased: how often keys were turned to other positions.

    Raises:
        BundleError: the bundle has no decoder, or one that takes other inputs.
    """

    def __init__(self, stream: GraphRunner, manifest: Manifest, eviction: str = "slots") -> None:
        if manifest.language is None:
            raise BundleError("this bundle has no language decoder; export a checkpoint that has one")
        if eviction not in EVICTIONS:
            raise FramestepError(f"eviction: expected {' or '.join(EVICTIONS)}, found '{eviction}'")
        self._stream = stream
        self._language = manifest.language
        self._eviction = eviction
        self._names = _input_names(manifest)
        self._rows, self.capacity = rows_and_capacity(manifest)
        self._grid = manifest.grid
        self._visible = np.zeros(self.capacity, bool)  # [C], what `slot_mask` is fed with
        self._positions = np.zeros((self._rows, self.capacity), np.int64)  # [R, C]
        self._cursor = 0  # where the search for free slots begins
        self.turns: list[Turn] = []
        self.position = self.steps = self.taken = self.forgotten = self.rebased = 0

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return int(self._visible.sum())

    def text(self, turn: Turn, tokens: Sequence[int], kept: bool = False, part: int = 0) -> Piece:
        """Tokens of text, at least one."""
        ids = np.array(tokens, np.int64)
        embeddings = self._stream.run(self._language.embed, {self._names["tokens"]: ids})["embeddings"]
        return Piece(turn, embeddings, np.tile(np.arange(len(ids)), (self._rows, 1)), len(ids), kept, part)

    def picture(self, turn: Turn, visual: Array, shown: Array | None = None) -> Piece:
        """What the model sees of a frame.

        Args:
            visual: the bundle's `visual` output, float32 [tokens, D].
            shown: bool [tokens], which of them are taken in; None for all. Each has the position that it has among all.
        """
        count = len(visual)
        offsets, span = np.arange(count)[None], count
        if self._rows == 3:  # time, row and column
            if self._grid is None or self._grid[0] * self._grid[1] != count:
                raise BundleError(f"grid: does not tell rows and columns of the {counted(count, 'token')} of a frame")
            rows, columns = np.divmod(np.arange(count), self._grid[1])
            offsets, span = np.stack([np.zeros_like(rows), rows, columns]), max(self._grid)
        if shown is not None:
            visual, offsets = visual[shown], offsets[:, shown]
        return Piece(turn, visual, offsets, span)

    def take(self, pieces: Sequence[Piece]) -> Array:
        """Take tokens in, one piece after the other, and forget the oldest turns where room is needed.

        The last piece's turn is not forgotten for it. What is forgotten on the way is left out.

        Args:
            pieces: those of the last turn so far, then those of later ones.

        Returns:
            The logits after the last token, float32 [V].

        Raises:
            CapacityError: it does not fit even if all is forgotten that may be.
        """
        current = pieces[-1].turn
        self._check_fits(pieces, current)
        for piece in pieces:
            if piece.turn not in self.turns:
                self.turns.append(piece.turn)
            if self._eviction == "cut":
                piece.turn.pieces.append(piece)
        if self._eviction == "cut" and not self._fits(pieces):
            return self._write(self._cut(current))
        return self._write(self._make_room(pieces, current))

    def forget(self, turn: Turn) -> None:
        """Forget a turn, and what is kept of it. One that is forgotten already is no error."""
        self._drop(turn, [True] * len(turn.slots))
        turn.pieces = []
        if turn in self.turns:
            self.turns.remove(turn)

    def forget_part(self, turn: Turn, part: int) -> None:
        """Forget one part of a turn at once, even if it is kept or pinned. The rest stays, where it is."""
        self._drop(turn, [one == part for one in turn.parts])
        turn.pieces = [piece for piece in turn.pieces if piece.part != part]

    def let_go(self, turn: Turn) -> None:
        """Keep nothing of a turn when it is forgotten; what was kept of a forgotten one is forgotten now."""
        if turn.remnant:
            self.forget(turn)
        turn.kept = [False] * len(turn.slots)
        turn.pieces = [replace(piece, kept=False) for piece in turn.pieces]

    def reset(self) -> None:
        """Forget everything."""
        for turn in list(self.turns):
            self.forget(turn)
        self._cursor = self.position = 0

    def rebase(self) -> None:
        """Bring what is remembered to the lowest positions, and its keys with it.

        Turns keep their order and what lies within them its distances; only gaps that forgotten ones left are closed.
        A dialogue of which nothing was forgotten does not change.
        """
        at = 0
        for turn in sorted(self.turns, key=lambda turn: turn.first):
            if turn.remnant:  # text in pieces: one after the other
                self._positions[:, turn.slots] = at + np.arange(len(turn.slots))
                turn.first, turn.stop = at, at + len(turn.slots)
            else:
                self._positions[:, turn.slots] += at - turn.first
                turn.first, turn.stop = at, turn.stop + at - turn.first
            at = turn.stop
        self.position = at
        # what forgotten slots have does not matter as long as it is in range: it is that of an earlier token
        self._stream.run(self._language.rebase, {self._names["slot_positions"]: self._positions})
        self.rebased += 1

    def _check_fits(self, pieces: Sequence[Piece], current: Turn) -> None:
        stays = sum(_stays(turn, current) for turn in self.turns)
        new = sum(len(p.embeddings) for p in pieces if p.turn is current or p.kept or p.turn.pinned)
        if stays + new > self.capacity:
            raise CapacityError(
                f"no room for {counted(new, 'token')} beside the {stays} that have to stay: the cache holds"
                f" {self.capacity};"
                " export the bundle with a larger --capacity"
            )

    def _fits(self, pieces: Sequence[Piece]) -> bool:
        tokens, span = sum(len(p.embeddings) for p in pieces), sum(p.span for p in pieces)
        return tokens <= self.capacity - self.used and self.position + span <= self._language.positions

    def _make_room(self, pieces: Sequence[Piece], current: Turn) -> Sequence[Piece]:
        """Forget turns until the pieces fit; the pieces that are left."""
        while not self._fits(pieces):
            tokens = sum(len(p.embeddings) for p in pieces)
            if tokens <= self.capacity - self.used:  # positions have run out
                self.rebase()
                if self._fits(pieces):
                    break
            oldest = self._evict(current)
            pieces = [p for p in pieces if p.turn is not oldest or p.kept]
            if not oldest.slots and all(p.turn is not oldest for p in pieces):
                self.turns.remove(oldest)
        return pieces

    def _cut(self, current: Turn) -> list[Piece]:
        """Forget turns until all others fit, and empty the cache behind what is pinned first; the pieces for it."""
        prefix = self.turns[:1] if self.turns[0].pinned and self.turns[0].slots else []
        start, room = sum(turn.stop for turn in prefix), self.capacity - sum(len(turn.slots) for turn in prefix)
        while True:
            pieces = [piece for turn in self.turns if turn not in prefix for piece in turn.pieces]
            tokens, span = sum(len(p.embeddings) for p in pieces), sum(p.span for p in pieces)
            if tokens <= room and start + span <= self._language.positions:
                break
            oldest = self._evict(current)
            if not oldest.pieces:
                self.turns.remove(oldest)
        for turn in self.turns:
            if turn not in prefix:
                self._visible[turn.slots] = False
                turn.slots, turn.kept, turn.parts, turn.first, turn.stop = [], [], [], 0, 0
        self._cursor, self.position = self.capacity - room, start
        return pieces

    def _evict(self, current: Turn) -> Turn:
        """Forget the oldest turn that may be forgotten, but for what is kept of it."""
        for turn in self.turns:
            if not (turn.pinned or turn.remnant or turn is current):
                break
        else:
            raise CapacityError(
                f"a turn does not fit: the cache holds {self.capacity} tokens and {self._language.positions} positions;"
                " export the bundle with a larger --capacity"
            )
        self._drop(turn, [not kept for kept in turn.kept])
        turn.pieces = [piece for piece in turn.pieces if piece.kept]
        turn.remnant = True
        self.forgotten += 1
        return turn

    def _drop(self, turn: Turn, gone: Sequence[bool]) -> None:
        """Clear the bits of some of a turn's slots."""
        self._visible[[slot for slot, out in zip(turn.slots, gone, strict=True) if out]] = False
        left = [at for at, out in enumerate(gone) if not out]
        turn.slots = [turn.slots[at] for at in left]
        turn.kept = [turn.kept[at] for at in left]
        turn.parts = [turn.parts[at] for at in left]

    def _write(self, pieces: Sequence[Piece]) -> Array:
        """Take pieces that fit, in as few steps as free slots and `chunk` allow."""
        positions, owners = [], []
        begun: set[int] = set()  # turns that have tokens, by their identity
        for piece in pieces:
            turn = piece.turn
            if not turn.slots and id(turn) not in begun:
                turn.first = self.position
            begun.add(id(turn))
            positions.append(piece.offsets + self.position)
            self.position += piece.span
            turn.stop = self.position
            owners += [piece] * len(piece.embeddings)
        embeddings = np.concatenate([piece.embeddings for piece in pieces])  # [T, D]
        position_ids = np.concatenate(positions, axis=1)  # [R, T]
        at, logits = 0, None
        for first, stop in self._free_runs(len(embeddings)):
            new = slice(at, at + stop - first)
            inputs = {
                "embeddings": embeddings[new],
                "position_ids": np.ascontiguousarray(position_ids[:, new]),
                "write_index": np.array(first),
                "slot_mask": self._visible,
            }
            inputs = {self._names[role]: value for role, value in inputs.items()}
            logits = self._stream.run(self._language.decoder, inputs)["logits"]
            self._visible[first:stop] = True
            self._positions[:, first:stop] = position_ids[:, new]
            for slot, piece in zip(range(first, stop), owners[new], strict=True):
                piece.turn.slots.append(slot)
                piece.turn.kept.append(piece.kept)
                piece.turn.parts.append(piece.part)
            self._cursor = stop
            at = new.stop
            self.steps += 1
        self.taken += len(embeddings)
        assert logits is not None
        return logits

    def _free_runs(self, count: int) -> list[tuple[int, int]]:
        """First and last slot + 1 of each step for `count` tokens: free ones from the cursor on, at most `chunk`."""
        order = (np.arange(self.capacity) + self._cursor) % self.capacity
        slots = order[~self._visible[order]][:count]
        runs: list[tuple[int, int]] = []
        for part in np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1):
            for first in range(int(part[0]), int(part[-1]) + 1, self._language.chunk):
                runs.append((first, min(first + self._language.chunk, int(part[-1]) + 1)))
        return runs


def _stays(turn: Turn, current: Turn) -> int:
    return len(turn.slots) if turn.pinned or turn is current else sum(turn.kept)


def _input_names(manifest: Manifest) -> dict[str, str]:
    """Names of the inputs of the decoder's three graphs, by their roles."""
    language = manifest.language
    assert language is not None
    graphs = {
        language.embed: ("tokens",),
        language.decoder: ("embeddings", "position_ids", "write_index", "slot_mask"),
        language.rebase: ("slot_positions",),
    }
    names = {}
    for graph, roles in graphs.items():
        found = {port.role: port.name for port in manifest.graphs[graph].inputs}
        if not set(roles) <= set(found):
            raise BundleError(
                f"graphs.{graph}: expected inputs of the roles {', '.join(roles)}; found {', '.join(found)}"
            )
        names.update({role: found[role] for role in roles})
    return names


def rows_and_capacity(manifest: Manifest) -> tuple[int, int]:
    """Rows of position ids, and slots of the cache."""
    assert manifest.language is not None
    shapes = {port.role: port.shape for port in manifest.graphs[manifest.language.decoder].inputs}
    return int(shapes["position_ids"][1]), int(shapes["slot_mask"][1])


def visual_tokens(manifest: Manifest) -> int:
    """Tokens of a frame."""
    assert manifest.language is not None
    ports = {port.name: port for graph in manifest.graphs.values() for port in graph.outputs}
    visual = manifest.language.visual
    return 0 if visual is None else int(ports[visual].shape[1])
