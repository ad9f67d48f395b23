"""Tries a small version of the class that users load, if it also processes pictures or sound.

It must predict text exactly as the language model does. Its decoder and its head are those of the small language model.
Its towers take no memory, because text does not reach them. A module that text does reach gets random weights when it
is called.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.base.describe.composite import inner_of, with_parts_of
from trainer.base.describe.language_part import whole_model
from trainer.base.describe.logits import probe_logits
from trainer.base.describe.trial.self_test import are_alike, hidden_states, some_text
from trainer.base.describe.trial.small import small_id
from trainer.model.parts import body

_AS_WIDE = ("out_hidden_size", "text_hidden_size")
"""Settings of towers that classes require to be the language model's hidden size."""


def small_whole(config: PretrainedConfig, language: PreTrainedModel) -> PreTrainedModel:
    """The whole model that `config` describes, around the small `language` model.

    transformers may raise any error for sizes that a class was not made for."""
    made = copy.deepcopy(config)
    text, small = made.get_text_config(), language.config.get_text_config()
    around, place = next(_places(made, text))
    for key, value in vars(text).items():  # a setting that also stands in the whole's settings
        if key in vars(around) and vars(around)[key] == value and key in vars(small):
            setattr(around, key, vars(small)[key])
    for part in _parts(made):
        for key, value in list(vars(part).items()):
            if key in _AS_WIDE and value == text.hidden_size:
                setattr(part, key, small.hidden_size)
            else:
                setattr(part, key, small_id(key, value))
    setattr(around, place, small)
    whole = hollow(with_parts_of(whole_model(made, torch.float32), language))
    for module in whole.modules():
        module.register_forward_pre_hook(_fill)
    return whole.eval()


def predicts_otherwise(whole: PreTrainedModel, language: PreTrainedModel) -> bool:
    """Whether `small_whole` predicts text differently than the `language` model.

    The known scaling and capping of logits is applied to the language model. The class may raise any error for text
    without pictures or sound."""
    head: Any = language.get_output_embeddings()
    tokens = some_text(language, 21)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = whole(input_ids=tokens, use_cache=False).logits
        found = head(hidden_states(body(language), tokens))
        logits = probe_logits(whole, inner_of(whole), head)
    return logits is None or not are_alike(logits(found), expected)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _places(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[tuple[PretrainedConfig, str]]:
    """Yield the settings that contain those of the language model, at any depth, and their name there."""
    for part in _parts(config):
        yield from ((part, key) for key, value in vars(part).items() if value is text)


def hollow(whole: PreTrainedModel) -> PreTrainedModel:
    """`whole`, made on `meta`, with zeros on the CPU that take no memory. Its code may ask for its weights' device."""
    for module in whole.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                module._parameters[name] = nn.Parameter(_zeros(value), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = _zeros(value)
    return whole


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _fill(module: nn.Module, _given: Any) -> None:
    """Give the weights of `module` that take no memory random values, so that no module on text's path has zeros."""
    for name, value in module._parameters.items():
        if value is not None and value.numel() > 1 and not any(value.stride()):
            module._parameters[name] = nn.Parameter(0.05 * torch.randn(value.shape), requires_grad=False)
