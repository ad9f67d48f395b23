"""Finds the language model inside a model that also processes pictures or sound. The rest of its files is left out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_part import head_of, whole_class, whole_model
from trainer.base.describe.language_settings import model_config
from trainer.base.describe.trial.peft_names import saved_paths
from trainer.model.parts import body


def composite_model(directory: Path) -> PreTrainedModel | None:
    """The whole model of the config.json in `directory`, on `meta`. None if it is only a language model."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return None if config.get_text_config() is config else whole_model(config)


def composite_class(directory: Path) -> str | None:
    """transformers' class for the whole model of the config.json in `directory`. None for a language model alone."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return None if config.get_text_config() is config else whole_class(config).__name__


def language_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str | None]:
    """A function that maps the name of a weight in `whole` to its name in the `language` model.

    transformers builds the `language` model from a part of the settings of `whole`. A weight that is not in that part
    maps to None."""
    pairs = _places(whole, language)

    def name_in_language(name: str) -> str | None:
        for there, here in pairs:
            if name.startswith(f"{there}."):
                return f"{here}.{name.removeprefix(f'{there}.')}".removeprefix(".")
        return None

    return name_in_language


def whole_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str]:
    """A function that maps the name of a module or weight in the `language` model to its name in `whole`.

    It is the opposite of `language_names`.
    """
    pairs = _places(whole, language)

    def name_in_whole(name: str) -> str:
        for there, here in pairs:
            if not here:
                return f"{there}.{name}"
            if f"{name}.".startswith(f"{here}."):
                return f"{there}{name.removeprefix(here)}"
        raise AssertionError(f"{name} is of no part that both models have")

    return name_in_whole


def adapter_paths(directory: str, layers: int | None, paths: Sequence[str]) -> dict[str, list[str]]:
    """Layer of the language model -> the paths under which PEFT's folder of an adapter may have it.

    One is its path in the class that users load; the other is the path that PEFT renames to that. `directory` has the
    base's config.json."""
    whole, language = composite_model(Path(directory)), meta_model(model_config(Path(directory), layers))
    in_whole = {path: path if whole is None else whole_names(whole, language)(path) for path in paths}
    saved = saved_paths(whole or language, list(in_whole.values()))
    return {path: [there, saved[there] or there] for path, there in in_whole.items()}


def _places(whole: PreTrainedModel, language: PreTrainedModel) -> list[tuple[str, str]]:
    """The paths in `whole` and in `language` of the parts that both have: the head, and the decoder.

    The head comes first, because it may lie inside the decoder.
    """
    head = _path(whole, head_of(whole)), _path(language, head_of(language))
    return [head, (_path(whole, whole.get_decoder()), place_of_decoder(whole, language))]


def inner_of(whole: PreTrainedModel) -> nn.Module:
    """The module of a whole model that makes hidden states: its decoder, or the decoder's body if that has the head."""
    decoder: Any = whole.get_decoder()
    return decoder if decoder.get_output_embeddings() is None else body(decoder)


def place_of_decoder(whole: PreTrainedModel, language: PreTrainedModel) -> str:
    """The path in the `language` model of the decoder of `whole`. Empty if the decoder is the whole language model."""
    decoder = whole.get_decoder()
    return next(path for path, module in language.named_modules() if type(module) is type(decoder))


@contextmanager
def outputs_lack_nothing() -> Iterator[None]:
    """A context in which an output of transformers returns None for a field that it lacks.

    In 5.24 the whole class of Llama 4 asks its language model's output for pictures, and fails without this."""
    ModelOutput.__getattr__ = _no_such_field  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del ModelOutput.__getattr__  # type: ignore[attr-defined]


def _no_such_field(output: ModelOutput, name: str) -> None:
    if name.startswith("_"):
        raise AttributeError(name)


def with_parts_of(whole: PreTrainedModel, language: PreTrainedModel) -> PreTrainedModel:
    """`whole` with its decoder and head replaced by those of the `language` model."""
    (head, other_head), (decoder, other) = _places(whole, language)
    for there, here in ((decoder, other), (head, other_head)):
        whole.set_submodule(there, language.get_submodule(here))
    return whole


def _path(model: nn.Module, part: nn.Module | None) -> str:
    return next(path for path, module in model.named_modules() if module is part)
