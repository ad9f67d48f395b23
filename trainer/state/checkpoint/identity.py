"""The identity of a checkpoint (its base, adapter, objective, optimizer, data and their order), and whether a run may
continue it.

The ranks compare before they load a checkpoint, and the launcher compares before it writes anything: both ask here, so
that neither accepts what the other refuses. Without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import ConfigError
from trainer.run import layout
from trainer.state.checkpoint.manifest import CheckpointManifest, TextHashes

# Facts about the base that may change from one start to the next. An export reads them in the manifest.
_BESIDE_IDENTITY = {"path", "name", "revision", "dtype", "start", "start_data"}
# The facts about the base's content, see `trainer.base.find.check.content_of`. Earlier versions have not recorded
# them, and a base that has moved to another kind of place has others.
_CONTENT = {"weights", "commit", "hashes", "versions"}


@dataclass(frozen=True)
class Identity:
    """A restore refuses a checkpoint of another base, adapter, objective, optimizer, data set or order of it.

    `dataset` is the fingerprint of the compiled training data, `text` has the hashes of the tokenizer's files and of
    the template (`trainer.data.render.text_files.RunText`). Keys whose value is that of `defaults` may be missing, in
    this identity as in a checkpoint's: whatever is added to an identity later has a default, so that checkpoints of
    before can still be continued.
    """

    dataset: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    order: dict[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    text: TextHashes | None = None


def check_identity(manifest: CheckpointManifest, identity: Identity) -> None:
    """Raise `ConfigError` when the checkpoint was trained on something else than this run trains on."""
    parts = (
        ("base", manifest.base, identity.base),
        ("adapter", manifest.adapter, identity.adapter),
        ("objective", manifest.objective, identity.objective),
        ("optimizer", {"name": manifest.optimizer}, {"name": identity.optimizer}),
        ("data order", manifest.order, identity.order),
    )
    check_content(manifest, identity.base)
    check_text(manifest, identity.text)
    for what, saved, given in parts:
        # Another method or objective has other settings; listing those would say less.
        for key in sorted(saved.keys() | given.keys(), key=lambda key: (key not in ("method", "name"), key)):
            before, now = (values.get(key, identity.defaults.get(key)) for values in (saved, given))
            if not (what == "base" and key in _BESIDE_IDENTITY | _CONTENT) and before != now:
                raise ConfigError(
                    f"the checkpoint of step {manifest.step} has {what} {key}: {before!r}, the configuration gives "
                    f"{now!r}. Set it back, or start a run of another name."
                )
    if manifest.dataset != identity.dataset:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} was trained on data {manifest.dataset}, the configuration's"
            f" sources give {identity.dataset}. Restore the sources, or start a run of another name."
        )


def check_content(manifest: CheckpointManifest, base: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if `base`, the facts about a base, has other weights than the checkpoint was trained on."""
    before, after = manifest.base.get("commit"), base.get("commit")
    if before and after and before != after:
        raise ConfigError(
            f"model.base: {base['name']} is at commit {after} of the Hub, and the checkpoint of step {manifest.step}"
            f" was trained on commit {before}. Set model.revision={before}, or start a run of another name."
        )
    for kind in ("weights", "hashes"):
        known, found = manifest.base.get(kind), base.get(kind)
        if not isinstance(known, dict) or not found:
            continue
        other = next((file for file in sorted(known.keys() | found) if known.get(file) != found.get(file)), None)
        if other is not None:
            raise ConfigError(
                f"model.base: {base['path']} is not the model that the checkpoint of step {manifest.step} was trained"
                f" on: {other} is another. Put that one back, or start a run of another name."
            )


def is_written_anew(manifest: CheckpointManifest, base: Mapping[str, Any]) -> bool:
    """Whether the objects of the base have been written since the checkpoint. That alone does not change their
    content.
    """
    same_place = manifest.base.get("path") == base.get("path")
    return same_place and manifest.base.get("versions", base.get("versions")) != base.get("versions")


def check_text(manifest: CheckpointManifest, text: TextHashes | None) -> None:
    """Raise `ConfigError` if the tokenizer or the chat template differs from the checkpoint's."""
    before = manifest.text
    if before is None or text is None:
        return
    if before.template != text.template:
        kept = before.template and layout.kept_text(before.template)
        mend = (
            f"Set it to that one, which is in the run's folder as {kept}"
            if kept
            else "Leave it out, for the base's own"
        )
        raise ConfigError(
            f"data.template: the checkpoint of step {manifest.step} was trained with another chat template. {mend}, or"
            " start a run of another name."
        )
    files = sorted(before.tokenizer.keys() | text.tokenizer)
    other = next((file for file in files if before.tokenizer.get(file) != text.tokenizer.get(file)), None)
    if other is not None:
        kept = before.tokenizer.get(other)
        mend = f"Put that one back, which is in the run's folder as {layout.kept_text(kept)}" if kept else "Remove it"
        raise ConfigError(
            f"model.base: the tokenizer is not that of the checkpoint of step {manifest.step}: {other} is another."
            f" {mend}, or start a run of another name."
        )
