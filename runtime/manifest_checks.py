"""Whether the parts of a manifest fit together: what the types alone do not say."""

from __future__ import annotations

from collections.abc import Collection, Container

from .manifest import (
    CROSS_POSITIONS,
    DECODER_ROLES,
    DTYPES,
    MAX_EXTENT,
    MAX_GRAPHS,
    MAX_RANK,
    MAX_SIDE,
    MAX_STATE_BYTES,
    RESIZES,
    ROLES,
    STATE_DTYPES,
    STATE_KINDS,
    STREAM_ROLES,
    STREAMS,
    SYMBOLS,
    Graph,
    Language,
    Manifest,
    State,
    graphs_for,
)
from .schema import SchemaError


def check_manifest(manifest: Manifest) -> None:
    """Check the manifest of a bundle, in each of its precisions.

    Raises:
        SchemaError: parts that are not possible, or do not fit together.
    """
    if manifest.precision in manifest.variants:
        raise SchemaError(f"variants.{manifest.precision}: is the precision of the bundle's own graphs")
    for name, engine in manifest.engines.items():
        if engine.bytes < 0:
            raise SchemaError(f"engines.{name}.bytes: expected at least 0, found {engine.bytes}")
    for precision in manifest.precisions:
        _check_precision(manifest.at(precision))


def _check_precision(manifest: Manifest) -> None:
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
    if len(manifest.graphs) > MAX_GRAPHS:
        raise SchemaError(f"graphs: {len(manifest.graphs)} are more than {MAX_GRAPHS}")
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
    if any(int(n) > MAX_EXTENT for n in sizes) or len(state.shape) > MAX_RANK:
        raise SchemaError(f"{where}: shape should have at most {MAX_RANK} axes, none longer than {MAX_EXTENT}")
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
        if len(port.shape) > MAX_RANK:
            raise SchemaError(f"{where} has more than {MAX_RANK} axes")
        if port.states is not None and not any(state.startswith(f"{port.states}.") for state in states):
            raise SchemaError(f"{where} speaks of the states '{port.states}', and there are none")
    inputs = [port.name for port in graph.inputs]
    if len(set(inputs)) < len(inputs):
        twice = next(port for port in inputs if inputs.count(port) > 1)
        raise SchemaError(f"graphs.{name}: the input '{twice}' stands twice")
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
        if not use.input or use.output == "":
            raise SchemaError(f"graphs.{name}: state '{use.state}' has an input or output without a name")
