"""What the plan says of activations: which layers compute theirs again, tiles, and what lies on the host meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, SIZES
from tests.unit.plan.test_plan import GIB, LLAMA_70B, TINY, config, plan_of
from trainer.base.describe.architecture_cache import read_architecture
from trainer.errors import ConfigError
from trainer.plan.memory import layer_values
from trainer.plan.plan import Plan

EIGHT_B = {
    **LLAMA_70B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


OPT_350M: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 1024,
    "word_embed_proj_dim": 512,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": False,
}


def test_layers_that_are_wider_than_the_embedding_keep_what_layers_of_their_width_keep():
    narrow, wide = (
        read_architecture({**OPT_350M, "word_embed_proj_dim": size}) for size in (512, OPT_350M["hidden_size"])
    )
    assert (narrow.hidden, narrow.width, wide.hidden, wide.width) == (512, 1024, 1024, 1024)
    assert layer_values(narrow, 3) == layer_values(wide, 3)
    memory = [plan_of(config(), {**OPT_350M, "word_embed_proj_dim": size}, 8, 8, None) for size in (512, 1024)]
    assert memory[0].memory_per_gpu.activations == pytest.approx(memory[1].memory_per_gpu.activations, rel=0.02)


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


def test_auto_keeps_no_layer_with_dropout_whose_inputs_are_not_counted():
    found = plan_of(config("data.sequence_length=8192", "tuning.dropout=0.1"), LLAMA_70B, 8, 8, 288 * GIB)
    assert found.recomputed_layers == found.layers


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

    def planned(length: int, *overrides: str) -> Plan:
        return plan_of(config(f"data.sequence_length={length}", *overrides), EIGHT_B, 1, 1, 80 * 10**9)

    whole, tiled = (
        planned(65536, f"train.tiled_mlp={tiles}", "train.activation_checkpointing=all") for tiles in ("false", "true")
    )
    away = planned(65536, "train.activation_offload=true", "train.activation_checkpointing=all")
    assert [plan.shortfalls for plan in (whole, tiled, away)] == [[], [], []]
    tokens, value = 65536, 2
    mlp, inputs = 4 * 14336, 32 * 4096
    # Tiled, the gradients of the norm before the MLP are the widest: five of a hidden state in fp32.
    widest = 14336 - (5 * 2 * 4096 - mlp * 4096 // tokens) // 2
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
    assert by_default < 65e9 < 70e9 < whole, "tiles are the default in so long a row"


def test_the_matrices_of_an_mlp_are_dequantized_together_where_it_is_tiled():
    def planned(length: int) -> int:
        given = config(f"data.sequence_length={length}", "train.activation_checkpointing=all")
        return plan_of(given, EIGHT_B, 1, 1, None).memory_per_gpu.dequantized_weight

    assert (planned(8192), planned(65536)) == (2 * 4096 * 14336, 2 * 3 * 4096 * 14336)


@pytest.mark.parametrize(("keeping", "at_once"), [("all", 1), ("1", 1), ("2", 2), ("none", 32)])
def test_a_layer_is_computed_again_when_those_that_kept_their_activations_are_gone(keeping: str, at_once: int):
    """Of 92,160 values a token in each layer. Every other layer keeps its input, of 4096 values."""
    plan = plan_of(config(f"train.activation_checkpointing={keeping}"), EIGHT_B, 1, 1, None)
    inputs = {"all": 32, "1": 31, "2": 30, "none": 0}[keeping]
    # On top come a gradient of a hidden state, and two of the input of an MLP's last linear layer.
    values = inputs * 4096 + at_once * 92160 + 4096 + 2 * 14336
    assert plan.memory_per_gpu.activations == 2 * config().data.sequence_length * values


def test_layers_by_ligers_kernels_keep_a_quarter_less():
    """A norm keeps its input in 16 bits instead of 32, and an MLP not the gate's function, in a layer that keeps 92,160
    values a token.
    """

    def planned(kernels: str, width: int = 14336) -> int:
        given = config("train.activation_checkpointing=none", f"model.kernels={kernels}")
        return plan_of(given, {**EIGHT_B, "intermediate_size": width}, 1, 1, None).memory_per_gpu.activations

    spared = planned("none") - planned("liger")
    assert spared == 2 * config().data.sequence_length * 32 * (2 * 4096 + 14336)
    assert 0.24 < (2 * 4096 + 14336) / 92160 < 0.25
    assert planned("auto") == planned("none"), "the run finds out whether they fit the base"
    # Beside a narrow MLP, which keeps 4096 values, ten gradients of a hidden state are the most there is at one time.
    # By Liger's kernels these are two, and those of queries, keys and values with attention's results are more.
    norm, attention = 10 * 4096 - 4 * 1024, 4096 + 4096 + 2 * 1024
    spared = planned("none", 1024) - planned("liger", 1024)
    assert spared == 2 * config().data.sequence_length * (32 * (2 * 4096 + 1024) + norm - attention)


def test_pinned_memory_is_counted_as_torch_takes_it():
    """In powers of two, of which inputs share one where that takes less than one for each layer."""
    header = Path(torch.__file__).parent / "include/ATen/core/CachingHostAllocator.h"
    assert "return c10::llvm::PowerOf2Ceil(size);" in header.read_text()
    away = ("train.activation_offload=true", "train.activation_checkpointing=all")
    for length, gib in ((65536, 80), (65537, 88), (40000, 50)):
        plan = plan_of(config(f"data.sequence_length={length}", *away), LLAMA_70B, 1, 1, None)
        assert plan.memory_per_host.offloaded_activations == gib * GIB, length


def test_offloading_asks_for_layers_that_are_computed_again():
    offloads = "train.activation_offload=true"
    with pytest.raises(ConfigError, match="train.activation_offload: has no effect with"):
        config(offloads, "train.activation_checkpointing=none")
    plan = plan_of(config(offloads, "train.activation_checkpointing=80"), LLAMA_70B, 8, 8, None)
    (message,) = plan.mismatches
    assert message.startswith(
        "train.activation_offload: has no effect with train.activation_checkpointing: 80, as all 80"
    )
    assert plan.notes == [], "it is said once"
    assert plan_of(config(offloads, "train.activation_checkpointing=79"), LLAMA_70B, 8, 8, None).mismatches == []


def test_offloading_that_auto_finds_no_need_for_is_said_and_refused_nowhere():
    def notes(gpu_memory: int | None, *overrides: str) -> list[str]:
        plan = plan_of(config("train.activation_offload=true", *overrides), LLAMA_70B, 8, 8, gpu_memory)
        assert plan.mismatches == []
        return plan.notes

    (note,) = notes(288 * GIB)
    assert note.startswith(
        "train.activation_offload: has no effect, as there is room for the activations of all 80 layers"
    )
    assert notes(40 * GIB, "data.sequence_length=8192") == []
    (note,) = notes(None)
    assert "auto counts all layers as computed again here, as the memory of a rank is not known" in note
    assert notes(288 * GIB, "train.activation_checkpointing=all") == []
    (note,) = notes(None, "cluster.gpus_per_worker=0", "train.activation_checkpointing=all")
    assert note == "train.activation_offload: has no effect on CPUs, whose memory is the host's."
    assert plan_of(config(), LLAMA_70B, 8, 8, 288 * GIB).notes == []


def test_a_rank_on_a_cpu_has_neither_a_context_nor_nccl_and_its_memory_is_the_hosts():
    away = ("train.activation_offload=true", "train.activation_checkpointing=all")
    gpu, cpu = (plan_of(config(f"cluster.gpus_per_worker={gpus}", *away), LLAMA_70B, 8, 8, None) for gpus in (1, 0))
    assert gpu.memory_per_gpu.context > 0 < gpu.memory_per_gpu.communicators
    assert cpu.memory_per_gpu.context == cpu.memory_per_gpu.communicators == 0
    assert cpu.memory_per_host.offloaded_activations == 0 < gpu.memory_per_host.offloaded_activations
    inputs = 2 * 2048 * 8192
    assert cpu.memory_per_gpu.activations - gpu.memory_per_gpu.activations == 78 * inputs


@pytest.mark.parametrize(
    ("extra", "dtype"),
    [
        ({}, torch.bfloat16),
        ({}, torch.float32),
        ({"q_lora_rank": 96}, torch.bfloat16),
        ({"q_lora_rank": None}, torch.bfloat16),
    ],
    ids=["llama", "fp32", "latent", "latent keys"],
)
def test_a_layer_keeps_the_values_that_are_counted(extra: dict[str, Any], dtype: torch.dtype):
    """Those that autograd saves in a layer with LoRA of rank 1 on all its linear layers, in values of `dtype` a
    token.
    """
    latent = {
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 96,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 2,  # a layer behind them would have 256 experts
    }
    sizes = {**TINY, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    base = {"model_type": "llama", **sizes} if not extra else {"model_type": "deepseek_v3", **sizes, **latent, **extra}
    counted = layer_values(read_architecture(base), 1, dtype.itemsize)
    assert _saved(base, dtype, tokens=128) == pytest.approx(counted.kept + counted.kept_in_mlps, rel=0.05)


def _saved(base: dict[str, Any], dtype: torch.dtype, tokens: int) -> float:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in base.items() if key != "model_type"}
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(base["model_type"], **options), dtype=dtype, attn_implementation="sdpa"
    )
    model = get_peft_model(plain, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")).to(dtype)
    layer, saved = plain.model.layers[1], dict[int, torch.UntypedStorage]()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    inside = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    layer.register_forward_pre_hook(lambda *_: inside.__enter__())
    layer.register_forward_hook(lambda *_: inside.__exit__())
    output = model(input_ids=torch.arange(tokens)[None] % base["vocab_size"]).logits
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values()) / dtype.itemsize / tokens


@pytest.mark.parametrize(("keeping", "kept"), [("none", 3), ("2", 2), ("all", 1)])
def test_the_mask_of_a_window_is_counted_where_sdpa_takes_it(keeping: str, kept: int) -> None:
    def activations(window: int | None) -> int:
        base = {**SIZES, **FAMILIES["mistral"], "sliding_window": window, "num_hidden_layers": 3}
        settings = (
            "cluster.gpus_per_worker=0",
            "train.micro_batch=1",
            f"train.activation_checkpointing={keeping}",
            "model.dtype=fp32",
        )
        return plan_of(config(*settings, "data.sequence_length=64"), base, 1, 1, None).memory_per_gpu.activations

    # One of booleans, and one of values for each layer that keeps its activations, or for the one that is computed.
    assert activations(16) - activations(None) == 64**2 * (1 + kept * 4)
