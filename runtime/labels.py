"""Label embeddings of a bundle, and the arithmetic around scores.

The embeddings lie in a safetensors file: `text_embeddings` and `patch_text_embeddings`, float32 [labels, hidden].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BundleError
from .manifest import Scoring

Array = npt.NDArray[Any]
NAMES = ("text_embeddings", "patch_text_embeddings")


def read_label_embeddings(path: Path, labels: int) -> tuple[Array, Array]:
    """The embeddings for frames and for patches, each float32 [labels, hidden].

    Raises:
        BundleError: missing or damaged, or not one row a label.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; if the bundle was labelled anew meanwhile, open it again") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        found = []
        for name in NAMES:
            begin, end = header[name]["data_offsets"]
            array = np.frombuffer(content[8 + length + begin : 8 + length + end], "<f4")
            found.append(array.reshape(header[name]["shape"]))
        if header[NAMES[0]]["dtype"] != "F32" or any(a.ndim != 2 or len(a) != labels for a in found):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: damaged; label the bundle again with 'framestep label'") from None
    return found[0], found[1]


def label_bytes(embeddings: Array, patch_embeddings: Array) -> bytes:
    """The content of the file that `read_label_embeddings` reads."""
    arrays = [np.ascontiguousarray(array, "<f4") for array in (embeddings, patch_embeddings)]
    header, offset = {}, 0
    for name, array in zip(NAMES, arrays, strict=True):
        places = [offset, offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": places}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays)


def label_inputs(scoring: Scoring, embeddings: Array, patch_embeddings: Array) -> dict[str, Array]:
    """What the label graphs take beside features, by input name."""
    return {
        "text_embeddings": embeddings.astype(np.float32),
        "patch_text_embeddings": patch_embeddings.astype(np.float32),
        "logit_scale": np.asarray(scoring.logit_scale, np.float32),
        "logit_bias": np.asarray(scoring.logit_bias, np.float32),
    }
