"""The launcher's policy after a worker group dies, without a worker group."""

from launcher import retry
from launcher.retry import Failure
from launcher.status import read_status
from trainer.errors import CapstanError, ConfigError, DataError, NonFiniteLoss, Stopped, StorageError, Superseded
from trainer.run_layout import metrics
from trainer.store import open_store

CRASH = Failure("rank 1 died: killed", None)


def test_a_crash_is_tried_again_until_the_budget_is_used_up():
    assert retry.decide([CRASH], budget=2).error is None
    assert retry.decide([CRASH, CRASH], budget=2).error is None
    last = retry.decide([CRASH, CRASH, CRASH], budget=2).error
    assert isinstance(last, CapstanError)
    assert last.exit_code == 1
    assert "retry.failures: 2" in str(last)


def test_what_would_only_fail_again_ends_the_run_at_once():
    for error in (ConfigError("wrong"), DataError("bad"), NonFiniteLoss("nan"), Stopped("asked"), Superseded("newer")):
        decision = retry.decide([Failure(str(error), error)], budget=5)
        assert decision.error is error


def test_a_failing_store_is_tried_again_and_keeps_its_exit_code():
    down = Failure("503", StorageError("503"))
    assert retry.decide([down], budget=1).error is None
    final = retry.decide([down, down], budget=1).error
    assert isinstance(final, StorageError)
    assert final.exit_code == 6


def test_the_cause_is_our_own_error_and_not_the_crashes_it_set_off():
    cause = ConfigError("tensor missing")
    assert retry.classify({0: RuntimeError("connection reset"), 3: cause}).error is cause


def test_a_crash_names_the_lowest_rank_and_the_first_line_of_its_error():
    failure = retry.classify({2: RuntimeError("b"), 1: RuntimeError("first line\nsecond")})
    assert failure.error is None
    assert failure.reason == "rank 1 failed: RuntimeError: first line"


def test_a_rank_that_is_gone_is_the_cause_of_broken_connections_elsewhere():
    failure = retry.classify({0: RuntimeError("connection closed by peer"), 1: retry.RankDied("killed by a signal")})
    assert failure.reason == "rank 1 died: killed by a signal"


def test_the_reason_of_a_crash_is_left_in_the_runs_folder(tmp_path):
    run = open_store(str(tmp_path)).sub("run")
    run.put(metrics(1), b'{"kind": "start", "step": 0, "total_steps": 5, "world_size": 1, "time": 1.0}\n')
    retry.record_end(run, CRASH)
    retry.record_end(run, Failure("told already", ConfigError("told already")))
    status = read_status(run)
    assert (status.state, status.reason) == ("failed", CRASH.reason)
