"""A PEFT adapter from a committed checkpoint: without a GPU, and without the base in memory.

The directory is what PEFT's `save_pretrained` writes (adapter_config.json, adapter_model.safetensors), plus the
tokenizer's files and a model card with the run's facts.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer import run_layout
from trainer.config import Config, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.load import DTYPES, lora_config
from trainer.manifest import Manifest, newest_whole
from trainer.safetensors_index import read_header
from trainer.store import Store, open_store

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)


def export_adapter(run: Store, destination: Path) -> Manifest:
    """Write the newest whole checkpoint's adapter to `destination`, which must be new or empty; returns its manifest.

    Raises:
        NothingToResume: the run has no whole checkpoint.
        ConfigError: `destination` holds something.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"the destination {destination} is not empty. Name a new folder.")
    config = parse_config(run.get(run_layout.CONFIG).decode())
    manifest = newest_whole(run)
    # Written beside the destination and renamed, so that a killed export leaves no half adapter under its name.
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = DTYPES[config.model.dtype]
    weights = {_peft_name(name): tensor.to(dtype) for name, tensor in master_weights(run, manifest).items()}
    save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    base = Path(manifest.base["path"])
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in manifest.shapes}
    adapter = lora_config(config.tuning, targets)
    adapter.inference_mode = True
    adapter.base_model_name_or_path = config.model.base  # a Hub id stays one, not this machine's cache
    adapter.revision = config.model.revision
    adapter.save_pretrained(str(partial))
    for pattern in _TOKENIZER_FILES:
        for path in base.glob(pattern):
            shutil.copy(path, partial / path.name)
    (partial / "README.md").write_text(_model_card(config, manifest), encoding="utf-8")
    if destination.exists():
        destination.rmdir()
    partial.rename(destination)
    return manifest


def master_weights(run: Store, manifest: Manifest) -> dict[str, Tensor]:
    """Every trained parameter, whole, in fp32, by its name in the model."""
    flat = {name: torch.empty(torch.Size(shape).numel()) for name, shape in manifest.shapes.items()}
    for shard in manifest.shards:
        header = read_header(run, shard.key, shard.size)
        for name, (begin, end) in shard.intervals.items():
            data = header[f"{name}|master"].read(0, end - begin)
            flat[name][begin:end] = torch.frombuffer(data, dtype=torch.float32)
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def _peft_name(name: str) -> str:
    """PEFT saves under the wrapped model's names and without the adapter's own name."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def _model_card(config: Config, manifest: Manifest) -> str:
    facts = {
        "base": config.model.base,
        "run": config.run.name,
        "step": manifest.step,
        "adapter": json.dumps(manifest.adapter),
        "quantization": json.dumps(
            {key[6:]: value for key, value in manifest.base.items() if key.startswith("quant.")}
        ),
        "data": f"{manifest.dataset} ({', '.join(source.path for source in config.data.train)})",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: peft\nbase_model: {config.model.base}\n---\n\n# {config.run.name}\n\n"
        f"A LoRA adapter trained with Capstan.\n\n| | |\n|---|---|\n{rows}\n"
    )


def main() -> None:
    """`python -m trainer.export RUN_URI DEST [--verify]` prints one JSON object: the step, and what verify measured."""
    run, destination = open_store(sys.argv[1]), Path(sys.argv[2])
    try:
        result: dict[str, float] = {"step": export_adapter(run, destination).step}
        if "--verify" in sys.argv[3:]:
            from trainer.verify import compare_logits

            result |= asdict(compare_logits(run, destination))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
