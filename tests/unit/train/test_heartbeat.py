"""The ranks to blame for a hang: the judge over beats and a clock of its own."""

from trainer.config import Timeouts
from trainer.train.heartbeat import Beat, Hang, Judge, Phase

LIMITS = Timeouts(load=100, step=10, save=50)


class Clock:
    """Ranks under a judge's eye, second by second. `frozen` ranks publish nothing new."""

    def __init__(self, ranks: int = 3) -> None:
        self.now = 0.0
        self.begun = [0] * ranks
        self.phases: list[Phase] = ["load"] * ranks
        self.turns = [0] * ranks
        self.frozen: set[int] = set()
        self.collectives = [0] * ranks
        self.judge = Judge(LIMITS, lambda: self.now)

    def begin(self, phase: Phase, *ranks: int) -> None:
        for rank in ranks:
            self.phases[rank] = phase
            self.begun[rank] += 1

    def run(self, seconds: int) -> Hang | None:
        for _ in range(seconds):
            self.now += 1
            self.turns = [turn + (rank not in self.frozen) for rank, turn in enumerate(self.turns)]
            beats = [
                Beat(self.phases[rank], 7, self.begun[rank], self.turns[rank], self.collectives[rank])
                for rank in range(len(self.turns))
            ]
            if verdict := self.judge.look(beats):
                return verdict
        return None


def test_ranks_that_move_on_are_left_alone():
    clock = Clock()
    for _ in range(20):
        clock.begin("step", 0, 1, 2)
        assert clock.run(9) is None


def test_the_rank_that_the_others_wait_for_is_named_with_its_phase_and_the_setting():
    clock = Clock()
    clock.begin("data", 0, 1, 2)
    clock.begin("step", 0, 2)
    verdict = clock.run(30)
    assert verdict is not None
    assert verdict.ranks == [1]
    assert (
        verdict.reason == "rank 1 hangs in data of step 7: no progress for 10 s (timeouts.step); the others wait for it"
    )
    assert 10 < clock.now <= 12


def test_a_rank_whose_data_is_still_compiled_does_not_hang():
    clock = Clock()
    clock.begin("data", 0, 1, 2)
    clock.phases[1] = clock.phases[2] = "compile"
    clock.begin("step", 0)
    assert clock.run(1000) is None
    clock.begin("step", 1)  # it has come on two ranks, and the third hangs in what is left to read
    clock.phases[2] = "data"
    verdict = clock.run(30)
    assert verdict is not None
    assert verdict.ranks == [2]


def test_each_phase_has_its_own_limit():
    limits: list[tuple[Phase, int]] = [("load", 100), ("step", 10), ("save", 50)]
    for phase, seconds in limits:
        clock = Clock()
        clock.begin(phase, 0, 1, 2)
        assert clock.run(seconds) is None
        assert clock.run(2) is not None


def test_a_frozen_process_is_named_although_the_others_are_as_late():
    clock = Clock()
    clock.begin("step", 0, 1, 2)
    clock.frozen = {2}
    verdict = clock.run(30)
    assert verdict is not None
    assert verdict.ranks == [2]
    assert "no sign of life for 10 s" in verdict.reason


def test_of_ranks_in_one_phase_the_one_that_began_the_fewest_collectives_is_named():
    clock = Clock()
    clock.begin("step", 0, 1, 2)
    clock.collectives = [41, 40, 43]  # rank 2 does not wait for each of them, as NCCL works beside the host
    verdict = clock.run(30)
    assert verdict is not None
    assert verdict.ranks == [1]


def test_where_collectives_go_on_for_too_long_no_rank_is_blamed_for_it():
    """Rank 1 is always seen a moment before the others."""
    clock = Clock()
    clock.begin("step", 0, 1, 2)
    verdict = None
    for second in range(1, 30):
        clock.collectives = [100 * second, 100 * second - 50, 100 * second]
        if verdict := clock.run(1):
            break
    assert verdict is not None
    assert verdict.ranks == [0, 1, 2]
    assert "no end for 10 s (timeouts.step); collectives go on" in verdict.reason


def test_where_all_wait_nobody_is_singled_out():
    clock = Clock()
    clock.begin("save", 0, 1, 2)
    verdict = clock.run(60)
    assert verdict is not None
    assert verdict.ranks == [0, 1, 2]
    assert verdict.reason.startswith("ranks 0, 1, 2 hang in save: no progress for 50 s (timeouts.save); each waits for")


def test_of_many_ranks_that_hang_eight_are_named():
    named = "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    for ranks, said in ((8, f"{named} hang in load"), (9, f"{named} ... hang in load")):
        verdict = Clock(ranks).run(102)
        assert verdict is not None
        assert verdict.ranks == list(range(ranks))
        assert verdict.reason.startswith(said)


def test_of_ranks_in_several_phases_the_shortest_limit_decides():
    clock = Clock()
    clock.begin("save", 0, 1)
    clock.begin("step", 0, 2)
    verdict = clock.run(30)
    assert verdict is not None
    assert (verdict.ranks, clock.now) == ([1, 2], 12)


def test_ranks_wait_for_a_slow_one_as_long_as_its_own_phase_may_take():
    clock = Clock(2)
    clock.begin("step", 0)  # rank 1 still loads, rank 0 waits for it in its first step
    assert clock.run(100) is None
    verdict = clock.run(2)
    assert verdict is not None
    assert verdict.ranks == [1]
    assert verdict.reason.startswith("rank 1 hangs in load")
