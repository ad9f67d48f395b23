"""The meaning of a job's end: each case of the policy, without a scheduler."""

from dataclasses import replace

import pytest

from launcher.policy.jobs import (
    FRUITLESS,
    RAY_DID_NOT_START,
    Attempt,
    Ending,
    EndingKind,
    JobDecision,
    bad_nodes,
    judge,
    stand_in,
)

PREEMPTED = Ending(75, signal="USR1", step=10)


def attempt(
    number: int = 1, kind: EndingKind = "failure", failed_nodes: tuple[str, ...] = (), step: int = 0
) -> Attempt:
    return Attempt(number, "s", 12, number - 1, ["n1", "n2"], 0.0, 1.0, 1, kind, "", list(failed_nodes), step)


def judged(ending: Ending, *before: Attempt, budget: int = 3, supervised: bool = True) -> JobDecision:
    return judge(ending, before, budget=budget, supervised=supervised)


@pytest.mark.parametrize(
    ("ending", "kind", "goes_on", "exit_code"),
    [
        (Ending(0), "finished", False, 0),
        (Ending(0, signal="USR1"), "finished", False, 0),
        (PREEMPTED, "preempted", True, 75),
        (Ending(138, signal="USR1"), "preempted", True, 75),  # the signal came before the driver could catch it
        (Ending(RAY_DID_NOT_START, signal="USR1"), "preempted", True, 75),
        (Ending(75), "stopped", False, 75),
        (Ending(75, signal="USR1", stopped_by="capstan stop"), "stopped", False, 75),
        (Ending(1, lost_nodes=["n2"]), "node lost", True, 75),
        (Ending(75, lost_machine=True), "node lost", True, 75),  # its slurmd answers, its Ray does not
        (Ending(7, lost_machine=True), "node lost", True, 75),  # before the first commit
        (Ending(75, lost_machine=True, stopped_by="capstan stop"), "stopped", False, 75),
        (Ending(75, signal="USR1", lost_machine=True), "preempted", True, 75),
        (Ending(3, lost_machine=True), "mistake", False, 3),
        (Ending(75, lost_nodes=["n2"]), "node lost", True, 75),  # the driver found too few machines left
        (Ending(75, lost_nodes=["n2"], stopped_by="capstan stop"), "stopped", False, 75),
        (Ending(2, lost_nodes=["n2"]), "node lost", True, 75),  # too few workers came: because the node is gone
        (Ending(137), "failure", True, 75),
        (Ending(RAY_DID_NOT_START), "failure", True, 75),
        (Ending(1), "failure", False, 1),  # the driver has used up its budget itself
        (Ending(6), "failure", False, 6),
        (Ending(1, stopped_by="capstan stop"), "failure", False, 1),  # a crash came before the stop
        *((Ending(code), "mistake", False, code) for code in (2, 3, 4, 5, 7)),
        (Ending(3, signal="USR1"), "mistake", False, 3),
        (Ending(7, signal="USR1"), "preempted", True, 75),  # before its first commit
        (Ending(7, stopped_by="capstan stop"), "stopped", False, 7),
    ],
)
def test_what_an_end_means(ending: Ending, kind: EndingKind, goes_on: bool, exit_code: int) -> None:
    decision = judged(ending)
    assert (decision.kind, decision.goes_on, decision.exit_code) == (kind, goes_on, exit_code)


def test_without_a_driver_a_crash_of_a_rank_is_worth_another_start() -> None:
    assert judged(Ending(1), supervised=False).goes_on
    assert not judged(Ending(1), supervised=False, budget=0).goes_on


def test_the_same_error_twice_at_the_same_place_ends_the_run() -> None:
    ending = Ending(1, reason="rank 1 failed: RuntimeError: no such symbol", step=4)
    before = replace(attempt(step=4), reason=ending.reason)
    last = judged(ending, before, supervised=False)
    assert (last.goes_on, last.exit_code) == (False, 1)
    assert last.reason == f"{ending.reason}; it ended so twice at step 4, and another start would not help"
    for other in (
        replace(before, step=3),  # there is a commit since
        replace(before, reason="rank 1 failed: RuntimeError: another"),
        replace(before, kind="preempted"),
    ):
        assert judged(ending, other, supervised=False).goes_on
    assert judged(Ending(137, step=4), replace(before, reason="the driver was killed by signal 9")).goes_on
    assert judged(replace(ending, failed_nodes=["n1"]), before, supervised=False).goes_on
    silent = Ending(RAY_DID_NOT_START, step=4, reason="of the start before")
    assert judged(silent, replace(before, reason=judged(silent).reason)).goes_on, "Ray itself tells too little"


def test_failures_are_counted_and_preemptions_are_not() -> None:
    earlier = [attempt(1, "failure", step=1), attempt(2, "preempted", step=2), attempt(3, "node lost", step=3)]
    assert judged(Ending(137, step=4), *earlier, budget=2).goes_on
    last = judged(Ending(137, step=4), *earlier, attempt(4, "failure", step=4), budget=2)
    assert not last.goes_on
    assert last.reason == "the driver was killed by signal 9 (failure 3; retry.failures: 2)"


def test_starts_that_never_reach_a_commit_end_the_run() -> None:
    earlier = [attempt(number, "preempted", step=10) for number in range(1, FRUITLESS)]
    assert judged(PREEMPTED, *earlier[1:]).goes_on
    decision = judged(PREEMPTED, *earlier)
    assert not decision.goes_on
    assert "5 starts in a row ended without a new commit (the newest is of step 10)" in decision.reason
    assert judged(replace(PREEMPTED, step=11), *earlier).goes_on
    assert not judged(PREEMPTED, attempt(0, "preempted", step=4), *earlier).goes_on, "an older start reached a commit"


def test_a_node_on_which_ranks_die_twice_is_excluded() -> None:
    once = Ending(1, failed_nodes=["n2"], reason="rank 3 died: killed")
    assert judged(once) == JobDecision(False, "failure", "rank 3 died: killed", 1)
    twice = judged(once, attempt(1, "failure", ("n2", "n1")))
    assert (twice.goes_on, twice.exclude) == (True, ["n2"])
    assert "excluded from now on: n2" in twice.reason
    assert judged(Ending(1, failed_nodes=["n1", "n1"])).exclude == ["n1"]


def test_an_excluded_node_stays_excluded() -> None:
    earlier = attempt(1, "failure", ("n2", "n2"), step=3)
    assert judged(PREEMPTED, earlier).exclude == ["n2"]
    slow = replace(attempt(2, "stopped", step=4), slow_nodes=["n3"])
    assert judged(replace(PREEMPTED, slow_nodes=["n1"]), earlier, slow).exclude == ["n1", "n2", "n3"]
    assert not judged(Ending(1, failed_nodes=["n1"]), earlier).goes_on, "n1 is not bad, and the driver has given up"


def test_a_lost_node_is_bad_the_second_time() -> None:
    lost = Ending(1, lost_nodes=["n2"], step=5)
    assert judged(lost).exclude == []
    assert judged(lost, attempt(1, "node lost", ("n2",))).exclude == ["n2"]
    assert bad_nodes([], lost) == []


@pytest.mark.parametrize(
    ("out", "spares", "expected"),
    [
        ([], ["n4"], (["n1", "n2", "n3"], ["n4"])),
        (["n2"], ["n4", "n5"], (["n1", "n4", "n3"], ["n5"])),
        (["n1", "n3"], ["n4", "n5"], (["n4", "n2", "n5"], [])),
        (["n1", "n3"], ["n4"], None),
        (["n2"], [], None),
        (["n9"], [], (["n1", "n2", "n3"], [])),
    ],
)
def test_spares_take_the_places_of_the_nodes_that_are_left_out(
    out: list[str], spares: list[str], expected: tuple[list[str], list[str]] | None
) -> None:
    """The ranks of the other nodes keep their numbers, and so what their keepers have."""
    found = stand_in(["n1", "n2", "n3"], spares, out)
    assert (found and (found.ranks, found.spares)) == expected
