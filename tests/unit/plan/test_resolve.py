"""A run's settings are resolved once: all that they name is found, and all that does not fit is said."""

import ast
import json
import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.config import override
from trainer.errors import ConfigError
from trainer.plan.resolve import Resolved, mismatches, resolve, resolve_alike
from trainer.processes.ranks import World
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


def test_a_run_with_another_setting_that_decides_what_is_learnt_is_another_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the one is not continued by the other."""
    config = workshop.config("any", "model.dtype=bf16")
    base = resolve_base(config.model)

    def identity(*settings: str) -> tuple[Any, ...]:
        return tuple(vars(Resolved.of(override(config, *settings), base).identity("data")).values())

    before = identity()
    assert identity("checkpoint.keep_last=9", "run.name=other", "cluster.workers=2") == before
    for setting in (
        *("model.dtype=fp32", "model.revision=v2", "model.layers=1", "model.add_tokens=[<x>]"),
        *("quant.type=none", "quant.block_size=128", "quant.double=true", "tuning.rank=4", "optim.name=lion"),
        *("run.seed=5", "data.sequence_length=32", "objective.router_loss=0.1", "objective.router_loss_of=layers"),
    ):
        assert identity(setting) != before, setting
    teacher = ("objective.name=distil", "objective.teacher=/models/big")
    values = iter(("first", "again", "again"))
    monkeypatch.setattr("trainer.data.dataset.taught.taught_identity", lambda *_: {"taught": next(values)})
    assert identity(*teacher) != identity(*teacher) == identity(*teacher)


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
    decide = {"torch", "deepspeed", "transformers", "peft", "bitsandbytes", "obstore"}
    ranks: Any = SimpleNamespace(rank=0, world_size=4, device_name="cuda:0 (NVIDIA H100)")
    found = json.loads(environment.environment(ranks))
    assert (found["world_size"], found["device"]) == (4, "cuda:0 (NVIDIA H100)")
    assert decide <= environment.versions().keys() <= decide | {"capstan-llm", "ray"}
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


class _Beside:
    """A rank beside rank 0, which tells it these values one after the other, or what it has itself."""

    def __init__(self, *told: Any) -> None:
        self._told = list(told)

    def broadcast(self, value: Any) -> Any:
        return self._told.pop(0) if self._told else value

    def agreeing(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_machine_of_rank_0_says_what_all_compute_in(workshop: Workshop, dtype: str) -> None:
    config = workshop.config("any")
    open_ = config.model_copy(update={"model": type(config.model)(base=config.model.base)})
    assert open_.leaves_type_open
    ranks: Any = _Beside(dtype)
    assert resolve_alike(open_, ranks).config.model.dtype == dtype


def test_all_ranks_begin_from_the_checkpoint_that_rank_0_has_found(workshop: Workshop) -> None:
    for step in (4, 5):
        commit(workshop.store.sub("sft"), workshop.config("sft"), step)
    config = workshop.config("next", "tuning.start=sft")
    found: Any = resolve(override(config, "tuning.start=sft@4")).beginning

    def alike(facts: dict[str, Any]) -> Resolved:
        ranks: Any = _Beside("bf16", facts)
        return resolve_alike(config, ranks)

    assert resolve(config).config.tuning.start == "sft@5"
    assert alike(found.facts).config.tuning.start == "sft@4"
    with pytest.raises(ConfigError, match="^tuning.start: 'sft' has other weights on one machine than on another"):
        alike({**found.facts, "start_weights": "0" * 64})


def test_what_a_start_ran_on_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    gpu = json.loads(environment.environment(World(0, 3, 2, 0, torch.device("cuda:1"))))
    assert gpu["device"] == "cuda:1 (a GPU at cuda:1)"
    facts = json.loads(environment.environment(World(0, 3, 2, 0, torch.device("cpu"))))
    assert (facts["device"], facts["world_size"]) == ("cpu", 3)
    assert (facts["python"], facts["versions"]["torch"]) == (platform.python_version(), torch.__version__)
