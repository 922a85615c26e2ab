"""The manifest of a bundle: all that a runtime needs to know.

It says which graphs there are, what feeds each input (its *role*), and which *states* a stream carries from step to
step. `docs/design.md` tells the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from .errors import BundleError

FORMAT = "framestep"
VERSION = 1
STREAMS = "S"  # the symbol of the dynamic streams axis in shapes
TOKENS = "T"  # the symbol of the dynamic axis of a decoder's new tokens
LABEL_ROLES = ("text_embeddings", "patch_text_embeddings", "logit_scale", "logit_bias")
STREAM_ROLES = ("frame", "position", "output")  # inputs with a row for each stream
DECODER_ROLES = (  # these too
    "tokens",
    "embeddings",
    "position_ids",
    "write_index",
    "slot_mask",
    "slot_positions",
    "position_shift",
)
ROLES = (*STREAM_ROLES, *LABEL_ROLES, "input_ids", *DECODER_ROLES)
DTYPES = ("uint8", "int64", "int32", "bool", "float32", "float16", "int8")
STATE_DTYPES = {"float32": 4, "float16": 2, "int8": 1}  # bytes of a number
SYMBOLS = (STREAMS, "C", "B", TOKENS)
CROSS_POSITIONS = ("parallel", "literal")
STATE_KINDS = ("ring", "linear")
RESIZES = ("crop", "stretch", "letterbox")
MAX_SIDE = 1 << 14  # pixels
MAX_EXTENT = 1 << 31
MAX_RANK = 8
MAX_GRAPHS = 256
MAX_STATE_BYTES = 1 << 38


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: name in the graph.
        role: what feeds an input, one of `ROLES`; "output" is the output of another graph with the same name.
            Outputs have the role "output".
        dtype: numpy name.
        shape: sizes; "S" is the streams axis, "C" the number of labels, "B" a number of texts, "T" one of new tokens.
        states: the states that the input speaks of, those whose names begin with this and a dot; None where a bundle
            has one kind of them.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]
    states: str | None = None


@dataclass(frozen=True)
class StateUse:
    """How a graph touches a state: read as `input`; written as `output`, or only read where `output` is None."""

    state: str
    input: str
    output: str | None = None


@dataclass(frozen=True)
class Graph:
    """A pure function (inputs, states) -> (outputs, states)."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[StateUse, ...] = ()


@dataclass(frozen=True)
class State:
    """Memory of a stream. It starts zeroed.

    Attributes:
        name: name of the state.
        kind: "ring": slot `position mod capacity` is written by each step; "linear": the slots from `write_index` on.
        shape: sizes, the first is "S".
        axis: the axis of the slots.
        capacity: number of slots.
        rows_per_slot: rows along `axis` that one slot takes.
        dtype: numpy name.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    axis: int
    capacity: int
    rows_per_slot: int
    dtype: str

    def bytes_per_stream(self) -> int:
        size = STATE_DTYPES[self.dtype]
        for extent in self.shape[1:]:
            size *= int(extent)
        return size


@dataclass(frozen=True)
class FrameSpec:
    """What a model sees: uint8 RGB of this height and width, and how other frames are brought to it.

    Attributes:
        resize: "crop" (shorter side to size, centre crop), "stretch" or "letterbox" (grey bars).
    """

    height: int
    width: int
    resize: str = "crop"


@dataclass(frozen=True)
class Scoring:
    """Scores are sigmoid(exp(logit_scale) * cosine + logit_bias).

    Attributes:
        head: the task head that the numbers and projections are from, or None.
        calibrated: the numbers were trained with this model; otherwise they are the original SigLIP's.
    """

    logit_scale: float
    logit_bias: float
    head: str | None
    calibrated: bool


@dataclass(frozen=True)
class Labels:
    """Open-vocabulary labels; their embeddings lie in `file` as `text_embeddings` and `patch_text_embeddings`."""

    names: tuple[str, ...]
    file: str
    background: str | None = None


@dataclass(frozen=True)
class Text:
    """The text tower as a graph, for new labels without a training framework.

    Attributes:
        length: tokens per text, padded.
        templates, patch_templates: the texts that one label stands for; `{}` is the label.
    """

    graph: str
    tokenizer: str
    length: int
    templates: tuple[str, ...]
    patch_templates: tuple[str, ...]


@dataclass(frozen=True)
class Cross:
    """How frames enter where text attends to them by cross-attention.

    Attributes:
        graph: name of the graph that writes one frame into a slot of its rings, which the decoder reads.
        rebase: name of the graph that turns the keys of frames back; None where positions are literal.
        positions: of a frame's token at time t: "parallel", (t, t + row, t + column), or "literal", (t, row, column).
    """

    graph: str
    rebase: str | None
    positions: str


@dataclass(frozen=True)
class Language:
    """The decoder of a bundle: which graphs speak, and what a runtime must know of tokens and positions.

    Attributes:
        embed: name of the graph from tokens to embeddings.
        decoder: name of the graph from embeddings to logits; it has the caches.
        rebase: name of the graph that turns the cached keys to other positions.
        visual: name of the output that holds a frame's embeddings [S, tokens, D]; None for a decoder without eyes.
        positions: position ids go from 0 to `positions` - 1.
        chunk: tokens that one step should take at most.
        tokenizer: the tokenizer's file, as Hugging Face's `tokenizers` reads it; None where the checkpoint had none.
        tokens: ids of special tokens by what they are for, such as "image" or "silence".
        stop: tokens that end an answer.
        chat: how a dialogue is written down: "streamo", "chatml", "vicuna" or "plain"; see `runtime/chat_format.py`.
        cross: how frames enter where text attends to them by cross-attention; None where it does not.
    """

    embed: str
    decoder: str
    rebase: str
    visual: str | None
    positions: int
    chunk: int
    tokenizer: str | None
    tokens: dict[str, int]
    stop: tuple[int, ...]
    chat: str = "plain"
    cross: Cross | None = None


@dataclass(frozen=True)
class Origin:
    """Where a bundle came from; nothing at run time depends on it."""

    checkpoint: str
    framestep: str
    trained_frames: int | None = None


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """The same model in another precision: graphs that stand in for those of the same name, and all its states."""

    graphs: dict[str, Graph]
    states: tuple[State, ...]


@dataclass(frozen=True)
class EngineFile:
    """An engine that TensorRT compiled from one graph, in one precision, for some GPUs.

    It is derived from the bundle and may be thrown away, so it is not among the manifest's `files`: what does not fit
    or is damaged is found when an engine is loaded, and never keeps a bundle from being opened.

    Attributes:
        flavour: the package that compiled it, and that runs it: "tensorrt" or "tensorrt_rtx".
        version: of that package.
        compute_capabilities: of the GPUs that it runs on, "8.6", or "8.0+" for that one and later ones.
        streams: the largest number of streams in one step.
        source: identifies the graph; see `engine_files.source_key`.
        labels: the largest number of labels, where the graph takes any.
        attention: "native" (fused by TensorRT), "decomposed" or "triton" (our kernel).
        version_compatible: also runs on later versions with the same first number.
    """

    graph: str
    precision: str
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    streams: int
    source: str
    bytes: int
    sha256: str
    labels: int | None = None
    attention: str = "native"
    version_compatible: bool = False


@dataclass(frozen=True)
class Manifest:
    """The contract of a bundle; see `docs/design.md`."""

    format: str
    version: int
    family: str
    precision: str
    frame: FrameSpec
    graphs: dict[str, Graph]
    states: tuple[State, ...]
    origin: Origin
    rate: float | None = None
    grid: tuple[int, ...] | None = None
    scoring: Scoring | None = None
    labels: Labels | None = None
    text: Text | None = None
    language: Language | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    engines: dict[str, EngineFile] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        """What `at` takes; the bundle's own first."""
        return (self.precision, *self.variants)

    def at(self, precision: str) -> Manifest:
        """The manifest of one precision, without variants.

        Raises:
            BundleError: the bundle does not have it.
        """
        if precision == self.precision:
            return replace(self, variants={})
        if precision not in self.variants:
            raise BundleError(f"precision '{precision}' is not in this bundle; it has {', '.join(self.precisions)}")
        variant = self.variants[precision]
        graphs = {**self.graphs, **variant.graphs}
        return replace(self, precision=precision, graphs=graphs, states=variant.states, variants={})


def graphs_for(manifest: Manifest, outputs: Iterable[str]) -> list[str]:
    """The graphs that compute these outputs, in an order in which each runs after those that feed it.

    Raises:
        BundleError: an output that no graph of the bundle has.
    """
    makers = {port.name: name for name, graph in manifest.graphs.items() for port in graph.outputs}
    order: list[str] = []

    def visit(output: str) -> None:
        graph = makers[output]
        if graph in order:
            return
        for port in manifest.graphs[graph].inputs:
            if port.role == "output":
                visit(port.name)
        order.append(graph)

    for output in outputs:
        if output not in makers:
            raise BundleError(f"no output '{output}' in this bundle; it has {', '.join(makers)}")
        visit(output)
    return order


def named_files(manifest: Manifest) -> Iterator[str]:
    """The files that a manifest names, but for external data of its graphs."""
    yield from (graph.file for graph in manifest.graphs.values())
    yield from (graph.file for variant in manifest.variants.values() for graph in variant.graphs.values())
    if manifest.labels is not None:
        yield manifest.labels.file
    if manifest.text is not None:
        yield manifest.text.tokenizer
    if manifest.language is not None and manifest.language.tokenizer is not None:
        yield manifest.language.tokenizer
