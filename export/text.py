"""The text side of open-vocabulary outputs: SigLIP's text tower and label embeddings.

`load_text_model` reads a SigLIP checkpoint, whose `embed` makes the embeddings that the label graph scores against.
`write_text_graph` puts the tower into a bundle, which with the tokenizer (`text_tokenizer`) takes new labels without
PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.counted import counted
from ..runtime.errors import BundleError, CheckpointError, first_line
from ..runtime.text import ACTION_TEMPLATES, LabelError, TextEncoder, label_embeddings
from .graph import GraphBuilder, WeightFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_LENGTH = 64  # tokens; StreamFormer's labels were tokenised to this length
TOLERANCE = 2e-4  # between PyTorch and the text graph

# Texts on which a converted tokenizer must agree with the original before it is written.
PROBES = (
    *(template.replace("{}", "opening a door") for template in ACTION_TEMPLATES),
    "",
    " ",
    "  leading spaces",
    "Hello,  WORLD!  ",
    "a café; naïve façade — jalapeño & crème brûlée",
    "cafe\u0301 from a decomposed source",
    "état-of-the-art (e.g. it's 3.14 km² or ½ №5™)…",
    "ＦＵＬＬ ｗｉｄｔｈ！＜／ｓ＞　and tabs\tand\nlines",
    "0123456789 1,000,000 12:30",
    "¿qué? Straße ÅNGSTRÖM İstanbul ΟΔΥΣΣΕΥΣ привет 東京 한국어 हिन्दी العربية",
    "👩🏽‍🚀 waves 🇩🇪 ❤️ 1️⃣",
    "!!! ??? ---",
    "</s> <unk> <pad> ▁ underline",
    "zzzzzzzzzzzzzzzzzzzzzzzz aaaaaaaaaaaa",
    "a person walking past the red car in front of the house with a cup of coffee " * 6,
)


@dataclass
class TextModel:
    """A SigLIP text tower with its tokenizer.

    Attributes:
        source: where it was read from.
        tower: `transformers.SiglipTextModel`, float32, in evaluation mode.
        tokenizer: its tokenizer.
        length: tokens per text; texts are padded and truncated to it.
        logit_scale, logit_bias: of the whole SigLIP model, the scale as its logarithm; None where the
            checkpoint holds the text tower alone.
    """

    source: str
    tower: Any
    tokenizer: Any
    length: int
    logit_scale: float | None = None
    logit_bias: float | None = None

    @property
    def dim(self) -> int:
        """Size of the text features."""
        return int(self.tower.config.projection_size or self.tower.config.hidden_size)

    def token_ids(self, texts: list[str]) -> np.ndarray:
        """int64 [B, length]. Labels are data: `</s>` in one is text, not the end of it."""
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            split_special_tokens=True,
        )
        return np.array(encoded["input_ids"], np.int64)

    def features(self, texts: list[str]) -> np.ndarray:
        """Pooled features of B texts, not normalised: float32 [B, dim]."""
        import torch

        # no attention mask: SigLIP was trained with the padding attended to
        with torch.inference_mode():
            pooled: np.ndarray = self.tower(torch.from_numpy(self.token_ids(texts))).pooler_output.numpy()
        return pooled

    def embed(self, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Embeddings of labels, float32 [labels, dim]; see `runtime.text.label_embeddings`."""
        return label_embeddings(self.features, labels, templates)


@dataclass(frozen=True)
class TextEmbeddings:
    """Label embeddings that were made elsewhere.

    Attributes:
        text_embeddings: for the scores of a frame, float32 [labels, hidden].
        patch_text_embeddings: for those of patches; None where the file has none.
        logit_scale, logit_bias: the scale as its logarithm; None where the file has none.
    """

    text_embeddings: np.ndarray
    patch_text_embeddings: np.ndarray | None = None
    logit_scale: float | None = None
    logit_bias: float | None = None


def load_text_model(source: str) -> TextModel:
    """Read a SigLIP text tower and its tokenizer.

    Args:
        source: folder or hub id of a whole SigLIP model or of its text tower.

    Raises:
        CheckpointError: nothing there, another architecture, weights that do not fit the config, or a
            tokenizer that does not fit the weights.
    """
    from .checkpoint import find_checkpoint, read_json, read_weights, weight_files

    folder = find_checkpoint(source, ["*.json", "*.model", "model*.safetensors"])
    if not folder.is_dir():
        raise CheckpointError(f"{source}: expected the folder of a SigLIP model, found a file")
    config = _text_config(read_json(folder / "config.json"), folder / "config.json")
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights.update(read_weights(file))
    scale, bias = (
        float(weights.pop(key).float().reshape(-1)[0]) if key in weights else None
        for key in ("logit_scale", "logit_bias")
    )
    with _quiet_transformers():
        tower = _load_tower(config, weights, source)
        tokenizer = _load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer does not belong to the weights: it has {len(tokenizer)} tokens,"
            f" text_config.vocab_size is {config.vocab_size}"
        )
    length = min(MAX_LENGTH, config.max_position_embeddings)
    return TextModel(source, tower, tokenizer, length, scale, bias)


def read_text_embeddings(path: Path, labels: int, dim: int) -> TextEmbeddings:
    """Read label embeddings from a safetensors file.

    Keys: `text_embeddings` [labels, dim]; optionally `patch_text_embeddings` of the same shape, and the
    scalars `logit_scale` (a logarithm) and `logit_bias`. Stored as float32 or float16.

    Args:
        labels: how many labels there are.
        dim: hidden size of the model that they are to be compared with.

    Raises:
        LabelError: missing or damaged file, missing or unknown key, wrong shape or type, NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    matrices = ("text_embeddings", "patch_text_embeddings")
    scalars = ("logit_scale", "logit_bias")
    if not path.is_file():
        raise LabelError(f"{path}: no such file of text embeddings")
    values: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (it has no __iter__)
                dtype = file.get_slice(key).get_dtype()
                if key not in (*matrices, *scalars):
                    known = ", ".join((*matrices, *scalars))
                    raise LabelError(f"{path}: unknown key '{key}'; expected {known}")
                if dtype not in ("F32", "F16"):
                    raise LabelError(f"{path}: {key} is {dtype}; expected F32 or F16")
                values[key] = file.get_tensor(key).astype(np.float32)
    except (SafetensorError, OSError) as error:
        raise LabelError(f"{path}: damaged, or not a safetensors file ({error})") from None
    if "text_embeddings" not in values:
        found = ", ".join(values) or "no keys"
        raise LabelError(f"{path}: missing key 'text_embeddings'; found {found}")
    for key, value in values.items():
        if key in matrices and value.shape != (labels, dim):
            raise LabelError(
                f"{path}: {key} has shape {list(value.shape)}; expected [{labels}, {dim}]"
                f" ({counted(labels, 'label')}, hidden size {dim})"
            )
        if key in scalars and value.size != 1:
            raise LabelError(f"{path}: {key} has shape {list(value.shape)}; expected one number")
        if not np.isfinite(value).all():
            raise LabelError(f"{path}: NaN or infinity in {key}")
    return TextEmbeddings(
        values["text_embeddings"],
        values.get("patch_text_embeddings"),
        *(float(values[key].reshape(())) if key in values else None for key in scalars),
    )


def write_text_graph(model: TextModel, path: Path) -> None:
    """Write the text tower as ONNX: `input_ids` int64 [B, length] to `text_features` float32 [B, dim].

    The features are not normalised. The weights go beside the graph, into `path` with the suffix `.bin`.

    Raises:
        CheckpointError: the tower has an activation that has no ONNX form here.
    """
    config = model.tower.config
    weights = {key.removeprefix("text_model."): value.numpy() for key, value in model.tower.state_dict().items()}
    file = WeightFile(path.with_suffix(".bin"))
    try:
        graph = GraphBuilder("text", file)
        _text_tower(graph, config, weights, model.length, model.dim)
        graph.save(path)
    except ValueError as error:
        raise CheckpointError(f"{model.source}: text_config: {error}") from None
    finally:
        file.close()


def compare_text_graph(model: TextModel, graph: Path, tokenizer: Path) -> float:
    """Largest difference between the features of PyTorch and of the written files, over texts of every kind; as a share
    of the largest feature where that is above 1.

    Raises:
        BundleError: they disagree.
    """
    texts = list(PROBES)
    found, wanted = TextEncoder(graph, tokenizer, model.length).features(texts), model.features(texts)
    difference = float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))
    if not difference <= TOLERANCE:  # NaN too
        raise BundleError(
            f"{graph}: text features differ from PyTorch's by {difference:.2g}, more than {TOLERANCE:.0e}"
        )
    return difference


def _text_config(values: dict[str, Any], where: Path) -> Any:
    from transformers import SiglipTextConfig

    kind = values.get("model_type")
    if kind not in ("siglip", "siglip_text_model"):
        raise CheckpointError(f"{where}: expected a SigLIP model (model_type 'siglip'), found {kind!r}")
    sizes = values.get("text_config", {}) if kind == "siglip" else values
    with _quiet_transformers():
        try:
            config = SiglipTextConfig.from_dict(sizes)
        except Exception as error:  # its validation raises errors of its own kinds
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where}: text_config cannot be used ({reason})") from None
    if getattr(config, "projection_size", None) is None:
        config.projection_size = config.hidden_size
    return config


def _load_tower(config: Any, weights: dict[str, Tensor], where: str) -> Any:
    from transformers import SiglipTextModel

    from .checkpoint import fill

    try:
        tower: Any = SiglipTextModel(config)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: text_config cannot be used ({error})") from None
    names = {key.removeprefix("text_model."): key for key in tower.state_dict()}  # some versions have the prefix
    given = {
        names.get(name := key.removeprefix("text_model."), name): value
        for key, value in weights.items()
        if not key.startswith("vision_model.") and not key.endswith("position_ids")
    }
    fill(tower, given, f"{where}: text tower")
    return tower.float().eval()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model")):
        raise CheckpointError(f"{folder}: no tokenizer: neither tokenizer.json nor spiece.model is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        package = error.name or "sentencepiece"
        raise CheckpointError(
            f"{folder}: its tokenizer needs the package {package}: pip install 'framestep[export]'"
        ) from None
    except Exception as error:  # the parsers raise errors of their own kinds
        raise CheckpointError(f"{folder}: damaged tokenizer ({first_line(error)})") from None
    # a file that ends between two tokens is read without complaint, and its settings, which come last, are lost
    if hasattr(tokenizer, "sp_model") and not sentencepiece_proto(tokenizer).HasField("trainer_spec"):
        raise CheckpointError(f"{folder}: damaged tokenizer (its sentencepiece model is truncated)")
    return tokenizer


def sentencepiece_proto(tokenizer: Any) -> Any:
    """The sentencepiece model of a tokenizer of `transformers`, as its message."""
    import sentencepiece.sentencepiece_model_pb2

    messages: Any = sentencepiece.sentencepiece_model_pb2
    return messages.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Published SigLIP configs name token ids that they do not have, and transformers warns each time."""
    from transformers import utils

    logging: Any = utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _text_tower(g: GraphBuilder, config: Any, weights: dict[str, np.ndarray], length: int, dim: int) -> None:
    """Sizes in shape comments: B texts, T tokens, D hidden."""

    def linear(value: str, name: str) -> str:
        bias = weights.get(f"{name}.bias")
        return g.linear(value, f"text.{name}", weights[f"{name}.weight"].T, bias)

    def layer_norm(value: str, name: str) -> str:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return g.layer_norm(value, f"text.{name}", weight, bias, config.layer_norm_eps)

    token = weights["embeddings.token_embedding.weight"]
    position = weights["embeddings.position_embedding.weight"][:length]
    heads = config.num_attention_heads
    ids = g.input("input_ids", "int64", ["B", length])
    tokens = g.node("Gather", g.weight("text.embeddings.token_embedding.weight", token), ids, axis=0)
    x = g.node("Add", tokens, g.weight("text.embeddings.position_embedding.weight", position))  # [B, T, D]
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        g.scope(f"layers.{index}")
        y = layer_norm(x, f"{layer}.layer_norm1")
        q, k, v = (linear(y, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        mixed = g.node("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads)
        x = g.node("Add", x, linear(mixed, f"{layer}.self_attn.out_proj"))
        y = layer_norm(x, f"{layer}.layer_norm2")
        y = g.activation(linear(y, f"{layer}.mlp.fc1"), config.hidden_act)
        x = g.node("Add", x, linear(y, f"{layer}.mlp.fc2"))
    g.scope("pool")
    last = g.node("Gather", x, g.constant([length - 1]), axis=1)  # [B, 1, D]; in short texts it is padding
    last = g.node("Squeeze", last, g.constant([1]))  # [B, D]
    pooled = linear(layer_norm(last, "final_layer_norm"), "head")
    g.output(pooled, "text_features", "float32", ["B", dim])
