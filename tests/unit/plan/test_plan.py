"""The plan's counts are those of the real models, its bytes those of the stored tensors, its shortfalls complete."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.base.architecture import Parameter
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.description import describe
from trainer.config import Config, Quant, override, parse_config
from trainer.errors import ConfigError
from trainer.plan.inputs import most_whole, stored_bytes
from trainer.plan.longest import PlannedRanks, longest_rows
from trainer.plan.plan import Plan, choose_experts_at_once, make_plan
from trainer.plan.resolve import _of_long_rows
from trainer.state.zero.policy import WHOLE
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

RUN = "run: {name: demo}\nmodel: {base: /models/tiny}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
GIB = 2**30

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def config(*overrides: str) -> Config:
    return parse_config(RUN, overrides)


def plan_of(
    config: Config, base_config: dict[str, Any], world_size: int, ranks_per_node: int, gpu_memory: int | None
) -> Plan:
    return make_plan(config, describe(base_config, config.model.layers), world_size, ranks_per_node, gpu_memory)


def quantized_bytes(numel: int, quant: Quant) -> int:
    """Bytes of one quantized matrix: its parts, and under double quantization the fp32 mean of the scales."""
    return stored_bytes(Parameter("weight", (1, numel), "linear"), quant, item=2)


def meta_model(base_config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in base_config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(base_config["model_type"], **options))


@pytest.mark.parametrize(
    "extra",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {"model_type": "mistral", "head_dim": 32},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
        {"model_type": "phi3"},
        {"model_type": "gemma2"},
        {"model_type": "gemma3_text", "head_dim": 32},
        {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
        {"model_type": "qwen3_moe", "num_experts": 5, "moe_intermediate_size": 20, "num_experts_per_tok": 2},
        {"model_type": "gpt_oss", "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 32},
    ],
    ids=lambda extra: "-".join(f"{value}" for value in extra.values()),
)
@pytest.mark.parametrize("targets", ["all-linear", "[o_proj, k_proj]", "[layers.1.self_attn.o_proj]"])
def test_parameters_are_those_of_the_transformers_model(extra: dict[str, Any], targets: str):
    from peft import LoraConfig, get_peft_model

    base_config = {**TINY, **extra}
    given = config(f"tuning.targets={targets}", "tuning.rank=4")
    planned = plan_of(given, base_config, world_size=2, ranks_per_node=2, gpu_memory=None).parameters

    model = meta_model(base_config)
    ours = {parameter.name: parameter.shape for parameter in read_architecture(base_config).parameters}
    assert ours == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert planned.frozen == sum(parameter.numel() for parameter in model.parameters())
    wanted = given.tuning.targets
    names = read_architecture(base_config).linear_names if wanted == "all-linear" else wanted
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    assert planned.trainable == adapted.get_nb_trainable_parameters()[0]


def test_only_the_first_layers_are_counted_when_asked():
    whole = plan_of(config(), LLAMA_70B, 8, 8, None).parameters
    part = plan_of(config("model.layers=2"), LLAMA_70B, 8, 8, None).parameters
    assert part.linear * 40 == whole.linear
    assert part.embedding == whole.embedding


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("numel", "block_size"), [(4096, 64), (100_001, 64), (300_000, 256)])
def test_quantized_bytes_are_those_that_bitsandbytes_stores(numel: int, block_size: int, double: bool):
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        torch.randn(numel), blocksize=block_size, quant_type="nf4", compress_statistics=double
    )
    assert state.absmax is not None
    stored = packed.nbytes + state.absmax.nbytes
    if double:
        assert state.state2 is not None
        assert state.state2.absmax is not None
        assert state.offset is not None
        stored += state.state2.absmax.nbytes + state.offset.nbytes
    quant = Quant.model_validate({"block_size": block_size, "double": double})
    assert quantized_bytes(numel, quant) == stored
    assert stored_bytes(Parameter("experts", (3, 1, numel), "experts"), quant, item=2) == 3 * stored
    if not double:
        eight = quant.model_copy(update={"type": "int8"})
        assert quantized_bytes(numel, eight) == numel + state.absmax.nbytes


def test_the_chunk_of_logits_is_that_of_the_loss():
    import torch

    from trainer.model import head
    from trainer.plan import memory, plan

    assert memory._LOGITS_CHUNK_BYTES == head._CHUNK_BYTES
    assert memory._LOGITS_CHUNK_ROWS == head._CHUNK_ROWS
    assert memory._LOGITS_BLOCK_BYTES == (head._BLOCK_BYTES, head._BLOCK_BYTES_ON_GPU)
    for vocabulary in (1000, 32000, 128256, 262144):
        hidden, weight = (torch.empty(rows, 1, device="meta") for rows in (2**20, vocabulary))
        first, second = itertools.islice(head._parts(hidden, weight), 2)
        assert second.start % 512 == 0
        base = {**TINY, "model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 8192}
        given = plan._inputs(config("data.sequence_length=8192"), read_architecture(base), 1, 1, "world")
        logits = min(8192, first.stop) * vocabulary
        assert memory._logits(given) == 2 * logits + 2 * min(4 * logits, 2**26) + 2 * 8192 * 64
        in_fp32 = plan._inputs(
            config("data.sequence_length=8192", "model.dtype=fp32"), given.model, 1, 1, "world"
        )  # which are not copied
        assert memory._logits(in_fp32) == 4 * logits + min(4 * logits, 2**26) + 4 * 8192 * 64


def test_targets_that_match_nothing_are_a_sentence_of_the_plan():
    plan = plan_of(config("tuning.targets=[zzz]"), LLAMA_70B, 8, 8, None)
    (sentence,) = plan.mismatches
    assert "'zzz' is no linear layer that can be adapted" in sentence


def test_a_mixtures_experts_are_dequantized_together_up_to_what_the_forward_pass_takes_at_once():
    given = {**TINY, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    sizes = {"hidden_size": 4096, "intermediate_size": 14336}
    for changes, expected in ({}, 2 * 8 * 192 * 64), (sizes, 2**29), ({**sizes, "intermediate_size": 2**17}, 2**31):
        assert plan_of(config(), {**given, **changes}, 1, 1, None).memory_per_gpu.dequantized_weight == expected


def test_all_experts_of_a_layer_are_dequantized_at_once_where_a_gpu_has_room_for_them_beside_all_else():
    mixture = {**TINY, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    mixture |= {"hidden_size": 4096, "intermediate_size": 14336}
    stack = 2 * 8 * 2 * 14336 * 4096
    least = plan_of(config(), mixture, 1, 1, None).memory_per_gpu
    assert least.dequantized_weight == 2**29
    enough = math.ceil((least.total + stack - 2**29) / 0.85)
    for memory, expected in ((enough, stack), (enough - 2**20, 2**29)):
        kept = config("train.activation_checkpointing=all")
        plan = plan_of(kept, mixture, 1, 1, memory)
        assert plan.memory_per_gpu.dequantized_weight == expected
        ranks_decide = choose_experts_at_once(kept, read_architecture(mixture), 1, 1, plan.scope, memory)
        assert ranks_decide == expected, "by the size of their smallest GPU"
    on_cpus = make_plan(config("cluster.gpus_per_worker=0"), describe(mixture, None), 1, 1, None, 2**40)
    assert on_cpus.memory_per_gpu.dequantized_weight == 2**29


def test_codes_that_are_trained_through_are_decoded_operator_by_operator_on_a_gpu_too():
    base = {**TINY, "model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    beside, through = (
        plan_of(config("quant.type=stored", *more), base, 1, 1, None).memory_per_gpu.dequantized_weight
        for more in ([], ["tuning.through=stored"])
    )
    assert through - beside == 2**27


def test_the_base_is_divided_by_the_ranks_that_share_a_copy():
    world = plan_of(config(), LLAMA_70B, 16, 8, None).memory_per_gpu
    node = plan_of(config("sharding.scope=node"), LLAMA_70B, 16, 8, None).memory_per_gpu
    assert node.frozen_quantized == pytest.approx(2 * world.frozen_quantized, rel=1e-6)
    assert node.adapter_states == world.adapter_states, "adapters are always divided by all ranks"
    # 70B in 4.5 bits a weight (nibble + fp32 scale for each 64) over 16 ranks
    assert world.frozen_quantized == pytest.approx(80 * 855_638_016 * 4.5 / 8 / 16, rel=1e-6)


def test_the_parts_add_up():
    memory = plan_of(config(), LLAMA_70B, 16, 8, None).to_json()["memory_per_gpu"]
    assert memory.pop("total") == sum(memory.values())


def test_one_rank_gathers_nothing_and_receives_nothing():
    plan = plan_of(config(), {**TINY, "model_type": "llama"}, 1, 1, None)
    assert plan.memory_per_gpu.gathered_layers == 0
    assert plan.traffic_per_step.total == 0


def test_what_is_whole_and_what_reduces_is_counted():
    """Three layers are whole at one time, or the head and a layer. NCCL's communicators are two of all ranks and one of
    a node.
    """
    alone, world = plan_of(config(), LLAMA_70B, 1, 1, None), plan_of(config(), LLAMA_70B, 16, 8, None)
    node = plan_of(config("sharding.scope=node"), LLAMA_70B, 16, 8, None)
    buffers = [plan.memory_per_gpu.communicators / 2**27 for plan in (alone, world, node)]
    assert buffers == [0, 2, 3]
    layer, head = quantized_bytes(855_638_016, Quant()), 2 * 128256 * 8192
    assert world.memory_per_gpu.gathered_layers == pytest.approx(max(3 * layer, head + layer), rel=1e-3)
    assert alone.memory_per_gpu.gradient_buckets == 4 * 50_000_000
    assert world.memory_per_gpu.gradient_buckets == 4 * (50_000_000 * 2 + 50_000_000 // 16)
    host = plan_of(config("cluster.gpus_per_worker=0"), {**TINY, "model_type": "llama"}, 1, 1, None)
    assert host.memory_per_gpu.gradient_buckets == 4 * host.parameters.trainable, "what is written to, on a CPU"


@pytest.mark.parametrize(
    ("rank", "quant", "whole"),
    [(16, "nf4", 16 * 28672), (64, "nf4", WHOLE), (16, "none", 16 * 28672), (32, "none", WHOLE)],
)
def test_adapters_stay_whole_where_they_are_few_bytes_beside_a_layer(rank: int, quant: str, whole: int):
    """Few are less than a layer has, and in any case at most 512 MiB: rank 32 has 830 MB, and a layer 1.7 GB."""
    given = config(f"tuning.rank={rank}", f"quant.type={quant}")
    assert most_whole(given, describe(LLAMA_70B, None).architecture) == whole
    part = config("tuning.method=full", "tuning.train=[model.layers.79.self_attn.o_proj.*]", "quant.type=none")
    assert most_whole(part, describe(LLAMA_70B, None).architecture) == WHOLE, "weights of the base are divided"
    zero = plan_of(given, LLAMA_70B, 16, 8, None).deepspeed["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == whole


def test_a_load_holds_the_pieces_that_are_read_ahead_and_the_one_that_is_quantized_twice():
    from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT

    host = plan_of(config(), LLAMA_70B, 16, 8, None).memory_per_host
    assert host.reads_during_load == 8 * 2 * (PIECES_IN_FLIGHT + 1) * PIECE_BYTES
    assert host.total == sum(size for name, size in asdict(host).items() if name != "total")


def test_offloading_moves_the_base_from_the_gpus_to_the_host():
    here = plan_of(config(), LLAMA_70B, 8, 8, None)
    away = plan_of(config("sharding.deepspeed=zero3_offload_cpu"), LLAMA_70B, 8, 8, None)
    assert away.memory_per_gpu.frozen_quantized == away.memory_per_gpu.frozen_unquantized == 0
    # Each partition is a pinned block, which torch rounds up to a power of two: of codes and of scales, then embedding
    # and head.
    q, k, mlp = (2**22, 2**19), (2**19, 2**16), (2**24, 2**21)
    partitions = 80 * (2 * sum(q) + 2 * sum(k) + 3 * sum(mlp)) + 2 * 2**28
    assert away.memory_per_host.offloaded_base == 8 * partitions
    moved = here.memory_per_gpu.frozen_quantized + here.memory_per_gpu.frozen_unquantized
    assert away.memory_per_host.offloaded_base > 1.09 * 8 * moved
    # Norms are whole on each rank, and stay on the GPU.
    norms = 2 * 8192 * (2 * 80 + 1)
    assert here.memory_per_gpu.frozen_whole == norms
    assert away.memory_per_gpu.frozen_whole == norms + norms // 8


def test_scales_that_are_smaller_than_wide_adapters_are_whole_on_each_rank(tmp_path: Path):
    """ZeRO-3 has one threshold for all that is small, and a policy may set it above the scales of a layer."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 600_000}}))
    plain, wide = (
        plan_of(config(*given), LLAMA_70B, 8, 8, None).memory_per_gpu
        for given in ((), (f"sharding.deepspeed={policy}",))
    )
    assert wide.frozen_whole - plain.frozen_whole == 80 * 2 * 4 * 8192 * 1024 // 64  # those of keys and values


@pytest.mark.parametrize(("quant", "element_bytes"), [("nf4", 1), ("none", 2)])
def test_half_of_what_a_policy_keeps_for_reuse_is_gathered_beside_the_layers(
    quant: str, element_bytes: int, tmp_path: Path
):
    """It is on either side of the turn from forward to backward. A parameter in 4 bits consists of bytes."""

    def gathered(distance: int) -> int:
        policy = tmp_path / f"{distance}.json"
        policy.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": distance}}))
        given = config(f"sharding.deepspeed={policy}", f"quant.type={quant}")
        return plan_of(given, LLAMA_70B, 8, 8, None).memory_per_gpu.gathered_layers

    assert gathered(10**8) - gathered(0) == 10**8 // 2 * element_bytes


def test_offloading_the_optimizer_leaves_the_weights_of_what_learns_on_the_gpus():
    full = ("tuning.method=full", "quant.type=none")
    here = plan_of(config(*full), LLAMA_70B, 8, 8, None)
    away = plan_of(config(*full, "sharding.deepspeed=zero3_offload_optimizer"), LLAMA_70B, 8, 8, None)
    every = here.parameters.trainable
    assert away.memory_per_gpu.adapter_states == away.memory_per_gpu.optimizer_step == 0
    assert away.memory_per_gpu.adapter_weights == here.memory_per_gpu.adapter_weights
    # One gradient more than a GPU has, and the update of a sub-group of 1e8 elements on each rank.
    # Both gradients are pinned, in blocks of a power of two: all of a rank's, and each sub-group's.
    share = 4 * every // 8
    gradients = 2**36 + share // (4 * 10**8) * 2**29 + 2**28
    assert away.memory_per_host.offloaded_states == pytest.approx(12 * every + 8 * (gradients + 12 * 1e8), rel=1e-3)
    assert here.memory_per_host.offloaded_states == 0


def test_with_scope_node_only_adapters_cross_nodes():
    world = plan_of(config(), LLAMA_70B, 16, 8, None).traffic_per_step
    node = plan_of(config("sharding.scope=node"), LLAMA_70B, 16, 8, None).traffic_per_step
    assert node.base_gathers > 0
    # Of the 15 ranks that each rank hears from 8 are on the other node.
    of_adapters = node.adapter_gathers + node.adapter_gradients
    assert node.from_other_nodes == pytest.approx(of_adapters * 8 / 15, rel=1e-6)
    assert world.from_other_nodes == pytest.approx((of_adapters + world.base_gathers) * 8 / 15, rel=1e-6)
    assert world.from_other_nodes > 10 * node.from_other_nodes
    assert plan_of(config(), LLAMA_70B, 8, 8, None).traffic_per_step.from_other_nodes == 0


def test_traffic_grows_with_accumulation():
    one = plan_of(config("train.global_batch=16"), LLAMA_70B, 16, 8, None)
    four = plan_of(config("train.global_batch=64"), LLAMA_70B, 16, 8, None)
    assert (one.batch.accumulation, four.batch.accumulation) == (1, 4)
    assert four.traffic_per_step.base_gathers == pytest.approx(4 * one.traffic_per_step.base_gathers)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accumulation", "empty_rows"),
    [(3, 1, 4, 2), (2, 2, 3, 2), (10, 1, 1, 0), (16, 1, 1, 6)],
)
def test_accumulation_is_derived_and_uneven_rows_are_told(
    world_size: int, micro_batch: int, accumulation: int, empty_rows: int
):
    given = config("train.global_batch=10", f"train.micro_batch={micro_batch}", "data.sequence_length=100")
    batch = plan_of(given, {**TINY, "model_type": "llama"}, world_size, 8, None).batch
    assert (batch.accumulation, batch.empty_rows, batch.rows, batch.tokens) == (accumulation, empty_rows, 10, 1000)


def test_a_checkpoint_is_three_fp32_values_for_each_trainable_parameter():
    plan = plan_of(config(), LLAMA_70B, 16, 8, None)
    assert plan.parameters.trainable == 207_093_760  # rank 16 on the seven layers of 70B
    assert plan.checkpoint_bytes == 12 * 207_093_760


@pytest.mark.parametrize(
    ("optimizer", "moments", "tolerance"), [("adamw", 8, 0), ("adamw_8bit", 2 + 8 / 256, 1e-3), ("adafactor", 0, 1e-3)]
)
def test_full_fine_tuning_has_ten_bytes_a_parameter_and_its_moments_over_the_ranks_and_four_less_in_checkpoints(
    optimizer: str, moments: float, tolerance: float
):
    given = config("tuning.method=full", "quant.type=none", f"optim.name={optimizer}")
    full = plan_of(given, LLAMA_70B, 64, 8, None)
    every = 70_553_706_496
    assert (full.parameters.total, full.parameters.trainable, full.parameters.frozen) == (every, every, 0)
    assert full.checkpoint_bytes == pytest.approx((4 + moments) * every, rel=tolerance)
    # A pinned block on each of a node's eight ranks, which PyTorch rounds up to a power of two.
    share = full.checkpoint_bytes / 64
    assert full.memory_per_host.checkpoint_copy == 8 * 2 ** math.ceil(math.log2(share))
    on_cpus = plan_of(override(given, "cluster.gpus_per_worker=0"), LLAMA_70B, 64, 8, None)
    assert on_cpus.memory_per_host.checkpoint_copy == pytest.approx(8 * share, rel=1e-6)
    memory = full.memory_per_gpu
    assert memory.frozen_quantized == memory.frozen_unquantized == memory.dequantized_weight == 0
    # Adafactor's vectors are whole on each rank.
    assert memory.adapter_weights + memory.adapter_states == pytest.approx((10 + moments) * every / 64, rel=1e-2)
    assert full.traffic_per_step.base_gathers == 0
    assert full.scope == "world"


def test_adafactors_rows_and_columns_are_whole_on_each_rank_and_all_else_is_divided():
    given = config("tuning.method=full", "quant.type=none", "optim.name=adafactor")
    plan = plan_of(given, LLAMA_70B, 64, 8, None)
    matrices = {(8192, 8192): 160, (1024, 8192): 160, (28672, 8192): 240, (128256, 8192): 2}
    rows_and_columns = sum(count * sum(shape) for shape, count in matrices.items())
    norms, every = (2 * 80 + 1) * 8192, plan.parameters.trainable
    # A master and a gradient for each element, and a second moment for each of a norm.
    divided = -(-4 * (every + norms) // 64) - (-every // 64) * 4
    assert plan.memory_per_gpu.adapter_states == divided + 4 * rows_and_columns
    assert plan.checkpoint_bytes == 4 * (every + norms + rows_and_columns)


def test_what_does_not_learn_of_a_base_that_is_tuned_in_part_is_frozen():
    last = plan_of(
        config("tuning.method=full", "tuning.train=[model.layers.79.*]", "quant.type=none"), LLAMA_70B, 8, 8, None
    )
    layer = 80 * 855_654_400
    assert last.parameters.trainable * 80 == layer
    assert last.parameters.frozen + last.parameters.trainable == last.parameters.total
    assert last.memory_per_gpu.frozen_unquantized == pytest.approx(2 * last.parameters.frozen / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["train.activation_checkpointing=none"], "Set train.activation_checkpointing: auto."),
        (["quant.type=none"], "Set quant.type: nf4."),
        (["quant.type=none", "tuning.method=full"], "Use more GPUs, set optim.name: adamw_8bit, or sharding.deepspeed: zero3_offload_optimizer."),
        (["quant.type=none", "tuning.method=full", "sharding.deepspeed=zero3_offload_optimizer"], "Use more GPUs, lower data.sequence_length, or set sharding.deepspeed: zero3_offload_cpu."),
        (["sharding.scope=node"], "Set sharding.scope: world, or use more GPUs a node."),
        ([], "Use more GPUs, lower data.sequence_length, or set sharding.deepspeed: zero3_offload_cpu."),
        (["sharding.deepspeed=zero3_offload_cpu"], "Use more GPUs, or lower data.sequence_length."),
    ],
)  # fmt: skip
def test_the_remedy_for_too_little_memory_is_the_next_thing_that_saves_some(settings: list[str], remedy: str):
    (message,) = plan_of(config(*settings), LLAMA_70B, 4, 2, GIB).shortfalls
    assert message.endswith(f"1.0 GiB are there. {remedy}")


def test_ranks_that_cannot_share_rows_are_a_shortfall():
    shortfalls = plan_of(config("sharding.sequence_parallel=4"), LLAMA_70B, 6, 6, 1024 * GIB).shortfalls
    assert any("6 ranks are no multiple of 4" in sentence for sentence in shortfalls)


def test_a_base_of_which_no_small_model_was_tried_is_said_to_be_unknown():
    base = describe({**TINY, "model_type": "llama"}, None)
    untried = replace(base, architecture=replace(base.architecture, tried=False))
    plans = [make_plan(config(), one, 1, 1, None) for one in (base, untried)]
    assert [any("no small model of the base was tried" in note for note in plan.notes) for plan in plans] == [
        False,
        True,
    ]


def test_every_shortfall_is_told_at_once():
    given = config("data.sequence_length=200000", "model.layers=81", "tuning.targets=[q_proj, c_attn]")
    plan = plan_of(given, LLAMA_70B, 2, 2, 8 * GIB)
    assert plan.mismatches == [
        (
            "data.sequence_length: 200000 exceeds the base's 131072 positions (config.json). Lower it, or set"
            " model.rope_scaling: {rope_type: yarn, factor: 2}."
        ),
        "model.layers: 81 exceeds the base's 80 layers (config.json). Lower it.",
        (
            "tuning.targets: 'c_attn' is no linear layer that can be adapted. The base has q_proj, k_proj, v_proj,"
            " o_proj, gate_proj, up_proj, down_proj."
        ),
    ]
    assert plan.shortfalls[:-1] == plan.mismatches
    assert plan.shortfalls[-1].startswith("memory: ")


def test_too_little_gpu_memory_is_told_with_both_numbers_and_a_remedy():
    (message,) = plan_of(config(), LLAMA_70B, 2, 2, 16 * GIB).shortfalls
    assert message.startswith("memory: ")
    assert "16.0 GiB are there. Use more GPUs" in message
    assert plan_of(config(), LLAMA_70B, 16, 8, 80 * GIB).shortfalls == []


def test_auto_keeps_the_base_inside_a_node_where_it_fits_and_nodes_are_alike():
    def scope(gpu_memory: int | None, world_size: int = 16, *overrides: str) -> str:
        return plan_of(config(*overrides), LLAMA_70B, world_size, 8, gpu_memory).scope

    assert scope(80 * GIB) == "node"
    assert scope(8 * GIB) == "world"
    assert scope(None) == "world"
    assert scope(80 * GIB, 8) == "world"  # one node: the same
    assert scope(80 * GIB, 12) == "world"
    assert scope(8 * GIB, 16, "sharding.scope=node") == "node"


def test_nodes_of_different_size_cannot_each_hold_a_copy():
    (message,) = plan_of(config("sharding.scope=node"), LLAMA_70B, 10, 4, None).shortfalls
    assert "10 ranks are not a multiple of 4 a node" in message


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="is a 'mine' model, which transformers .* does not know"):
        plan_of(config(), {"model_type": "mine"}, 1, 1, None)


def test_the_plan_is_json():
    tree = plan_of(config(), LLAMA_70B, 16, 8, None).to_json()
    assert json.loads(json.dumps(tree)) == tree


def test_the_longest_row_is_the_last_that_the_plan_has_room_for_and_each_setting_makes_it_longer() -> None:
    given, ranks = config("quant.type=none", "train.micro_batch=2"), PlannedRanks(4, 4, 17 * 2**30 // 10, on_gpu=True)
    found = longest_rows(given, describe({**TINY, "model_type": "llama"}, None), ranks)
    more = [dict(after.settings.items() - before.settings.items()) for before, after in itertools.pairwise(found[1:])]
    assert more == [
        {"quant.type": "nf4"},
        {"train.activation_checkpointing": "all"},
        {"train.tiled_mlp": True},
        {"train.activation_offload": True},
        {"sharding.sequence_parallel": 2},
        {"sharding.sequence_parallel": 4},
    ]
    tokens = [row.tokens for row in found[1:]]
    # The MLPs here are so narrow that tiles spare next to nothing, and have their matrices dequantized together.
    assert tokens == pytest.approx(sorted(tokens), rel=0.002)
    shared = found[-1]
    assert shared.tokens == pytest.approx(2 * found[-2].tokens, rel=0.01)
    changed = [f"{name}={str(value).lower()}" for name, value in shared.settings.items()]

    def needed(length: int) -> int:
        given = config("quant.type=none", *changed, f"data.sequence_length={length}")
        return plan_of(given, {**TINY, "model_type": "llama"}, 4, 4, ranks.memory).memory_per_gpu.total

    assert needed(shared.tokens) <= ranks.memory < needed(shared.tokens + 1024)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (("data.sequence_length=262144",), None),  # 2**31 numbers: every place is below that
        (("data.sequence_length=262145",), "262145 tokens (data.sequence_length) with 64 heads of 128 has more."),
        (("data.sequence_length=524288", "sharding.sequence_parallel=2"), None),
        (("data.sequence_length=524290", "sharding.sequence_parallel=2"), "524290 tokens"),
        (("data.sequence_length=262145", "model.attention=flash_attention_3"), None),
        (("data.sequence_length=262145", "model.attention=flex_attention"), "flex_attention counts the numbers"),
        (("data.sequence_length=262145", "cluster.gpus_per_worker=0"), None),
    ],
)
def test_a_row_has_no_more_numbers_than_the_kernel_of_its_attention_counts(
    overrides: tuple[str, ...], refused: str | None
) -> None:
    base = {**LLAMA_70B, "num_hidden_layers": 1, "max_position_embeddings": 2**20}
    found = [text for text in plan_of(config(*overrides), base, 8, 8, 80 * GIB).mismatches if "32 bits" in text]
    assert len(found) == (refused is not None)
    if refused:
        assert refused in found[0]


def test_a_row_has_no_more_numbers_than_the_kernels_of_linear_attention_count() -> None:
    sizes = {"linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128}
    heads = {**sizes, "linear_value_head_dim": 128, "num_experts": 2, "num_experts_per_tok": 1}
    base = {**TINY, "model_type": "qwen3_next", **heads, "moe_intermediate_size": 32, "max_position_embeddings": 2**20}
    for tokens, refused in ((2**32 // 12288, False), (2**32 // 12288 + 1, True)):
        plan = plan_of(config(f"data.sequence_length={tokens}", "data.packing=false"), base, 1, 1, 80 * GIB)
        found = [text for text in plan.mismatches if "count the numbers of a row in 32 bits" in text]
        assert bool(found) is refused
        assert not refused or f"{tokens} tokens with 12288 values each has more" in found[0]


@pytest.mark.parametrize(("exchanges", "refused"), [((), True), ((SimpleNamespace(heads=2),), False)])
def test_ranks_that_share_a_row_divide_the_numbers_of_layers_that_exchange_them(exchanges: Any, refused: bool) -> None:
    given = config(f"data.sequence_length={2**32 // 12288 + 2}", "sharding.sequence_parallel=2")
    inside = SimpleNamespace(kind="linear", layer=0, shape=(12288, 64))
    mixing = SimpleNamespace(path="mixer", layer=0, exchanges=exchanges)
    model: Any = SimpleNamespace(attention=(), mixing=(mixing,), parameters=(inside,))
    assert bool([*_of_long_rows(given, model, method_of(given), find_objective(given))]) is refused


def test_a_mask_has_no_more_numbers_than_sdpa_counts() -> None:
    base = {**TINY, "model_type": "mistral", "max_position_embeddings": 2**20}
    for tokens, window, refused in ((46340, 64, False), (46342, 64, True), (46342, 46342, False)):
        windows = {**base, "sliding_window": window}
        plan = plan_of(config(f"data.sequence_length={tokens}", "model.attention=sdpa"), windows, 1, 1, 80 * GIB)
        assert any("model.attention: sdpa counts the numbers" in text for text in plan.mismatches) is refused


def test_a_keeper_has_room_for_its_own_ranks_updates_and_for_those_of_another_machine() -> None:
    """Two updates of each of its ranks, two copies of the others', and one that arrives."""

    def kept(*overrides: str, ranks: int = 16) -> float:
        given = config("cluster.keeper=true", "cluster.gpus_per_worker=0", *overrides)
        host = plan_of(given, LLAMA_70B, ranks, 8, None).memory_per_host
        return host.kept_updates / host.checkpoint_copy

    assert kept(ranks=8) == pytest.approx(2, rel=0.01)
    assert kept() == pytest.approx(5, rel=0.01)
    assert kept("cluster.copies=false") == pytest.approx(2, rel=0.01)
