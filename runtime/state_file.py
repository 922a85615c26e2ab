"""A stream's saved state: tensors in the safetensors layout, keyed to the model that wrote them.

Eight bytes with the length of a JSON header, the header, then the raw little-endian tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .durable import write_file
from .errors import StateError

Array = npt.NDArray[Any]
NAMES = {"F32": "float32", "F16": "float16", "I8": "int8"}
CODES = {name: code for code, name in NAMES.items()}
MAX_HEADER = 1 << 20  # bytes
MAX_POSITION = 1 << 62  # frames since reset, held in 64 bits


def write_state(path: str | os.PathLike[str], state_key: str, position: int, tensors: dict[str, Array]) -> None:
    """Write a state file in one step: a reader sees the whole file or none.

    Raises:
        OutputError: the file cannot be written.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "framestep-state", "state_key": state_key, "position": str(position)}
    }
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pieces = (np.ascontiguousarray(tensor).data.cast("B") for tensor in tensors.values())
    write_file(Path(path), itertools.chain([len(text).to_bytes(8, "little") + text], pieces))


def read_state(
    path: str | os.PathLike[str], state_key: str, expected: dict[str, tuple[tuple[int, ...], str]]
) -> tuple[int, dict[str, Array]]:
    """Read a state file.

    Args:
        path: the file.
        state_key: of the model that is to continue from it.
        expected: shape and numpy dtype name of each tensor.

    Returns:
        The position and the tensors.

    Raises:
        StateError: missing, damaged, or of another model.
    """
    target = Path(path)
    total = sum(_bytes(shape, dtype) for shape, dtype in expected.values())
    try:
        with target.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MAX_HEADER:
                raise ValueError("header length")
            header = json.loads(file.read(length))
            data = np.fromfile(file, np.uint8, total + 1)  # one more, to see that there is none
        metadata = header.pop("__metadata__")
        found_key, position = str(metadata["state_key"]), int(metadata["position"])
    except OSError as error:
        raise StateError(f"{target}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StateError(f"{target}: damaged, or not a framestep state file") from None
    if found_key != state_key:
        raise StateError(
            f"{target}: was saved by another model, precision or window"
            f" (state key {found_key[:12]}…, expected {state_key[:12]}…)"
        )
    if not 0 <= position <= MAX_POSITION:
        raise StateError(f"{target}: damaged, its position is {position}")
    if len(data) != total:
        raise StateError(f"{target}: damaged or truncated, expected {total} bytes of tensors")
    tensors = {}
    end = 0
    for name, (shape, dtype) in expected.items():
        size = _bytes(shape, dtype)
        wanted = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        if header.get(name) != wanted:
            raise StateError(f"{target}: damaged at '{name}'")
        tensors[name] = data[end : end + size].view(dtype).reshape(shape)
        end += size
    return position, tensors


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
