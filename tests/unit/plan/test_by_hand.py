"""The numbers of a plan of a small Llama are those that a reader gets who adds them up by hand.

Its three layers have matrices of 64 x 64 (q, o), 64 x 32 (k, v) and 64 x 96 (gate, up, down), and adapters of rank 4 on
them. Seven norms have 64 weights each; embedding and head have 101 x 64. Parameters up to 384 elements stay whole.
"""

import json
from dataclasses import asdict, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.plan.test_plan import TINY, config
from trainer.base.architecture import KeptOfPictures, MixingLayer, Parameter
from trainer.base.base import Description
from trainer.base.describe.description import describe
from trainer.plan.flops import AttentionWork, StepWork, work_of
from trainer.plan.inputs import exchanged_values, stored_size
from trainer.plan.longest import PlannedRanks, longest_rows
from trainer.plan.needs import WholeWeights
from trainer.plan.plan import make_plan

LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
NORMS, VOCABULARY = 7 * 64, 2 * 101 * 64
BASE = 3 * LAYER + NORMS + VOCABULARY
ADAPTERS = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
TOKENS = 2 * 96  # of a micro-batch
BUCKET = 500_000_000
# What a layer keeps for each token, and the gradients in the backward pass of its norms.
KEPT = 6 * 64 + 2 * 64 + 2 * 32 + 4 * 96
GRADIENTS = 10 * 64 - 4 * 96
MIB = 2**20

ROWS = ("data.sequence_length=96", "train.micro_batch=2", "train.global_batch=24")
PLAIN = (*ROWS, "quant.type=none", "train.activation_checkpointing=all")
LORA = (*PLAIN, "tuning.rank=4")
OF_LORA = {
    "world_size": 6,
    "data_groups": 6,
    "accumulation": 2,  # 24 rows of 6 ranks with 2 each
    "tokens": 24 * 96,
    "reference_time_percent": 0,
    "frozen_quantized": 0,
    "frozen_unquantized": ceil(2 * BASE / 6),
    "frozen_whole": 2 * NORMS,
    "gathered_layers": 3 * 2 * LAYER,
    "dequantized_weight": 0,
    "adapter_weights": 2 * (ADAPTERS + ADAPTERS // 6),  # all are small
    "adapter_states": 16 * ADAPTERS // 6,
    "whole_gradient": (4 + 2) * 4 * 96,
    "gradient_buckets": 4 * (BUCKET + ADAPTERS + ADAPTERS // 6),
    "activations": 2 * TOKENS * (3 * 64 + KEPT + GRADIENTS + 64),
    "logits": 0,
    "context": 768 * MIB,
    "communicators": 2 * 128 * MIB,
    "reads_during_load": 2 * 2 * 9 * 4 * MIB,
    "checkpoint_copy": 2 * 32768,  # 12 * ADAPTERS / 6 bytes, pinned: the next power of two
    "kept_updates": 0,
    "offloaded_base": 0,
    # Forward and backward pass of two micro-batches, from the 5 others of 6; 4 of these 5 are on other nodes.
    "base_gathers": 4 * 2 * BASE * 5 // 6,
    "adapter_gathers": 2 * ADAPTERS * 5 // 6,
    "adapter_gradients": 2 * 4 * ADAPTERS * 5 // 6,
    "row_exchanges": 0,
    "from_other_nodes": (2 + 2 * 4) * ADAPTERS * 5 // 6 * 4 // 5 + 4 * 2 * BASE * 5 // 6 * 4 // 5,
}
ALONE = {
    "world_size": 1,
    "data_groups": 1,
    "accumulation": 12,
    "frozen_unquantized": 2 * BASE,
    "frozen_whole": 0,
    "gathered_layers": 0,
    "adapter_weights": 2 * ADAPTERS,
    "adapter_states": 16 * ADAPTERS,
    "communicators": 0,
    "gradient_buckets": 4 * BUCKET,
    "reads_during_load": 2 * 9 * 4 * MIB,
    "checkpoint_copy": 2**18,
    **dict.fromkeys(("base_gathers", "adapter_gathers", "adapter_gradients", "from_other_nodes"), 0),
}
NODE = {
    "frozen_unquantized": 2 * BASE // 2,
    "communicators": 3 * 128 * MIB,
    "base_gathers": 4 * 2 * BASE // 2,
    "from_other_nodes": (2 + 2 * 4) * ADAPTERS * 5 // 6 * 4 // 5,
    # Two updates of each of the node's two ranks, two of another machine's and one that arrives.
    "kept_updates": (2 + 3) * 2 * 12 * ADAPTERS // 6,
}
FULL = {
    "frozen_unquantized": 0,
    "frozen_whole": 0,
    "adapter_weights": 2 * (NORMS + ceil(BASE / 6)),
    "adapter_states": 12 * BASE // 6 + 4 * ceil(BASE / 6),
    "whole_gradient": (4 + 2) * 101 * 64,
    "gradient_buckets": 4 * (BUCKET + BASE + ceil(BASE / 6)),
    "checkpoint_copy": 2 * 2**18,
    "kept_updates": 2 * 2 * 12 * BASE // 6,  # where all learns, nothing is copied to another machine
    "base_gathers": 0,
    "adapter_gathers": 2 * (NORMS + 4 * (BASE - NORMS)) * 5 // 6,
    "adapter_gradients": 2 * 4 * BASE * 5 // 6,
    "from_other_nodes": (2 * (NORMS + 4 * (BASE - NORMS)) * 5 // 6 + 2 * 4 * BASE * 5 // 6) * 4 // 5,
}
# Four ranks on CPUs, with values of four bytes: a norm keeps two of them, and its gradient needs four.
CPU = {
    "world_size": 4,
    "data_groups": 4,
    "accumulation": 3,
    "frozen_unquantized": BASE,
    "frozen_whole": 4 * NORMS,
    "gathered_layers": 3 * 4 * LAYER,
    "adapter_weights": 4 * (ADAPTERS + ADAPTERS // 4),
    "adapter_states": 16 * ADAPTERS // 4,
    "whole_gradient": 8 * 4 * 96,
    "gradient_buckets": 4 * (2 * ADAPTERS + ADAPTERS // 4),  # only what is written to
    "activations": 4 * TOKENS * (3 * 64 + (KEPT - 2 * 64) + 2 * 96 + 64),
    "context": 0,
    "communicators": 0,
    "checkpoint_copy": 2 * 12 * ADAPTERS // 4,
    "base_gathers": 6 * 4 * BASE * 3 // 4,
    "adapter_gathers": 4 * ADAPTERS * 3 // 4,
    "adapter_gradients": 3 * 4 * ADAPTERS * 3 // 4,
    "from_other_nodes": (4 + 3 * 4) * ADAPTERS * 3 // 4 * 2 // 3 + 6 * 4 * BASE * 3 // 4 * 2 // 3,
}
# Two ranks share a row, and exchange queries and results of 64 values, keys and values of 32, in three passes.
SHARED = {
    "data_groups": 3,
    "accumulation": 4,
    "communicators": 3 * 128 * MIB,
    "activations": 2 * TOKENS // 2 * (3 * 64 + KEPT + 64 + GRADIENTS + 64),
    "row_exchanges": 2 * 4 * 3 * (TOKENS // 2) * 3 * 2 * (64 + 32) // 2,
    "base_gathers": 8 * 2 * BASE * 5 // 6,
    "adapter_gradients": 4 * 4 * ADAPTERS * 5 // 6,
    "from_other_nodes": (2 + 4 * 4) * ADAPTERS * 5 // 6 * 4 // 5 + 8 * 2 * BASE * 5 // 6 * 4 // 5,
}
KEEPING = {
    "activations": 2 * TOKENS * (3 * KEPT + GRADIENTS + 64),
    # Their gradient replaces the logits; beside them are two copies in fp32, and the gradients of the hidden states.
    "logits": TOKENS * 101 * 2 + 2 * 4 * TOKENS * 101 + 2 * TOKENS * 64 - 2 * TOKENS * (GRADIENTS + 64),
}
# Logits of four bytes are not copied: their gradient replaces them, beside those that are computed with.
CPU_KEEPING = CPU | {
    "activations": 4 * TOKENS * (3 * (KEPT - 2 * 64) + 2 * 96 + 64),
    "logits": 4 * TOKENS * (101 + 101 + 64) - 4 * TOKENS * (2 * 96 + 64),
}
# A weight takes half a byte, and 64 of them a scale of four. Scales of k and v are small enough to be whole.
OF_4_BITS = 3 * (LAYER // 2 + 4 * LAYER // 64)
IN_4_BITS = {
    "frozen_quantized": OF_4_BITS // 6,
    "frozen_unquantized": ceil(2 * (NORMS + VOCABULARY) / 6),
    "frozen_whole": 2 * NORMS + 3 * 4 * (2 * (64 + 32) + 3 * 96),
    "gathered_layers": OF_4_BITS,
    "dequantized_weight": 2 * 64 * 96,
    "base_gathers": 4 * (OF_4_BITS + 2 * (NORMS + VOCABULARY)) * 5 // 6,
    "from_other_nodes": (2 + 8) * ADAPTERS * 5 // 6 * 4 // 5
    + 4 * (OF_4_BITS + 2 * (NORMS + VOCABULARY)) * 5 // 6 * 4 // 5,
}
DPO = {
    "reference_time_percent": 33,  # a forward pass beside one, one again and one backward
    "base_gathers": 6 * 2 * BASE * 5 // 6,
    "from_other_nodes": (2 + 8) * ADAPTERS * 5 // 6 * 4 // 5 + 6 * 2 * BASE * 5 // 6 * 4 // 5,
}
# Where all learns, the reference is stored before the first step: one pass beside a step of four.
FULL_DPO = {**FULL, "kept_updates": 0, "reference_time_percent": 0, "stored_reference_percent": 25}
# Four virtual tokens before each row take places in it.
PROMPT = {"tokens": 24 * (96 + 4), "activations": 2 * 2 * (96 + 4) * (3 * 64 + KEPT + GRADIENTS + 64)}


@cache
def llama() -> Description:
    return describe({**TINY, "model_type": "llama"}, None)


@pytest.mark.parametrize(
    ("settings", "ranks", "other"),
    [
        (LORA, 6, {}),
        (LORA, 1, ALONE),
        ((*LORA, "sharding.scope=node", "cluster.keeper=true"), 6, NODE),
        ((*PLAIN, "tuning.method=full", "cluster.keeper=true"), 6, FULL),
        ((*LORA, "model.dtype=fp32", "cluster.gpus_per_worker=0"), 4, CPU),
        (
            (*LORA, "model.dtype=fp32", "cluster.gpus_per_worker=0", "train.activation_checkpointing=none"),
            4,
            CPU_KEEPING,
        ),
        ((*LORA, "sharding.sequence_parallel=2"), 6, SHARED),
        ((*LORA, "train.activation_checkpointing=none"), 6, KEEPING),
        ((*LORA, "quant.type=nf4"), 6, IN_4_BITS),
        ((*LORA, "objective.name=dpo"), 6, DPO),
        ((*LORA, "sharding.scope=node"), 1, ALONE),
        ((*PLAIN, "tuning.method=full", "objective.name=dpo"), 6, FULL_DPO),
    ],
    ids=[
        "lora",
        "alone",
        "node",
        "full",
        "cpu",
        "cpu keeping",
        "shared",
        "keeping",
        "4-bits",
        "dpo",
        "alone on a node",
        "full dpo",
    ],
)
def test_a_plan_is_what_is_added_up_by_hand(
    settings: tuple[str, ...], ranks: int, other: dict[str, int], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 384}}))
    plan = make_plan(config(*settings, f"sharding.deepspeed={policy}"), llama(), ranks, 2, None)
    parts = (plan.batch, plan.memory_per_gpu, plan.memory_per_host, plan.traffic_per_step)
    found = {name: value for part in parts for name, value in asdict(part).items()}
    expected = OF_LORA | other
    assert {name: found[name] for name in expected} == expected
    (learnt, frozen) = (BASE, 0) if "tuning.method=full" in settings else (ADAPTERS, BASE)
    assert (plan.parameters.frozen, plan.parameters.trainable, plan.checkpoint_bytes) == (frozen, learnt, 12 * learnt)


def test_the_operations_of_a_token_are_what_is_added_up_by_hand() -> None:
    """Two for each weight forward, two for its inputs' gradient and two for its own, if it learns."""

    def work(*settings: str, recomputed: float = 0.0, **base: Any) -> StepWork:
        model = describe({**TINY, "model_type": "llama", **base}, None).architecture
        return work_of(config(*PLAIN, *settings), model, recomputed, "NVIDIA H100 80GB HBM3")

    frozen, head, lora, full = 3 * LAYER, 101 * 64, ("tuning.rank=4",), ("tuning.method=full",)
    plain = work(*lora)
    assert (plain.token, plain.target, plain.passes) == (4 * frozen + 6 * ADAPTERS, 4 * head, 3)
    assert plain.attention == 3 * (AttentionWork(4 * 64, None),)
    assert (plain.peak, work(*lora, "model.dtype=fp32").peak) == (989e12, None), "the peak is that of bf16"
    repeated = frozen + ADAPTERS - 3 * 64 * 96  # nobody needs the results of down again
    assert work(*lora, recomputed=1).token == plain.token + 2 * repeated
    assert work(*lora, recomputed=1).passes == 4
    assert work("tuning.method=dora", "tuning.rank=4").token == plain.token, "a vector is no product"
    assert work("tuning.method=prompt", "tuning.virtual_tokens=4").token == 4 * frozen, "virtual tokens are tokens"
    whole = work(*full)
    assert (whole.token, whole.target) == (6 * frozen, 8 * head)
    assert work(*full, tie_word_embeddings=True).target == 8 * head
    assert work(*full, "tuning.train=[model.layers.*]").target == 4 * head
    mixture: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}
    experts, alone = (work(*lora, f"tuning.experts={on}", **mixture) for on in ("true", "false"))
    of_all = 3 * 4 * 4 * ((64 + 2 * 96) + (96 + 64))  # three layers, four experts, rank 4
    assert experts.token - alone.token == 6 * of_all / 4, "a token visits one expert in four"


def test_virtual_tokens_take_places_of_a_row() -> None:
    plan = make_plan(config(*PLAIN, "tuning.method=prompt", "tuning.virtual_tokens=4"), llama(), 6, 2, None)
    assert {name: {**asdict(plan.batch), **asdict(plan.memory_per_gpu)}[name] for name in PROMPT} == PROMPT
    pairs = (*PLAIN, "tuning.method=prompt", "tuning.virtual_tokens=4", "objective.name=dpo")
    assert make_plan(config(*pairs), llama(), 6, 2, None).batch.tokens == 24 * (96 + 2 * 4), "before both answers"


def test_no_longest_row_is_told_of_a_setting_that_has_no_effect_or_does_not_suit_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has no other memory to offload to, and ranks cannot share rows of every base."""
    monkeypatch.setattr("trainer.plan.longest._MOST", 512)  # a search in few steps
    base = replace(llama(), architecture=replace(llama().architecture, fails_shared="its layers are odd"))
    found = longest_rows(config(*LORA, "cluster.gpus_per_worker=0"), base, PlannedRanks(4, 4, 2**22, on_gpu=False))
    told = {item for row in found for item in row.settings.items()}
    assert ("train.tiled_mlp", True) in told
    assert told.isdisjoint({("train.activation_offload", True), ("sharding.sequence_parallel", 2)})


def test_a_longest_row_is_as_long_as_its_memory_to_the_last_byte_and_none_where_no_row_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.plan.longest._MOST", 1024)

    def tokens(memory: int) -> int:
        return longest_rows(given, llama(), PlannedRanks(1, 1, memory, on_gpu=True))[0].tokens

    given = config("quant.type=none", "train.activation_checkpointing=all", "tuning.rank=4")
    for length in (256, 512, 1024):
        planned = config(
            "quant.type=none", "train.activation_checkpointing=all", "tuning.rank=4", f"data.sequence_length={length}"
        )
        needed = make_plan(planned, llama(), 1, 1, None).memory_per_gpu.total
        assert (tokens(needed), tokens(needed - 1)) == (length, length - 256)
    none = longest_rows(given, llama(), PlannedRanks(1, 1, 1, on_gpu=True))[0]
    assert none.activations == longest_rows(given, llama(), PlannedRanks(1, 1, 2**40, on_gpu=True))[0].activations // 4


def test_no_longest_row_is_told_to_quantize_a_base_that_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.plan.longest._MOST", 512)
    told = [
        row.settings
        for kind in ("none", "nf4")
        for row in longest_rows(config(*LORA, f"quant.type={kind}"), llama(), PlannedRanks(1, 1, 2**40, on_gpu=True))
    ]
    assert [settings["quant.type"] for settings in told if "quant.type" in settings] == ["nf4"] * 4


def test_ranks_on_cpus_keep_as_many_activations_as_their_hosts_memory_has_room_for() -> None:
    cpu = config(*ROWS, "quant.type=none", "tuning.rank=4", "model.dtype=fp32", "cluster.gpus_per_worker=0")
    computed_again = {
        memory: make_plan(cpu, llama(), 4, 2, None, memory).recomputed_layers for memory in (None, 2**20, 2**30)
    }
    assert computed_again == {None: 3, 2**20: 3, 2**30: 0}


def test_matrices_that_stay_whole_are_told_where_the_others_are_quantized() -> None:
    router = Parameter("model.layers.0.mlp.router.weight", (8, 64), "small", 0, whole="its class multiplies it itself")
    architecture = llama().architecture
    base = replace(llama(), architecture=replace(architecture, parameters=(*architecture.parameters, router)))
    told = [WholeWeights("router", "its class multiplies it itself", 8 * 64, 2 * 8 * 64)]
    found = {kind: make_plan(config(*LORA, f"quant.type={kind}"), base, 6, 2, None).whole for kind in ("nf4", "none")}
    assert found == {"nf4": told, "none": []}


def test_what_cpus_offload_is_not_pinned(tmp_path: Path) -> None:
    policy, pinned = tmp_path / "policy.json", {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 384, "sub_group_size": 1000}
    policy.write_text(
        json.dumps({"zero_optimization": zero | dict.fromkeys(("offload_param", "offload_optimizer"), pinned)})
    )
    cpu = config(*LORA, "model.dtype=fp32", "cluster.gpus_per_worker=0", f"sharding.deepspeed={policy}")
    found = make_plan(cpu, llama(), 4, 2, None).memory_per_host
    assert found.offloaded_base == 2 * 4 * (BASE - NORMS) // 4
    # Masters, moments and the summed gradients; a copy of these for each sub-group; and what the update of one takes.
    assert found.offloaded_states == 2 * (16 * ADAPTERS // 4 + 4 * ADAPTERS // 4 + 12 * 1000)


def test_ranks_exchange_of_a_layer_that_each_computes_whole_its_states_alone() -> None:
    model, of_layer = llama().architecture, 2 * 64 + 2 * 32
    whole = replace(model, mixing=(MixingLayer(model.attention[1].path, 1),))
    assert [exchanged_values(model, size) for size in (1, 2)] == [0, 3 * of_layer]
    assert [exchanged_values(whole, size) for size in (1, 2)] == [0, 2 * of_layer + 2 * 64]


def test_a_base_is_as_large_as_its_files_or_their_index_say_and_else_as_such_bases_are_published(
    tmp_path: Path,
) -> None:
    model, whole = llama().architecture, config("quant.type=nf4")
    cut = config("quant.type=nf4", "model.layers=3")
    assert stored_size(whole, model, None) == stored_size(whole, model, tmp_path) == 2 * BASE
    index = tmp_path / "model.safetensors.index.json"
    for text, size in (('{"metadata": {"total_size": 4321}}', 4321), ('{"metadata": {}}', 2 * BASE), ("{", 2 * BASE)):
        index.write_text(text)
        assert stored_size(whole, model, tmp_path) == size
    index.write_text('{"metadata": {"total_size": 4321}}')
    for name, size in (("a.safetensors", 100), ("b.safetensors", 20), ("c.bin", 3)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert stored_size(whole, model, tmp_path) == 120
    assert stored_size(cut, model, tmp_path) == 2 * BASE, "the files have layers that are left out"


@pytest.mark.parametrize(("layers", "of_row", "of_token"), [("all", 100, 7), ("none", 300, 9)])
def test_a_tower_that_learns_has_its_backward_pass_when_nothing_of_the_decoder_is_left(
    layers: str, of_row: int, of_token: int
) -> None:
    """What it computes again of a layer is there only where activations are recomputed."""
    settings = (*ROWS, "quant.type=none", "tuning.rank=4", f"train.activation_checkpointing={layers}")
    decoder = make_plan(config(*settings), llama(), 6, 2, None).memory_per_gpu.activations
    for largest, layer in ((1, 2), (10_000, 500)):
        kept = KeptOfPictures(plain=(300, 9), recomputed=(100, 7), largest=largest, layer=layer)
        base = replace(llama(), architecture=replace(llama().architecture, kept_of_pictures=kept))
        found = make_plan(config(*settings), base, 6, 2, None).memory_per_gpu
        backward = TOKENS * (2 * largest + layer * (layers == "all"))
        assert found.activations == decoder
        assert found.tower_activations == of_row + of_token * TOKENS + max(0, backward - decoder)


@pytest.mark.parametrize(("limit", "held"), [("1", 2 * 1000), ("0.000001", 0)])
def test_the_part_that_sees_is_whole_on_each_rank_unless_its_features_are_kept(limit: str, held: int) -> None:
    sees = replace(llama(), architecture=replace(llama().architecture, weights_beside=1000))
    over = (*LORA, "data.format=pictures", "data.images.read_ahead=1000000", f"sharding.tower_limit={limit}")
    plan = make_plan(config(*over), sees, 6, 2, None)
    assert (plan.memory_per_gpu.frozen_tower, plan.memory_per_host.pictures_read_ahead) == (held, 2 * 1000000)
    assert make_plan(config(*LORA), sees, 6, 2, None).memory_per_gpu.frozen_tower == 0
