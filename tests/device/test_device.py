"""The product's own code on a device beside the host, which a CPU stands in for (pretended.cpp): whole runs,
and that a run is caught where it lacks what orders its streams. controls.py takes out each such line.

No operation of it computes as a GPU does: kernels, NCCL and times are proven on a card, by benchmarks/gpu.py.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.device import life
from tests.device.cases import CASES, LAYERS, STEPS, STREAMS, made, rows_of, run_of
from tests.device.controls import GATHERED
from tests.device.pretended import build
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from tests.needs import need
from trainer.config import Config, dump_config
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.store.store import open_store

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def library() -> str:
    """Kept from run to run, as compiling it takes longer than a test of it."""
    need(None if shutil.which("c++") else "The pretended device needs a C++ compiler.")
    return str(build(Path(__file__).parents[2] / ".pytest_cache" / "device"))


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    sizes = {"llama": {"num_hidden_layers": LAYERS}, "mixtral": {}}
    return {kind: Workshop(tmp_path_factory.mktemp(kind), kind, **some) for kind, some in sizes.items()}


@pytest.fixture(scope="module")
def device(workshops: dict[str, Workshop]) -> Workshop:
    return workshops["llama"]


@pytest.fixture(scope="module", params=CASES)
def trained(
    request: pytest.FixtureRequest, workshops: dict[str, Workshop], library: str
) -> dict[str, tuple[list[dict[str, Any]], Config, Config]]:
    """All cases of a number of ranks, one after the other in the same processes: how each ended on each rank, and the
    runs on the device and on CPUs."""
    ranks: int = request.param
    configs, given = dict[str, list[Config]](), dict[str, list[Any]]()
    for where in ("", "-host"):
        for name, case in CASES[ranks].items():
            workshop = workshops[case.base]
            config = made(workshop, f"{name}{where}", case, *rows_of(workshop.folder, name))
            prepared = workshop.prepare(config)
            configs.setdefault(name, []).append(config)
            given.setdefault(where, []).append([dump_config(config), prepared.train, "start", prepared.eval])
    (per_node,) = {case.ranks_per_node for case in CASES[ranks].values()}
    launch(ranks, life.train, "", given["-host"], ranks_per_node=per_node, timeout=1500)
    every = launch(ranks, life.train, library, given[""], ranks_per_node=per_node, timeout=1500)
    ended = dict(zip(CASES[ranks], map(list, zip(*every, strict=True)), strict=True))
    return {name: (ended[name], there, on_host) for name, (there, on_host) in configs.items()}


def test_runs_have_the_losses_that_they_have_on_cpus(trained: dict[str, Any]) -> None:
    for name, (ends, there, on_host) in trained.items():
        for ended in ends:
            assert ended["outcome"] == "finished", (name, ended["message"])
            assert ended["operations"] > 1000, "the device was there"
        expected = losses(run_of(on_host))
        assert losses(run_of(there)) == pytest.approx(expected, abs=5e-3), name
        assert len(expected) == STEPS
        if name == "alone":
            ours = [place for place in ends[0]["of_step"] if place.startswith("trainer/")]
            assert ours == ["trainer/state/zero/engine.py: <lambda>"], "a step waits for the gradient's norm alone"
        if name.startswith("offloaded"):
            rows = there.train.global_batch // len(ends)
            assert {ended["sent"] for ended in ends} == {STEPS * LAYERS * rows}, "the input of each layer"
            assert {ended["places"] for ended in ends} == {LAYERS}, "in memory that the next row uses again"
        if name == "alone":
            assert run_of(there).exists(layout.samples(STEPS))


def test_a_run_is_killed_resumes_on_another_number_of_ranks_and_is_exported(
    device: Workshop, library: str, tmp_path: Path
) -> None:
    settings = ("train.steps=8", "checkpoint.every_steps=5")
    whole, killed = (made(device, name, STREAMS, *settings) for name in ("whole", "killed"))
    fingerprint = device.prepare(whole).train
    launch(2, life.train, "", [[dump_config(whole), fingerprint]])
    with running(2, life.train, library, [[dump_config(killed), fingerprint, "hold"]]) as ranks:
        ranks.wait_until(lambda: run_of(killed).exists(layout.manifest(5)))
        ranks.kill()
    ((ended,),) = launch(1, life.train, library, [[dump_config(killed), fingerprint, "resume"]])
    assert ended["outcome"] == "finished", ended["message"]
    assert losses(run_of(killed)) == pytest.approx(losses(run_of(whole)), abs=5e-3)
    export_adapter(run_of(killed), open_store(str(tmp_path / "adapter")))
    exported = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert exported
    assert all(bool(weight.isfinite().all()) for weight in exported.values())
    # The trained side of a proof: whole, and a layer at a time out of memory of the host.
    uri = run_of(killed).uri
    ((expected,),) = launch(1, life.logits, "", uri, 8, [None])
    for found in launch(1, life.logits, library, uri, 8, [None, str(tmp_path)])[0]:
        assert found == pytest.approx(expected, abs=2e-2)


def test_compute_that_does_not_wait_for_a_gather_is_missed(device: Workshop, library: str) -> None:
    """One of the lines of controls.py, which has the others."""
    given, line = made(device, "unordered", STREAMS), GATHERED
    change = [line.module, line.text, line.put]
    for ended in launch(2, life.train_without, library, dump_config(given), device.prepare(given).train, change):
        assert ended["outcome"] != "finished"
        assert "race: " in ended["message"]


def test_memory_whose_uses_nobody_tells_of_is_missed(device: Workshop, library: str) -> None:
    given = made(device, "untold", STREAMS)
    for ended in launch(2, life.train_untold, library, dump_config(given), device.prepare(given).train):
        assert ended["outcome"] != "finished"
        assert "race: a reuse of freed memory" in ended["message"]


def test_a_group_is_told_which_device_is_whose_and_an_exchange_is_waited_for(library: str) -> None:
    for told, waited, unwaited in launch(2, life.joined, library):
        assert told == "pretended:0"
        assert waited == [[7.0], [7.0]]
        assert unwaited != waited
