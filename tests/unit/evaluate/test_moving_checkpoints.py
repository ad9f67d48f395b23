"""A run that trains removes checkpoints (`checkpoint.keep_last`) while somebody evaluates it: what reads them takes the
next one.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import NAME, SHAPE, commit
from trainer.config import Checkpoint
from trainer.errors import Damaged, StorageError
from trainer.evaluate import models
from trainer.evaluate.models import OpenedRun
from trainer.run import layout
from trainer.state.checkpoint import manifest as manifests
from trainer.state.checkpoint.checkpoints import TrainablePartition
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.state.checkpoint.retention import plan_removal, remove
from trainer.store.store import Store, open_store


@pytest.fixture
def run() -> Store:
    run = open_store("memory://moving").sub("run")
    commit(run, 4)
    return run


class Engine:
    """A model of one parameter on one rank."""

    def __init__(self) -> None:
        self.master, self.updates = torch.zeros(SHAPE[0] * SHAPE[1]), 0

    def partitions(self) -> list[TrainablePartition]:
        return [TrainablePartition(NAME, (4, 5), 0, 20, {"master": self.master})]

    def refresh(self, updates: int) -> None:
        self.updates = updates


def opened(run: Store, engine: Any) -> OpenedRun:
    alone: Any = SimpleNamespace(together=lambda action: [action()], on_first=lambda action: action())
    unread: Any = None
    return OpenedRun(run, unread, whole_checkpoint(run), alone, engine, unread)


def goes_on(run: Store, step: int) -> None:
    """The run commits `step`, and keeps that one alone."""
    commit(run, step)
    remove(run, plan_removal(run, Checkpoint(keep_last=1)))


def test_the_newest_takes_the_place_of_one_that_was_removed_while_the_base_was_measured(run: Store) -> None:
    engine = Engine()
    model = opened(run, engine)
    goes_on(run, 5)
    goes_on(run, 6)
    assert model.load(or_newer=True).step == 6
    assert engine.updates == 6
    assert engine.master.tolist() == [6.0 * (1 + element) for element in range(20)]


def test_the_newest_takes_the_place_of_one_that_is_found_to_be_damaged(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    model = opened(run, engine)
    commit(run, 5)
    real: Callable[..., Any] = models.load_partitions

    def load(folder: Store, found: Any, *rest: Any, **more: Any) -> Any:
        if found.step == 4:
            raise Damaged("a shard has another sha256")
        return real(folder, found, *rest, **more)

    monkeypatch.setattr(models, "load_partitions", load)
    assert model.load(or_newer=True).step == 5


def test_one_that_was_asked_for_has_no_other_in_its_place(run: Store) -> None:
    model = opened(run, Engine())
    goes_on(run, 5)
    with pytest.raises(StorageError, match="the checkpoint of step 4 is gone"):
        model.load()


@pytest.mark.parametrize(
    "changed", [{"base": {"path": "/models/b", "quant.type": "none"}}, {"adapter": {}}, {"shapes": {}}]
)
def test_another_model_takes_no_ones_place(
    changed: dict[str, Any], run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(run, Engine())
    goes_on(run, 5)
    other = replace(whole_checkpoint(run), **changed)
    monkeypatch.setattr("trainer.evaluate.models.whole_checkpoint", lambda _: other)
    with pytest.raises(StorageError, match="the checkpoint of step 4 is gone"):
        model.load(or_newer=True)


def test_all_that_were_listed_may_be_removed_while_they_are_looked_at(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., list[str]] = manifests.problems_of
    later = iter((5, 6))

    def problems(folder: Store, found: Any) -> list[str]:
        if step := next(later, None):
            goes_on(run, step)
        return real(folder, found)

    monkeypatch.setattr(manifests, "problems_of", problems)
    assert whole_checkpoint(run).step == 6
    assert run.exists(layout.manifest(6))
