"""The bases of a sweep: each trial trains over the one that the first trial had, or not at all, as other weights are no
setting.
"""

import hashlib
import json

from trainer.base.base import Base
from trainer.base.find.content import hub_commit
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.errors import ConfigError


def base_facts(base: Base) -> dict[str, str]:
    """The facts by which `base` is known again. Reads samples of its weights."""
    digest = hashlib.sha256(json.dumps([base.fingerprint, base.samples]).encode()).hexdigest()[:16]
    commit = hub_commit(base.directory)
    return {"digest": digest, **({"commit": commit} if commit else {})}


def check_same(config: Config, known: dict[str, str]) -> None:
    """Raises `ConfigError` where the base of a trial's `config` is another than the `known` one; without facts nothing
    is read.
    """
    if known and base_facts(resolve_base(config.model)) != known:
        raise ConfigError(
            f"model.base: {config.model.base} is not the model that this sweep began with: its weights have changed"
            " since. Put that one back, or start another sweep under another run.name."
        )
