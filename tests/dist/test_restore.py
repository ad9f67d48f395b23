"""Whatever learns is restored bit for bit by any number of ranks, and its next step is the one that it would have
taken.

One start of the ranks goes over all methods. Ten steps that are five, a resume and five more are proven for LoRA in
test_resume.py, and for full fine-tuning and each optimizer in test_full.py: the data's position and the schedule are
theirs too.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import saving
from tests.dist.launch import launch
from tests.dist.test_checkpoint import whole
from tests.dist.test_experts import adapting as of_experts
from tests.dist.test_modules import saving as of_modules
from tests.dist.test_tokens import adding as of_tokens
from tests.families import rows
from tests.material import Workshop
from tests.methods import trained_by
from tests.stored import store_as
from trainer.config import Config, dump_config, override
from trainer.tuning.method import methods

pytestmark = pytest.mark.timeout(600)

SETTINGS = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=0.01", "checkpoint.every_steps=0")


def trains(method: str) -> Callable[[Workshop], Config]:
    return lambda here: here.config(method, *SETTINGS, *trained_by(method))


def through_codes(here: Workshop) -> Config:
    """A run through the codes of the same base in INT4."""
    base = store_as(here.base, here.folder / "int4", "int4-32")
    return here.config(
        "through", *SETTINGS, f"model.base={base}", "quant.type=stored", "tuning.rank=4", "tuning.through=stored"
    )


# What learns -> a run of it over a workshop.
METHODS: dict[str, Callable[[Workshop], Config]] = {
    **{method: trains(method) for method in methods()},
    "tokens": lambda here: of_tokens(here, "tokens", "grown", *SETTINGS),
    "modules": lambda here: of_modules(here, "tied", "modules", *SETTINGS),
    "through": lambda here: through_codes(here),
    "experts": lambda here: of_experts(here, "qwen3-moe", "experts", *SETTINGS),
}


@dataclass(frozen=True)
class Trained:
    """Runs of two ranks that were saved after their second step."""

    workshop: Workshop
    configs: dict[str, Config]
    states: dict[str, dict[str, torch.Tensor]]
    losses: dict[str, float]  # of the third step, without an interruption


def jobs(workshop: Workshop, configs: dict[str, Config], folder: Path) -> list[tuple[str, str, str]]:
    for method in configs:
        (folder / method).mkdir(parents=True)
    return [
        (dump_config(config), workshop.prepare(config).train, str(folder / method))
        for method, config in configs.items()
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    workshop = Workshop(tmp_path_factory.mktemp("restore"), "qwen2", intermediate_size=192)
    workshop.policy.write_text(workshop.policy.read_text().replace(": 600", ": 0"))  # every parameter in parts
    configs = {method: config(workshop) for method, config in METHODS.items()}
    folder = tmp_path_factory.mktemp("states")
    losses, _ = launch(2, saving.train_each, jobs(workshop, configs, folder), timeout=400)
    states = {method: whole(folder / method) for method in METHODS}
    return Trained(workshop, configs, states, dict(zip(METHODS, losses, strict=True)))


@pytest.mark.parametrize("ranks", rows([1, 2, 3], [3]))
def test_every_method_is_restored_bit_for_bit_and_goes_on(trained: Trained, ranks: int, tmp_path: Path) -> None:
    stores, configs = trained.workshop.folder / "store", dict[str, Config]()
    for method, config in trained.configs.items():
        name = f"{config.run.name}-{ranks}"
        shutil.copytree(stores / config.run.name, stores / name)
        configs[method] = override(config, f"run.name={name}")
    found: list[dict[str, Any]] = launch(
        ranks, saving.go_on_each, jobs(trained.workshop, configs, tmp_path), timeout=400
    )[0]
    for method, facts in zip(METHODS, found, strict=True):
        assert (facts["from"], facts["half"]) == (2, True), method
        states, expected = whole(tmp_path / method), trained.states[method]
        assert states.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(states[name], expected[name])] == [], method
        moments = [values for name, values in expected.items() if name.endswith("|exp_avg_sq")]
        assert all(values.any() for values in moments), f"{method}: something has not learnt"
        exact = trained.losses[method]
        assert facts["loss"] == (exact if ranks == 2 else pytest.approx(exact, rel=1e-3)), method
