"""Describes the layers of a model on `meta` that mix tokens: heads and windows of attention, and other layers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from trainer.base.architecture import AttentionLayer, MixingLayer
from trainer.model.documents import knows_borders, mixers
from trainer.model.rows.mixing import divides, exchanges


def attention_layers(
    layers: Iterable[nn.Module], modules: Mapping[str, nn.Module], config: PretrainedConfig
) -> Iterator[AttentionLayer]:
    """The attention layers in a model's decoder layers. `modules` has all modules of the model, by path."""
    for number, layer in enumerate(layers):
        prefix = next(path for path, module in modules.items() if module is layer)
        for path, module in layer.named_modules(prefix=prefix):
            if isinstance(getattr(module, "is_causal", None), bool):
                keys, window = _keys(module, config), _window(module, number, config)
                yield AttentionLayer(path, number, *keys, window, _query_heads(module, config))


def mixing_layers(layers: Iterable[nn.Module], modules: Mapping[str, nn.Module], hidden: int) -> Iterator[MixingLayer]:
    """The layers in a model's decoder layers that mix tokens in other ways. `hidden` is the width of their states."""
    paths = {module: path for path, module in modules.items()}
    example = torch.empty(1, 8, hidden, device="meta")
    for number, layer in enumerate(layers):
        for mixer in mixers(layer):
            if not knows_borders(mixer):
                yield MixingLayer(paths[mixer], number, exchanges(mixer, example) if divides(mixer) else ())


def _keys(module: nn.Module, config: PretrainedConfig) -> tuple[int | None, int | None]:
    """The number of key heads and their width, if values have the same."""
    size, made_by = getattr(module, "head_dim", None), getattr(module, "k_proj", None)
    if not isinstance(size, int):
        return None, None
    if isinstance(made_by, nn.Linear):
        return made_by.out_features // size, size
    heads = declared(config, "num_key_value_heads")
    return (heads, size) if isinstance(heads, int) and hasattr(module, "qkv_proj") else (None, None)


def _query_heads(module: nn.Module, config: PretrainedConfig) -> int | None:
    """The number of query heads, from the layer itself or from its family's setting. None if neither says."""
    own = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads"))
    found = next((count for count in own if type(count) is int), getattr(config, "num_attention_heads", None))
    return found if type(found) is int else None


def _window(module: nn.Module, layer: int, config: PretrainedConfig) -> int | None:
    kinds = declared(config, "layer_types")
    if kinds and kinds[layer] == "full_attention":
        return None
    if kinds and kinds[layer] == "chunked_attention":
        return declared(config, "attention_chunk_size")
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None  # type: ignore[return-value]
    return declared(config, "sliding_window") or None


def declared(config: PretrainedConfig, key: str) -> Any:
    """A setting that the family itself declares. transformers keeps other keys of config.json too, but ignores them."""
    return getattr(config, key, None) if key in type(config).__dataclass_fields__ else None
