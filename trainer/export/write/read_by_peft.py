"""An adapter's weights under the names by which PEFT loads all of them into the class that people load.

PEFT renames a LoRA adapter's weights, and its targets, by transformers' tables of the names in a base's files. For a
few families it takes the names that the class has now for the names in its files. Then it loads only a part of the
adapter, and only warns. Such weights are written under the names that the base's files would have for them. PEFT
renames these to the right ones.
"""

import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load, save
from transformers import PreTrainedModel

from trainer.base.describe.composite import composite_model
from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_settings import model_config
from trainer.base.describe.trial.peft_names import saved_paths
from trainer.base.find.locate import base_files
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.tuning.head import WithHead
from trainer.tuning.shared.linear_adapters import PREFIX, SETTINGS, WEIGHTS


def as_peft_reads(files: Mapping[str, bytes], model: Model, head: WithHead | None = None) -> Mapping[str, bytes]:
    """Return `files`, an adapter, with all weights under names that PEFT loads.

    The adapter is for the base `model`, or for the class with its `head`.

    Raises:
        ConfigError: PEFT would leave out some of them under either name.
    """
    described: dict[str, Any] = json.loads(files[SETTINGS]) if SETTINGS in files else {}
    if described.get("peft_type") != "LORA":
        return files
    weights = load(files[WEIGHTS])
    lost = _left_out(described, weights, _loaded(model, head), weights)
    if not lost:
        return files
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in lost & weights.keys()}
    saved = saved_paths(_loaded(model, head), layers)
    renamed = {_renamed(name, saved) if name in lost else name: weight for name, weight in weights.items()}
    if lost := _left_out(described, renamed, _loaded(model, head), weights):
        layers = sorted({name.partition(".lora_")[0] for name in lost})
        raise ConfigError(
            f"--format peft: PEFT would load an adapter of this base without the weights of {layers[0]}"
            f"{f' and of {len(layers) - 1} more layers' if layers[1:] else ''}, as it takes their names for others. "
            "Take --format merged, which writes the whole model."
        )
    return {**files, WEIGHTS: save(renamed, metadata={"format": "pt"})}


def _renamed(name: str, saved: Mapping[str, str | None]) -> str:
    path, lora, matrix = name.removeprefix(PREFIX).partition(".lora_")
    return f"{PREFIX}{saved[path] or path}{lora}{matrix}"


def _left_out(
    described: dict[str, Any], weights: Mapping[str, torch.Tensor], loaded: PreTrainedModel, names: Collection[str]
) -> set[str]:
    """Return the `names` whose weights PEFT leaves out as it loads `weights`.

    They include the names that PEFT makes of others and finds no place for.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        # PEFT stores in the settings what a base was loaded from, and makes no other use of it.
        adapted = get_peft_model(loaded, PeftConfig.from_peft_type(**described))
        found = set_peft_model_state_dict(adapted, {name: weight.to("meta") for name, weight in weights.items()})
    missing = {name.replace(".default", "") for name in found.missing_keys} & set(names)
    return missing | {name.replace(".default", "") for name in found.unexpected_keys}


def _loaded(model: Model, head: WithHead | None) -> PreTrainedModel:
    """Load the class that people load, on `meta`."""
    directory = base_files(model)
    config = model_config(directory, model.layers)
    if head is None:
        return composite_model(directory) or meta_model(config)
    config.num_labels = head.outputs
    with torch.device("meta"):
        return getattr(transformers, head.head.transformers_class).from_config(config)
