"""A rank that is slower than the others all the time is found within 20 steps. Pauses, uneven work and noise name
nobody.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.processes import hindered
from trainer.processes.hindered import CoreWaits, Hindrance, Quota, of_clock
from trainer.train import slow
from trainer.train.slow import Busy, Lag, SlowRanks, Times, _data
from trainer.train.start import slowest


def steps_until_named(
    ranks: int,
    steps: int,
    seconds: Callable[[int, int], float],
    work: Callable[[int, int], float] = lambda step, rank: 1.0,
    waited: Callable[[int, int], float] = lambda step, rank: 0.0,
) -> tuple[Times, dict[int, int]]:
    """The step in which each rank was named first."""
    pace, named = Times(), dict[int, int]()
    for step in range(1, steps + 1):
        pace.add([Busy(seconds(step, rank), waited(step, rank), work(step, rank), 0) for rank in range(ranks)])
        named = dict.fromkeys(pace.slow, step) | named
    return pace, named


@pytest.mark.parametrize("ranks", [2, 3, 8, 1024])
def test_a_rank_that_is_1_3_times_slower_is_named_within_20_steps(ranks: int) -> None:
    draw = np.random.default_rng(3)
    last = ranks - 1

    def seconds(step: int, rank: int) -> float:
        return (1.3 if rank == last and step > 100 else 1.0) * float(draw.lognormal(0, 0.03))

    pace, named = steps_until_named(ranks, 120, seconds)
    assert named.keys() == {last}
    assert 100 < named[last] < 119
    assert pace.slow[last].ratio == pytest.approx(1.3, abs=0.05)


def test_a_quota_of_time_that_stops_a_rank_in_some_steps_only_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.04 s; of each tenth of a second the rank has 0.077 s. Other programs hold all ranks up as well."""
    quotas = [0.0, 0.0, 0.0]
    monkeypatch.setattr(slow, "quota", Quota)
    start: Any = SimpleNamespace()
    ranks, draw = [SlowRanks(start) for _ in range(3)], np.random.default_rng(6)
    seconds = list[list[float]]()
    for step in range(40):
        row = list[float]()
        for rank, own in enumerate(ranks):
            stopped = 0.03 * ((step + 1) * 0.04 // 0.077 - step * 0.04 // 0.077) if rank == 0 else 0.0
            others = float(draw.exponential(0.05))
            quotas[rank] += stopped
            monkeypatch.setattr(slow, "quota", lambda at=rank: Quota(seconds=quotas[at]))
            passes = {"forward": 0.01, "backward": 0.03 + stopped + others, "gather": 1.0}
            row.append(own.own_seconds(passes, {"backward": stopped + others, "gather": 0.0}))
        seconds.append(row)
    assert steps_until_named(3, 40, lambda step, rank: seconds[step - 1][rank])[1].keys() == {0}


def test_nobody_is_named_in_2_000_even_steps_beside_other_work() -> None:
    """Pauses of any rank for one to five steps, and noise in all."""
    draw = np.random.default_rng(4)
    pauses = {rank: [int(begin) for begin in range(20, 2000, 40) + draw.integers(-10, 10, 50)] for rank in range(8)}

    def seconds(step: int, rank: int) -> float:
        paused = any(begin <= step < begin + 1 + begin % 5 for begin in pauses[rank])
        return float(draw.lognormal(0, 0.1)) * (2.5 if paused else 1.0)

    assert steps_until_named(8, 2000, seconds)[1] == {}


def test_more_work_excuses_a_rank_as_far_as_work_takes_time() -> None:
    draw = np.random.default_rng(5)
    amounts = draw.uniform(0.5, 1.5, (400, 2)) * (1.0, 1.6)

    def work(step: int, rank: int) -> float:
        return float(amounts[step - 1, rank])

    assert steps_until_named(2, 400, work, work)[1] == {}
    # Where the time does not grow with the work, a rank with more of it has no excuse.
    assert steps_until_named(2, 40, lambda step, rank: 1 + 0.3 * rank, work)[1].keys() == {1}


def test_ranks_without_rows_are_no_measure_for_the_others() -> None:
    assert steps_until_named(8, 40, lambda step, rank: float(rank < 2), lambda step, rank: float(rank < 2))[1] == {}


def test_a_rank_that_waits_for_data_is_named_with_what_it_waits() -> None:
    pace, named = steps_until_named(4, 40, lambda *_: 1.0, waited=lambda step, rank: 0.5 * (rank == 2))
    assert named.keys() == {2}
    assert pace.slow[2].waited == pytest.approx(0.5)


def test_a_rank_that_is_as_fast_as_the_others_again_is_no_longer_slow() -> None:
    pace, named = steps_until_named(4, 60, lambda step, rank: 1.4 if rank == 1 and step < 30 else 1.0)
    assert named.keys() == {1}
    assert pace.slow == {}


@pytest.mark.parametrize(("later", "stays"), [(1.1, True), (1.07, False)])
def test_a_slow_rank_that_catches_up_nearly_is_named_once(later: float, stays: bool) -> None:
    pace, named = steps_until_named(4, 60, lambda step, rank: (1.4 if step < 30 else later) if rank == 1 else 1.0)
    assert named == {1: 16}
    assert list(pace.slow) == [1] * stays
    assert steps_until_named(4, 60, lambda step, rank: later if rank == 1 else 1.0)[1] == {}, "it is not slow by itself"


@pytest.mark.parametrize(("even", "late"), [({3, 4}, True), ({3, 4, 9, 10}, False)])
def test_one_stretch_of_eight_may_be_as_fast_as_the_others(even: set[int], late: bool) -> None:
    pace, _ = steps_until_named(3, 16, lambda step, rank: 1.4 if rank == 2 and step not in even else 1.0)
    assert list(pace.slow) == [2] * late


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("1980, 1980, 61, 0x0000000000000000", ""),
        ("1900, 1980, 61, 0x0000000000000001", ""),  # an idle GPU, or a clock that varies a little
        ("1980, 1980, 88, 0x0000000000000020", "its GPU runs at 1,980 of 1,980 MHz (88 °C, heat)"),
        ("1200, 1980, 88, 0x0000000000000060", "its GPU runs at 1,200 of 1,980 MHz (88 °C, heat)"),
        ("1400, 1980, 60, 0x0000000000000004", "its GPU runs at 1,400 of 1,980 MHz (60 °C, power cap)"),
        ("1400, 1980, 60, 0x0000000000000000", "its GPU runs at 1,400 of 1,980 MHz (60 °C)"),
    ],
)
def test_the_clock_of_a_gpu_says_why_a_rank_is_slow(told: str, found: str) -> None:
    assert of_clock(told) == found


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ((10.0, 0.9, (0, 0, 0.0)), []),
        ((10.0, 2.5, (0, 0, 0.0)), ["its threads waited 0.25 s each second for a core that something else used"]),
        ((10.0, 2.5, (100, 9, 0.1)), ["its threads waited 0.25 s each second for a core that something else used"]),
        ((10.0, 2.5, (100, 40, 2.0)), ["its CPU quota (cgroup) was used up in 40% of the quota's periods"]),
    ],
)
def test_what_holds_up_a_rank_is_its_quota_or_else_other_programs(now: tuple[Any, ...], found: list[str]) -> None:
    passed, waited, quota = now
    for time, earlier, counts in ((0.0, 0.0, (0, 0, 0.0)), (100.0, 70.0, (1000, 900, 30.0))):
        before = hindered._Counters(time, earlier, Quota(*counts))
        after = Quota(*(old + new for old, new in zip(counts, quota, strict=True)))
        assert list(hindered._since(before, hindered._Counters(time + passed, earlier + waited, after))) == found


def test_of_groups_with_a_quota_the_one_that_has_held_up_longest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        {"nr_periods": 10, "nr_throttled": 1, "throttled_usec": 500_000},
        {"nr_periods": 30, "nr_throttled": 9, "throttled_time": 2_000_000_000},  # nanoseconds, in version 1
        {"nr_periods": 99, "nr_throttled": 9, "throttled_usec": 100},
        {"usage_usec": 5},
    ]
    monkeypatch.setattr(hindered, "_cpu_stats", lambda: iter(groups))
    assert hindered.quota() == Quota(30, 9, 2.0)
    monkeypatch.setattr(hindered, "_cpu_stats", lambda: iter(groups[:1]))
    assert hindered.quota() == Quota(10, 1, 0.5)
    monkeypatch.setattr(hindered, "_cpu_stats", lambda: iter(()))
    assert hindered.quota() == Quota()


@pytest.mark.parametrize("controllers", ["", "cpu,cpuacct"])
def test_the_quota_of_a_group_around_this_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controllers: str
) -> None:
    monkeypatch.setattr(hindered, "_CGROUPS", tmp_path)
    lines = f"4:memory:/job\n3:cpuset:/job\n2:{controllers}:/job/step\n"
    plain = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: lines if path.name == "cgroup" else plain(path))
    for below, counts in (
        (Path(controllers, "job"), "nr_periods 8\nnr_throttled 2"),
        (Path("memory/job"), "nr_periods 99"),
        (Path("cpuset/job"), "nr_periods 77"),
    ):
        (tmp_path / below).mkdir(parents=True)
        (tmp_path / below / "cpu.stat").write_text(f"{counts}\n")
    assert list(hindered._cpu_stats()) == [{"nr_periods": 8, "nr_throttled": 2}]


def test_seconds_without_a_core_are_those_that_linux_counts() -> None:
    def counted() -> float:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9

    before = counted()
    assert before <= CoreWaits()() <= counted()


def test_a_machine_that_tells_nothing_gives_no_reason() -> None:
    assert "GPU" not in Hindrance(torch.device("cpu")).found()


def test_the_clock_of_a_ranks_own_gpu_is_asked_for_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[str]]()

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout="1000, 1980, 85, 0x0000000000000040\n")

    monkeypatch.setattr(hindered.children, "run", run)
    monkeypatch.setattr(hindered.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of-{device}"))
    assert Hindrance(torch.device("cuda:1")).found().startswith("its GPU runs at 1,000 of 1,980 MHz (85 °C, heat)")
    assert [command[:2] for command in asked] == [["nvidia-smi", "--id=GPU-of-cuda:1"]]


def test_the_rank_that_was_last_in_each_part_of_a_start_is_told_with_the_median() -> None:
    ranks = [{"launch": 10.0, "load": 3.0}, {"launch": 41.5, "load": 3.0}, {"launch": 12.0, "load": 2.0}]
    found = slowest(ranks, ["a", "b", "c"])
    assert found["launch"] == {"rank": 1, "machine": "b", "seconds": 41.5, "median": 12.0}
    assert found["load"]["rank"] == 0


def test_a_clock_of_waits_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert all(CoreWaits()() >= 0 for _ in range(50))
    assert len(os.listdir("/proc/self/fd")) < before + 25  # other threads may open a few


def test_a_slow_rank_is_replaced_after_a_commit_where_the_settings_say_so_and_said_to_be_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, step = list[dict[str, Any]](), 0

    def begun(device: torch.device) -> Any:
        since = step
        return SimpleNamespace(found=lambda: f"held up since step {since}")

    monkeypatch.setattr(slow, "Hindrance", begun)
    start: Any = SimpleNamespace(
        ranks=SimpleNamespace(rank=1, device=torch.device("cpu"), gather_objects=lambda mine: [None, None, mine, None]),
        starter=SimpleNamespace(machine="b"),
        config=SimpleNamespace(retry=SimpleNamespace(slow_rank="replace")),
        metrics=SimpleNamespace(write=lambda kind, **facts: written.append({"kind": kind, **facts})),
    )
    start.ranks.rank = 2
    ranks = SlowRanks(start)
    assert not ranks.to_replace
    waits = [Busy(0.0, 0.5 * (rank == 2), 1.0, 0.0) for rank in range(4)]
    while not written:
        step += 1
        ranks.heard(step, [1.0] * 4, waits)
    assert (written[0]["rank"], written[0]["machine"], written[0]["ratio"]) == (2, "b", 1.5)
    assert written[0]["why"] == "it waits 0.5 s a step longer for data from the store; held up since step 9", (
        "from when it was suspected"
    )
    assert ranks.to_replace
    start.config.retry.slow_rank = "keep"
    assert not ranks.to_replace
    ranks._named |= {3: "a", 1: "b"}
    error = ranks.replaced(7)
    assert (error.ranks, error.machines) == ([1, 2, 3], ["a", "b"])
    assert str(error).startswith("stopped at step 7 because a and b are slower than the other machines")
    ranks._named.pop(3)
    assert "because b is slower" in str(ranks.replaced(7)), "with two ranks"
    ranks._named.pop(1)
    for more in range(1, 60):
        ranks.heard(step + more, [1.0] * 4, [Busy(0.0, 0.0, 1.0, 0.0)] * 4)
    (over,) = written[1:]
    assert (over["kind"], over["rank"], over["machine"], over["over"]) == ("slow_rank", 2, "b", True)


@pytest.mark.parametrize(
    ("lag", "said"),
    [
        (Lag(1.5, 1.0, 0.49, 3), ""),
        (Lag(1.5, 1.0, 0.5, 0), "it waits 0.5 s a step longer for data from the store"),
        (Lag(1.5, 1.0, 0.75, 2), "it waits 0.75 s a step longer for data from the store, 2 reads repeated"),
    ],
)
def test_a_rank_that_loses_half_of_its_time_to_data_waits_for_data(lag: Lag, said: str) -> None:
    assert _data(lag) == said


def test_a_rank_computes_in_its_passes_alone_without_what_held_it_up_but_its_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = iter([10.0, 11.0, 11.5, 11.5, 20.0, 20.0])
    monkeypatch.setattr(slow, "quota", lambda: SimpleNamespace(seconds=next(stopped)))
    start: Any = SimpleNamespace(ranks=None)
    ranks, spent = SlowRanks(start), {"forward": 4.0, "backward": 6.0, "step": 4.0}
    assert ranks.own_seconds(spent, {}) == 10.0, "on a GPU"
    held_up = {"forward": 1.0, "backward": 2.0, "save": 1.0}
    by_quota = [0.75, 0.375, 0.0, 3.0, 0.0]  # the share of the passes, and no more than they were held up
    for step in range(5):
        newest = by_quota[max(0, step - 3) : step + 1]
        assert ranks.own_seconds(spent, held_up) == pytest.approx(10 - 3 + sum(newest) / len(newest))


def test_a_rank_is_suspected_after_half_of_the_steps_by_which_it_is_named() -> None:
    pace = Times()
    for step in range(1, 9):
        pace.add([Busy(1.0 + 0.3 * (rank == 2), 0.0, 1.0, 0.0) for rank in range(3)])
        assert pace.suspects() == ({2} if step == 8 else set())
    pace.add([Busy(1.0, 0.0, 1.0, 0.0)] * 3)
    pace.add([Busy(1.0, 0.0, 1.0, 0.0)] * 3)
    assert pace.suspects() == set(), "one stretch as fast as the others"
    alone = Times()
    for _ in range(9):
        alone.add([Busy(1.0, 0.0, 1.0, 0.0)])
    assert alone.suspects() == set()


def test_the_median_of_others_leaves_each_rank_out_of_its_own() -> None:
    drawn = np.random.default_rng(3)
    for size in (2, 3, 4, 5, 8):
        values = drawn.integers(0, 4, size).astype(float)  # some are equal
        expected = [np.median(np.delete(values, rank)) for rank in range(size)]
        assert slow._medians_of_others(values).tolist() == expected


def test_time_grows_with_work_as_the_steps_show_and_with_all_of_it_where_work_hardly_varies() -> None:
    drawn = np.random.default_rng(4)
    work = drawn.uniform(1, 3, (16, 4))
    speeds = np.array([1.0, 2.0, 3.0, 4.0])
    assert slow._growth(speeds * work**0.5, work) == pytest.approx(0.5)
    assert slow._growth(speeds * work, work) == pytest.approx(1.0)
    assert slow._growth(speeds * work**2, work) == 1.0
    assert slow._growth(speeds / work, work) == 0.0
    even = 5 + 0.01 * drawn.uniform(-1, 1, (16, 4))
    assert slow._growth(np.ones((16, 4)), even) == 1.0
    packed = 2 + 0.05 * drawn.uniform(-1, 1, (16, 4))  # each row is full but for its last document
    assert slow._growth(np.ones((16, 4)), packed) == 1.0
    some = work.copy()
    some[3, 2] = 0  # a rank without rows in a step tells nothing
    assert slow._growth(np.where(some > 0, speeds * work**0.5, 9.0), some) == pytest.approx(0.5)


def test_more_work_excuses_a_longer_time_and_less_makes_nobody_slow() -> None:
    def slowness(seconds: list[float], work: list[float], growth: float) -> list[float]:
        return slow._slowness(np.array(seconds), np.array(work), growth).tolist()

    assert slowness([1, 1, 1, 2], [1, 1, 1, 1], 1.0) == [1, 1, 1, 2]
    assert slowness([1, 1, 1, 2], [1, 1, 1, 2], 1.0) == [1, 1, 1, 1]
    assert slowness([1, 1, 1, 2], [1, 1, 1, 4], 0.5) == [1, 1, 1, 1]
    assert slowness([1, 1, 1, 2], [1, 1, 1, 2], 0.0) == [1, 1, 1, 2]
    assert slowness([1, 1, 1, 1], [1, 1, 1, 0.5], 1.0) == [1, 1, 1, 1]
    assert slowness([1, 1, 5, 2], [1, 1, 0, 1], 1.0) == [1 / 1.5, 1 / 1.5, 0, 2], "one without rows is no measure"
    assert slowness([1, 5], [1, 0], 1.0) == [0, 0]


def test_a_slow_rank_is_told_with_its_own_seconds_above_the_others() -> None:
    times = Times()
    for step in range(16):
        times.add([Busy(1.0, 0.1, 1.0, 3), Busy(1.0, 0.6, 1.0, 5 + step % 16), Busy(1.2, 0.1, 1.0, 0)])
    lag = times.slow[1]
    assert lag.seconds == pytest.approx(0.4)  # above the median of 1.1 and 1.3
    assert lag.waited == pytest.approx(0.5)
    assert lag.repeated == 15
    assert lag.ratio == pytest.approx(1.6 / 1.2)
