"""Tiny models that see, each with the language model of one of the families."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

from tests.families import FAMILIES, SIZES
from tests.material import byte_tokenizer

# A model that sees -> the family of the language model in it.
COMPOSITES = {
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5-moe",
    "mistral3": "mistral",
    "llama4": "llama4",
    "kimi_k25": "deepseek-v3",
}
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 2),
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 16,
    "num_position_embeddings": 4,
}


def make_composite(folder: Path, kind: str) -> Any:
    """A tiny random model that sees, as transformers builds and writes it."""
    text = {"tie_word_embeddings": False, **SIZES, **FAMILIES[COMPOSITES[kind]]}
    made_of: Any = CONFIG_MAPPING[kind]
    vision = getattr(made_of(), "vision_config", None) or CONFIG_MAPPING[f"{kind}_vision"]()
    sizes = {key: size for key, size in _VISION.items() if hasattr(vision, key)}
    if hasattr(vision, "out_hidden_size"):
        sizes["out_hidden_size"] = text["hidden_size"]
    config = made_of(
        text_config=text,
        vision_config={"model_type": vision.model_type, **sizes},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    torch.manual_seed(5)
    model: Any = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return model
