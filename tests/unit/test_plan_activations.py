"""What the plan says of activations: which layers compute theirs again, tiles, and what lies on the host meanwhile."""

import pytest

from tests.unit.test_plan import GIB, LLAMA_70B, config, plan_of
from trainer.errors import ConfigError
from trainer.plan import Plan


def test_activation_checkpointing_saves_memory():
    on = plan_of(config(), LLAMA_70B, 8, 8, None).memory_per_gpu.activations
    off = plan_of(config("train.activation_checkpointing=false"), LLAMA_70B, 8, 8, None).memory_per_gpu.activations
    assert off > 10 * on


def test_auto_recomputes_as_few_layers_as_the_memory_asks_for():
    def planned(gpu_memory: int | None, *overrides: str) -> Plan:
        return plan_of(config("data.sequence_length=8192", *overrides), LLAMA_70B, 8, 8, gpu_memory)

    by_memory = {gib: planned(gib * GIB) for gib in (20, 40, 80, 141, 288)}
    again = [plan.recomputed_layers for plan in by_memory.values()]
    assert again == sorted(again, reverse=True)
    assert (again[0], again[-1]) == (80, 0)
    assert 0 < by_memory[80].recomputed_layers < 80
    for gib, plan in by_memory.items():
        if 0 < plan.recomputed_layers < 80:
            kept = 80 - plan.recomputed_layers
            explicit, more = (planned(None, f"train.activation_checkpointing={kept + one}") for one in (0, 1))
            assert plan.memory_per_gpu == explicit.memory_per_gpu
            assert plan.memory_per_gpu.total <= 0.85 * gib * GIB < more.memory_per_gpu.total
    assert planned(None).recomputed_layers == 80, "nobody knows how much memory there is"
    assert planned(288 * GIB, "tuning.method=dora").recomputed_layers == 80, "it keeps what is not counted"


@pytest.mark.parametrize(
    ("given", "again"), [("all", 80), ("true", 80), ("none", 0), ("false", 0), ("0", 80), ("30", 50)]
)
def test_layers_that_keep_their_activations_are_the_last_ones(given: str, again: int):
    plan = plan_of(config(f"train.activation_checkpointing={given}"), LLAMA_70B, 8, 8, 80 * GIB)
    assert (plan.layers, plan.recomputed_layers) == (80, again)


def test_more_layers_than_there_are_cannot_keep_their_activations():
    (message,) = plan_of(config("train.activation_checkpointing=81"), LLAMA_70B, 8, 8, None).shortfalls
    assert message.startswith("train.activation_checkpointing: 81 exceeds the 80 layers")


def test_a_row_of_64k_tokens_of_an_8b_base_fits_on_one_80_gb_card():
    """Tiles take the MLP's part of a layer, offloading the layers' inputs, which go to the host."""
    llama = {
        **LLAMA_70B,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }

    def planned(length: int, *overrides: str) -> Plan:
        return plan_of(config(f"data.sequence_length={length}", *overrides), llama, 1, 1, 80 * 10**9)

    whole, tiled = (
        planned(65536, f"train.tiled_mlp={tiles}", "train.activation_checkpointing=all") for tiles in ("false", "true")
    )
    away = planned(65536, "train.activation_offload=true", "train.activation_checkpointing=all")
    assert [plan.shortfalls for plan in (whole, tiled, away)] == [[], [], []]
    tokens, value = 65536, 2
    mlp, queries, inputs = 4 * 14336, 4096, 32 * 4096
    widest = 14336 - queries
    assert whole.memory_per_gpu.activations - tiled.memory_per_gpu.activations == (
        value * (mlp * (tokens - 4096) + 2 * widest * tokens)
    )
    assert tiled.memory_per_gpu.activations - away.memory_per_gpu.activations == value * tokens * (inputs - 2 * 4096)
    assert away.memory_per_host.offloaded_activations == value * tokens * inputs
    assert tiled.memory_per_host.offloaded_activations == 0
    assert away.memory_per_gpu.total < 20e9 < tiled.memory_per_gpu.total < 40e9 < whole.memory_per_gpu.total
    again = ("train.activation_checkpointing=all",)
    by_default, whole = (
        planned(131072, *again, *more).memory_per_gpu.total for more in ((), ("train.tiled_mlp=false",))
    )
    assert by_default < 60e9 < 70e9 < whole, "tiles are the default in so long a row"


def test_offloading_asks_for_layers_that_are_computed_again():
    with pytest.raises(ConfigError, match="train.activation_offload: has no effect with"):
        config("train.activation_offload=true", "train.activation_checkpointing=none")
