"""A small SigLIP checkpoint with random weights and its own tokenizer, in the published form.

The tokenizer is a sentencepiece unigram model with the settings of SigLIP's English vocabulary: `<pad>` 0,
`</s>` 1, `<unk>` 2, NFKC normalisation, a dummy prefix, padding with `</s>` to 64 tokens.
"""

from __future__ import annotations

import io
from pathlib import Path

VOCABULARY = 240
LENGTH = 64  # tokens
LAYERS = 2

_SENTENCE = """
person man woman child dog cat horse robot cook player driver doctor teacher painter drummer surfer
climber open close walk pick look ride cut play throw catch push pull lift pour wash brush paint write
read jump climb door car cup coffee apple guitar bicycle wood ball bottle table chair window street
kitchen garden mountain river photo video example demonstration practice during using doing performing
practicing showing about after before near red green blue yellow white black small large quick slow old
young bright dark empty full wooden plastic metal hammer needle bread butter cheese tomato potato onion
pepper salt sugar water juice plate bowl spoon fork knife running swimming dancing singing skating skiing
sailing fishing hunting boxing wrestling fencing archery bowling jalapeño café naïve façade über déjà vu
crème brûlée señor Zürich Ångström œuvre straße ½ ² № ™ 東京 привет σοφός 0 1 2 3 4 5 6 7 8 9 10 12 30
100 2024 3.14 it's don't state-of-the-art e-mail x-ray t-shirt
"""


def make_siglip_checkpoint(
    folder: Path,
    hidden_size: int = 96,
    seed: int = 0,
    *,
    text_only: bool = False,
    vocabulary: int = VOCABULARY,
    projection_size: int | None = None,
) -> Path:
    """Write a checkpoint folder: `config.json`, `model.safetensors`, `spiece.model`, `tokenizer_config.json`.

    Args:
        folder: made if needed.
        hidden_size: of both towers.
        seed: of the weights. They are large enough that different texts get clearly different features.
        text_only: a `SiglipTextModel`, without vision tower, `logit_scale` and `logit_bias`.
        vocabulary: number of token embeddings.
        projection_size: size of the text features where it is not `hidden_size`.
    """
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipTextModel, SiglipTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pieces = folder / "spiece.model"
    pieces.write_bytes(_sentencepiece_model())
    SiglipTokenizer(str(pieces)).save_pretrained(folder)
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    text = {
        **sizes,
        "vocab_size": vocabulary,
        "max_position_embeddings": LENGTH,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if projection_size is not None:
        text["projection_size"] = projection_size
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = SiglipTextModel(config.text_config) if text_only else SiglipModel(config)
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embedding" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if "position" in name else 1.0))
            elif parameter.ndim == 2:  # sharp attention, or the many padding tokens would hide the text
                gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(gain * torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            elif not name.startswith("logit_"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
        if not text_only:
            model.logit_scale.fill_(2.3)
            model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    return folder


def _sentencepiece_model() -> bytes:
    import sentencepiece

    words = _SENTENCE.split()
    count = len(words)
    sentences = [
        f"a {words[i % count]} {words[i * 7 % count]}ing the {words[i * 13 % count]} in a {words[i * 29 % count]}s"
        for i in range(3 * count)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        hard_vocab_limit=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
