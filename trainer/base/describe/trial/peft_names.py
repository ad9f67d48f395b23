"""Finds the names under which PEFT finds the weights of a LoRA adapter, by trying PEFT's own renaming.

PEFT renames an adapter's weights with transformers' tables of the names in a base's files. For a few families it takes
the current name of a layer for an old name in files, and puts the weights nowhere. Such weights are saved under the
name that the base's files have for the layer, which PEFT renames to the right one. If there is no such name, the layer
cannot have an adapter.
"""

from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

_WRAPPED = "base_model.model."
"""Begins the names of all weights in PEFT's files."""


def saved_paths(model: PreTrainedModel, paths: Collection[str]) -> dict[str, str | None]:
    """The path of each of these layers -> the path under which its weights are saved. None if PEFT finds no path."""
    misplaced = _misplaced(model, {path: path for path in paths})
    renamed = {path: _in_files(model, path) for path in misplaced}
    return {path: path for path in paths} | renamed | dict.fromkeys(_misplaced(model, renamed))


def _misplaced(model: PreTrainedModel, saved: Mapping[str, str]) -> set[str]:
    """The layers whose weights PEFT does not load correctly if they are `saved` under these paths."""
    if (
        get_checkpoint_conversion_mapping(model.config.model_type) is None
    ):  # PEFT renames nothing, so save the seconds of its import
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    given = {_weight(there): torch.empty(1, 1, device="meta") for there in saved.values()}
    try:
        read = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), given)
    except Exception:  # a family's table may raise any error; an export tries again with the whole adapter
        return set()
    return {path for path in saved if _weight(path) not in read}


def _weight(path: str) -> str:
    return f"{_WRAPPED}{path}.lora_A.weight"


def _in_files(model: PreTrainedModel, path: str) -> str:
    """The path of the layer at `path` in a base's files, according to transformers' table."""
    for entry in get_model_conversion_mapping(model):
        if type(entry) is WeightRenaming:
            before, pattern = entry.reverse_transform().rename_source_key(f"{path}.weight")
            if pattern is not None:
                return before.removesuffix(".weight")
    return path
