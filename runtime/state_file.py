"""A stream's saved state: tensors in the safetensors layout, keyed to the model that wrote them.

Eight bytes with the length of a JSON header, the header, then the raw little-endian tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutputError, StateError

Array = npt.NDArray[Any]
NAMES = {"F32": "float32", "F16": "float16", "I8": "int8"}
CODES = {name: code for code, name in NAMES.items()}
MAX_HEADER = 1 << 20  # bytes


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
    target = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).data)
        Path(temporary).replace(target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None


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
    try:
        content = np.fromfile(target, np.uint8)
    except OSError as error:
        raise StateError(f"{target}: cannot be read: {error.strerror}") from None
    try:
        length = int.from_bytes(content[:8].tobytes(), "little")
        if not 0 < length <= min(MAX_HEADER, len(content) - 8):
            raise ValueError("header length")
        header = json.loads(content[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__")
        found_key, position = str(metadata["state_key"]), int(metadata["position"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StateError(f"{target}: damaged, or not a framestep state file") from None
    if found_key != state_key:
        raise StateError(
            f"{target}: was saved by another model, precision or window"
            f" (state key {found_key[:12]}…, expected {state_key[:12]}…)"
        )
    data = content[8 + length :]
    tensors = {}
    end = 0
    for name, (shape, dtype) in expected.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        wanted = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        if header.get(name) != wanted or end + size > len(data):
            raise StateError(f"{target}: damaged or truncated at '{name}'")
        tensors[name] = data[end : end + size].view(dtype).reshape(shape)
        end += size
    if position < 0 or len(data) != end:
        raise StateError(f"{target}: damaged, expected {end} bytes of tensors, found {len(data)}")
    return position, tensors
