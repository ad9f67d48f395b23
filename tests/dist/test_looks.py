"""A wrong byte is found, named, and repaired or the end of the start; and none is found where there is none."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.report.figures import read_figures
from launcher.view.checkpoints import list_checkpoints
from launcher.view.status import read_generation, read_status
from tests.dist import looks
from tests.dist.launch import launch
from tests.material import Workshop
from tests.methods import methods, trained_by
from trainer.config import dump_config
from trainer.run.records import Record, read_records
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.state.optimizer import optimizers
from trainer.store.store import Store

STEPS = 6
EVERYTHING = ("train.look_share=0.99", "train.probe_every=0")
"""So that a tiny step has time for all that there is."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(Path(tmp_path_factory.mktemp("workshop")))


def trained(
    workshop: Workshop,
    name: str,
    where: str,
    *overrides: str,
    ranks: int = 3,
    rank: int = 1,
    step: int = 3,
    seen: str = "",
) -> tuple[Store, Mapping[str, Any]]:
    """The folder of a run in which a bit is flipped, and how it ended."""
    config = workshop.config(
        *(name, f"train.steps={STEPS}", "checkpoint={every_steps: 2, keep_last: 100}", "model.dtype=fp32"), *overrides
    )
    given = (dump_config(config), workshop.prepare(config).train)
    (outcome, *others) = launch(ranks, looks.run, *given, where, rank, step, seen)
    assert all(other["outcome"] == outcome["outcome"] for other in others)
    return workshop.store.sub(name), outcome


def records(run: Store, kind: str) -> list[Record]:
    return [record for record in read_records(run, 1) if record["kind"] == kind]


def came_of(run: Store) -> tuple[list[tuple[float, float]], dict[int, list[str]]]:
    """Loss and norm of each update, and the hashes of the shards of each checkpoint."""
    shards = {step: [shard.sha256 for shard in read_manifest(run, step).shards] for step in committed_steps(run)}
    return [(record["loss"], record["grad_norm"]) for record in records(run, "step")], shards


NOTHING = ("train.look_share=0", "train.probe_every=0")


@pytest.fixture(scope="module")
def unharmed(workshop: Workshop) -> Store:
    """A run of two ranks in which nobody looks, and nothing is flipped."""
    return trained(workshop, "unharmed", "none", *NOTHING, ranks=2)[0]


def test_looks_and_probes_change_no_bit_and_find_nothing(workshop: Workshop, unharmed: Store) -> None:
    run, outcome = trained(workshop, "looked", "none", "train.look_share=0.99", "train.probe_every=2", ranks=2)
    assert outcome["outcome"] == "finished"
    assert records(run, "wrong_bytes") == []
    assert came_of(run) == came_of(unharmed)
    probes = [(probe["step"], probe["bound"]) for probe in records(run, "probe")]
    assert probes == [(step, 0.0) for step in range(2, STEPS + 1, 2)]


def test_a_wrong_byte_of_a_share_is_named_and_read_again(workshop: Workshop) -> None:
    run, outcome = trained(workshop, "share", "share", *EVERYTHING, seen="layers.1.mlp.up_proj")
    assert outcome["outcome"] == "finished"
    (found,) = records(run, "wrong_bytes")
    assert (found["rank"], found["where"], found["since"]) == (1, "share", 3)
    assert found["step"] == 5, "the sweep after the next update has met it"
    assert "layers.1.mlp.up_proj" in found["tensor"]
    (said,) = read_status(run).wrong_bytes
    assert f"step 5: rank 1 on {found['machine']} holds a wrong byte in {found['tensor']}" in said
    assert "perhaps since step 3. It has been read again" in said
    assert said in read_figures(run).notes
    assert any(said in log for log in [run.get(entry.key).decode() for entry in run.list("logs/")])


def test_with_the_search_turned_off_nobody_finds_it(workshop: Workshop, unharmed: Store) -> None:
    """The control: the flip of the other tests is there, and does harm."""
    run, outcome = trained(workshop, "unseen", "share", *NOTHING, seen="layers.1.mlp.up_proj", ranks=2)
    assert outcome["outcome"] == "finished"
    assert records(run, "wrong_bytes") == []
    assert came_of(run)[0][:3] == came_of(unharmed)[0][:3]
    assert came_of(run)[0][3:] != came_of(unharmed)[0][3:]


@pytest.mark.parametrize(
    ("where", "seen"), [("layer", "self_attn.k_proj"), pytest.param("whole", "norm", marks=pytest.mark.long)]
)
def test_a_wrong_byte_of_a_gathered_copy_is_named(workshop: Workshop, where: str, seen: str) -> None:
    run, outcome = trained(workshop, where, where, *EVERYTHING, seen=seen)
    assert outcome["outcome"] == "finished"
    found = records(run, "wrong_bytes")[0]
    assert (found["rank"], found["where"]) == (1, "gathered")
    assert seen in found["tensor"]
    assert len(records(run, "wrong_bytes")) == 1, "a copy that stays whole has been gathered again"


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[] if name in ("adamw", "adamw_8bit") else pytest.mark.long) for name in optimizers()],
)
def test_a_wrong_byte_of_what_learns_ends_the_start(workshop: Workshop, optimizer: str) -> None:
    run, outcome = trained(
        workshop,
        f"learnt-{optimizer}",
        "learnt",
        *EVERYTHING,
        f"optim.name={optimizer}",
        "optim.schedule=constant",
        seen="master",
        ranks=2,
    )
    assert (outcome["outcome"], outcome["exit_code"]) == ("WrongBytes", 8)
    (found,) = records(run, "wrong_bytes")
    assert (found["step"], found["rank"], found["where"]) == (4, 1, "learnt")
    assert f"step 4: rank 1 on {found['machine']} holds master of " in outcome["message"]
    assert "The update after step 3 is not kept." in outcome["message"]
    assert max(committed_steps(run)) <= 2, "which may still have been on its way"


@pytest.mark.long
@pytest.mark.parametrize("seen", ["weights", "exp_avg", "exp_avg_sq", "exp_avg_sq_absmax"])
def test_a_wrong_byte_of_each_state_is_found(workshop: Workshop, seen: str) -> None:
    # Moments of small parameters are in fp32.
    own = ("optim.name=adamw_8bit", "tuning.rank=128") if "absmax" in seen else ()
    _, outcome = trained(workshop, f"state-{seen}", "learnt", *EVERYTHING, *own, seen=seen)
    assert f"holds {seen} of " in outcome["message"]


@pytest.mark.long
@pytest.mark.parametrize("method", methods())
def test_with_every_method_nothing_is_found_and_a_wrong_byte_is(workshop: Workshop, method: str) -> None:
    own = (*trained_by(method), "train.look_share=0.99", "train.probe_every=2", "optim.lr=1.0e-3")
    run, outcome = trained(workshop, f"sound-{method}", "none", *own)
    assert outcome["outcome"] == "finished"
    assert records(run, "wrong_bytes") == []
    assert len(records(run, "probe")) == STEPS // 2
    _, outcome = trained(workshop, f"wrong-{method}", "learnt", *own, seen="master")
    assert outcome["outcome"] == "WrongBytes"


def test_a_wrong_byte_of_what_a_keeper_has_is_named_and_kept_again(workshop: Workshop, unharmed: Store) -> None:
    run, outcome = trained(workshop, "kept", "kept", *EVERYTHING, ranks=2)
    assert outcome["outcome"] == "finished"
    (found,) = records(run, "wrong_bytes")
    assert (found["step"], found["rank"], found["where"], found["since"]) == (4, 1, "kept", 3)
    (said,) = read_status(run).wrong_bytes
    assert said.endswith("has kept a wrong byte of what learns, perhaps since step 3. It has been kept again")
    assert came_of(run) == came_of(unharmed)


@pytest.mark.parametrize("ranks", [3, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_computes_something_else_is_named(workshop: Workshop, ranks: int) -> None:
    """Its gradient is wrong once, behind the first probe."""
    run, outcome = trained(
        workshop, f"computes-{ranks}", "gradient", "train.probe_every=3", ranks=ranks, rank=ranks // 2, step=1
    )
    assert (outcome["outcome"], outcome["exit_code"]) == ("WrongBytes", 8)
    (found,) = records(run, "wrong_bytes")
    assert (found["step"], found["rank"], found["where"], found["since"]) == (6, ranks // 2, "gradient", 3)
    assert f"rank {ranks // 2} on {found['machine']} computes another gradient" in outcome["message"]
    doubts = list_checkpoints(run).doubts
    assert doubts.keys() == {4}
    assert "computes another gradient than the others, perhaps since step 3" in doubts[4]


@pytest.mark.long
def test_the_next_start_passes_over_a_checkpoint_in_doubt(workshop: Workshop) -> None:
    """It goes on from the checkpoint before, and ends as a run whose ranks compute what they should. The control goes
    on from the newest one, because nobody has said that it is in doubt."""
    probed = ("train.probe_every=3",)
    run, outcome = trained(workshop, "doubted", "gradient", *probed, step=1)
    assert outcome["outcome"] == "WrongBytes"
    assert committed_steps(run)[:2] == [4, 2]
    control = shutil.copytree(workshop.folder / "store/doubted", workshop.folder / "store/trusted")
    for doubt in control.glob("checkpoints/*/doubt-*"):
        doubt.unlink()
    again, ended = trained(workshop, "doubted", "none", *probed)
    assert ended["outcome"] == "finished"
    trusting, _ = trained(workshop, "trusted", "none", *probed)
    assert [read_generation(folder, 2)["start"][0]["step"] for folder in (again, trusting)] == [2, 4]
    log = "".join(run.get(entry.key).decode() for entry in run.list("logs/000002/"))
    assert "checkpoint of step 4 passed over, because it is in doubt: step 6: rank 1 on " in log
    sound, _ = trained(workshop, "not-doubted", "none", *probed)
    shards = [[shard.sha256 for shard in read_manifest(folder, STEPS).shards] for folder in (again, sound)]
    assert shards[0] == shards[1]
    assert list_checkpoints(run).doubts == {}, "step 4 was made again"


@pytest.mark.long
def test_nothing_is_found_in_many_steps(workshop: Workshop) -> None:
    settings = ("train.look_share=0.99", "train.probe_every=20", "data.sequence_length=32", "train.global_batch=2")
    run, outcome = trained(
        workshop, "many", "none", *settings, "train.steps=500", "checkpoint.every_steps=250", ranks=2
    )
    assert outcome["outcome"] == "finished"
    assert records(run, "wrong_bytes") == []
