"""The launcher's policy after a worker group ends, without a worker group."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.policy import retry
from launcher.policy.retry import Failure, RankDied
from launcher.view.status import read_status
from trainer.config import Retry
from trainer.errors import (
    CapstanError,
    ConfigError,
    DataError,
    DoesNotFit,
    Interrupted,
    NonFiniteLoss,
    Stopped,
    StorageError,
    Superseded,
    WrongBytes,
)
from trainer.run.layout import metrics
from trainer.run.records import newest_records, record_end
from trainer.run.requests import MACHINE_LEAVES, Stop
from trainer.store.store import Store, open_store
from trainer.train import loop
from trainer.train.start import early_end


def decide(ends: list[Failure], rules: Retry, *, committed: bool = True) -> str | CapstanError:
    return retry.decide(ends, rules, committed=committed, command="`capstan {} mine --store /my/runs`".format)


def crash(step: int | None = None) -> Failure:
    return Failure("rank 1 died: killed", None, step=step)


PREEMPTED = Failure("the machine of rank 1 was lost", None, "preemption")
RESIZED = Failure("stopped at step 7 because 4 ranks instead of 2 find room", Interrupted("grow"), "resize")
NOT_FINITE = Failure(
    "the loss of step 7 is nan", NonFiniteLoss("the loss of step 7 is nan", {"epoch": 0, "next_bin": 24})
)


def test_a_crash_is_tried_again_until_the_budget_is_used_up():
    rules = Retry(failures=2)
    assert isinstance(decide([crash()], rules), str)
    assert isinstance(decide([crash(), crash()], rules), str)
    last = decide([crash(), crash(), crash()], rules)
    assert isinstance(last, CapstanError)
    assert last.exit_code == 1
    assert "retry.failures: 2" in str(last)
    assert str(last).endswith("`capstan logs mine --store /my/runs` shows more.")


def test_a_second_crash_in_the_same_step_ends_the_run_and_says_so():
    assert isinstance(decide([crash(7), crash(12)], Retry()), str)
    error = decide([crash(7), crash(12), crash(7)], Retry())
    assert isinstance(error, CapstanError)
    assert error.exit_code == 1
    assert "second crash in step 7" in str(error)
    assert str(error).endswith("`capstan logs mine --store /my/runs` shows more.")


def test_the_same_error_twice_before_the_first_step_ends_the_run_and_a_killed_start_does_not():
    certain = retry.classify({0: IndexError("list index out of range"), 1: RuntimeError("connection closed")})
    assert isinstance(decide([certain], Retry(failures=9)), str)
    error = decide([certain, PREEMPTED, certain], Retry(failures=9))
    assert "IndexError: list index out of range. It is the second crash before the first step" in str(error)
    busy = replace(certain, reason="rank 0 failed: OSError: busy")
    assert isinstance(decide([certain, crash(7), busy], Retry(failures=9)), str)
    assert isinstance(decide([crash(), crash(), crash()], Retry(failures=9)), str)


def test_machines_that_leave_are_counted_apart_from_failures():
    rules = Retry(failures=1, preemptions=2)
    assert isinstance(decide([crash(3), PREEMPTED, PREEMPTED], rules), str)
    assert isinstance(decide([PREEMPTED, PREEMPTED, crash(3)], rules), str)
    last = decide([PREEMPTED, crash(3), PREEMPTED, PREEMPTED], rules)
    assert isinstance(last, Stopped)
    assert "retry.preemptions: 2" in str(last)
    assert str(last).endswith("`capstan resume mine --store /my/runs` goes on.")
    assert isinstance(decide([PREEMPTED] * 100, Retry()), str)


def test_growing_uses_no_budget():
    assert isinstance(decide([RESIZED] * 10, Retry(failures=0, preemptions=0)), str)


def test_a_loss_that_is_not_finite_is_left_out_once():
    decision = decide([crash(3), NOT_FINITE], Retry())
    assert isinstance(decision, str)
    assert "without the rows of that step" in decision
    assert decide([NOT_FINITE, crash(3), NOT_FINITE], Retry()) is NOT_FINITE.error
    assert decide([crash(3), NOT_FINITE, NOT_FINITE], Retry()) is NOT_FINITE.error
    after = decide([NOT_FINITE, crash(3)], Retry(failures=1))
    assert isinstance(after, str), "the loss is no failure of the budget"
    assert after.endswith("(1 of 1 restarts).")
    assert decide([NOT_FINITE], Retry(skip_bad_window=False)) is NOT_FINITE.error
    assert NOT_FINITE.error is not None
    assert NOT_FINITE.error.exit_code == 5


@pytest.mark.parametrize(
    "error",
    [ConfigError("wrong"), DataError("bad"), DoesNotFit("out of memory"), Stopped("asked"), Superseded("newer")],
    ids=lambda error: type(error).__name__,
)
def test_what_would_only_fail_again_ends_the_run_at_once(error: CapstanError):
    assert decide([Failure(str(error), error)], Retry(failures=5)) is error


def test_a_failing_store_is_tried_again_and_keeps_its_exit_code():
    down = Failure("No space is left.", StorageError("No space is left."))
    again = decide([down], Retry(failures=1))
    assert again == "No space is left. Starting again from the last commit (1 of 1 restarts)."
    final = decide([down, down], Retry(failures=1))
    assert isinstance(final, StorageError)
    assert str(final).startswith("No space is left (failure 2; retry.failures: 1).")
    assert final.exit_code == 6


def test_wrong_bytes_are_read_again_within_the_budget():
    wrong = Failure("other bytes than were written", WrongBytes("other bytes than were written"))
    assert isinstance(decide([wrong], Retry(failures=1)), str)
    assert isinstance(decide([wrong, wrong], Retry(failures=1)), WrongBytes)


def test_the_cause_is_our_own_error_and_not_the_crashes_it_set_off():
    cause = ConfigError("tensor missing")
    assert retry.classify({0: RuntimeError("connection reset"), 3: cause}).error is cause


def test_a_crash_names_the_lowest_rank_and_the_first_line_of_its_error():
    failure = retry.classify({2: RuntimeError("b"), 1: RuntimeError("first line\nsecond")})
    assert failure.error is None
    assert failure.reason == "rank 1 failed: RuntimeError: first line"


def test_a_rank_that_is_gone_is_the_cause_of_broken_connections_elsewhere():
    failure = retry.classify({0: RuntimeError("connection closed by peer"), 1: RankDied("killed by a signal")})
    assert failure.reason == "rank 1 died: killed by a signal"
    assert failure.facts == {"died": 1}
    seen = retry.classify({1: RankDied("killed by a signal", at=12.5)})
    assert seen.facts == {"died": 1, "died_at": 12.5}, "the time that a keeper saw"


def test_beyond_the_budget_of_preemptions_a_run_without_a_commit_cannot_be_resumed():
    rules = Retry(preemptions=0)
    for committed, exit_code in ((True, 75), (False, 7)):
        error = decide([PREEMPTED], rules, committed=committed)
        assert isinstance(error, Stopped)
        assert error.exit_code == exit_code


def test_a_lost_machine_is_the_cause_of_whatever_else_went_wrong():
    failure = retry.classify({0: StorageError("reset"), 2: RankDied("gone", node_lost=True), 3: RankDied("gone")})
    assert (failure.kind, failure.reason) == ("preemption", "lost a machine: that of rank 2")
    assert failure.facts == {"lost_machine": True}


@pytest.mark.parametrize(("reason", "lost"), [(MACHINE_LEAVES, True), ("because 4 ranks find room", False)])
def test_ranks_that_a_machine_leaves_say_so_in_a_field(reason: str, lost: bool):
    """Whoever looks on reads no sentence for it."""
    asked: Any = SimpleNamespace(
        ranks=SimpleNamespace(broadcast=lambda value: value), stop=SimpleNamespace(reason=reason)
    )
    ended = loop._stopped(SimpleNamespace(start=asked), Stop.RESTART, 3)  # type: ignore[arg-type]
    assert retry.classify({0: ended}).lost_machine is lost
    written = list[dict[str, Any]]()
    metrics = SimpleNamespace(write=lambda kind, **facts: written.append(facts))
    with pytest.raises(Interrupted), early_end(SimpleNamespace(metrics=metrics, let_last_words=lambda: None)):  # type: ignore[arg-type]
        raise ended
    assert written[0].get("lost_machine", False) is lost


def test_an_interruption_is_a_preemption_unless_the_driver_asked_for_it():
    errors = {0: Interrupted("stopped at step 3"), 1: Interrupted("stopped at step 3")}
    assert retry.classify(errors).kind == "preemption"
    assert retry.classify(errors, resizing=True).kind == "resize"


@pytest.fixture
def run(tmp_path) -> Store:
    run = open_store(str(tmp_path)).sub("run")
    run.put(metrics(1), b'{"kind": "start", "step": 4, "total_steps": 9, "world_size": 1, "time": 1.0}\n')
    return run


def test_the_records_tell_the_step_of_a_crash(run: Store):
    assert retry.explained(crash(), newest_records(run)).step == 5
    steps = b"".join(b'{"kind": "step", "step": %d, "time": 2.0}\n' % step for step in (5, 6))
    run.put(metrics(1), run.get(metrics(1)) + steps)
    assert retry.explained(crash(), newest_records(run)).step == 7, "the one after the last that was done"
    run.put(metrics(2), b"")
    assert retry.explained(crash(), newest_records(run)).step is None


def test_ranks_that_named_a_hang_explain_why_they_died(run: Store):
    hang = b'{"kind": "end", "outcome": "failed", "reason": "rank 1 hangs in load", "hung_ranks": [1]}\n'
    run.put(metrics(2), hang)
    explained = retry.explained(crash(), newest_records(run))
    assert explained.reason == "rank 1 hangs in load"
    assert retry.explained(replace(crash(), died=1), newest_records(run)).died is None, "the hang is the cause"
    asked = Failure("503", StorageError("503"))
    assert retry.explained(asked, newest_records(run)).reason == "503", "an error of our own says more"
    record_end(run, explained.reason, crash=True)
    assert run.get(metrics(2)) == hang


def test_the_reason_of_a_crash_is_left_in_the_runs_folder(run: Store):
    record_end(run, crash().reason, crash=True)
    record_end(run, "told already")
    status = read_status(run)
    assert (status.state, status.reason) == ("failed", crash().reason)


def test_a_run_that_ended_before_it_had_a_rank_has_its_reason(tmp_path):
    run = open_store(str(tmp_path)).sub("early")
    record_end(run, "no data")
    status = read_status(run)
    assert (status.state, status.reason) == ("failed", "no data")
