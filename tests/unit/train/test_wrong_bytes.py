"""What a run does when a look finds a wrong byte, or a probe a rank that computes wrongly."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.errors import WrongBytes
from trainer.state.zero.looks import Told
from trainer.train.every import Moment
from trainer.train.every.look import Look
from trainer.train.every.probe import Probe, RankAnswer, RankAnswers, _answer

FINE = Told(0, 0, 0, 5, 0, 8, 0)
OTHER = Told(0, 0, 0, 3, 0, 8, 0)
"""Two ranks that have parts of the sum that each of them computes with."""


class Looking:
    """The looks of the first of two ranks, after the update that makes step 5. `left` is what stays wrong."""

    def __init__(self, wrong: list[int] | None = None, left: list[int] | None = None, of_other: Any = None) -> None:
        self.done, self.written, self.wrong, self.left, self.of_other = list[Any](), list[Any](), wrong, left, of_other
        self.held = [SimpleNamespace(name=name, owner=f"owner of {name}") for name in ("q", "k", "v")]
        self.looked, self.seconds, self.asked = [0, 0, 0], 0.0, list[float]()
        self.refilled = False
        engine = SimpleNamespace(
            looks=self,
            turns=2,
            look_at=lambda turn: self.done.append(("look at", turn)),
            gather_again=lambda: self.done.append("gathered again"),
        )
        ranks = SimpleNamespace(rank=0, gather_objects=self.gather_objects)
        start = SimpleNamespace(
            ranks=ranks,
            starter=SimpleNamespace(machine="m0"),
            metrics=SimpleNamespace(write=lambda kind, **of: self.written.append((kind, of))),
        )
        self.run: Any = SimpleNamespace(
            engine=engine,
            start=start,
            begin=lambda *of: self.done.append(of),
            refill=self.refill,
            checkpoints=SimpleNamespace(doubt=lambda after, reason: self.done.append(("doubt", after, reason))),
        )
        self.look = Look(self.run, 0.5)
        self.look.begins(3)
        assert self.looked == [3, 3, 3], "all was read or restored just now"
        self.look.stepped(4)
        self.look.heard([FINE, OTHER])  # of the pass after step 3
        self.looked = [3, 2, 1]
        self.look.stepped(5)
        self.done.clear()

    def gather_objects(self, mine: Any) -> list[Any]:
        return [mine, ("m1", "master of w") if isinstance(mine, tuple) else {} if isinstance(mine, dict) else []]

    def refill(self, owners: Any) -> None:
        self.done.append(("read again", owners))
        self.refilled = True

    def wrong_now(self, numbers: Any) -> list[int]:
        return [number for number in numbers if number in ((self.left if self.refilled else self.wrong) or ())]

    def learnt_name(self, number: int) -> str:
        return f"learnt {number}"

    def sound(self, step: int) -> None:
        self.done.append(("sound", step))

    def budget(self, seconds: float) -> int:
        self.asked.append(seconds)
        return 1000

    def watch(self, size: int) -> None:
        self.done.append(("watch", size))

    def sweep(self, size: int) -> None:
        self.done.append(("sweep", size))

    def records(self) -> list[Any]:
        assert all(kind == "wrong_bytes" and of["step"] == 5 for kind, of in self.written)
        return [(of["rank"], of["machine"], of["where"], of["tensor"], of["since"]) for _, of in self.written]


def test_a_step_looks_at_a_part_of_everything_and_where_all_is_well_nothing_is_said() -> None:
    looking = Looking()
    looking.look.heard([FINE, OTHER])
    looking.look.stepped(6)
    assert looking.done == [("sound", 4), ("look at", 0), ("watch", 150), ("sweep", 300)]
    assert looking.written == []
    looking.look.stepped(7)
    assert looking.done[4] == ("look at", 1), "the layers take turns"


def test_looks_have_their_share_of_the_time_between_two_steps_and_tell_what_they_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    looking = Looking()
    for now, spent, told in ((12.0, 0.25, 0.25), (16.0, 0.75, 0.5), (16.0, 0.75, 0.0)):  # noqa: B007 # the clock reads it
        looking.seconds = spent
        assert looking.look.stepped(6) == {"look_seconds": told}
    assert looking.asked[-3:] == [0.5 * 2.0, 0.5 * 4.0, 0.0]


@pytest.mark.parametrize(
    ("told", "record"),
    [
        ([FINE._replace(learnt=7), OTHER], (0, "m0", "learnt", "learnt 7", 4)),
        ([FINE, OTHER._replace(learnt=7)], (1, "m1", "learnt", "master of w", 4)),
        ([FINE._replace(computed_low=9), OTHER], (0, "m0", "gathered", "what learns", 4)),
    ],
)
def test_where_what_learns_is_wrong_no_state_since_the_update_before_is_kept(told: list[Told], record: Any) -> None:
    looking = Looking()
    with pytest.raises(WrongBytes, match="The update after step 4 is not kept") as raised:
        looking.look.heard(told)
    assert looking.records() == [record]
    ((what, after, reason),) = looking.done
    assert (what, after) == ("doubt", 3)
    assert str(raised.value).startswith(reason)


def test_a_wrong_share_is_read_again_and_a_wrong_copy_gathered_again() -> None:
    looking = Looking(wrong=[1])
    looking.look.heard([FINE._replace(share=2, layer=2), OTHER._replace(layer=3)])
    assert looking.records() == [(0, "m0", "share", "k", 2), (1, "m1", "gathered", "v", 3)]
    assert looking.done == [
        ("load",),
        ("read again", ["owner of k"]),
        ("save", 5),
        "gathered again",
        ("sound", 4),
    ]
    looking = Looking(wrong=[1])
    looking.look.heard([FINE._replace(layer=2), OTHER])
    assert looking.records() == [(0, "m0", "share", "k", 2)], "found in the gathered layer before the sweep came to it"
    assert ("read again", ["owner of k"]) in looking.done
    looking = Looking()
    looking.look.heard([FINE._replace(layer=1), OTHER])
    assert looking.records() == [(0, "m0", "gathered", "q", 3)]
    assert looking.done == ["gathered again", ("sound", 4)]
    for step in (6, 7):
        looking.look.stepped(step)
        looking.look.heard([FINE, OTHER] if step == 6 else [FINE._replace(layer=1), OTHER])
    assert looking.written[-1][1]["since"] == 4, "the turn of this layer came last after step 4"


def test_a_share_that_the_files_do_not_mend_ends_the_run() -> None:
    looking = Looking(wrong=[1], left=[1])
    with pytest.raises(WrongBytes, match="k could not be repaired from the base's files. Start the run again"):
        looking.look.heard([FINE._replace(share=2), OTHER])


RIGHT, WRONG = RankAnswer((7, 8), (3.0, 4.0)), RankAnswer((7, 9), (3.0, 4.5))


class Probing:
    """The probes of the first of some ranks, each with its answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
        self.done, self.written, self.kinds = list[Any](), list[Any](), kinds
        self.wrong = set[int]()
        self.given: list[tuple[RankAnswer, ...]] | None = None
        ranks = SimpleNamespace(world_size=len(kinds))
        start = SimpleNamespace(
            ranks=ranks,
            config=SimpleNamespace(sharding=SimpleNamespace(sequence_parallel=1)),
            metrics=SimpleNamespace(write=lambda kind, **of: self.written.append((kind, of))),
        )
        run: Any = SimpleNamespace(
            start=start,
            begin=lambda *of: None,
            checkpoints=SimpleNamespace(doubt=lambda after, reason: self.done.append(("doubt", after, reason))),
        )
        self.probe = Probe(run, 3)
        monkeypatch.setattr(self.probe, "_row", lambda now, size, group: self.done.append(("row of", group)))
        monkeypatch.setattr(self.probe, "_answers", self.answers)

    def answers(self, row: Any, step: int, passes: int) -> list[RankAnswers]:
        self.done.append(("passes", passes))
        given = self.given or [(WRONG if rank in self.wrong else RIGHT,) * 3 for rank in range(len(self.kinds))]
        return [
            RankAnswers(
                kind,
                f"m{rank}",
                answers[:passes] if passes == 1 else answers[1:] if len(self.done) > 2 else answers[:2],
            )
            for rank, (kind, answers) in enumerate(zip(self.kinds, given, strict=True))
        ]

    def at(self, step: int) -> None:
        row: Any = "a row"
        now = Moment(step, rows=[row])
        assert self.probe.is_due(now)
        self.probe.act(now)


def test_a_probe_takes_the_rows_of_ranks_in_turns_and_repeats_itself_only_where_nobody_else_can_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probing = Probing(monkeypatch, "a", "a", "a")
    for step in (3, 6, 9, 12):
        probing.at(step)
    assert probing.done == [
        *(("row of", 0), ("passes", 2)),
        *(("row of", 1), ("passes", 1)),
        *(("row of", 2), ("passes", 1)),
        *(("row of", 0), ("passes", 1)),
    ]
    assert [(kind, of["step"], of["bound"]) for kind, of in probing.written] == [
        ("probe", step, 0.0) for step in (3, 6, 9, 12)
    ]
    row: Any = "a row"
    assert not probing.probe.is_due(Moment(4, rows=[row]))
    assert not probing.probe.is_due(Moment(6))
    assert not probing.probe.is_due(Moment(6, rows=[row], stopping=True))
    alone = Probing(monkeypatch, "a", "a", "b")
    for step in (3, 6):
        alone.at(step)
    assert [passes for what, passes in alone.done if what == "passes"] == [2, 2]


def test_a_rank_that_computes_wrongly_ends_the_start_and_leaves_what_came_since_the_last_good_probe_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probing = Probing(monkeypatch, "a", "a", "a")
    probing.probe.begins(1)
    probing.at(3)
    probing.at(6)
    probing.wrong = {1}
    with pytest.raises(WrongBytes, match="The checkpoints since step 6 are in doubt"):
        probing.at(9)
    assert probing.done[4:-1] == [("row of", 2), ("passes", 1), ("passes", 2)], "they all compute it again"
    assert probing.done[-1][:2] == ("doubt", 6)
    kind, facts = probing.written[-1]
    assert kind == "wrong_bytes"
    told = {"step": 9, "rank": 1, "machine": "m1", "where": "gradient", "since": 6, "undecided": False}
    assert facts == {**told, "tensor": "gradient"}
    two = Probing(monkeypatch, "a", "a")
    two.probe.begins(1)
    two.wrong = {1}
    with pytest.raises(WrongBytes, match=r"Which of them is right cannot be told\. The checkpoints since step 1 are"):
        two.at(3)
    assert [of["rank"] for _, of in two.written] == [0, 1]


def nearly(difference: float) -> RankAnswer:
    """Other bits than `RIGHT`, and norms that differ by so much of the gradient's."""
    return RankAnswer((6, int(1e9 * difference)), (3.0, 4.0 + 5 * difference))


def test_kernels_that_give_other_bits_may_differ_by_16_times_what_they_differed_by_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probing = Probing(monkeypatch, "a", "a", "a")
    probing.given = [(RIGHT, nearly(1e-4)), (RIGHT, RIGHT), (RIGHT, RIGHT)]
    probing.at(3)
    assert probing.written[-1][1]["bound"] == pytest.approx(16e-4, rel=1e-3)
    probing.given = [(nearly(15e-4),) * 3, (RIGHT,) * 3, (RIGHT,) * 3]
    probing.at(6)
    probing.given = [(nearly(18e-4), RIGHT, nearly(5e-4)), (RIGHT, RIGHT, nearly(5e-4)), (RIGHT, RIGHT, nearly(5e-4))]
    probing.at(9)  # these kernels differ more than they did, on most ranks
    assert probing.written[-1][1]["bound"] == pytest.approx(80e-4, rel=1e-2)
    probing.given = [(nearly(90e-4),) * 3, (RIGHT,) * 3, (RIGHT,) * 3]
    with pytest.raises(WrongBytes):
        probing.at(12)


def test_an_answer_sums_each_gradient_and_leaves_the_counts_of_experts_as_they_were() -> None:
    experts = SimpleNamespace(has_gate=True, visits=5)

    def gradients(row: Any, limit: int) -> dict[str, torch.Tensor]:
        experts.visits += 1
        return {"w": torch.tensor([3.0, 4.0]), "v": torch.zeros(2)} if row else {}

    model = SimpleNamespace(modules=lambda: [experts, SimpleNamespace()])
    run: Any = SimpleNamespace(engine=SimpleNamespace(model=model, gradients=gradients))
    row: Any = "a row"
    found = _answer(run, row, 3)
    assert found.norms == (5.0, 0.0)
    assert found.sums == (int(torch.tensor([3.0, 4.0]).view(torch.int64).sum()), 0)
    assert experts.visits == 5
    nothing: Any = ""
    assert _answer(run, nothing, 3) == RankAnswer((), ())
