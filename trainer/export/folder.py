"""The folder that an export fills, on a disk or in a bucket: what may be there before, and the model card."""

import json
from datetime import UTC, datetime
from fnmatch import fnmatch

from trainer.checkpoint.manifest import CheckpointManifest
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.store import Store

# Written first, and says by these words whose a half export is.
CARD = "README.md"
TRAINED = "trained with Capstan"


def check_destination(destination: Store, *ours: str) -> None:
    """Raises `ConfigError` if it holds anything but what an export that was killed left: its card and files like `ours`."""
    taken = {entry.key for entry in destination.list()}
    if not taken:
        return
    known = all(any(fnmatch(name, pattern) for pattern in (CARD, *ours)) for name in taken)
    if not (known and CARD in taken and TRAINED.encode() in destination.get(CARD)):
        raise ConfigError(f"the destination {destination.uri} is not empty. Name a new folder.")


def model_card(config: Config, manifest: CheckpointManifest, library: str, what: str) -> bytes:
    """The file that a hub shows: `what` it is, in a sentence, and the facts of its run. `config`: as it was trained."""
    facts = {
        "base": config.model.base,
        "run": config.run.name,
        "step": manifest.step,
        "evaluation loss": "not evaluated at this step" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}",
        "adapter": json.dumps(config.tuning.model_dump(mode="json", exclude_none=True)),
        "optimizer": json.dumps(manifest.groups),
        "quantization": json.dumps(config.quant.model_dump(mode="json", exclude={"cache"})),
        "computed in": config.model.dtype,
        "data": f"{manifest.dataset} ({', '.join(source.path for source in config.data.train)})",
        "sequence length": manifest.order.get("sequence_length", config.data.sequence_length),
        "global batch": config.train.global_batch,
        "seed": manifest.order.get("seed", config.run.seed),
        "saved": f"{datetime.fromtimestamp(manifest.created, UTC):%Y-%m-%d %H:%M} UTC on {manifest.world_size} ranks",
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\nbase_model: {config.model.base}\n---\n\n# {config.run.name}\n\n"
        f"{what}\n\n| | |\n|---|---|\n{rows}\n"
    ).encode()
