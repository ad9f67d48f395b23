"""A real vLLM serves an export beside its base: `export --verify --server` finds it right, and the base alone beside
it, and `evaluate --server` measures what the ranks do. It samples what the trainer computes, for runs that have started
before it and for one that starts it."""

import json
import os
import tomllib
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import NamedTuple

import obstore
import pytest

from launcher.view.status import read_generation
from tests.cli.conftest import ROOT, Capstan
from tests.dist import rollouts
from tests.dist.launch import running
from tests.dist.test_evaluate import write_tasks
from tests.material import Workshop, commit, make_data
from tests.needs import need
from tests.ray.cluster import Driver, alive, write
from tests.real_vllm import ENVIRONMENT, TARGETS, VLLM, vllm
from tests.rollout_kills import begin, config_of
from tests.served_runs import sidecars, until
from trainer.export.write.adapter import export_adapter
from trainer.processes import guard
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


class Served(NamedTuple):
    """A server at `url` of the workshop's base and of the export of its run `done`, which finds adapters in the store
    `there`; and its log.
    """

    workshop: Workshop
    url: str
    there: Path
    log: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for the tests that ask a server, whose start takes half a minute of a processor."""
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    folder = tmp_path_factory.mktemp("served")
    workshop = Workshop(folder, hidden_size=128)  # vLLM wants heads of 32
    exact = ("model.dtype=fp32", "quant.type=none")
    config = workshop.config("done", f"tuning.targets=[{', '.join(TARGETS)}]", *exact)
    commit(workshop.store.sub("done"), config, dataset=workshop.prepare(config).train)
    export_adapter(workshop.store.sub("done"), open_store(str(folder / "adapter")))
    there, log = folder / "there", folder / "vllm.log"
    plugin = {"PYTHONPATH": str(installed(folder / "plugin")), "CAPSTAN_STORE": str(there)}
    with vllm(workshop.base, log, "--lora-modules", f"done={folder}/adapter", **plugin) as url:
        yield Served(workshop, url, there, log)


def test_a_real_server_serves_what_was_exported(served: Served, tmp_path: Path, capstan: Capstan) -> None:
    url, export = served.url, ("export", "done", str(tmp_path / "adapter"), f"--store={served.workshop.folder}/store")
    found = capstan(*export, "--verify", "--server", url, timeout=600)
    assert found.returncode == 0, found.stderr
    assert "log-probabilities of done" in found.stdout
    alone = capstan(*export, "--verify", "--server", f"{url}#base", timeout=600)
    assert alone.returncode == 1
    assert "It answers as the base alone" in alone.stderr
    make_data(tmp_path / "task.jsonl", documents=7, seed=8)
    write_tasks(tmp_path / "tasks")
    evaluate = (
        "evaluate",
        "done",
        export[-1],
        f"--set=task={tmp_path}/task.jsonl",
        f"--tasks={tmp_path}/tasks",
        "--json",
    )
    theirs, ours = (capstan(*evaluate, *more, timeout=600) for more in (("--server", url, "--step=4"), ()))
    assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
    measured, here = json.loads(theirs.stdout), json.loads(ours.stdout)
    assert measured["server"] == f"{url}#done"
    for side in ("base", "adapter"):
        assert measured["sets"]["task"][side]["loss"] == pytest.approx(here["sets"]["task"][side]["loss"], abs=1e-4)
        for task, metrics in measured["tasks"].items():
            for metric, one in metrics.items():
                assert one[side] == pytest.approx(here["tasks"][task][metric][side], rel=1e-3), (task, metric, side)
    assert abs(measured["sets"]["task"]["difference"]) > 0.01


def test_a_real_server_samples_what_the_trainer_computes(served: Served) -> None:
    """It takes the adapters of one run from a folder, and finds those of another in the store of that, as it has our
    plugin.
    """
    before = len(served.log.read_text(errors="replace"))
    for name, store in (("folder", served.workshop.folder / "store"), ("store", served.there)):
        given = f"rollout.engine=[{served.url}]", "rollout.max_lag=0", "train.steps=4", f"run.store={store}"
        workshop = copy(served.workshop)
        workshop.store = open_store(str(store))
        config = config_of(workshop, name, *given, f"tuning.targets=[{', '.join(TARGETS)}]")
        run, ranks = begin(workshop, config)
        with running(1, *ranks, timeout=900) as trainer, running(1, rollouts.sample, run.uri, timeout=900) as rest:
            assert trainer.wait()[0]["outcome"] == "finished"
            assert rest.wait()[0]["outcome"] == "finished"
        steps = read_generation(run, 1)["step"]
        assert [record["lag"] for record in steps] == [0] * 4
        # Also of the later ones, whose adapter is no longer nothing.
        assert all(record["log_ratio"] < 1e-4 and abs(record["ratio"] - 1) < 1e-3 for record in steps), steps
    said = served.log.read_text(errors="replace")[before:]
    assert [said.count(what) for what in ("Loaded new LoRA adapter", "using StoreResolver")] == [4, 4]


def test_a_real_server_starts_with_a_run_and_is_started_again_when_it_is_killed(tmp_path: Path) -> None:
    """The trainer computes what it samples, and of neither of its starts a process is left: not of its engine, which
    renames itself, either.
    """
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop, run = Workshop(tmp_path, hidden_size=128), open_store(str(tmp_path / "store")).sub("served")
    inside = [f"{name}={value}" for name, value in ENVIRONMENT.items() if name != "VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
    command = ["env", *inside, str(VLLM / "bin/vllm"), "serve"]
    options = ["--enforce-eager", "--lora-target-modules", *TARGETS]
    settings = (
        *("objective.name=grpo", "rollout.reward=length", "rollout.max_tokens=3", "rollout.engine=serve"),
        *(f"rollout.serve.command={json.dumps(command)}", f"rollout.serve.options={json.dumps(options)}"),
        *("rollout.serve.gpus=0", f"tuning.targets=[{', '.join(TARGETS)}]", "model.dtype=fp32", "quant.type=none"),
        *("cluster.gpus_per_worker=0", "cluster.workers=1", "train.steps=12", "rollout.max_lag=0"),
    )

    def family() -> list[int]:
        heads = [number for number, command in sidecars(run).items() if "launcher.start.sidecars" in command]
        return [*guard.descendants(heads)]

    with Driver(tmp_path, "train", write(tmp_path, workshop, "served", *settings), real=True) as driver:
        driver.wait_for(run, 1, step=3)
        first, log = family(), run.uri.removeprefix("file://")
        (server,) = [
            number for number in first if b"/bin/vllm\0serve\0" in Path(f"/proc/{number}/cmdline").read_bytes()
        ]
        engines = [*guard.descendants([server])]
        assert len(engines) > 1, log
        os.kill(server, 9)
        until(lambda: not any(map(alive, engines)), 30)
        until(lambda: driver.log.read_text().count("server-1 answers at http://127.0.0.1:") == 2)
        last = family()
        assert driver.end() == 0, driver.log.read_text()
    assert not any(map(alive, [*first, *last]))
    steps = read_generation(run, 1)["step"]
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert steps[0]["log_ratio"] < 1e-3


def test_a_real_server_computes_a_merge_in_codes(tmp_path: Path, capstan: Capstan) -> None:
    """It multiplies by the codes of compressed-tensors, and has the log-probabilities that `--verify` computes of them;
    those of another merge it does not have."""
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop = Workshop(
        tmp_path, hidden_size=128, intermediate_size=256
    )  # its kernel takes whole 32 rows and columns, in bf16
    config = workshop.config("done", f"tuning.targets=[{', '.join(TARGETS)}]", "model.dtype=fp32", "quant.type=none")
    commit(workshop.store.sub("done"), config, dataset=workshop.prepare(config).train)
    common = f"--store={tmp_path}/store", "--format", "merged"
    for folder, *options in (("int4", "as=int4"), ("dithered", "as=int4", "rounding=dither")):
        written = capstan("export", "done", str(tmp_path / folder), *common, *options, timeout=600)
        assert written.returncode == 0, written.stderr
    with vllm(tmp_path / "int4", tmp_path / "vllm.log", "--dtype", "bfloat16") as url:
        served = "--verify", "--server", f"{url}#base"
        found = capstan("export", "done", str(tmp_path / "int4"), *common, "as=int4", *served, timeout=600)
        assert found.returncode == 0, found.stdout + found.stderr
        options = ("as=int4", "rounding=dither")
        other = capstan("export", "done", str(tmp_path / "dithered"), *common, *options, *served, timeout=600)
        assert other.returncode == 1, other.stdout + other.stderr


def installed(folder: Path) -> Path:
    """A folder of packages with Capstan and the client of its stores, beside which vLLM has all that its plugin
    needs.
    """
    described = folder / "capstan_llm-0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: capstan-llm\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (f"{name} = {found}\n" for name, found in project["entry-points"]["vllm.general_plugins"].items())
    (described / "entry_points.txt").write_text("[vllm.general_plugins]\n" + "".join(lines))
    assert obstore.__file__ is not None
    for package in (ROOT / "trainer", Path(obstore.__file__).parent):
        (folder / package.name).symlink_to(package)
    return folder
