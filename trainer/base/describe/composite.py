"""The language model inside a model that sees or hears as well: its part is found, what else is in the files is left out."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel


def composite_model(directory: Path) -> PreTrainedModel | None:
    """The whole model that transformers builds of the config.json in `directory`, on `meta`; None where that is a language
    model alone."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.get_text_config() is config:
        return None
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(config, trust_remote_code=False)


def language_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str | None]:
    """Maps the name of a weight of `whole` to its name in the `language` model, which transformers builds of a part of its
    settings; to None where it is not of that part."""
    head = _path(whole, whole.get_output_embeddings()), _path(language, language.get_output_embeddings())
    # The head first: it may lie inside the decoder.
    pairs = [head, (_path(whole, whole.get_decoder()), place_of_decoder(whole, language))]

    def name_in_language(name: str) -> str | None:
        for there, here in pairs:
            if name.startswith(f"{there}."):
                return f"{here}.{name.removeprefix(f'{there}.')}".removeprefix(".")
        return None

    return name_in_language


def place_of_decoder(whole: PreTrainedModel, language: PreTrainedModel) -> str:
    """The path in the `language` model of the module that is the decoder of `whole`; empty where that is all of it."""
    decoder = whole.get_decoder()
    return next(path for path, module in language.named_modules() if type(module) is type(decoder))


def _path(model: nn.Module, part: nn.Module | None) -> str:
    return next(path for path, module in model.named_modules() if module is part)
