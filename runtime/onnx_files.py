"""What is read of an ONNX graph without the `onnx` package: its external files, and in what blocks its weights lie.

Only the few protobuf fields that say so are followed; the wire format is that of
https://protobuf.dev/programming-guides/encoding and the field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from .errors import BundleError

# message -> field number -> message of that field
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_files(path: Path) -> set[str]:
    """Locations of the external data that the graph in `path` names.

    Raises:
        BundleError: the file is not an ONNX graph.
    """
    try:
        found: set[str] = set()
        _add_locations(memoryview(path.read_bytes()), "Model", found)
        return found
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    except (IndexError, UnicodeDecodeError, RecursionError, ValueError):
        raise BundleError(f"{path}: damaged, or not an ONNX graph") from None


def weight_blocks(path: Path) -> dict[int, int]:
    """Of the graph in `path`: how many weights lie in blocks of integers with a scale for each, by the block's size.

    Raises:
        BundleError: the file is not an ONNX graph.
    """
    found: dict[int, int] = {}
    try:
        for graph in _all(memoryview(path.read_bytes()), 7):
            for node in _all(graph, 1):
                if b"DequantizeLinear" in map(bytes, _all(node, 4)):
                    for size in filter(None, map(_block_size, _all(node, 5))):
                        found[size] = found.get(size, 0) + 1
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    except (IndexError, ValueError):
        raise BundleError(f"{path}: damaged, or not an ONNX graph") from None
    return found


def _block_size(attribute: memoryview) -> int:
    """Of an attribute of `DequantizeLinear`; 0 for another one."""
    if b"block_size" not in map(bytes, _all(attribute, 1)):
        return 0
    return next((value for _, value in _fields(attribute, (3,)) if isinstance(value, int)), 0)


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for _, value in _fields(message, (number,)) if not isinstance(value, int))


def _add_locations(message: memoryview, kind: str, found: set[str]) -> None:
    if kind == "Entry":
        pair = {number: bytes(value).decode() for number, value in _fields(message) if not isinstance(value, int)}
        if pair.get(1) == "location":
            found.add(pair.get(2, ""))
        return
    followed = _FIELDS[kind]
    for number, value in _fields(message, followed):
        if not isinstance(value, int):
            _add_locations(value, followed[number], found)


def _fields(message: memoryview, wanted: Container[int] | None = None) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message, or those of some numbers: number, and an integer or content. None of a fixed size."""
    at, end = 0, len(message)
    while at < end:
        key = message[at]
        at += 1
        if key >= 0x80:  # nearly all are of one byte
            key, at = _varint(message, at - 1)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length = message[at]
            at += 1
            if length >= 0x80:
                length, at = _varint(message, at - 1)
            start, at = at, at + length
            if at > end:
                raise IndexError("field beyond the end")
            if wanted is None or number in wanted:
                yield number, message[start:at]
        elif wire == 0:
            value, at = _varint(message, at)
            if wanted is None or number in wanted:
                yield number, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
