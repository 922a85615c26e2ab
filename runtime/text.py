"""Labels and their text embeddings.

A label stands for the mean of the unit-norm embeddings of its texts, one text per template. The mean is not
normalised again: StreamFormer was trained against it so. `TextEncoder` makes the embeddings from a bundle's
text graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cores import default_threads
from .errors import BundleError, EngineError, FramestepError, first_line

FloatArray = npt.NDArray[np.float32]

# The templates that StreamFormer's heads were trained with: per frame, and (`PATCH_TEMPLATES`) per patch.
ACTION_TEMPLATES = tuple(
    f"{start} {what}."
    for start in ("a photo of", "a video of", "a example of", "a demonstration of")
    for what in (
        "{}",
        "a person {}",
        "a person using {}",
        "a person doing {}",
        "a person during {}",
        "a person performing {}",
        "a person practicing {}",
    )
)
PATCH_TEMPLATES = ("{}",)

BATCH = 64  # texts that go through a text tower at once


LONGEST_LABEL = 1000  # characters; models read some tens of tokens


class LabelError(FramestepError):
    """Labels, templates or text embeddings are missing, malformed or do not fit the model."""


def read_labels(path: Path) -> list[str]:
    """Read a file of labels: one a line; blank lines and lines that start with `#` are skipped.

    Raises:
        LabelError: the file cannot be read, holds no label, one twice, or one that nobody can show.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise LabelError(f"{path}: cannot read labels: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise LabelError(f"{path}: cannot read labels: not UTF-8 text") from None
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        label = line.strip()
        if not label or label.startswith("#"):
            continue
        if why := _no_label(label):
            raise LabelError(f"{path}: line {number} {why}")
        if label in first_seen:
            raise LabelError(
                f"{path}: line {number} repeats the label '{label}' of line {first_seen[label]}; remove one"
            )
        first_seen[label] = number
    if not first_seen:
        raise LabelError(f"{path}: no labels; write one a line")
    return list(first_seen)


def label_embeddings(
    features: Callable[[list[str]], FloatArray], labels: Sequence[str], templates: Sequence[str]
) -> FloatArray:
    """Mean over templates of the unit-norm text features.

    Args:
        features: text tower: B texts to features [B, dim] of any norm.
        labels: C different labels.
        templates: texts in which every `{}` is replaced by the label.

    Returns:
        [C, dim]

    Raises:
        LabelError: no labels or templates, a blank or repeated label, a template without `{}`.
    """
    check_labels(labels)
    _check_templates(templates)
    texts = [template.replace("{}", label) for label in labels for template in templates]
    pooled = np.concatenate([features(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])
    with np.errstate(invalid="ignore", divide="ignore"):  # the outcome is checked below
        unit = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    means: FloatArray = unit.reshape(len(labels), len(templates), -1).mean(axis=1, dtype=np.float32)
    if not np.isfinite(means).all():
        label = labels[int(np.argmin(np.isfinite(means).all(axis=1)))]
        raise LabelError(f"label '{label}': the text model gives NaN or infinity for it")
    return means


class TextEncoder:
    """A bundle's text graph with its tokenizer. Needs no training framework.

    Args:
        graph: the ONNX file: `input_ids` int64 [B, length] to `text_features` float32 [B, dim].
        tokenizer: the `tokenizer.json`, which pads and truncates to `length` itself.
        length: tokens per text.
        threads: of ONNX Runtime; None for what a session takes by itself.

    Raises:
        EngineError: `tokenizers` or ONNX Runtime is not installed.
        BundleError: a file is missing or damaged, or the two do not fit.
    """

    def __init__(self, graph: Path, tokenizer: Path, length: int, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise EngineError(f"new labels need the package {error.name}: pip install 'framestep[cpu,text]'") from None
        for path in (graph, tokenizer):
            if not path.is_file():
                raise BundleError(f"{path}: missing; export the bundle again with --text-graph")
        self._tokenizer = open_tokenizer(tokenizer)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or default_threads()
        # alternates with the backbone's session in one process: idle threads must not spin against it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise BundleError(f"{graph}: ONNX Runtime cannot load it ({first_line(error)})") from None
        names = [port.name for port in (*self._session.get_inputs(), *self._session.get_outputs())]
        if names != ["input_ids", "text_features"]:
            raise BundleError(
                f"{graph}: expected input_ids to text_features, found {', '.join(names)}; not a text graph"
            )
        self.length = length
        self.dim = int(self._session.get_outputs()[0].shape[1])
        self._tokenizer_path = tokenizer
        found = self._session.get_inputs()[0].shape[1]
        if found != length:
            raise BundleError(f"{graph}: expected {length} tokens per text, found {found}")
        self.token_ids([""])

    def embed(self, labels: Sequence[str], templates: Sequence[str]) -> FloatArray:
        """Embeddings of labels, [labels, dim]; see `label_embeddings`."""
        return label_embeddings(self.features, labels, templates)

    def features(self, texts: list[str]) -> FloatArray:
        """Features of B texts as the text tower gives them, not normalised: [B, dim]."""
        features: FloatArray = self._session.run(["text_features"], {"input_ids": self.token_ids(texts)})[0]
        return features

    def token_ids(self, texts: list[str]) -> npt.NDArray[np.int64]:
        """Tokens of B texts, padded or truncated: [B, length]."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        if any(len(row) != self.length for row in rows):
            found = next(len(row) for row in rows if len(row) != self.length)
            raise BundleError(f"{self._tokenizer_path}: expected texts padded to {self.length} tokens, found {found}")
        return np.array(rows, np.int64)


def open_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a `tokenizer.json`; it takes `</s>` and the like in a text for text.

    Raises:
        BundleError: damaged, or not a tokenizer.json.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise BundleError(f"{path}: damaged tokenizer ({first_line(error)})") from None
    tokenizer.encode_special_tokens = True  # the file cannot say so
    return tokenizer


def check_labels(labels: Sequence[str]) -> None:
    if isinstance(labels, str):
        raise LabelError(f"labels: expected a list of texts, found the text '{labels}'; write ['{labels}']")
    if not labels:
        raise LabelError("labels: none given; at least one is needed")
    seen = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise LabelError(f"labels[{index}]: expected a text, found {label!r}")
        if why := _no_label(label):
            raise LabelError(f"labels[{index}] {why}")
        if label in seen:
            raise LabelError(f"labels[{index}]: '{label}' is given twice")
        seen.add(label)


def _no_label(label: str) -> str | None:
    """Why a text cannot be shown as a label, after what names it; None where it can."""
    if len(label) > LONGEST_LABEL:
        return f"has {len(label)} characters; a label has at most {LONGEST_LABEL}"
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in label):
        return f"holds control characters: {label!r}"
    return None


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str):
        raise LabelError(f"templates: expected a list of texts, found the text '{templates}'")
    if not templates:
        raise LabelError("templates: none given; '{}' stands for the label alone")
    for template in templates:
        if "{}" not in template:
            raise LabelError(f"template '{template}': no {{}} where the label is to go")
