"""A run over kept features of pictures is, to the last bit, the run that computes them in each step."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist import runs, seeing
from tests.dist.launch import launch, running
from tests.material import Workshop
from trainer.config import Config, dump_config, override
from trainer.run import layout
from trainer.store.store import Store

pytest.importorskip("torchvision")
from tests.dist.test_seeing import judged_rows
from tests.seeing import BASES, make_pictured, seeing_base, trained_over

pytestmark = pytest.mark.timeout(300)
QUICK = "qwen3_vl"


def _config(workshop: Workshop, name: str, base: Path, rows: Path, *more: str) -> Config:
    return workshop.config(
        name,
        *trained_over(base, rows),
        *("data.held_out=6", "data.format=pictures", "data.sequence_length=128", "train.steps=4"),
        *("train.global_batch=6", "train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=4"),
        *("eval.every=2", *more),
    )


def records(run: Store, start: int = 1) -> list[tuple[Any, ...]]:
    """What was computed: losses and norms, of the data of each step, and the held-out losses."""
    lines = [json.loads(line) for line in run.get(layout.metrics(start)).splitlines()]
    names = ("kind", "step", "loss", "grad_norm", "samples")
    return [tuple(line.get(name) for name in names) for line in lines if line["kind"] in ("step", "eval")]


def _checkpoint(run: Store, step: int) -> list[bytes]:
    return [run.get(entry.key) for entry in run.list(layout.checkpoint(step)) if entry.key.endswith(".safetensors")]


def features(store: Store) -> list[str]:
    return [entry.key for entry in store.list("bases/") if entry.key.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("kind", "worlds"), [(QUICK, (1,)), *(pytest.param(kind, (1, 2), marks=pytest.mark.long) for kind in BASES)]
)
def test_losses_and_checkpoints_over_kept_features_are_the_same_to_the_last_bit(
    kind: str, worlds: tuple[int, ...], workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", kind, seed=11 + len(worlds)), make_pictured(tmp_path / "rows")
    expected, found, before = list[Any](), list[Any](), len(features(workshop.store))
    for ranks in worlds:
        for kept in (False, True):
            name = f"{kind}-{len(worlds)}-{ranks}-{'kept' if kept else 'plain'}"
            config = _config(workshop, name, base, rows, *(["sharding.tower_limit=0"] if kept else []))
            data = workshop.prepare(config)
            if kept and ranks == 2:  # all features are there: pictures and tower are needed no more
                for file in rows.parent.glob("*.png"):
                    file.rename(tmp_path / file.name)
            counts = launch(ranks, seeing.trained, dump_config(config), data.train, "start", data.eval)
            if kept and ranks == 2:
                assert counts == [{"pictures": 0, "weights": 0}] * 2
            run = workshop.store.sub(name)
            (found if kept else expected).append((records(run), _checkpoint(run, 4)))
    assert found == expected
    assert len(expected[0][0]) == 4 + 3
    assert expected[0][1]
    assert len(features(workshop.store)) - before == 18  # of the documents with pictures


@pytest.mark.parametrize("kind", [QUICK, *(pytest.param(one, marks=pytest.mark.long) for one in BASES if one != QUICK)])
def test_a_step_counts_the_operations_of_the_pictures_that_it_reads(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    """They are those that PyTorch counts of the whole class."""
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    config = _config(workshop, f"counted-{kind}", base, rows)
    (found,) = launch(1, seeing.seeing_operations, dump_config(config), workshop.prepare(config).train)
    assert len(found) == 4
    for counted, expected in found:
        assert counted == pytest.approx(expected, rel=0.01)
    assert any(expected for _, expected in found)


@pytest.mark.long
def test_a_pass_that_was_killed_goes_on_where_it_was(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK, seed=9), make_pictured(tmp_path / "rows")
    config = _config(workshop, "features-killed", base, rows, "sharding.tower_limit=0")
    data = workshop.prepare(config)
    before = len(features(workshop.store))
    with running(2, seeing.stuck_pass, dump_config(config), data.train) as ranks:
        ranks.wait_until(lambda: len(features(workshop.store)) >= before + 4)
        ranks.kill()
    there = len(features(workshop.store)) - before
    assert 4 <= there < 18
    counts = launch(1, seeing.trained, dump_config(config), data.train, "start", data.eval)
    pictures = sum(len(row["messages"][0]["content"]) // 2 for row in map(json.loads, rows.read_text().splitlines()))
    assert 0 < counts[0]["pictures"] < pictures
    assert len(features(workshop.store)) - before == 18
    plain = _config(workshop, "features-whole", base, rows)
    launch(1, seeing.trained, dump_config(plain), data.train, "start", data.eval)
    assert records(workshop.store.sub("features-killed"), 2) == records(workshop.store.sub("features-whole"))


@pytest.mark.long
def test_features_that_are_not_what_was_written_end_the_run(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK, seed=10), make_pictured(tmp_path / "rows")
    config = _config(workshop, "features-damaged", base, rows, "sharding.tower_limit=0")
    data, before = workshop.prepare(config), set(features(workshop.store))
    launch(1, seeing.trained, dump_config(config), data.train, "start", data.eval)
    for key in set(features(workshop.store)) - before:
        content = bytearray(workshop.store.get(key))
        content[-1] ^= 1
        workshop.store.put(key, bytes(content))
    again = override(config, "run.name=features-damaged-2")
    (outcome,) = launch(1, runs.run, dump_config(again), data.train, "start", data.eval)
    assert outcome["outcome"] == "Damaged"
    assert "has damaged features of pictures: their SHA-256 differs. Delete " in outcome["message"]


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [("model.dtype=bf16",), ("sharding.sequence_parallel=2", "cluster.workers=2")], ids=str
)
def test_other_types_and_shared_rows_have_the_same_bits(
    more: tuple[str, ...], workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK, seed=14), make_pictured(tmp_path / "rows")
    found = list[Any]()
    for name, limit in (("plain", 8), ("kept", 0)):
        config = _config(workshop, f"features-{len(more)}-{name}", base, rows, f"sharding.tower_limit={limit}", *more)
        data = workshop.prepare(config)
        launch(2, seeing.trained, dump_config(config), data.train, "start", data.eval)
        found.append(records(workshop.store.sub(config.run.name)))
    assert found[0] == found[1]


@pytest.mark.long
def test_a_stored_reference_is_that_of_the_rows_with_their_pictures(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK), judged_rows(tmp_path / "rows", "dpo")
    found = list[Any]()
    for name, more in (
        ("off", ("objective.reference=adapter_off",)),
        ("stored", ("objective.reference=stored",)),
        ("kept", ("objective.reference=stored", "sharding.tower_limit=0")),
    ):
        config = workshop.config(
            f"features-dpo-{name}",
            *trained_over(base, rows),
            *("data.format=preference_pictures", "objective.name=dpo", "data.sequence_length=256", "train.steps=3"),
            *("train.global_batch=4", "train.micro_batch=1", "optim.lr=0.01", *more),
        )
        launch(2, seeing.trained, dump_config(config), workshop.prepare(config).train)
        found.append([loss for _, _, loss, *_ in records(workshop.store.sub(config.run.name))])
    off, stored, kept = found
    assert kept == stored
    assert stored == pytest.approx(off, rel=1e-4)
    assert len(off) == 3
