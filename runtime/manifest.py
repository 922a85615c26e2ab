"""The manifest of a bundle: all that a runtime needs to know.

It says which graphs there are, what feeds each input (its *role*), and which *states* a stream carries from step to
step. `docs/design.md` tells the contract.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace

from .errors import BundleError
from .schema import SchemaError

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


def check_manifest(manifest: Manifest) -> None:
    """What the types alone do not say.

    Raises:
        SchemaError: parts of the manifest that do not fit together.
    """
    if manifest.frame.resize not in RESIZES:
        raise SchemaError(f"frame.resize: '{manifest.frame.resize}' is unknown; expected {', '.join(RESIZES)}")
    if not 0 < manifest.frame.height <= MAX_SIDE or not 0 < manifest.frame.width <= MAX_SIDE:
        raise SchemaError(f"frame: height and width should be from 1 to {MAX_SIDE}")
    if manifest.rate is not None and not 0 < manifest.rate < float("inf"):
        raise SchemaError(f"rate: expected a number above 0, found {manifest.rate}")
    for state in manifest.states:
        _check_state(state)
    states = {state.name for state in manifest.states}
    if len(states) != len(manifest.states):
        raise SchemaError("states: a name stands twice")
    outputs = [port.name for graph in manifest.graphs.values() for port in graph.outputs]
    if len(set(outputs)) != len(outputs):
        raise SchemaError("graphs: two outputs have the same name")
    for name, graph in manifest.graphs.items():
        _check_graph(name, graph, states, outputs)
    try:
        graphs_for(manifest, outputs)
    except RecursionError:
        raise SchemaError("graphs: they feed each other in a circle") from None
    if manifest.text is not None and manifest.text.graph not in manifest.graphs:
        raise SchemaError(f"text.graph: there is no graph '{manifest.text.graph}'")
    if manifest.language is not None:
        _check_language(manifest.language, manifest.graphs, outputs)


def _check_language(language: Language, graphs: Container[str], outputs: Container[str]) -> None:
    for key in ("embed", "decoder", "rebase"):
        if getattr(language, key) not in graphs:
            raise SchemaError(f"language.{key}: there is no graph '{getattr(language, key)}'")
    if language.visual is not None and language.visual not in outputs:
        raise SchemaError(f"language.visual: no graph has the output '{language.visual}'")
    for key in ("positions", "chunk"):
        if getattr(language, key) < 1:
            raise SchemaError(f"language.{key}: expected at least 1, found {getattr(language, key)}")
    if (cross := language.cross) is not None:
        for key in ("graph", "rebase"):
            name = getattr(cross, key)
            if name is not None and name not in graphs:
                raise SchemaError(f"language.cross.{key}: there is no graph '{name}'")
        if cross.positions not in CROSS_POSITIONS:
            expected = " or ".join(CROSS_POSITIONS)
            raise SchemaError(f"language.cross.positions: '{cross.positions}' is unknown; expected {expected}")


def _check_state(state: State) -> None:
    where = f"states '{state.name}'"
    if state.kind not in STATE_KINDS:
        raise SchemaError(f"{where}: kind '{state.kind}' is unknown; expected {' or '.join(STATE_KINDS)}")
    if state.dtype not in STATE_DTYPES:
        raise SchemaError(f"{where}: dtype '{state.dtype}' is unknown; expected {', '.join(STATE_DTYPES)}")
    sizes = state.shape[1:]
    if not state.shape or state.shape[0] != STREAMS or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise SchemaError(f"{where}: shape should be '{STREAMS}' and then positive sizes")
    if state.bytes_per_stream() > MAX_STATE_BYTES:
        raise SchemaError(f"{where}: takes {state.bytes_per_stream()} bytes a stream, more than {MAX_STATE_BYTES}")
    if not 0 < state.axis < len(state.shape):
        raise SchemaError(f"{where}: axis {state.axis} is outside of its shape")
    if state.capacity < 1 or state.rows_per_slot < 1 or state.shape[state.axis] != state.capacity * state.rows_per_slot:
        raise SchemaError(f"{where}: capacity * rows_per_slot does not fill axis {state.axis}")


def _check_graph(name: str, graph: Graph, states: Collection[str], outputs: Container[str]) -> None:
    for port in (*graph.inputs, *graph.outputs):
        where = f"graphs.{name}: '{port.name}'"
        if port.role not in ROLES:
            raise SchemaError(f"{where} has the unknown role '{port.role}'")
        if port.dtype not in DTYPES:
            raise SchemaError(f"{where} has the unknown dtype '{port.dtype}'")
        if not all(n in SYMBOLS if isinstance(n, str) else 0 < n <= MAX_EXTENT for n in port.shape):
            raise SchemaError(f"{where} has the shape {list(port.shape)}, which is not possible")
        if port.states is not None and not any(state.startswith(f"{port.states}.") for state in states):
            raise SchemaError(f"{where} speaks of the states '{port.states}', and there are none")
    per_stream = (*STREAM_ROLES, *DECODER_ROLES)
    of_streams = any(port.role in per_stream for port in graph.inputs)
    for port in graph.inputs:
        if port.role == "output" and port.name not in outputs:
            raise SchemaError(f"graphs.{name}: no graph has the output '{port.name}' that it takes")
    for port in (*(p for p in graph.inputs if p.role in per_stream), *(graph.outputs if of_streams else ())):
        # buffers are cut along this axis; without it a step would write beside them
        if not port.shape or port.shape[0] != STREAMS:
            raise SchemaError(f"graphs.{name}: '{port.name}' should have '{STREAMS}' as its first axis")
    for use in graph.states:
        if use.state not in states:
            raise SchemaError(f"graphs.{name}: state '{use.state}' is not declared")


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
