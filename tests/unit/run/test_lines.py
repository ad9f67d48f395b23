"""Progress without a terminal: plain lines, of what a log should keep and no more."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.view.watch import follow_lines
from trainer.errors import Stopped
from trainer.run import layout
from trainer.run.lines import PlainLines, slow_sentence, wrong_sentence
from trainer.run.metrics import Metrics, Printed
from trainer.run.records import new_record, record_line
from trainer.store.store import Store, open_store
from trainer.train.start import Start, early_end


def step(number: int, **values: Any) -> dict[str, Any]:
    facts = {"step": number, "loss": 2.5, "lr": 2.346e-4, "tokens_per_second": 1234.5, "seconds": 2.0}
    return new_record("step", {**facts, **values})


def steps(every: int, first: int, last: int) -> list[int]:
    """The steps of a start that has a line for each of these."""
    lines = PlainLines(every)
    lines.of(new_record("start", {"step": first - 1, "total_steps": 25}))
    return [number for number in range(first, last + 1) if lines.of(step(number))]


@pytest.mark.parametrize(
    ("every", "first", "last", "printed"),
    [(10, 1, 25, [1, 10, 20, 25]), (10, 13, 24, [13, 20]), (1, 1, 3, [1, 2, 3]), (0, 1, 25, [])],
)
def test_a_start_prints_its_first_step_every_so_many_and_the_last(
    every: int, first: int, last: int, printed: list[int]
) -> None:
    assert steps(every, first, last) == printed


def test_a_start_after_another_prints_its_first_step_too_and_the_time_left_by_its_own_steps() -> None:
    lines = PlainLines(10)
    for first, seconds, left in ((1, 50.0, "20 min 0 s left"), (13, 2.0, "24 s left")):
        lines.of(new_record("start", {"step": first - 1, "total_steps": 25}))
        assert (lines.of(step(first, seconds=seconds)) or "").endswith(left)
        assert not lines.of(step(first + 1))


def test_a_line_has_step_loss_learning_rate_speed_and_the_time_that_is_left() -> None:
    lines = PlainLines(1)
    lines.of(new_record("start", {"step": 0, "total_steps": 1000}))
    assert lines.of(step(1, seconds=40.0)) == "step 1/1,000, loss 2.5000, lr 0.000235, 1,234 tokens/s, 11 h 6 min left"
    assert lines.of(step(1000)) == "step 1,000/1,000, loss 2.5000, lr 0.000235, 1,234 tokens/s"


def test_a_line_has_what_the_objective_tells_and_the_time_left_by_the_newest_steps() -> None:
    lines = PlainLines(1)
    told = "step 1, loss 2.5000, accuracy 0.750, reward 0.5000, lr 0.000235, 1,234 tokens/s"
    assert lines.of(step(1, reward=0.5, accuracy=0.75)) == told
    lines.of(new_record("start", {"step": 0, "total_steps": 100}))
    of_steps = [lines.of(step(number, seconds=100.0 if number <= 10 else 1.0)) or "" for number in range(1, 21)]
    assert of_steps[-1].endswith(", 1 min 20 s left"), "the first ten were slower"


def test_what_else_happens_has_a_line() -> None:
    lines = PlainLines(10)
    records = [
        ("phase", {"phase": "load"}, "load: reads the base and the newest checkpoint"),
        ("phase", {"phase": "first_step"}, "first step: takes longer than those after it"),
        ("phase", {"phase": "reference", "done": 0, "in_all": 5}, "reference: 0 of 5"),
        ("phase", {"phase": "reference", "done": 120, "in_all": 2400}, "reference: 120 of 2,400"),
        ("eval", {"step": 100, "loss": 1.5}, "step 100: held-out loss 1.5000"),
        ("eval", {"step": 100, "loss": 1.5, "set": "general"}, "step 100: held-out loss of general 1.5000"),
        ("commit", {"step": 100}, "step 100: committed"),
        ("end", {"outcome": "finished", "reason": ""}, "finished"),
        ("end", {"outcome": "failed", "reason": "it broke"}, "failed: it broke"),
        ("end", {"outcome": "stopped", "reason": "stopped at step 4 on request"}, "stopped at step 4 on request"),
        ("experts", {"step": 100}, None),
    ]
    assert [lines.of(new_record(kind, values)) for kind, values, _ in records] == [line for *_, line in records]


def test_rank_0_prints_them(capfd: pytest.CaptureFixture[str]) -> None:
    printed = Printed(10)
    end = new_record("end", {"outcome": "finished", "reason": ""})
    for record in (new_record("start", {"step": 0, "total_steps": 25}), step(1), step(2), step(10), end):
        printed.add(record)
    told = [line.partition(",")[0] for line in capfd.readouterr().out.splitlines()]
    assert told == ["step 1/25", "step 10/25", "finished"]


def test_the_driver_shows_the_starts_that_begin_from_now_on(tmp_path: Path) -> None:
    run: Store = open_store(str(tmp_path))
    run.put(layout.metrics(1), record_line("start", {"step": 0, "total_steps": 25}) + record_line("step", {"step": 1}))
    lines = [
        record_line("phase", {"phase": "load"}),
        record_line("start", {"step": 1, "total_steps": 25}),
        record_line("step", {"step": 2, "loss": 2.0, "seconds": 1.0}),
    ]
    looks = [b"".join(lines[:count]) for count in (1, 2, 3)]  # the same bytes, and more
    seen: list[str] = []
    waits = iter(looks)
    over = False

    def wait(_: float) -> None:
        nonlocal over
        run.put(layout.metrics(2), next(waits))
        over = run.head(layout.metrics(2)).size == len(looks[-1])

    follow_lines(run, lambda: over, 10, seen.append, wait=wait)
    assert seen == [
        "load: reads the base and the newest checkpoint",
        "step 2/25, loss 2.0000, lr ?, ? tokens/s, 23 s left",
    ]


def test_an_early_end_is_in_the_log_of_rank_0_once(capfd: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics([Printed(10)])
    start = cast(Start, SimpleNamespace(metrics=metrics, let_last_words=lambda: None))
    with pytest.raises(Stopped), early_end(start):
        raise Stopped("stopped at step 4 on request, with a checkpoint committed")
    metrics.close()
    printed = "".join(capfd.readouterr())
    assert printed == "stopped at step 4 on request, with a checkpoint committed\n"


def test_what_the_run_does_after_a_record_is_known_while_it_prints_nothing() -> None:
    lines = PlainLines(10)
    lines.of({"kind": "start", "step": 0, "total_steps": 3})
    assert lines.doing({"kind": "phase", "phase": "reference"}) == "reference"
    assert lines.doing({"kind": "phase", "phase": "first_step"}) == "first step"
    assert lines.doing({"kind": "step", "step": 2}) == "step 3"
    assert lines.doing({"kind": "step", "step": 3}) == "the end of the run"
    assert lines.doing({"kind": "commit", "step": 3}) is None


def test_rewards_that_are_all_alike_are_said_once_with_what_to_change() -> None:
    lines = PlainLines(10)
    lines.of({"kind": "start", "step": 0, "total_steps": 9})
    step = {"kind": "step", "loss": 0.0, "reward": 0.5, "seconds": 1.0}
    assert "reward_spread" not in (lines.of({**step, "step": 1, "reward_spread": 0.1}) or "")
    told = lines.of({**step, "step": 2, "reward_spread": 0.0})
    assert "nothing is learnt" in (told or "")
    assert "rollout.answers" in (told or "")
    assert lines.of({**step, "step": 3, "reward_spread": 0.0}) is None


def test_the_accuracy_of_classes_is_in_the_lines() -> None:
    lines = PlainLines(1)
    assert "accuracy 0.750" in (lines.of({"kind": "step", "step": 1, "loss": 0.7, "accuracy": 0.75}) or "")
    assert (
        lines.of({"kind": "eval", "step": 1, "loss": 0.7, "accuracy": 0.5})
        == "step 1: held-out loss 0.7000, accuracy 0.500"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ratio": 1.5}, "takes 1.50 times as long as the others; nothing on its machine tells why"),
        ({"ratio": 1.5, "why": "its GPU is hot"}, "takes 1.50 times as long as the others: its GPU is hot"),
        ({"ratio": 1.5, "over": True}, "is as fast as the others again"),
    ],
)
def test_a_slow_rank_is_named_with_the_reason(more: dict[str, Any], said: str) -> None:
    record = new_record("slow", {"step": 1234, "rank": 3, "machine": "node1", **more})
    assert slow_sentence(record) == f"step 1,234: rank 3 on node1 {said}"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("share", "holds a wrong byte in x, perhaps since step 1,000. It has been read again"),
        ("gathered", "computed with another x than its owners have, perhaps since step 1,000"),
        ("learnt", "holds x with a byte that nobody wrote"),
        ("kept", "has kept a wrong byte of x, perhaps since step 1,000. It has been kept again"),
        (
            "copied",
            "has a wrong byte in its copy of x at another machine, perhaps since step 1,000. It has been sent again",
        ),
        ("gradient", "computes another gradient than the others, perhaps since step 1,000"),
        ("elsewhere", "has a wrong x, perhaps since step 1,000"),
    ],
)
def test_what_is_wrong_on_a_rank_is_said_with_the_steps_it_may_have_been_wrong_for(where: str, said: str) -> None:
    facts = {"step": 1234, "rank": 3, "machine": "node1", "where": where, "tensor": "x", "since": 1000}
    assert wrong_sentence(new_record("wrong", facts)) == f"step 1,234: rank 3 on node1 {said}"
