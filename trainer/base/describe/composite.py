"""The language model inside a model that sees or hears as well: its part is found, what else is in the files is left
out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_settings import model_config
from trainer.base.describe.trial.peft_names import saved_paths


def composite_model(directory: Path) -> PreTrainedModel | None:
    """The whole model that transformers builds of the config.json in `directory`, on `meta`; None where that is a
    language model alone."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.get_text_config() is config:
        return None
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(config, trust_remote_code=False)


def composite_class(directory: Path) -> str | None:
    """The name of transformers' class for the whole model of the config.json in `directory`; None for a language model
    alone.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.get_text_config() is config:
        return None
    made: type = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]  # type: ignore[assignment]  # typed as what is not loaded yet
    return made.__name__


def language_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str | None]:
    """Maps the name of a weight of `whole` to its name in the `language` model, which transformers builds of a part of
    its settings; to None where it is not of that part."""
    pairs = _places(whole, language)

    def name_in_language(name: str) -> str | None:
        for there, here in pairs:
            if name.startswith(f"{there}."):
                return f"{here}.{name.removeprefix(f'{there}.')}".removeprefix(".")
        return None

    return name_in_language


def whole_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str]:
    """The opposite of `language_names`: maps the name of a module or weight of the `language` model to its name in
    `whole`.
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
    """The paths under which PEFT's folder of an adapter may have each of these layers of the language model: its path
    in the class that people load, and the one that PEFT renames to that. `directory` has the base's config.json."""
    whole, language = composite_model(Path(directory)), meta_model(model_config(Path(directory), layers))
    in_whole = {path: path if whole is None else whole_names(whole, language)(path) for path in paths}
    saved = saved_paths(whole or language, list(in_whole.values()))
    return {path: [there, saved[there] or there] for path, there in in_whole.items()}


def _places(whole: PreTrainedModel, language: PreTrainedModel) -> list[tuple[str, str]]:
    """The paths in `whole` and in `language` of the parts that both have: the head, and the decoder.

    The head comes first, as it may lie inside the decoder.
    """
    head = _path(whole, whole.get_output_embeddings()), _path(language, language.get_output_embeddings())
    return [head, (_path(whole, whole.get_decoder()), place_of_decoder(whole, language))]


def place_of_decoder(whole: PreTrainedModel, language: PreTrainedModel) -> str:
    """The path in the `language` model of the module that is the decoder of `whole`; empty where that is all of it."""
    decoder = whole.get_decoder()
    return next(path for path, module in language.named_modules() if type(module) is type(decoder))


def _path(model: nn.Module, part: nn.Module | None) -> str:
    return next(path for path, module in model.named_modules() if module is part)
