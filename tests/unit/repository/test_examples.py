"""Every example is a valid configuration, and fits the machines that its first line names."""

from pathlib import Path
from typing import Any

import pytest

from trainer.base.describe.description import describe
from trainer.base.find.locate import known_config
from trainer.config import load_config
from trainer.plan.plan import Plan, make_plan

EXAMPLES = Path(__file__).parents[3] / "examples"
GIB = 2**30


def known(base: str) -> dict[str, Any]:
    found = known_config(base)
    assert found
    return found


LLAMA_8B = known("meta-llama/Llama-3.1-8B-Instruct")
LLAMA_70B = known("meta-llama/Llama-3.1-70B-Instruct")
LLAMA_405B = known("meta-llama/Llama-3.1-405B-Instruct")
QWEN3_30B_A3B = known("Qwen/Qwen3-30B-A3B")


def plan(name: str, base: dict[str, Any], ranks: int, ranks_per_node: int, gib: int, *overrides: str) -> Plan:
    config = load_config(EXAMPLES / f"{name}.yaml", overrides)
    return make_plan(config, describe(base, config.model.layers), ranks, ranks_per_node, gib * GIB)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_is_valid_and_says_what_it_is(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "base", "ranks", "ranks_per_node", "gib"),
    [
        ("8b-one-gpu", LLAMA_8B, 1, 1, 24),
        ("8b-rslora", LLAMA_8B, 1, 1, 24),
        ("8b-dora", LLAMA_8B, 1, 1, 24),
        ("8b-ia3", LLAMA_8B, 1, 1, 24),
        ("8b-oft", LLAMA_8B, 1, 1, 24),
        ("8b-bottleneck", LLAMA_8B, 1, 1, 24),
        ("8b-prompt", LLAMA_8B, 1, 1, 24),
        ("8b-prefix", LLAMA_8B, 1, 1, 24),
        ("8b-new-tokens", LLAMA_8B, 1, 1, 24),
        ("8b-sweep", LLAMA_8B, 1, 1, 24),
        ("evaluation", LLAMA_8B, 1, 1, 80),
        ("dpo", LLAMA_8B, 1, 1, 24),
        ("kto", LLAMA_8B, 1, 1, 24),
        ("70b-2x8", LLAMA_70B, 16, 8, 80),
        ("405b-2x8", LLAMA_405B, 16, 8, 80),
        ("elastic", LLAMA_8B, 32, 8, 24),
        ("8b-full", LLAMA_8B, 8, 8, 80),
        ("8b-dpo-full", LLAMA_8B, 8, 8, 80),
    ],
)
def test_an_example_fits_the_gpus_it_is_for(
    name: str, base: dict[str, Any], ranks: int, ranks_per_node: int, gib: int
) -> None:
    assert plan(name, base, ranks, ranks_per_node, gib).shortfalls == []


@pytest.mark.parametrize(
    ("name", "base", "node_gb", "world_gb"), [("70b-2x8", LLAMA_70B, 1.9, 173), ("405b-2x8", LLAMA_405B, 10, 872)]
)
def test_the_traffic_that_an_example_states_is_what_plan_counts(
    name: str, base: dict[str, Any], node_gb: float, world_gb: float
) -> None:
    node = plan(name, base, 16, 8, 80).traffic_per_step.from_other_nodes
    world = plan(name, base, 16, 8, 80, "sharding.scope=world").traffic_per_step.from_other_nodes
    assert node / 1e9 == pytest.approx(node_gb, rel=0.05)
    assert world / 1e9 == pytest.approx(world_gb, rel=0.05)
    text = " ".join((EXAMPLES / f"{name}.yaml").read_text().split())
    assert f"{node_gb} GB a rank and step by `capstan plan`, instead of {world_gb:,} GB" in text


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", ("tuning.rank=16",)),
        ("dora", ("tuning.rank=16",)),
        ("ia3", ()),
        ("oft", ()),
        ("bottleneck", ("tuning.reduction=16", "tuning.placement=houlsby")),
        ("prompt", ()),
        ("prefix", ()),
    ],
)
def test_the_parameters_that_the_page_of_methods_states_are_what_plan_counts(
    method: str, settings: tuple[str, ...]
) -> None:
    name = "8b-one-gpu" if method == "lora" else f"8b-{method}"
    counts = [plan(name, base, 1, 1, 24, *settings).parameters.trainable for base in (LLAMA_8B, LLAMA_70B)]
    (row,) = (
        line for line in (EXAMPLES.parent / "docs/methods.md").read_text().splitlines() if f"](#{method})" in line
    )
    assert " / ".join(f"{count / 1e6:.1f} M" for count in counts) in row


def test_the_parameters_of_experts_that_the_page_of_methods_states_are_what_plan_counts() -> None:
    page = " ".join((EXAMPLES.parent / "docs/methods.md").read_text().split())
    alone, both = (
        plan("8b-one-gpu", QWEN3_30B_A3B, 1, 1, 24, "tuning.rank=32", *settings).parameters.trainable
        for settings in ((), ("tuning.experts=true", "tuning.experts_rank=4"))
    )
    of_experts, of_layers = (f"{count / 1e6:.1f} M" for count in (both - alone, alone))
    said = f"rank 4 on all experts have {of_experts} parameters. By default only attention has adapters: with rank 32"
    assert f"{said} they have {of_layers}" in page
