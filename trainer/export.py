"""A PEFT adapter from a committed checkpoint: without a GPU, and without the base in memory.

The folder, on a disk or in a bucket, is what PEFT's `save_pretrained` writes (adapter_config.json,
adapter_model.safetensors), plus the tokenizer's files and a model card with the run's facts. adapter_config.json is
written last: PEFT loads nothing without it, so an export that was killed is not mistaken for one.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from trainer import run_layout
from trainer.base import TOKENIZER_FILES, base_files
from trainer.config import Config, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.load import DTYPES, lora_config
from trainer.manifest import Manifest, whole_checkpoint
from trainer.shard import Piece, read_states
from trainer.store import Store, open_store

_SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"


def export_adapter(run: Store, destination: Store, step: int | None = None) -> Manifest:
    """Write the adapter of `step`, or of the newest whole checkpoint, to `destination`; returns its manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something that is no half export, or the base's folder is not here.
    """
    config = parse_config(run.get(run_layout.CONFIG).decode())
    taken = {entry.key for entry in destination.list()}
    if taken and not _half_export(taken):
        raise ConfigError(f"the destination {destination.uri} is not empty. Name a new folder.")
    manifest = whole_checkpoint(run, step)
    files = _small_files(config, manifest)
    dtype = DTYPES[config.model.dtype]
    weights = {_peft_name(name): tensor.to(dtype) for name, tensor in master_weights(run, manifest).items()}
    destination.put(_WEIGHTS, safetensors_bytes(weights, metadata={"format": "pt"}))
    settings = files.pop(_SETTINGS)
    for name, content in files.items():
        destination.put(name, content)
    destination.create(_SETTINGS, settings)
    return manifest


def _half_export(names: set[str]) -> bool:
    """Whether an export that was killed left these: the weights, which come first, but not the settings."""
    ours = (_WEIGHTS, _CARD, *TOKENIZER_FILES)
    return _WEIGHTS in names and all(any(fnmatch(name, pattern) for pattern in ours) for name in names)


def _small_files(config: Config, manifest: Manifest) -> dict[str, bytes]:
    """Everything but the weights: file name -> content."""
    adapter = lora_config(config.tuning, {name.split(".lora_")[0].rpartition(".")[2] for name in manifest.shapes})
    adapter.inference_mode = True
    adapter.base_model_name_or_path = config.model.base  # a Hub id stays one, not this machine's cache
    adapter.revision = config.model.revision
    with tempfile.TemporaryDirectory(prefix="capstan-export-") as folder:
        adapter.save_pretrained(folder)
        settings = Path(folder, _SETTINGS).read_bytes()
    base = base_files(config.model)
    tokenizer = {path.name: path.read_bytes() for pattern in TOKENIZER_FILES for path in base.glob(pattern)}
    return {**tokenizer, _CARD: _model_card(config, manifest).encode(), _SETTINGS: settings}


def master_weights(run: Store, manifest: Manifest) -> dict[str, Tensor]:
    """Every trained parameter, whole, in fp32, by its name in the model."""
    flat = {name: torch.empty(torch.Size(shape).numel()) for name, shape in manifest.shapes.items()}
    for shard in manifest.shards:
        pieces = (Piece(name, "master", begin, end) for name, (begin, end) in shard.intervals.items())
        for (name, _, begin, end), data in read_states(run, shard, pieces):
            flat[name][begin:end] = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def _peft_name(name: str) -> str:
    """PEFT saves under the wrapped model's names and without the adapter's own name."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def _model_card(config: Config, manifest: Manifest) -> str:
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
        f"---\nlibrary_name: peft\nbase_model: {config.model.base}\n---\n\n# {config.run.name}\n\n"
        f"A LoRA adapter trained with Capstan.\n\n| | |\n|---|---|\n{rows}\n"
    )


def main() -> None:
    """`python -m trainer.export` prints one JSON object: the step, and what --verify measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("destination")
    parser.add_argument("--step", type=int)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    try:
        run, destination = open_store(arguments.run), open_store(arguments.destination, setting="DEST")
        step = export_adapter(run, destination, arguments.step).step
        result: dict[str, float] = {"step": step}
        if arguments.verify:
            from trainer.verify import compare_logits

            result |= asdict(compare_logits(run, step, destination))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
