"""Which checkpoints a run may go on from."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.checkpoint.identity import Identity, check_identity
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.config import Tuning
from trainer.errors import ConfigError
from trainer.tuning.method import find_method

LORA = find_method(Tuning(rank=8, alpha=16))
OURS = Identity("data", {"fingerprint": "f", "quant.type": "nf4"}, LORA.identity, {"version": 2}, LORA.defaults)


def saved(**changed: Any) -> CheckpointManifest:
    parts = {"base": OURS.base, "adapter": OURS.adapter, "order": OURS.order, "dataset": "data", **changed}
    return CheckpointManifest(
        4, 1, 1, 0.0, 4, {}, parts["dataset"], parts["order"], parts["base"], parts["adapter"], {}, {}, None, {}, []
    )


def test_a_checkpoint_that_names_every_setting_is_continued():
    """As all were written before identities left defaults out."""
    every = {"method": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"}
    check_identity(saved(adapter=every), OURS)


def test_a_checkpoint_from_before_a_setting_is_continued_while_the_setting_has_its_default():
    new = replace(OURS, adapter={**OURS.adapter, "new": 0}, base={**OURS.base, "quant.new": "a"})
    new = replace(new, defaults={**OURS.defaults, "new": 0, "quant.new": "a"})
    check_identity(saved(), new)
    with pytest.raises(ConfigError, match="has adapter new: 0, the configuration gives 1"):
        check_identity(saved(), replace(new, adapter={**OURS.adapter, "new": 1}))


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("adapter", {**LORA.identity, "alpha": 320.0}, "adapter alpha: 320.0, the configuration gives 16.0"),
        ("adapter", {**LORA.identity, "dropout": 0.1}, "adapter dropout: 0.1, the configuration gives 0.0"),
        ("base", {"fingerprint": "g", "quant.type": "nf4"}, "base fingerprint: 'g', the configuration gives 'f'"),
        ("order", {"version": 1}, "data order version: 1, the configuration gives 2"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(part: str, values: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match="the checkpoint of step 4 has " + said.replace("'", ".")):
        check_identity(saved(**{part: values}), OURS)


def test_a_checkpoint_of_other_data_is_refused():
    with pytest.raises(ConfigError, match="was trained on data other, the configuration's sources give data"):
        check_identity(saved(dataset="other"), OURS)
