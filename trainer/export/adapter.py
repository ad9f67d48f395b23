"""A PEFT adapter from a committed checkpoint: without a GPU, and without the base in memory.

The folder, on a disk or in a bucket, is what PEFT's `save_pretrained` writes (adapter_config.json,
adapter_model.safetensors), plus the tokenizer's files and a model card with the run's facts. adapter_config.json is
written last: PEFT loads nothing without it, so an export that was killed is not mistaken for one. What the export of a merged
model (trainer/export/merged.py) has in common with it is here too.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from trainer.base.load import DTYPES
from trainer.base.locate import TOKENIZER_FILES, base_files, named_files
from trainer.checkpoint.manifest import CheckpointManifest, whole_checkpoint
from trainer.checkpoint.shard import StateSlice, read_states
from trainer.config import Config
from trainer.errors import CapstanError, ConfigError
from trainer.run.folder import run_config
from trainer.store import Store, open_store
from trainer.tuning.lora import METHODS

_SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
# Written first, and says by these words whose a half export is.
CARD = "README.md"
TRAINED = "trained with Capstan"


def export_adapter(run: Store, destination: Store, step: int | None = None) -> CheckpointManifest:
    """Write the adapter of `step`, or of the newest whole checkpoint, to `destination`; returns its manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something that is no half export, or the base's folder is not here.
    """
    config = run_config(run)
    check_destination(destination, _WEIGHTS, *TOKENIZER_FILES)
    manifest = whole_checkpoint(run, step)
    files = _small_files(config, manifest)
    weights = {_peft_name(name): tensor for name, tensor in adapter_weights(run, manifest, config).items()}
    destination.put(CARD, files.pop(CARD))
    destination.put(_WEIGHTS, safetensors_bytes(weights, metadata={"format": "pt"}))
    settings = files.pop(_SETTINGS)
    for name, content in files.items():
        destination.put(name, content)
    destination.create(_SETTINGS, settings)
    return manifest


def check_destination(destination: Store, *ours: str) -> None:
    """Raises `ConfigError` if it holds anything but what an export that was killed left: its card and files like `ours`."""
    taken = {entry.key for entry in destination.list()}
    if not taken:
        return
    known = all(any(fnmatch(name, pattern) for pattern in (CARD, *ours)) for name in taken)
    if not (known and CARD in taken and TRAINED.encode() in destination.get(CARD)):
        raise ConfigError(f"the destination {destination.uri} is not empty. Name a new folder.")


def _small_files(config: Config, manifest: CheckpointManifest) -> dict[str, bytes]:
    """Everything but the weights: file name -> content."""
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in manifest.shapes}
    adapter = METHODS[config.tuning.method](config.tuning).peft_config(targets)
    adapter.inference_mode = True
    adapter.base_model_name_or_path = config.model.base  # a Hub id stays one, not this machine's cache
    adapter.revision = config.model.revision
    with tempfile.TemporaryDirectory(prefix="capstan-export-") as folder:
        adapter.save_pretrained(folder)
        settings = Path(folder, _SETTINGS).read_bytes()
    card = model_card(config, manifest, "peft", f"A LoRA adapter {TRAINED}.")
    return {**named_files(base_files(config.model), TOKENIZER_FILES), CARD: card, _SETTINGS: settings}


def master_weights(run: Store, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """Every trained parameter, whole, in fp32, by its name in the model."""
    flat = {name: torch.empty(torch.Size(shape).numel()) for name, shape in manifest.shapes.items()}
    for shard in manifest.shards:
        pieces = (StateSlice(name, "master", begin, end) for name, (begin, end) in shard.intervals.items())
        for (name, _, begin, end), data in read_states(run, shard, pieces):
            flat[name][begin:end] = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def adapter_weights(run: Store, manifest: CheckpointManifest, config: Config) -> dict[str, Tensor]:
    """The trained parameters in `model.dtype`: what the training's forward pass multiplied with."""
    dtype = DTYPES[config.model.dtype]
    return {name: tensor.to(dtype) for name, tensor in master_weights(run, manifest).items()}


def _peft_name(name: str) -> str:
    """PEFT saves under the wrapped model's names and without the adapter's own name."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def model_card(config: Config, manifest: CheckpointManifest, library: str, what: str) -> bytes:
    """The file that a hub shows: `what` it is, in a sentence, and the facts of its run."""
    facts = {
        "base": config.model.base,
        "run": config.run.name,
        "step": manifest.step,
        "evaluation loss": "not evaluated at this step" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}",
        "adapter": json.dumps(manifest.adapter),
        "optimizer": json.dumps(manifest.groups),
        "quantization": json.dumps(
            {key[6:]: value for key, value in manifest.base.items() if key.startswith("quant.")}
        ),
        "data": f"{manifest.dataset} ({', '.join(source.path for source in config.data.train)})",
        "sequence length": config.data.sequence_length,
        "global batch": config.train.global_batch,
        "seed": config.run.seed,
        "saved": f"{datetime.fromtimestamp(manifest.created, UTC):%Y-%m-%d %H:%M} UTC on {manifest.world_size} ranks",
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\nbase_model: {config.model.base}\n---\n\n# {config.run.name}\n\n"
        f"{what}\n\n| | |\n|---|---|\n{rows}\n"
    ).encode()


def command(
    export: Callable[[Store, Store, int | None], CheckpointManifest], prove: Callable[[Store, int, Store], Any]
) -> None:
    """A module's command line: prints one JSON object, the step, the bytes written, and what --verify measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("destination")
    parser.add_argument("--step", type=int)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    try:
        run, destination = open_store(arguments.run), open_store(arguments.destination, setting="DEST")
        step = export(run, destination, arguments.step).step
        result: dict[str, float] = {"step": step, "bytes": sum(entry.size for entry in destination.list())}
        if arguments.verify:
            result |= asdict(prove(run, step, destination))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


def _prove(run: Store, step: int, adapter: Store) -> Any:
    from trainer.export.verify import compare_logits

    return compare_logits(run, step, adapter)


if __name__ == "__main__":
    command(export_adapter, _prove)
