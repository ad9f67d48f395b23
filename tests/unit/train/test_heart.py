"""A rank's heart: what it tells of itself, whom it hears, and how it ends when some rank hangs."""

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import Timeouts
from trainer.train import heartbeat
from trainer.train.heartbeat import HUNG, Beat, Hang, Heart, Judge

TIMEOUTS = Timeouts(load=100, step=50, save=80)


class _Ended(BaseException):
    """The process would have ended."""


class Hearts:
    """The heart of one of three ranks, whose threads do nothing by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int = 0, timeouts: Timeouts = TIMEOUTS) -> None:
        self.done, self.asked, self.now = list[Any](), list[Any](), 0.0
        self.answer: Any = None
        line = SimpleNamespace(ask=self.ask) if rank else None
        monkeypatch.setattr(heartbeat, "_connect", lambda ranks, hear: (None, line))
        monkeypatch.setattr(heartbeat, "Every", lambda seconds, *_: SimpleNamespace(stop=lambda *, wait: None))
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(heartbeat.os, "_exit", self.ends)
        world: Any = SimpleNamespace(rank=rank, world_size=3)
        self.heart = Heart(world, timeouts, lambda hang, mine: self.done.append((hang, mine)))

    def ends(self, code: int) -> None:
        self.done.append(code)
        raise _Ended

    def ask(self, told: Any) -> Any:
        self.asked.append(told)
        if self.answer is None:
            raise OSError("rank 0 does not answer")
        return self.answer


def test_data_that_is_compiled_is_a_part_of_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every rank has that part, so it must not count as one more thing that it has begun."""
    heart, begun = Hearts(monkeypatch).heart, list[tuple[str, int]]()
    for phase in ("data", "compile", "data", "step", "compile", "data", "data"):
        heart(phase, 4)  # type: ignore[arg-type]
        begun.append((heart._beat.phase, heart._beat.begun))
    assert begun == [("data", 1), ("compile", 1), ("data", 1), ("step", 2), ("compile", 2), ("data", 2), ("data", 3)]
    assert heart._beat.place == "data of step 4"
    assert Beat("compile", 4, 1, 1).place == "compile of step 4"
    assert Beat("save", 4, 1, 1).place == "save"


def test_rank_0_hears_the_newest_of_each_rank_and_no_line_that_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Hearts(monkeypatch).heart

    def told(turns: int, knows: bool = False) -> dict[str, Any]:
        beat = {"phase": "step", "step": 4, "begun": 3, "turns": turns}
        return {"rank": 2, "beat": beat, "knows": knows}

    assert heart._hear(told(5)) == {"turns": 5, "hang": None}
    assert heart._hear(told(4)) == {"turns": 4, "hang": None}
    assert (heart._beats[2].turns, heart._beats[1].turns) == (5, 0)
    assert heart._told == set()
    heart._hear(told(5, knows=True))
    assert heart._told == {2}


def test_a_rank_ends_when_rank_0_says_that_some_rank_hangs_and_tells_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hearts = Hearts(monkeypatch, rank=2)
    hearts.heart("step", 4)
    hearts.answer = {"turns": 7, "hang": None}
    hearts.now = 30.0
    hearts.heart._turn_of_other(7)
    hearts.now = 79.0
    hearts.heart._watch()  # rank 0 answered 49 s ago
    hearts.answer = {"turns": 6, "hang": ["rank 1 hangs", [1]]}
    hearts.heart._turn_of_other(8)  # an answer to an earlier line, which somebody has overheard
    assert hearts.done == []
    hearts.answer = {"turns": 9, "hang": ["rank 1 hangs", [1]]}
    with pytest.raises(_Ended):
        hearts.heart._turn_of_other(9)
    assert hearts.done == [(Hang("rank 1 hangs", [1]), False), HUNG]
    assert [told["knows"] for told in hearts.asked] == [False, False, False, True]
    said = capfd.readouterr().err
    assert "rank 1 hangs. The Python stacks of this rank:" in said
    assert "most recent call first" in said, "of at most a hundred threads, of which this may not be one"


@pytest.mark.parametrize(("rank", "speaks"), [(1, True), (2, False)])
def test_where_rank_0_answers_no_more_the_next_rank_says_so(
    monkeypatch: pytest.MonkeyPatch, rank: int, speaks: bool
) -> None:
    hearts = Hearts(monkeypatch, rank)
    hearts.heart("step", 4)
    hearts.now = 50.0
    hearts.heart._turn_of_other(1)  # in vain
    hearts.heart._watch()
    hearts.now = 51.0
    with pytest.raises(_Ended):
        hearts.heart._watch()
    ((hang, mine), code) = hearts.done
    assert (hang.ranks, mine, code) == ([0], speaks, HUNG)
    assert hang.reason.startswith("rank 0 hangs: no answer to the others for 50 s (timeouts.step)")


def test_rank_0_says_what_hangs_tells_it_to_whoever_asks_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = Hearts(monkeypatch)
    heart = hearts.heart
    heart._judge = Judge(TIMEOUTS, lambda: hearts.now)
    heart("step", 4)
    for rank in (1, 2):
        heart._hear({"rank": rank, "beat": {"phase": "step", "step": 4, "begun": 1, "turns": 1}, "knows": True})
    heart._turn_of_judge(1)
    hearts.now = 49.0
    heart._turn_of_judge(2)
    hearts.now = 90.0
    heart._watch()  # its own thread is alive
    assert hearts.done == []
    with pytest.raises(_Ended):
        heart._turn_of_judge(3)
    ((hang, mine), code) = hearts.done
    assert (hang.ranks, mine, code) == ([1, 2], True, HUNG)
    assert heart._hear({"rank": 1, "beat": {"phase": "step", "step": 4, "begun": 1, "turns": 2}, "knows": False}) == {
        "turns": 2,
        "hang": hang,
    }
    over = Hearts(monkeypatch)
    over.heart.close()
    over.heart._end(Hang("it hangs", [1]), mine=True)
    assert over.done == [], "a run that has just ended by itself"


def test_a_rank_tells_five_times_within_the_shortest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hearts(monkeypatch).heart._seconds == 1.0
    assert Hearts(monkeypatch, timeouts=Timeouts(load=100, step=2, save=80)).heart._seconds == pytest.approx(0.4)


def test_the_ranks_reach_rank_0_by_the_address_that_others_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own machine may know itself as 127.0.1.1 only."""
    gathered = ["127.0.1.1", "10.0.0.1"]
    world: Any = SimpleNamespace(
        rank=1, world_size=2, broadcast=lambda value: value, gather_objects=lambda mine: gathered
    )
    server, line = heartbeat._connect(world, lambda told: told)
    assert server is None
    assert line is not None
    assert line._address[0] == "10.0.0.1"
