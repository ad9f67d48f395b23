"""A run's settings are resolved once: all that they name is found, and all that does not fit is said."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.errors import ConfigError
from trainer.plan.resolve import Resolved, mismatches, resolve
from trainer.run import environment
from trainer.servers import refuse_reader_of_prompts
from trainer.state.optimizer import find_optimizer


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("resolve"), "speck")


def test_everything_that_the_settings_name_is_found(workshop: Workshop) -> None:
    config = workshop.config("any", "optim.name=adafactor", "objective.name=dpo", "data.format=preference")
    found = resolve(config)
    assert found.config is config
    assert found.base.name == str(workshop.base)
    assert found.method.identity == {"method": "lora", "rank": 8, "alpha": 16.0}
    assert found.objective.identity == {"name": "dpo"}
    assert found.optimizer is find_optimizer(config.optim)
    assert found.reference == "adapter_off"
    identity = found.identity("data")
    assert (identity.dataset, identity.optimizer, identity.adapter) == ("data", "adafactor", found.method.identity)
    assert identity.base["fingerprint"] == found.base.fingerprint


def test_all_that_does_not_fit_is_said_at_once(workshop: Workshop) -> None:
    config = workshop.config("any", "tuning={method: full}", "objective.name=dpo", "data.sequence_length=100000")
    with pytest.raises(ConfigError) as raised:
        resolve(config)
    said = str(raised.value).splitlines()
    assert len(said) >= 3
    for setting in ("data.sequence_length", "quant.type", "data.format"):
        assert any(sentence.startswith(setting) for sentence in said), setting


def test_what_a_base_that_reads_prompts_in_both_directions_cannot_do_is_said(workshop: Workshop) -> None:
    base = resolve_base(workshop.config("any").model)
    reads = replace(base.description, architecture=replace(base.architecture, reads_prompts=True))
    config = workshop.config(
        "any",
        *("data.format=chat", "eval.tasks=[a.yaml]", "eval.bias=pairs.jsonl"),
        "eval.sets={said: {format: chat, path: a.jsonl}}",
    )
    found = Resolved.of(config, base)
    said = mismatches(config, reads, found.method, found.objective)
    both = "this base reads everything before an answer in both directions"
    assert [one.partition(f": {both}")[0] for one in said if both in one] == [
        *("data.format: chat", "eval.sets.said", "eval.tasks", "eval.bias")
    ]
    assert not any(both in one for one in mismatches(config, base.description, found.method, found.objective))
    with pytest.raises(ConfigError, match="--server: this base reads everything before an answer in both directions"):
        refuse_reader_of_prompts(reads.architecture.reads_prompts)
    refuse_reader_of_prompts(base.architecture.reads_prompts)


def test_a_base_that_is_known_is_not_looked_for_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(workshop.config("any").model)
    monkeypatch.setattr("trainer.plan.resolve.resolve_base", lambda model: pytest.fail("looked for again"))
    assert resolve(workshop.config("any"), base).base is base
    assert Resolved.of(workshop.config("any"), base).base is base


def test_a_package_that_is_not_installed_is_left_out_of_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert environment.versions().keys() == {"torch"}


def test_nothing_that_trains_takes_the_configuration_again() -> None:
    """What was resolved is passed on, or the section, number or object that is needed: only the door to a rank takes a
    whole configuration.
    """
    root = Path(__file__).parents[3] / "trainer"
    rooms = ("train", "model", "state/checkpoint", "state/optimizer")
    measuring = (root / "evaluate" / f"{name}.py" for name in ("generation", "losses", "prompts"))
    shared = (root / "tuning/linear_adapters.py", root / "plan/beginning.py")
    files = [root / "rank.py", *measuring, *shared, *(file for room in rooms for file in (root / room).rglob("*.py"))]
    taking = {
        f"{file.relative_to(root)}:{function.name}"
        for file in files
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Config"
    }
    assert taking == {
        "rank.py:run_rank",
        "rank.py:evaluated",  # of one of eval.sets
        "train/every/__init__.py:never",  # what an action refuses before a rank starts
        "train/every/sample.py:_mismatches",
        *(
            f"plan/{place}"
            for place in (
                "beginning.py:differences",
                "beginning.py:find_beginning",
                "beginning.py:starting_at",
                "beginning.py:with_known_start",
            )
        ),
    }
