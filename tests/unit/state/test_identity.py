"""Which checkpoints a run may go on from."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from trainer.config import Tuning
from trainer.errors import ConfigError
from trainer.state.checkpoint.identity import Identity, check_identity, is_written_anew
from trainer.state.checkpoint.manifest import CheckpointManifest, TextHashes
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


def test_what_says_where_a_base_is_or_how_a_start_computes_may_change() -> None:
    for fact in ("path", "name", "revision", "dtype", "start", "start_data"):
        check_identity(saved(base=OURS.base | {fact: "before"}), replace(OURS, base=OURS.base | {fact: "now"}))
        check_identity(saved(), replace(OURS, base=OURS.base | {fact: "now"}))


def test_another_method_objective_or_optimizer_is_named_before_its_settings() -> None:
    other = {"method": "dora", "alpha": 1.0, "rank": 1}
    with pytest.raises(ConfigError, match="has adapter method: 'dora', the configuration gives 'lora'"):
        check_identity(saved(adapter=other), OURS)
    pairs = replace(saved(), objective={"beta": 0.1, "name": "dpo"})
    with pytest.raises(ConfigError, match="has objective name: 'dpo', the configuration gives None"):
        check_identity(pairs, OURS)
    with pytest.raises(ConfigError, match="has objective beta: 0.1, the configuration gives 0.2"):
        check_identity(pairs, replace(OURS, objective={"beta": 0.2, "name": "dpo"}))
    with pytest.raises(ConfigError, match="has optimizer name: 'adamw', the configuration gives 'lion'"):
        check_identity(saved(), replace(OURS, optimizer="lion"))


FILES = {"a.safetensors": "1", "b.safetensors": "2"}
PLACE = {"path": "/models/b", "name": "me/b", "fingerprint": "f", "quant.type": "nf4"}
TEXT = TextHashes({"tokenizer.json": "1" * 64}, "2" * 64)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"weights": FILES}, {"weights": FILES}, None),
        ({"weights": FILES}, {"weights": {**FILES, "b.safetensors": "3"}}, "b.safetensors is another"),
        ({"weights": FILES}, {"weights": {"a.safetensors": "1"}}, "b.safetensors is another"),
        ({"weights": {"a.safetensors": "1"}}, {"weights": FILES}, "b.safetensors is another"),
        ({"versions": "1"}, {"versions": "2"}, None),  # written again, which alone changes no content
        (
            {"weights": FILES, "hashes": FILES},
            {"weights": FILES, "hashes": {**FILES, "a.safetensors": "9"}},
            "a.safetensors is another",
        ),
        (
            {"weights": FILES, "commit": "c"},
            {"weights": FILES, "commit": "d"},
            "at commit d .* on commit c. Set model.revision=c",
        ),
        (
            {"weights": FILES, "commit": "c", "hashes": FILES},
            {"weights": FILES},
            None,
        ),  # copied from the Hub into a folder
        ({}, {"weights": FILES, "commit": "c"}, None),  # a checkpoint of before
        ({"weights": 5, "commit": 7}, {"weights": FILES}, None),
    ],
)
def test_a_base_is_compared_by_what_both_sides_know_of_its_content(
    before: dict[str, Any], now: dict[str, Any], said: str | None
) -> None:
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_identity(saved(base=PLACE | before), replace(OURS, base=PLACE | now))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (TEXT, None),
        (None, None),
        (replace(TEXT, template="3" * 64), "another chat template. Set it to that one, which is in the run's folder as text/2222"),
        (replace(TEXT, tokenizer={"tokenizer.json": "4" * 64}), "tokenizer.json is another. Put that one back, .* as text/1111"),
        (replace(TEXT, tokenizer={}), "tokenizer.json is another. Put that one back, .* as text/1111"),
        (replace(TEXT, tokenizer={**TEXT.tokenizer, "vocab.json": "4" * 64}), "vocab.json is another. Remove it"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_tokenizer_or_template_is_refused(now: TextHashes | None, said: str | None) -> None:
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_identity(replace(saved(), text=TEXT), replace(OURS, text=now))
    check_identity(saved(), replace(OURS, text=now))


def test_a_template_in_place_of_the_bases_own_is_another_one() -> None:
    before = replace(saved(), text=replace(TEXT, template=None))
    with pytest.raises(
        ConfigError, match="was trained with another chat template. Leave it out, for the base's own, or"
    ):
        check_identity(before, replace(OURS, text=TEXT))
    check_identity(before, replace(OURS, text=replace(TEXT, template=None)))


def test_objects_that_were_written_again_in_their_place_are_noticed() -> None:
    before, now = saved(base=PLACE | {"versions": "1"}), PLACE | {"versions": "2"}
    assert is_written_anew(before, now)
    assert not is_written_anew(before, PLACE | {"versions": "1"})
    assert not is_written_anew(before, now | {"path": "/elsewhere"})
    assert not is_written_anew(saved(base=PLACE), now)


def test_a_checkpoint_of_other_data_is_refused():
    with pytest.raises(ConfigError, match="was trained on data other, the configuration's sources give data"):
        check_identity(saved(dataset="other"), OURS)
