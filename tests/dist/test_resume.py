"""Ten steps are five, a kill, a resume and five more; and the same ten on any number of ranks."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist import runs
from tests.dist.launch import launch, running
from tests.material import Workshop
from trainer.config import Config, dump_config
from trainer.run import layout
from trainer.run.records import read_records
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import Store

TOLERANCE = 1e-3  # nats, at another world size


@dataclass
class Runs:
    """Starts runs that differ in nothing but the name and what they go through."""

    workshop: Workshop
    overrides: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "-".join(self.overrides).replace("=", "-").replace(".", "-") or "plain"

    def config(self, name: str) -> Config:
        return self.workshop.config(f"{self.kind}-{name}", *self.overrides)

    def folder(self, name: str) -> Store:
        return self.workshop.store.sub(f"{self.kind}-{name}")

    def arguments(self, name: str) -> tuple[str, str]:
        config = self.config(name)
        return dump_config(config), self.workshop.prepare(config).train

    def train(self, name: str, world_size: int, how: str = "start") -> dict[int, float]:
        """Start or resume the run and let it end: the losses in its folder by step."""
        outcomes = launch(world_size, runs.run, *self.arguments(name), how)
        assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
        return losses(self.folder(name))

    def kill_after_five(self, name: str, world_size: int) -> None:
        """Kill every rank with SIGKILL once step 5 is committed and more steps were taken."""
        folder = self.folder(name)
        with running(world_size, runs.run, *self.arguments(name), "hold") as ranks:
            ranks.wait_until(lambda: folder.exists(layout.manifest(5)))
            ranks.kill()
        assert committed_steps(folder) == [5, 1]

    def copy(self, name: str, to: str) -> None:
        root = self.workshop.folder / "store"
        shutil.copytree(root / f"{self.kind}-{name}", root / f"{self.kind}-{to}")


def losses(run: Store, generation: int | None = None) -> dict[int, float]:
    """Step -> loss; where generations took the same step, the later one's."""
    found: dict[int, float] = {}
    for entry in run.list(layout.METRICS):
        if generation in (None, layout.generation_of(entry.key)):
            records = map(json.loads, run.get(entry.key).splitlines())
            found |= {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    return found


def steps_taken(run: Store, generation: int) -> list[int]:
    return list(losses(run, generation))


@pytest.fixture(scope="module")
def plain(workshop: Workshop) -> Runs:
    return Runs(workshop, ())


@pytest.fixture(scope="module")
def dropping(workshop: Workshop) -> Runs:
    """With dropout, and with two optimizer groups that learn at different rates."""
    return Runs(workshop, ("tuning.dropout=0.2", "optim.lora_plus_ratio=4"))


@pytest.fixture(scope="module")
def uninterrupted(plain: Runs) -> dict[int, float]:
    """The losses of ten steps of two ranks."""
    return plain.train("uninterrupted", 2)


@pytest.fixture(scope="module")
def killed(plain: Runs) -> str:
    """A run of two ranks that died after the commit of step 5."""
    plain.kill_after_five("killed", 2)
    return "killed"


def test_the_loss_falls(uninterrupted: dict[int, float]) -> None:
    assert list(uninterrupted) == list(range(1, 11))
    assert uninterrupted[10] < uninterrupted[1] - 0.3


def test_a_killed_run_goes_on_with_bit_identical_losses(
    plain: Runs, killed: str, uninterrupted: dict[int, float]
) -> None:
    plain.copy(killed, "same")
    assert plain.train("same", 2, "resume") == uninterrupted
    assert steps_taken(plain.folder("same"), 2) == [6, 7, 8, 9, 10]
    first = [[r["step"] for r in read_records(plain.folder("same"), n) if r["kind"] == "first_step"] for n in (1, 2)]
    assert first == [[1], [6]], "the first step that a start took, whose seconds are those until it had taken it"


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.long)])
def test_a_killed_run_of_two_ranks_goes_on_at_another_world_size(
    plain: Runs, killed: str, uninterrupted: dict[int, float], world_size: int
) -> None:
    name = f"to-{world_size}"
    plain.copy(killed, name)
    assert plain.train(name, world_size, "resume") == pytest.approx(uninterrupted, abs=TOLERANCE)
    assert steps_taken(plain.folder(name), 2) == [6, 7, 8, 9, 10]
    assert read_manifest(plain.folder(name), 10).world_size == world_size


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.long)])
def test_a_killed_run_of_another_world_size_goes_on_with_two(
    plain: Runs, uninterrupted: dict[int, float], world_size: int
) -> None:
    name = f"from-{world_size}"
    plain.kill_after_five(name, world_size)
    assert plain.train(name, 2, "resume") == pytest.approx(uninterrupted, abs=TOLERANCE)
    assert steps_taken(plain.folder(name), 2) == [6, 7, 8, 9, 10]


def test_three_ranks_that_do_not_divide_the_global_batch_have_the_losses_of_two(workshop: Workshop) -> None:
    runs = Runs(workshop, ("model.dtype=fp32", "train.steps=4"))
    assert runs.train("three", 3) == pytest.approx(runs.train("two", 2), abs=1e-5)


@pytest.mark.long
def test_dropout_and_optimizer_groups_are_resumed_bit_identically(
    dropping: Runs, uninterrupted: dict[int, float]
) -> None:
    whole = dropping.train("whole", 2)
    assert whole != pytest.approx(uninterrupted, abs=TOLERANCE), "dropout changes nothing, so this test shows nothing"
    dropping.kill_after_five("killed", 2)
    assert dropping.train("killed", 2, "resume") == whole


def test_a_stop_request_ends_every_rank_with_a_commit_and_the_run_goes_on(
    plain: Runs, uninterrupted: dict[int, float]
) -> None:
    folder = plain.folder("stopped")
    folder.put(layout.STOP, b"")
    outcomes = launch(2, runs.run, *plain.arguments("stopped"))
    assert [(o["outcome"], o["exit_code"]) for o in outcomes] == [("Stopped", 75)] * 2
    step = committed_steps(folder)[0]
    assert 0 <= step < 10
    assert f"stopped at step {step} on request" in outcomes[0]["message"]
    folder.delete(layout.STOP)
    assert plain.train("stopped", 2, "resume") == uninterrupted


def test_a_signal_to_one_rank_stops_all_of_them_with_a_commit(plain: Runs, uninterrupted: dict[int, float]) -> None:
    outcomes = launch(2, runs.run, *plain.arguments("signalled"), "terminate")
    assert [(o["outcome"], o["exit_code"]) for o in outcomes] == [("Stopped", 75)] * 2
    # The signal comes in step 3, after the ranks' exchange, so that all learn of it in step 4.
    assert committed_steps(plain.folder("signalled")) == [4, 1]
    assert plain.train("signalled", 2, "resume") == uninterrupted


def test_resuming_without_a_commit_is_refused_on_every_rank(plain: Runs) -> None:
    outcomes = launch(2, runs.run, *plain.arguments("nothing"), "resume")
    assert [(o["outcome"], o["exit_code"]) for o in outcomes] == [("NothingToResume", 7)] * 2


def test_a_loss_that_is_not_finite_ends_every_rank_and_commits_nothing(workshop: Workshop, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "infinite"
    shutil.copytree(workshop.base, base)
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = float("inf")
            save_file(tensors, file, metadata={"format": "pt"})
    config = workshop.config("infinite", f"model.base={base}", "checkpoint.every_steps=1")
    outcomes = launch(2, runs.run, dump_config(config), workshop.prepare(config).train)
    assert [(o["outcome"], o["exit_code"]) for o in outcomes] == [("NonFiniteLoss", 5)] * 2
    assert "the loss of step 1 is nan" in outcomes[0]["message"]
    assert workshop.store.sub("infinite").list(layout.CHECKPOINTS) == []


def samples(run: Store, generation: int) -> dict[int, str]:
    lines = [json.loads(line) for line in run.get(layout.metrics(generation)).splitlines()]
    return {line["step"]: line["samples"] for line in lines if line["kind"] == "step"}


def test_the_window_of_a_loss_that_is_not_finite_is_left_out_by_the_next_start(workshop: Workshop) -> None:
    def start(name: str, how: str, *overrides: str) -> set[str]:
        config = workshop.config(name, *overrides)
        outcomes = launch(2, runs.run, dump_config(config), workshop.prepare(config).train, how)
        return {outcome["outcome"] for outcome in outcomes}

    assert start("poisoned", "poison") == {"NonFiniteLoss"}
    run = workshop.store.sub("poisoned")
    assert committed_steps(run)[0] == 5
    assert start("poisoned", "poison") == {"finished"}
    assert start("healthy", "start", "train.steps=11") == {"finished"}
    healthy, mended = samples(workshop.store.sub("healthy"), 1), {**samples(run, 1), **samples(run, 2)}
    assert mended == {step: healthy[step if step < 7 else step + 1] for step in range(1, 11)}

    assert start("poisoned-2", "poison", "retry.skip_bad_window=false") == {"NonFiniteLoss"}
    assert start("poisoned-2", "poison", "retry.skip_bad_window=false") == {"NonFiniteLoss"}
