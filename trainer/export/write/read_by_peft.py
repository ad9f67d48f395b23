"""Whether PEFT loads all of an adapter's weights into the class that people load.

PEFT renames a LoRA adapter's weights, and its targets, by transformers' tables of the names in a base's files. Of a few families it takes
the names that the class has now for those of its files, loads a part of the adapter, and only warns.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load

from trainer.base.describe.composite import composite_model
from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_settings import model_config
from trainer.base.find.locate import base_files
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.tuning.head import WithHead
from trainer.tuning.shared.peft_folder import SETTINGS, WEIGHTS


def check_peft_reads(files: Mapping[str, bytes], model: Model, head: WithHead | None = None) -> None:
    """Raises ConfigError where PEFT would leave out weights of `files`, an adapter for the base `model`, or for the class with its `head`."""
    described: dict[str, Any] = json.loads(files[SETTINGS]) if SETTINGS in files else {}
    if described.get("peft_type") != "LORA":
        return
    weights = {name: weight.to("meta") for name, weight in load(files[WEIGHTS]).items()}
    if lost := _left_out(described, weights, model, head):
        layers = sorted({name.partition(".lora_")[0] for name in lost})
        raise ConfigError(
            f"--format peft: PEFT would load an adapter of this base without the weights of {layers[0]}"
            f"{f' and of {len(layers) - 1} more layers' if layers[1:] else ''}, as it takes their names for others. "
            "Take --format merged, which writes the whole model."
        )


def _left_out(
    described: dict[str, Any], weights: dict[str, torch.Tensor], model: Model, head: WithHead | None
) -> set[str]:
    directory = base_files(model)
    config = model_config(directory, model.layers)
    if head is not None:
        config.num_labels = head.outputs
        with torch.device("meta"):
            loaded = getattr(transformers, head.head.transformers_class).from_config(config)
    else:
        loaded = composite_model(directory) or meta_model(config)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        # PEFT keeps what a base was loaded from in the settings, and takes no further note of it.
        adapted = get_peft_model(loaded, PeftConfig.from_peft_type(**described))
        found = set_peft_model_state_dict(adapted, weights)
    missing = {name.replace(".default", "") for name in found.missing_keys} & weights.keys()
    return missing | {name.replace(".default", "") for name in found.unexpected_keys}
