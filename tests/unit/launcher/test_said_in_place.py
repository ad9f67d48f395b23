"""What has no effect, or not the expected one, is said by the command that is asked for it."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.cluster.slurm import submit
from launcher.export import Exported, Pushed
from launcher.plan import planning
from launcher.plan.notes import refuse_empty_rows
from launcher.plan.planning import Planned, plan_run
from launcher.plan.starts import KnownStart, Phase, StartTime, keep_import_seconds, past_starts, restarts, start_time
from launcher.plan.summary import plan_lines, show_plan
from launcher.start.check import check
from tests.material import Workshop, commit
from tests.unit.run import made_records as made
from trainer.config import dump_config, override, parse_config
from trainer.config.run import Checkpoint
from trainer.data.compile.length import EpochLength
from trainer.errors import ConfigError
from trainer.export.card import cut_sentence
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.records import record_end, record_line
from trainer.store.store import open_store


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("said"))


def test_a_run_that_has_ended_is_not_asked_to_stop(workshop: Workshop, tmp_path: Path) -> None:
    config = workshop.config("over", f"run.store={tmp_path}")
    folder = run_folder(config)
    commit(folder, config, step=4)
    folder.put(layout.metrics(1), record_line("start", {"step": 0, "total_steps": 10, "world_size": 1}))
    record_end(folder, "stopped by a person", stopped=True)
    told = CliRunner().invoke(app, ["stop", "over", "--store", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    answer = json.loads(told.stdout)
    assert answer["stop_requested"] is False
    assert "is stopped already" in answer["what"]
    assert "capstan resume" in answer["what"]
    assert not folder.exists(layout.STOP)


@pytest.mark.parametrize("before", [14, 12])
def test_fewer_steps_than_a_run_has_are_refused(workshop: Workshop, tmp_path: Path, before: int) -> None:
    config = workshop.config("twelve", f"run.store={tmp_path}", f"train.steps={before}")
    commit(run_folder(config), config, step=12)
    with pytest.raises(ConfigError, match="train.steps: 9 is less than the 12 steps that"):
        check(override(config, "train.steps=9"), resume=True)


def test_many_passes_over_the_data_are_said_by_plan(workshop: Workshop) -> None:
    def notes(epochs: int) -> str:
        config = workshop.config("passes", "train.steps=null", f"train.epochs={epochs}")
        return "\n".join(plan_run(config, None, None).plan.notes)

    assert "train.epochs: 100 passes over the data" in notes(100)
    assert "passes over the data" not in notes(3)


@pytest.mark.parametrize(
    ("ranks", "batch", "said"),
    [
        (
            4,
            5,
            "computes 8 rows on 4 ranks, of which 3 (38%) are empty. train.global_batch: 8 takes the same time, and 4",
        ),
        (8, 3, "of which 5 (62%) are empty. train.global_batch: 8 takes the same time, and so do fewer ranks"),
        (4, 15, ""),
        (4, 8, ""),
    ],
)
def test_many_empty_rows_of_a_step_are_said_by_plan(workshop: Workshop, ranks: int, batch: int, said: str) -> None:
    config = workshop.config("empty", f"cluster.workers={ranks}", f"train.global_batch={batch}")
    plan = plan_run(config, None, None).plan
    wrong = "\n".join(plan.mismatches)
    assert said in wrong if said else "are empty" not in wrong
    assert plan.shortfalls == plan.mismatches
    elastic = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": (1, ranks)})})
    found = plan_run(elastic, None, None).plan
    assert found.mismatches == [], "a run that shrinks and grows is told, and not refused"
    assert said in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("ranks", "batch", "refused"),
    [(16, 20, True), (64, 40, True), (16, 32, False), (16, 30, False), (20, 18, False), (8, 9, False)],
)
def test_a_first_start_on_many_ranks_is_refused_for_many_empty_rows(
    workshop: Workshop, ranks: int, batch: int, refused: bool
) -> None:
    config = workshop.config("many", f"cluster.workers={ranks}", f"train.global_batch={batch}")
    with pytest.raises(ConfigError, match="are empty") if refused else nullcontext():
        refuse_empty_rows(config, ranks)


def test_ranks_that_share_a_row_compute_one_row_at_a_time_or_a_micro_batch(workshop: Workshop) -> None:
    config = workshop.config("shared", "cluster.workers=16", "sharding.sequence_parallel=2", "train.global_batch=8")
    refuse_empty_rows(config, 16)
    with pytest.raises(ConfigError, match="computes 16 rows on 16 ranks, of which 6"):
        refuse_empty_rows(override(config, "train.global_batch=10"), 16)
    with pytest.raises(ConfigError, match="computes 32 rows on 16 ranks, of which 14"):
        refuse_empty_rows(override(config, "train.global_batch=18", "train.micro_batch=2"), 16)


def test_plan_says_what_a_large_batch_does_to_adapters_of_low_rank(workshop: Workshop) -> None:
    def notes(*settings: str) -> str:
        return "\n".join(plan_run(workshop.config("large", *settings), None, None).plan.notes)

    said = "train.global_batch: 512 rows (32,768 tokens) an update. Adapters of low rank learn less"
    assert said in notes("train.global_batch=512")
    assert "Adapters of low rank" in notes("train.global_batch=256")
    assert "low rank" not in notes("train.global_batch=64")


def _record_start(workshop: Workshop, name: str, ranks: int, load: float, read: int = 0, *settings: str) -> None:
    run = workshop.store.sub(name)
    run.put(layout.CONFIG, dump_config(workshop.config(name, *settings)).encode())
    parts = {"launch_seconds": 10.0, "load_seconds": load, "restore_seconds": 2.0, "read_bytes": read}
    begun = {"kind": "start", "step": 0, "world_size": ranks, "time": 1.0, **parts}
    first = {"kind": "first_step", "step": 1, "seconds": 20.0 + load, "time": 2.0}
    run.put(layout.metrics(1), "".join(json.dumps(record) + "\n" for record in (begun, first)).encode())


def test_a_plan_tells_the_time_of_a_start_and_what_restarts_cost(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    config = workshop.config("planned", "checkpoint.every_steps=100", "checkpoint.every_minutes=0")
    assert plan_run(config, None, None).start.run is None
    _record_start(workshop, "other", 4, 90.0)
    _record_start(workshop, "near", 1, 30.0)
    _record_start(workshop, "a-node", 1, 9.0, 0, "sharding.scope=node")  # another base to load
    planned = plan_run(config, None, None)
    assert (planned.start.run, planned.start.ranks) == ("near", 1)
    assert planned.start.phases["first_step"].seconds == 8.0
    assert not any(phase.assumed for phase in planned.start.phases.values())
    (line,) = (text for name, text in plan_lines(planned, config) if name == "start")
    assert "about 50 s (launch 10.0 s, load 30.0 s, restore 2.0 s, first step 8.0 s), as near took on 1 rank" in line
    # 1,000 ranks, a commit each 100 steps of 6 s: each failure costs 50 + 300 s, and one comes each 50 hours.
    expected = restarts(planned.start, 1000, 6.0, 360_000.0, config.checkpoint, 50_000)
    assert expected.count == pytest.approx(2.0)
    assert expected.seconds_each == pytest.approx(350.0)
    assert expected.share == pytest.approx(350 / (180_000 + 350))


def known(run: str, ranks: int, *, time: float = 1.0, same: bool = True, read: int = 0, **seconds: float) -> KnownStart:
    return KnownStart(run, time, ranks, {"launch": 1.0, "load": 2.0, "first_step": 3.0, **seconds}, same, read, 5.0)


@pytest.mark.parametrize(
    ("past", "run"),
    [
        ([known("near", 8), known("newer", 16, time=2.0)], "near"),
        ([known("older", 8), known("newer", 8, time=2.0)], "newer"),
        ([known("half", 4)], "half"),
        ([known("twice", 16)], "twice"),
        ([known("few", 3)], None),
        ([known("many", 17)], None),
        ([known("other", 8, same=False), known("mine", 16)], "mine"),
        ([], None),
    ],
)
def test_a_start_is_as_long_as_the_nearest_from_the_same_base_on_about_as_many_ranks(
    past: list[KnownStart], run: str | None
) -> None:
    found = start_time(past, lambda _: {"load": Phase(9.0, "assumed")}, 8)
    assert found.run == run
    assert (found.phases["load"].seconds, found.phases["load"].assumed) == ((2.0, False) if run else (9.0, True))


def test_parts_of_a_start_that_do_not_grow_are_those_of_the_nearest_and_a_large_load_measures_the_rate() -> None:
    asked = list[KnownStart | None]()

    def estimate(reading: KnownStart | None) -> dict[str, Phase]:
        asked.append(reading)
        return {name: Phase(9.0, "assumed") for name in ("launch", "load", "first_step")}

    little, much = (known(str(read), 1, same=False, read=read) for read in (10**9 - 1, 10**9))
    others = start_time([little, much], estimate, 64)
    assert {name: phase.seconds for name, phase in others.phases.items()} == {
        "launch": 1.0,
        "load": 9.0,
        "first_step": 9.0,
    }
    mine = start_time([known("mine", 1, restore=4.0)], estimate, 64)
    assert {name: phase.seconds for name, phase in mine.phases.items()} == {
        "launch": 1.0,
        "load": 9.0,
        "first_step": 3.0,
        "restore": 4.0,
    }
    assert asked == [much, None]


def test_a_restart_costs_half_of_the_time_between_two_commits_or_of_a_short_run() -> None:
    start = StartTime({"load": Phase(50.0, "")}, 1000)

    def each(seconds: float, **rules: float) -> float:
        return restarts(start, 1000, 6.0, seconds, Checkpoint.model_validate(rules), 50_000).seconds_each

    assert each(1e6, every_minutes=15, every_steps=0) == 50 + 15 * 60 / 2
    assert each(1e6, every_minutes=15, every_steps=100) == 50 + 600 / 2, "whichever comes first"
    assert each(100, every_minutes=15, every_steps=0) == 50 + 100 / 2
    assert each(1e6, every_minutes=0, every_steps=0) == 50 + 1e6 / 2, "there is no commit before the end"


def test_phases_that_no_start_has_measured_are_assumed_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    workshop = Workshop(tmp_path)
    many = ("cluster.workers=64", "train.global_batch=64", "sharding.scope=node", "model.dtype=bf16")
    config = workshop.config("assumed", *many)
    size = sum(file.stat().st_size for file in Path(config.model.base).glob("*.safetensors"))

    def plan(*settings: str, rate: float | None = None) -> Planned:
        return plan_run(override(config, *settings), "H100", 8, store_rate=rate)

    start = plan().start
    assert list(start.phases) == ["launch", "meet", "groups", "load", "first_step"]
    assert all(phase.assumed and "(assumed)" in phase.basis for phase in start.phases.values())
    assert start.phases["meet"].seconds == pytest.approx(64 * 0.0016)
    assert "read once, at 2.5 GB/s a node (assumed)" in start.phases["load"].basis
    assumed = plan("sharding.scope=world").start.phases
    assert "groups" not in assumed
    assert assumed["load"].seconds == pytest.approx(size / (2.5e9 * 8)), "eight nodes read at once"
    assert "groups" not in plan("cluster.workers=8", "train.global_batch=8").start.phases, "they are on one node"
    planned = plan()
    assert planned.restarts is not None
    assert planned.restarts.seconds_each > start.seconds
    (line,) = (text for name, text in plan_lines(planned, config) if name == "start")
    assert "basis: the last table" in line
    show_plan(planned, config)
    json.dumps(planned.to_json()["start"])

    given = plan("sharding.scope=world", rate=1e3).start.phases["load"]
    assert (given.assumed, given.seconds) == (False, pytest.approx(size / 1e3))
    # Eight ranks have read another base at 1 GB/s, or 125 MB/s each. This is measured; 64 ranks read as fast each.
    _record_start(workshop, "another", 8, 2.0, 2 * 10**9, "model.layers=1")
    load = plan("sharding.scope=world").start.phases["load"]
    assert (load.assumed, load.seconds) == (False, pytest.approx(size / (64 * 125e6)))
    assert "125.0 MB/s a rank, as another read on 8 ranks" in load.basis
    assert plan().start.phases["launch"].basis == "as another took on 8 ranks"


def test_the_four_newest_starts_of_a_run_count(tmp_path: Path) -> None:
    store, config = open_store(str(tmp_path)), parse_config(made.CONFIG)
    run = store.sub("demo")
    run.put(layout.CONFIG, dump_config(config).encode())
    for number in range(1, 7):
        parts = {"launch_seconds": float(number), "load_seconds": 2.0}
        made.write(run, number, made.start(number) | parts, {"kind": "first_step", "seconds": 9.0, "time": made.NOW})
    assert [one.seconds for one in past_starts(store, config)] == [
        {"launch": launch, "load": 2.0, "first_step": 7.0 - launch} for launch in (3.0, 4.0, 5.0, 6.0)
    ]


def test_a_bucket_answers_so_many_requests_a_second_and_the_doctors_figure_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    workshop = Workshop(tmp_path)
    config = workshop.config("cached", "cluster.workers=2", "model.dtype=bf16")
    keep_import_seconds(42.0)
    phases = plan_run(config, "H100", None).start.phases
    assert phases["launch"] == Phase(42.0, "imports 42.0 s (as capstan doctor measured them here)", assumed=False)
    assert "requests" not in phases["load"].basis
    in_s3 = override(config, "run.store=s3://bucket/runs", "quant.cache=true")
    monkeypatch.setattr(planning, "_answering_store", lambda _: None)
    load = plan_run(in_s3, "H100", None).start.phases["load"]
    assert "of the cache of quantized shards, read once" in load.basis
    assert "1 requests at 5,500 a second" in load.basis


@pytest.mark.parametrize(
    ("rows", "batch", "tokens", "said"),
    [
        (33, 16, 2000, "33 rows, so the last of its 3 steps learns from 1 of 16 and is an update like the others."),
        (33, 16, 2000, "train.global_batch: 17 divides them more evenly"),
        (12, 1, 64 * 11 + 20, "an epoch's 12 rows an update, and their tokens fill only 11.3 of them: the emptiest"),
        (12, 1, 64 * 11 + 36, None),  # its row of few tokens is more than half full
        (40, 16, 2000, None),  # half of the last step
        (32, 16, 2000, None),
        (801, 16, 50000, None),  # one small step of 51
        (3, 16, 150, None),  # one step is an epoch
    ],
)
def test_an_epochs_step_of_few_tokens_is_said_by_plan(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, tokens: int, said: str | None
) -> None:
    epoch = EpochLength(tokens, rows, (rows,), compiled=True)
    monkeypatch.setattr(planning, "epoch_length", lambda *_given: epoch)
    config = workshop.config("tail", "train.steps=null", "train.epochs=1", f"train.global_batch={batch}")
    assert config.data.sequence_length == 64
    notes = "\n".join(plan_run(config, None, None).plan.notes)
    assert said in notes if said else "train.global_batch" not in notes


def test_an_adapter_of_a_base_that_was_cut_says_so(workshop: Workshop) -> None:
    assert cut_sentence(workshop.config("whole")) is None
    said = cut_sentence(workshop.config("cut", "model.layers=1")) or ""
    assert "the first 1 layer of its base alone" in said
    exported = Exported("there", "peft", 2, merged=False, remarks=[said])
    for url in (None, "https://there"):
        assert Pushed("me/x", "main", private=True, exported=exported, url=url).sentence().endswith(said)


def test_a_job_that_a_node_could_not_run_is_doubted_before_it_is_submitted(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.sys, "prefix", "/tmp/venv")
    doubts = list(submit._doubts(workshop.config("job", "cluster.workers=1")))
    assert ["memory_per_node" in doubts[0], "/tmp/venv" in doubts[1]] == [True, True]
    on_gpus = workshop.config("job", "cluster.slurm.memory_per_node=0", "cluster.slurm.gpus_per_node=8")
    assert on_gpus.cluster.slurm.memory_per_node == "0"
    assert "the job asks for 8 CPUs on each node, as cluster.slurm.cpus_per_node is not set" in next(
        submit._doubts(on_gpus)
    )
    sure = override(on_gpus, "cluster.slurm.cpus_per_node=32", "cluster.slurm.python=/shared/bin/python")
    assert list(submit._doubts(sure)) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["gpus_per_node=2", "gpu_type=h100"], r"memory: fits: .* of 79\.\d GiB on each of 2 GPUs \(H100"),
        (
            ["gpus_per_node=2", "gpu_type=ours"],
            r"on each GPU. cluster.slurm.gpu_type: 'ours' is none whose memory is known",
        ),
        (["gpus_per_node=2"], r"cluster.slurm.gpu_type: none is named, so capstan plan --gpu says"),
        (["nodes=1"], r"memory: .* for its rank, on the CPU"),
    ],
)
def test_a_dry_run_says_whether_the_job_fits(workshop: Workshop, asked: list[str], said: str) -> None:
    where = ["cluster.workers=1", "cluster.gpus_per_worker=0"] if asked == ["nodes=1"] else []
    config = workshop.config("job", "model.dtype=fp32", *where, *(f"cluster.slurm.{one}" for one in asked))
    told = list[str]()
    submit.submit(config, resume=False, take_over=False, after=None, dry_run=True, log=told.append)
    assert re.search(said, "\n".join(told)), told


def test_a_node_with_less_memory_than_its_ranks_take_is_said(workshop: Workshop) -> None:
    config = workshop.config(
        "job", "cluster.workers=1", "cluster.gpus_per_worker=0", "cluster.slurm.memory_per_node=1K"
    )
    assert "memory_per_node: 1K is less than the" in list(submit._memory(config))[-1]
    assert len(list(submit._memory(override(config, "cluster.slurm.memory_per_node=900G")))) == 1
