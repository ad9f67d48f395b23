"""The product's own code on a device beside the host, which a CPU stands in for (pretended.cpp): whole runs, and for each place where it
orders its streams that they are caught without.

No operation of it computes as a GPU does: kernels, NCCL and times are proven on a card, by benchmarks/gpu.py. An optimizer whose states are
on the host is not run here: this device takes DeepSpeed's freeing of its norms on another stream for a fault, and whether it is one is not settled. The wait that
a pass begins with is not among what is taken out: no run here is caught without it, and why is not settled either.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.device import life
from tests.device.pretended import build
from tests.dist import runs
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, make_pairs
from tests.needs import need
from trainer.config import Config, dump_config
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long
STEPS = 6


@pytest.fixture(scope="session")
def library() -> str:
    """Kept from run to run, as compiling it takes longer than a test of it."""
    need(None if shutil.which("c++") else "The pretended device needs a C++ compiler.")
    return str(build(Path(__file__).parents[2] / ".pytest_cache" / "device"))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"), num_hidden_layers=4)


@pytest.fixture
def config(device: Workshop) -> Callable[..., Config]:
    """The configuration of a run under a policy for GPUs, `zero3` unless it is another one."""

    def of(name: str, *overrides: str, policy: str = "zero3", **more: Any) -> Config:
        file = life.make_policy(device.folder / f"{name}.json", policy, **more)
        settings = (f"train.steps={STEPS}", "checkpoint.every_steps=3", f"sharding.deepspeed={file}")
        made = device.config(name, *settings, *overrides)
        run_of(made).put(layout.CONFIG, dump_config(made).encode())  # as the launcher does, for exports
        return made

    return of


def run_of(config: Config) -> Store:
    return open_store(config.run.store).sub(config.run.name)


def on_host(device: Workshop, config: Config, ranks: int) -> dict[int, float]:
    """The losses of the same run on CPUs."""
    plain = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-host"})})
    launch(ranks, runs.run, dump_config(plain), device.prepare(plain).train)
    return losses(run_of(plain))


OFFLOADED = ("train.activation_offload=true", "train.activation_checkpointing=all", "quant.double=true")


@pytest.mark.parametrize(
    ("name", "policy", "ranks", "overrides", "more"),
    [
        ("streams", "zero3", 2, (), {}),
        ("no-streams", "zero3", 2, (), {"overlap_comm": False}),
        ("alone", "single_gpu", 1, (), {}),
        ("offloaded", "zero3_offload_cpu", 2, OFFLOADED, {}),
        ("offloaded-alone", "zero3_offload_cpu", 1, OFFLOADED, {}),
        ("tiled", "zero3", 2, ("train.tiled_mlp=true", "tuning.dropout=0.1"), {}),
    ],
)
def test_a_run_has_the_losses_that_it_has_on_cpus(
    device: Workshop,
    config: Callable[..., Config],
    library: str,
    name: str,
    policy: str,
    ranks: int,
    overrides: tuple[str, ...],
    more: dict[str, Any],
) -> None:
    given = config(name, *overrides, policy=policy, **more)
    for ended in launch(ranks, life.train, library, dump_config(given), device.prepare(given).train):
        assert ended["outcome"] == "finished", ended["message"]
        assert ended["operations"] > 1000  # the device was there
    expected = on_host(device, given, ranks)
    assert losses(run_of(given)) == pytest.approx(expected, abs=5e-3)
    assert len(expected) == STEPS


def test_pairs_are_preferred_and_evaluated(device: Workshop, config: Callable[..., Config], library: str) -> None:
    pairs, others = (make_pairs(device.folder / f"{seed}.jsonl", 24, seed) for seed in (6, 7))
    overrides = ("objective.name=dpo", "data.format=preference", f'data.train=[{{"path": "{pairs}"}}]')
    overrides = (*overrides, f'data.eval=[{{"path": "{others}"}}]', "eval.every=3", "optim.name=adamw_8bit")
    given = config("pairs", *overrides)
    datasets = device.prepare(given)
    for ended in launch(2, life.train, library, dump_config(given), datasets.train, "start", datasets.eval):
        assert ended["outcome"] == "finished", ended["message"]
    assert len(losses(run_of(given))) == STEPS


def test_a_run_is_killed_resumes_on_another_number_of_ranks_and_is_exported(
    device: Workshop, config: Callable[..., Config], library: str, tmp_path: Path
) -> None:
    whole, killed = config("whole", "train.steps=10", "checkpoint.every_steps=5"), config("killed", "train.steps=10")
    killed = killed.model_copy(update={"checkpoint": whole.checkpoint})
    fingerprint = device.prepare(whole).train
    launch(2, life.train, library, dump_config(whole), fingerprint)
    with running(2, life.train, library, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: run_of(killed).exists(layout.manifest(5)))
        ranks.kill()
    (ended,) = launch(1, life.train, library, dump_config(killed), fingerprint, "resume")
    assert ended["outcome"] == "finished", ended["message"]
    assert losses(run_of(killed)) == pytest.approx(losses(run_of(whole)), abs=5e-3)
    export_adapter(run_of(killed), open_store(str(tmp_path / "adapter")))
    exported = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert exported
    assert all(bool(weight.isfinite().all()) for weight in exported.values())
    # The trained side of a proof: whole, and a layer at a time out of memory of the host.
    uri = run_of(killed).uri
    expected = launch(1, life.logits, "", uri, 10, None)[0]
    for scratch in (None, str(tmp_path)):
        assert launch(1, life.logits, library, uri, 10, scratch)[0] == pytest.approx(expected, abs=2e-2)


GATHER, CHECKPOINTS, ACCELERATOR = (
    "trainer.state.zero.gather",
    "trainer.state.checkpoint.checkpoints",
    "trainer.processes.accelerator",
)


@pytest.mark.parametrize(
    ("module", "line", "put", "caught"),
    [
        # A layer would compute with weights that are still on their way.
        (GATHER, "self._device.current_stream().wait_stream(self._stream)", "pass", "race: "),
        # The clock would read a moment that never was.
        (ACCELERATOR, "event.record()", "pass", "must be recorded"),
        # A tensor of the host would meet the weights.
        ("trainer.state.zero.engine", "row.to(self.ranks.device))", "row)", "device"),
    ],
    ids=["gathered", "clock", "row"],
)
def test_what_orders_streams_is_missed(
    device: Workshop, config: Callable[..., Config], library: str, module: str, line: str, put: str, caught: str
) -> None:
    given = config(f"without-{abs(hash((module, line)))}", "train.steps=3")
    fingerprint = device.prepare(given).train
    found = launch(2, life.train_without, library, dump_config(given), fingerprint, "start", module, line, put)
    assert all(rank["outcome"] != "finished" and caught in rank["message"] for rank in found), found


def test_memory_whose_uses_nobody_tells_of_is_missed(
    device: Workshop, config: Callable[..., Config], library: str
) -> None:
    given = config("untold", "train.steps=3")
    for ended in launch(2, life.train_untold, library, dump_config(given), device.prepare(given).train):
        assert ended["outcome"] != "finished"
        assert "race: a reuse of freed memory" in ended["message"]


def test_a_checkpoint_that_does_not_wait_for_its_copies_is_no_number(
    device: Workshop, config: Callable[..., Config], library: str, tmp_path: Path
) -> None:
    given = config("unwaited", "train.steps=3")
    put = (CHECKPOINTS, "torch.accelerator.synchronize()", "pass")
    launch(1, life.train_without, library, dump_config(given), device.prepare(given).train, "start", *put)
    export_adapter(run_of(given), open_store(str(tmp_path / "adapter")))
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    assert any(math.isnan(float(weight.sum())) for weight in weights)
