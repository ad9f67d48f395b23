"""Makes a model of the same kinds of layers as a base, so small that a CPU computes it in a fraction of a second.

Its settings are the base's own, except for the sizes, because the family's code depends on all other settings.
sizes.yaml has the sizes by the families' names for them. A size that is not listed there stays as it is.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.base.describe.description import EXPERT_COUNTS
from trainer.base.describe.empty_model import LanguagePart, with_linear_layers

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
_TABLES: dict[str, dict[int, str]] = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text(encoding="utf-8"))
_SIZES = {name: size for table in _TABLES.values() for size, names in table.items() for name in names.split()}
_SIZES |= dict.fromkeys(EXPERT_COUNTS, 6)
HEADS, HEAD, HIDDEN, VOCABULARY = (
    _SIZES[name] for name in ("num_attention_heads", "head_dim", "hidden_size", "vocab_size")
)
_NARROW = 48
"""The width of MLPs and experts, whatever they are called."""
_WIDTH_OF_MLP = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "dim_ff", "feed_forward_size")
# A list with one entry for each layer has one of these words in its name.
BY_LAYER = ("layer", "pattern", "types", "intermediate_size")


def small_model(config: PretrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    """A model in fp32 with random weights, equal at every call, of the classes of `like`, which `config` describes.

    transformers may raise any error for sizes that a family was not made for."""
    made: Any = type(config)(**small_settings(config))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        if isinstance(like, LanguagePart):
            decoder = type(like.model)(made)
            head = nn.Linear(made.hidden_size, made.vocab_size, bias=False)
            return _spread(LanguagePart(decoder, head, type(like)))
        # transformers' grouped products need widths that are multiples of 16 bytes.
        options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
        return _spread(with_linear_layers(AutoModelForCausalLM.from_config(made, trust_remote_code=False, **options)))


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Make the weights large enough that a layer's output matters beside the residual that bypasses it."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for value in model.parameters():
            if value.ndim > 1 and 0 < float(value.std()) < 0.08:
                value.mul_(0.08 / value.std())
            elif value.ndim == 1:
                value.add_(0.05 * torch.randn_like(value))
    return model.eval()


def small_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of the small model, in the form of transformers' own class of the same `model_type`."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    if getattr(config, "hidden_size", HIDDEN + 1) <= HIDDEN:
        return settings  # the model is already small
    made = {**_sized(settings), **_that_follow(settings)}
    if rotary := settings.get("rope_parameters"):
        made["rope_parameters"] = _small_rotary(rotary, settings, made)
    count = next((settings[key] for key in _LAYERS if isinstance(settings.get(key), int)), 0)
    kept = _one_of_each_kind(settings, count)
    for key, value in settings.items():
        if key.endswith(_SOURCES) and _is_by_layer(key, value, count):
            own = [layer for layer in kept if value[layer] == layer]
            made[key] = [
                place if layer in own else kept.index(max(one for one in own if one < layer))
                for place, layer in enumerate(kept)
            ]
        elif _is_by_layer(key, value, count):
            made[key] = [_size_of(key, value[layer]) for layer in kept]
        elif key.endswith("layer_ids") and isinstance(value, list):
            made[key] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, dict) and value and all(str(layer).isdecimal() for layer in value):
            made[key] = {
                kept.index(int(layer)): {**_sized(own), **_that_follow({**settings, **own})}
                for layer, own in value.items()
                if int(layer) in kept
            }
    for key in _LAYERS:
        if isinstance(settings.get(key), int):
            made[key] = len(kept)
    return made


_SOURCES = (
    "source_layers"  # each layer's entry is the number of the layer whose keys and values it takes, often its own
)
_NOT_OF_THE_MODEL = (
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "quantization_config",
)


def _sized(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _size_of(key, value) for key, value in settings.items()}


def _small_rotary(rotary: Mapping[str, Any], settings: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, or those of each kind of layer, for heads of the sizes `made`.

    Sections of the rotated dimension are scaled with it."""
    found = {
        key: _small_rotary(value, settings, made) if isinstance(value, dict) else value for key, value in rotary.items()
    }
    share = rotary.get("partial_rotary_factor")
    turned = made.get("qk_rope_head_dim") or int(HEAD * (share or 1.0))
    if share and made.get("qk_rope_head_dim") and share * settings.get("head_dim", 0) == settings["qk_rope_head_dim"]:
        found["partial_rotary_factor"] = turned / made["head_dim"]
    if sections := rotary.get("mrope_section"):
        found["mrope_section"] = _scaled(sections, turned // 2)
    return found


def _scaled(sections: list[int], total: int) -> list[int]:
    """The sections of a rotary dimension, in the same proportions."""
    made = [max(1, part * total // sum(sections)) for part in sections]
    return [*made[:-1], total - sum(made[:-1])]


def _that_follow(settings: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that follow from others, such as the number of key heads, or the heads of a recurrence's inner width."""
    made, inner = dict[str, int](), HIDDEN * int(settings.get("expand") or settings.get("mamba_expand") or 1)
    heads = next((settings[key] for key in _HEADS if settings.get(key)), None)
    if heads and settings.get("num_key_value_heads") == heads:
        made["num_key_value_heads"] = HEADS
    parts = [settings.get(key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if parts[1] and settings.get("head_dim") in (parts[1], sum(parts)):
        made["head_dim"] = _SIZES["qk_rope_head_dim"] + (HEAD if settings["head_dim"] != parts[1] else 0)
    if (attended := settings.get("attention_hidden_size")) and settings.get("attention_head_dim"):
        made["attention_hidden_size"] = HIDDEN * attended // settings["hidden_size"]
        made["attention_head_dim"] = made["attention_hidden_size"] // HEADS
    if settings.get("qk_head_dim"):
        made["qk_head_dim"] = _SIZES["qk_nope_head_dim"] + _SIZES["qk_rope_head_dim"]
    for count, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("num_heads", "head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
    ):
        if settings.get(width) and settings.get(count) and (count != "num_heads" or settings.get("expand")):
            made |= {count: HEADS, width: inner // HEADS}
    if settings.get("mamba_d_ssm"):
        made["mamba_d_ssm"] = inner
    return made


_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def _size_of(key: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return _sized(value)
    if not isinstance(key, str):
        return value
    if (found := small_id(key, value)) is not value:
        return found
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if key.endswith(_WIDTH_OF_MLP) or "intermediate_size" in key:
        return min(value, _NARROW)
    small = _SIZES.get(key)
    return value if small is None else min(value, small)


def small_id(key: str, value: Any) -> Any:
    """The value of a setting. A token id is replaced by one that the trial's text does not contain."""
    if not key.endswith(_IDS) or not isinstance(value, int) or isinstance(value, bool):
        return value
    return 0 if key == "pad_token_id" else min(value, 2)


_IDS = ("token_id", "token_index")


def _is_by_layer(key: str, value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and any(word in key for word in BY_LAYER)


def _one_of_each_kind(settings: Mapping[str, Any], count: int) -> list[int]:
    """The numbers of layers that differ in any list with an entry for each layer.

    There are at least two, because families may treat their first layer differently.
    """
    lists = [
        [layer == source for layer, source in enumerate(value)] if key.endswith(_SOURCES) else value
        for key, value in settings.items()
        if _is_by_layer(key, value, count)
    ]
    kinds = dict[Any, int]()
    for layer in range(count):
        kinds.setdefault(str([value[layer] for value in lists]), layer)
    kept = set(kinds.values())
    more: Iterable[int] = (layer for layer in range(count) if layer not in kept)
    return sorted({*kept, *(next(more, 0) for _ in range(2 - len(kept)))})
