"""The product's own code on a device beside the host, which a CPU stands in for (pretended.cpp): whole runs, and for each place where it
orders its streams that they are caught without.

    line taken out                                              caught by
    compute waits for the gathers' stream                       race: a layer reads what is on its way
    record_stream of what was gathered                          race: a reuse of freed memory
    the event of the clock and of exchanges                     ranks agree on what has not come
    a row goes to the device                                    a tensor of the host in an operation of the device
    the exchange waits for its copy to the host                 the host reads what has not come
    a copy of an offloaded input waits for compute              race: it reads what a layer writes
    compute waits for such a copy, forwards and backwards       race: a layer reads, or the allocator reuses, what is copied
    a checkpoint waits for its copies                           NaN in the export

The wait of the gathers' stream that a pass begins with is not among them: no run is caught without it, over five steps with nothing whole
and no collective between update and pass either, and what orders the two is not known.

Nor is `sharding.scope: node`: gloo, which is behind the device, makes no groups of a group that knows its device.

No operation of it computes as a GPU does: kernels, NCCL and times are proven on a card, by benchmarks/gpu.py.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from tests.device import life
from tests.device.pretended import build
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, make_pairs
from tests.needs import need
from trainer.config import Config, dump_config
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long
STEPS, LAYERS = 3, 4


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


class Case(NamedTuple):
    """A run under a policy for GPUs, on so many ranks of so many nodes."""

    policy: str = "zero3"
    overrides: tuple[str, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    base: str = "llama"


OFFLOADED = ("train.activation_offload=true", "train.activation_checkpointing=all", "quant.double=true")
CASES = {
    2: {
        "streams": Case(),
        "no streams": Case(more=(("overlap_comm", False),)),
        "offloaded": Case("zero3_offload_cpu", OFFLOADED),
        "optimizer": Case("zero3_offload_optimizer"),
        "tiled": Case(overrides=("train.tiled_mlp=true", "tuning.dropout=0.1")),
        "experts": Case(overrides=("tuning.experts=true", "tuning.experts_rank=3"), base="mixtral"),
        "pairs": Case(
            overrides=("objective.name=dpo", "data.format=preference", "eval.every=2", "optim.name=adamw_8bit")
        ),
    },
    1: {
        "alone": Case("single_gpu", ("train.sample_every=2", "eval.max_tokens=4")),
        "offloaded alone": Case("zero3_offload_cpu", OFFLOADED),
    },
}


def made(device: Workshop, name: str, case: Case = Case(), *overrides: str) -> Config:  # noqa: B008  # it cannot change
    """The configuration of a run of a case."""
    file = life.make_policy(device.folder / f"{name}.json", case.policy, **dict(case.more))
    settings = (f"train.steps={STEPS}", "checkpoint.every_steps=3", f"sharding.deepspeed={file}")
    given = device.config(name.replace(" ", "-"), *settings, *case.overrides, *overrides)
    run_of(given).put(layout.CONFIG, dump_config(given).encode())  # as the launcher does, for exports
    return given


def run_of(config: Config) -> Store:
    return open_store(config.run.store).sub(config.run.name)


def rows_of(folder: Path, name: str) -> tuple[str, ...]:
    """Settings that name rows which a case needs."""
    if name == "pairs":
        learnt, others = (make_pairs(folder / f"{seed}.jsonl", 16, seed) for seed in (6, 7))
        return f'data.train=[{{"path": "{learnt}"}}]', f'data.eval=[{{"path": "{others}"}}]'
    if name == "alone":
        (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "the ant? "}) + "\n")
        return (f"eval.prompts={folder / 'prompts.jsonl'}",)
    return ()


@pytest.fixture(scope="module", params=CASES)
def trained(
    request: pytest.FixtureRequest, workshops: dict[str, Workshop], library: str
) -> dict[str, tuple[list[dict[str, Any]], Config, Config]]:
    """All cases of a number of ranks, one after the other in the same processes: how each ended on each rank, and the runs on the device and
    on CPUs."""
    ranks: int = request.param
    configs, given = dict[str, list[Config]](), dict[str, list[Any]]()
    for where in ("", "-host"):
        for name, case in CASES[ranks].items():
            workshop = workshops[case.base]
            config = made(workshop, f"{name}{where}", case, *rows_of(workshop.folder, name))
            prepared = workshop.prepare(config)
            configs.setdefault(name, []).append(config)
            given.setdefault(where, []).append([dump_config(config), prepared.train, "start", prepared.eval])
    launch(ranks, life.train, "", given["-host"], timeout=1500)
    every = launch(ranks, life.train, library, given[""], timeout=1500)
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
        if name.startswith("offloaded"):
            rows = there.train.global_batch // len(ends)
            assert {ended["sent"] for ended in ends} == {STEPS * LAYERS * rows}, "the input of each layer"
        if name == "alone":
            assert run_of(there).exists(layout.samples(2))


def test_a_run_is_killed_resumes_on_another_number_of_ranks_and_is_exported(
    device: Workshop, library: str, tmp_path: Path
) -> None:
    settings = ("train.steps=8", "checkpoint.every_steps=5")
    whole, killed = (made(device, name, Case(), *settings) for name in ("whole", "killed"))
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


GATHER, CHECKPOINTS, ACCELERATOR = (
    "trainer.state.zero.gather",
    "trainer.state.checkpoint.checkpoints",
    "trainer.processes.accelerator",
)
ENGINE, OFFLOAD = "trainer.state.zero.engine", "trainer.model.offload"
SENDING = "self._stream.wait_stream(torch.accelerator.current_stream(self._device))"


@pytest.mark.parametrize(
    ("ranks", "case", "module", "line", "put", "caught"),
    [
        (2, Case(), GATHER, "self._device.current_stream().wait_stream(self._stream)", "pass", "race: "),
        (1, Case("single_gpu"), ACCELERATOR, "event.record()", "pass", "StopIteration"),
        (1, Case("single_gpu"), ENGINE, "row.to(self.ranks.device))", "row)", "of the host in"),
        (1, Case("single_gpu", OFFLOADED), OFFLOAD, SENDING, "pass", "race: "),
        (1, Case("single_gpu", OFFLOADED), OFFLOAD, "            self._wait_for(gone)", "            pass", "race: "),
        (1, Case("single_gpu", OFFLOADED), OFFLOAD, "        self._wait_for(wanted)", "        pass", "race: "),
    ],
    ids=["gathered", "clock", "row", "sent", "gone", "back"],
)
def test_what_orders_streams_is_missed(
    device: Workshop, library: str, ranks: int, case: Case, module: str, line: str, put: str, caught: str
) -> None:
    given = made(device, f"without-{abs(hash((module, line)))}", case)
    change = [module, line, put]
    found = launch(ranks, life.train_without, library, dump_config(given), device.prepare(given).train, change)
    assert all(rank["outcome"] != "finished" and caught in rank["message"] for rank in found), found


def test_memory_whose_uses_nobody_tells_of_is_missed(device: Workshop, library: str) -> None:
    given = made(device, "untold")
    for ended in launch(2, life.train_untold, library, dump_config(given), device.prepare(given).train):
        assert ended["outcome"] != "finished"
        assert "race: a reuse of freed memory" in ended["message"]


def test_a_checkpoint_that_does_not_wait_for_its_copies_is_no_number(
    device: Workshop, library: str, tmp_path: Path
) -> None:
    given = made(device, "unwaited")
    change = [CHECKPOINTS, "torch.accelerator.synchronize()", "pass"]
    launch(1, life.train_without, library, dump_config(given), device.prepare(given).train, change)
    export_adapter(run_of(given), open_store(str(tmp_path / "adapter")))
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    assert any(math.isnan(float(weight.sum())) for weight in weights)


def test_a_group_is_told_which_device_is_whose_and_an_exchange_is_waited_for(library: str) -> None:
    for told, waited, unwaited in launch(2, life.joined, library):
        assert told == "pretended:0"
        assert waited == [[7.0], [7.0]]
        assert unwaited != waited
