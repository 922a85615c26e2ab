"""Giving a bundle labels: at export, or later without touching the backbone."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.bundle import Bundle, file_entry
from ..runtime.errors import BundleError, CheckpointError, OutputError
from ..runtime.labels import label_bytes
from ..runtime.manifest import Graph, Labels, Manifest, Port, Scoring, Text
from ..runtime.text import ACTION_TEMPLATES, PATCH_TEMPLATES, LabelError, TextEncoder

if TYPE_CHECKING:
    from .text import TextModel


@dataclass(frozen=True)
class LabelOptions:
    """What to look for in frames, and where the embeddings of the words come from.

    Attributes:
        labels: the words; empty to write a text graph alone.
        text_model: folder or hub id of a SigLIP model.
        text_embeddings: safetensors file with ready embeddings, instead of a text model.
        templates: texts that one label stands for in the scores of a frame; `{}` is the label.
        background: a label that competes in class maps but is no event; appended to the labels if it is not among them.
        text_graph: whether the text tower goes into the bundle, for new labels on the device.
    """

    labels: Sequence[str] = ()
    text_model: str | None = None
    text_embeddings: Path | None = None
    templates: Sequence[str] = ()
    background: str | None = None
    text_graph: bool = False

    def check(self, has_text_graph: bool) -> None:
        """Raise LabelError where the options do not go together."""
        if self.text_embeddings is not None and (self.text_model is not None or self.text_graph or self.templates):
            raise LabelError("--text-embeddings: cannot be combined with --text-model, --text-graph or --template")
        if self.text_model is None and self.text_graph:
            raise LabelError("--text-graph: give the SigLIP model that it is made from with --text-model")
        if self.text_model is None and self.text_embeddings is None and not has_text_graph:
            raise LabelError("--labels: needs --text-model or --text-embeddings, for the bundle has no text graph")

    def names(self) -> tuple[str, ...]:
        names = tuple(self.labels)
        return names if self.background is None or self.background in names else (*names, self.background)


def label_bundle(bundle: Bundle, options: LabelOptions) -> Bundle:
    """Replace a bundle's labels. The backbone and saved states stay valid; a reader sees the old labels or the new.

    Without a text model or ready embeddings the bundle's own text graph makes them, and neither torch nor transformers
    is needed.

    Raises:
        LabelError: labels or embeddings that do not fit.
        BundleError: no text model given, and the bundle has no text graph.
    """
    old = bundle.manifest
    if old.language is not None:
        raise LabelError(f"{bundle.path}: a {old.family} scores no labels; ask its decoder questions")
    try:
        before = _written(bundle.path)
        made = write_labels(bundle.path, old, options)
        written = {name: file_entry(bundle.path / name) for name in _label_files(made)}
        now = Bundle.open(bundle.path, verify=False).manifest  # an engine may have been built meanwhile
        stale = set(_label_files(now)) - set(written)
        files = {name: entry for name, entry in now.files.items() if name not in stale} | written
        graphs = {**now.graphs, **made.graphs}
        manifest = replace(now, graphs=graphs, files=files, scoring=made.scoring, labels=made.labels, text=made.text)
        bundle = bundle.rewrite_manifest(manifest)
    except BaseException as error:
        for file in _written(bundle.path) - before:  # the old manifest names none of them
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{bundle.path}: cannot be written: {error.strerror or error}") from None
        raise
    for name in stale:
        bundle.file(name).unlink(missing_ok=True)
    return bundle


def write_labels(folder: Path, manifest: Manifest, options: LabelOptions) -> Manifest:
    """Write label embeddings (and the text graph) into `folder`, and return the manifest that names them."""
    options.check(has_text_graph=manifest.text is not None)
    names = options.names()
    templates = tuple(options.templates) or (manifest.text.templates if manifest.text else ACTION_TEMPLATES)
    hidden = _hidden_size(manifest)
    scoring = manifest.scoring
    embeddings: tuple[np.ndarray, np.ndarray] | None = None
    if options.text_embeddings is not None:
        from .text import read_text_embeddings

        ready = read_text_embeddings(options.text_embeddings, len(names), hidden)
        patch = ready.patch_text_embeddings
        embeddings = (ready.text_embeddings, ready.text_embeddings if patch is None else patch)
        scoring = _scoring(scoring, ready.logit_scale, ready.logit_bias, str(options.text_embeddings))
    elif options.text_model is not None:
        from .text import load_text_model

        model = load_text_model(options.text_model)
        if model.dim != hidden:
            raise CheckpointError(
                f"{options.text_model}: text features have size {model.dim}; the model's hidden size is {hidden}"
            )
        scoring = _scoring(scoring, model.logit_scale, model.logit_bias, options.text_model)
        if names:
            embeddings = (model.embed(names, templates), model.embed(names, PATCH_TEMPLATES))
        if options.text_graph:
            manifest = _write_text(folder, manifest, model, templates)
    else:
        assert manifest.text is not None
        text = manifest.text
        encoder = TextEncoder(folder / manifest.graphs[text.graph].file, folder / text.tokenizer, text.length)
        embeddings = (encoder.embed(names, templates), encoder.embed(names, text.patch_templates))
    manifest = replace(manifest, scoring=scoring)
    if embeddings is None:
        return manifest
    content = label_bytes(*embeddings)
    file = f"labels-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    (folder / file).write_bytes(content)
    return replace(manifest, labels=Labels(names, file, options.background))


def _write_text(folder: Path, manifest: Manifest, model: TextModel, templates: tuple[str, ...]) -> Manifest:
    from .text import compare_text_graph, write_text_graph
    from .text_tokenizer import write_tokenizer

    mark = secrets.token_hex(4)  # names that no earlier manifest has: until the new one is in place, the old is whole
    graph_file, tokenizer = f"text-{mark}.onnx", f"tokenizer-{mark}.json"
    write_text_graph(model, folder / graph_file)
    write_tokenizer(model, folder / tokenizer)
    compare_text_graph(model, folder / graph_file, folder / tokenizer)
    graph = Graph(
        graph_file,
        (Port("input_ids", "input_ids", "int64", ("B", model.length)),),
        (Port("text_features", "output", "float32", ("B", model.dim)),),
    )
    text = Text("text", tokenizer, model.length, templates, PATCH_TEMPLATES)
    return replace(manifest, graphs={**manifest.graphs, "text": graph}, text=text)


def _scoring(known: Scoring | None, scale: float | None, bias: float | None, source: str) -> Scoring:
    """A task head's numbers stay; otherwise those of the text model, which were not trained with this backbone."""
    if known is not None and known.calibrated:
        return known
    if scale is None or bias is None:
        if known is not None:
            return known
        raise LabelError(
            f"{source}: has no logit_scale and logit_bias; add them to it, give a whole SigLIP model,"
            " or --head of a training checkpoint"
        )
    return Scoring(scale, bias, None, calibrated=False)


def _hidden_size(manifest: Manifest) -> int:
    for graph in manifest.graphs.values():
        for port in graph.inputs:
            if port.role == "text_embeddings":
                return int(port.shape[1])
    raise BundleError("this bundle has no graph that scores labels")


def _written(folder: Path) -> set[Path]:
    """What labelling may have written into a bundle; others may be writing there too."""
    return {file for pattern in ("labels-*", "text-*", "tokenizer-*") for file in folder.glob(pattern)}


def _label_files(manifest: Manifest) -> list[str]:
    """Files that labelling writes."""
    files = [manifest.labels.file] if manifest.labels else []
    if manifest.text is not None:
        graph = manifest.graphs[manifest.text.graph].file
        files += [graph, str(Path(graph).with_suffix(".bin")), manifest.text.tokenizer]
    return files
