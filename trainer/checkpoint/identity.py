"""The identity of a checkpoint (its base, adapter, objective, optimizer, data and their order), and whether a run may go on from it.

The ranks compare before they load a checkpoint, and the launcher compares before it writes anything: both ask here, so
that neither accepts what the other refuses. Without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint.manifest import CheckpointManifest
from trainer.errors import ConfigError

# Facts about the base that may change from one start to the next. An export reads them in the manifest.
_BESIDE_IDENTITY = {"path", "name", "revision", "dtype"}


@dataclass(frozen=True)
class Identity:
    """A restore refuses a checkpoint of another base, adapter, objective, optimizer, data set or order of it.

    `dataset` is the fingerprint of the compiled training data. Keys whose value is that of `defaults` may be missing, in
    this identity as in a checkpoint's: whatever is added to an identity later has a default, so that checkpoints of before
    can still be continued.
    """

    dataset: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    order: dict[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"


def check_identity(manifest: CheckpointManifest, identity: Identity) -> None:
    """Raise `ConfigError` when the checkpoint was trained on something else than this run trains on."""
    parts = (
        ("base", manifest.base, identity.base),
        ("adapter", manifest.adapter, identity.adapter),
        ("objective", manifest.objective, identity.objective),
        ("optimizer", {"name": manifest.optimizer}, {"name": identity.optimizer}),
        ("data order", manifest.order, identity.order),
    )
    for what, saved, given in parts:
        # Another method or objective has other settings, which would say less.
        for key in sorted(saved.keys() | given.keys(), key=lambda key: (key not in ("method", "name"), key)):
            before, now = (values.get(key, identity.defaults.get(key)) for values in (saved, given))
            if not (what == "base" and key in _BESIDE_IDENTITY) and before != now:
                raise ConfigError(
                    f"the checkpoint of step {manifest.step} has {what} {key}: {before!r}, the configuration gives "
                    f"{now!r}. Set it back, or start a run of another name."
                )
    if manifest.dataset != identity.dataset:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} was trained on data {manifest.dataset}, the configuration's sources give "
            f"{identity.dataset}. Restore the sources, or start a run of another name."
        )
