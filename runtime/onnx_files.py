"""What is read of an ONNX graph without the `onnx` package: its external files, and in what blocks its weights lie.

Only the few protobuf fields that say so are followed; the wire format is that of
https://protobuf.dev/programming-guides/encoding and the field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        return set(_locations(memoryview(path.read_bytes()), "Model"))
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
    return next((value for number, value in _fields(attribute) if number == 3 and isinstance(value, int)), 0)


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for found, value in _parts(message) if found == number)


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "Entry":
        pair = {number: bytes(value).decode() for number, value in _parts(message)}
        if pair.get(1) == "location":
            yield pair.get(2, "")
        return
    for number, value in _parts(message):
        if number in _FIELDS[kind]:
            yield from _locations(value, _FIELDS[kind][number])


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message: number and content."""
    return ((number, value) for number, value in _fields(message) if isinstance(value, memoryview))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message, but for those of a fixed size: number, and an integer or content."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise IndexError("field beyond the end")
            yield key >> 3, message[at : at + length]
            at += length
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
