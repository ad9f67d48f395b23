"""A pass that fails on one rank alone ends that rank, whatever the asking program catches; a failure of that program is
told to all.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.evaluate import models
from trainer.evaluate.generation import Sampling
from trainer.evaluate.losses import Continued
from trainer.evaluate.models import PassFailed, SharedModel


class _FirstOfTwo:
    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.sent = list[Any]()

    def broadcast(self, value: Any) -> None:
        self.sent.append(value)

    def agree(self, failure: Exception | None) -> None:
        self.sent.append(failure)


def asks(model: SharedModel) -> None:
    try:
        model.likelihoods([Continued([1, 2], 1)], lambda done: None)
    except Exception as error:  # as a task of anybody's may
        raise ValueError("the task failed") from error


def test_a_failed_pass_is_no_failed_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: Any, **__: Any) -> None:
        raise MemoryError("out of memory")

    ranks, config = _FirstOfTwo(), SimpleNamespace(data=SimpleNamespace(sequence_length=8))
    opened: Any = SimpleNamespace(ranks=ranks, resolved=SimpleNamespace(config=config), engine=None, reserved=0)
    monkeypatch.setattr(models, "likelihoods", runs_out)
    with pytest.raises(PassFailed, match="MemoryError: out of memory"):
        SharedModel(opened).serve(asks)
    assert len(ranks.sent) == 1, "the others were told of an end while they are in the pass"

    def wrong(_: SharedModel) -> None:
        raise ValueError("the task failed")

    SharedModel(opened).serve(wrong)
    assert ranks.sent[1] is None
    assert str(ranks.sent[2]) == "the task failed"


def test_the_other_ranks_do_what_the_first_asks_until_it_asks_no_more() -> None:
    done = list[Any]()

    def job(*given: Any, told: Any) -> None:
        told(3)
        done.append(given)

    jobs = iter([(job, ("a", 1)), (job, ("b",)), None])
    ranks = SimpleNamespace(rank=1, broadcast=lambda value: next(jobs), agree=done.append)
    opened: Any = SimpleNamespace(ranks=ranks)
    assert SharedModel(opened).serve(asks) is None
    assert done == [(opened, "a", 1), (opened, "b"), None]
    assert SharedModel(opened).likelihoods([], lambda done: None) == []
    assert SharedModel(opened).continued([], Sampling(), lambda done: None) == []
