"""Exports the learnt weights of a committed checkpoint, without a GPU, and without the base in memory.

The folder, on a disk or in a bucket, holds the files of the run's method (for LoRA what PEFT's `save_pretrained` writes),
the tokenizer's files and a model card with the run's facts. The file without which nothing loads is written last, so an
export that was killed is not mistaken for one.
"""

import torch
from torch import Tensor

from trainer.base.load import DTYPES
from trainer.base.locate import TOKENIZER_FILES, base_files, named_files
from trainer.checkpoint.manifest import CheckpointManifest, whole_checkpoint
from trainer.checkpoint.reading import read_elements
from trainer.config import Config, Tuning
from trainer.export.command import command
from trainer.export.folder import CARD, TRAINED, check_destination, model_card
from trainer.export.proof import Proof
from trainer.export.trained import trained_config
from trainer.store import Store
from trainer.tuning.method import find_method, methods


def export_adapter(run: Store, destination: Store, step: int | None = None) -> CheckpointManifest:
    """Write the adapter of `step`, or of the newest whole checkpoint, to `destination`; returns its manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something that is no half export, or the base's folder is not here.
    """
    # Before the shards are read, so by the files of every method.
    ours = [name for make in methods().values() for name in make(Tuning()).file_names]
    check_destination(destination, *ours, *TOKENIZER_FILES)
    manifest = whole_checkpoint(run, step)
    config = trained_config(run, manifest)
    method = find_method(config.tuning)
    tokenizer = named_files(base_files(config.model), TOKENIZER_FILES)
    exported = method.export(adapter_weights(run, manifest, config), config.model)
    *names, last = exported.files
    destination.put(CARD, model_card(config, manifest, exported.library, f"{exported.what} {TRAINED}."))
    for name, content in {**{name: exported.files[name] for name in names}, **tokenizer}.items():
        destination.put(name, content)
    destination.create(last, exported.files[last])
    return manifest


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


def _prove(run: Store, step: int, adapter: Store) -> Proof:
    from trainer.export.verify import prove_adapter

    return prove_adapter(run, step, adapter)


if __name__ == "__main__":
    command(export_adapter, _prove)
