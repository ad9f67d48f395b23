"""A PEFT adapter from a committed checkpoint: without a GPU, and without the base in memory.

The folder, on a disk or in a bucket, is what PEFT's `save_pretrained` writes (adapter_config.json,
adapter_model.safetensors), plus the tokenizer's files and a model card with the run's facts. adapter_config.json is
written last: PEFT loads nothing without it, so an export that was killed is not mistaken for one.
"""

from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from trainer.base.load import DTYPES
from trainer.base.locate import TOKENIZER_FILES, base_files, named_files
from trainer.checkpoint.manifest import CheckpointManifest, whole_checkpoint
from trainer.checkpoint.reading import read_elements
from trainer.config import Config
from trainer.export.command import command
from trainer.export.folder import CARD, TRAINED, check_destination, model_card
from trainer.export.lora import PEFT_SETTINGS, peft_name, peft_settings
from trainer.export.trained import trained_config
from trainer.store import Store

_WEIGHTS = "adapter_model.safetensors"


def export_adapter(run: Store, destination: Store, step: int | None = None) -> CheckpointManifest:
    """Write the adapter of `step`, or of the newest whole checkpoint, to `destination`; returns its manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something that is no half export, or the base's folder is not here.
    """
    check_destination(destination, _WEIGHTS, *TOKENIZER_FILES)
    manifest = whole_checkpoint(run, step)
    config = trained_config(run, manifest)
    files = _small_files(config, manifest)
    weights = {peft_name(name): tensor for name, tensor in adapter_weights(run, manifest, config).items()}
    destination.put(CARD, files.pop(CARD))
    destination.put(_WEIGHTS, safetensors_bytes(weights, metadata={"format": "pt"}))
    settings = files.pop(PEFT_SETTINGS)
    for name, content in files.items():
        destination.put(name, content)
    destination.create(PEFT_SETTINGS, settings)
    return manifest


def _small_files(config: Config, manifest: CheckpointManifest) -> dict[str, bytes]:
    """Everything but the weights: file name -> content."""
    card = model_card(config, manifest, "peft", f"A LoRA adapter {TRAINED}.")
    return {
        **named_files(base_files(config.model), TOKENIZER_FILES),
        CARD: card,
        PEFT_SETTINGS: peft_settings(config, manifest.shapes),
    }


def master_weights(run: Store, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """Every trained parameter, whole, in fp32, by its name in the model."""
    flat = {name: torch.empty(numel) for name, numel in manifest.numels.items()}
    every = {name: (0, numel) for name, numel in manifest.numels.items()}
    for (name, _, begin, end), data in read_elements(run, manifest, every, states=("master",)):
        flat[name][begin:end] = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def adapter_weights(run: Store, manifest: CheckpointManifest, config: Config) -> dict[str, Tensor]:
    """The trained parameters in `model.dtype`: what the training's forward pass multiplied with."""
    dtype = DTYPES[config.model.dtype]
    return {name: tensor.to(dtype) for name, tensor in master_weights(run, manifest).items()}


def _prove(run: Store, step: int, adapter: Store) -> Any:
    from trainer.export.verify import compare_logits

    return compare_logits(run, step, adapter)


if __name__ == "__main__":
    command(export_adapter, _prove)
