"""The numbers of a plan of a small Llama are those that a reader gets who adds them up by hand.

Its three layers have matrices of 64 x 64 (q, o), 64 x 32 (k, v) and 64 x 96 (gate, up, down), and adapters of rank 4 on
them. Seven norms have 64 weights each; embedding and head have 101 x 64. Parameters up to 384 elements stay whole.
"""

import json
from dataclasses import asdict, replace
from functools import cache
from math import ceil
from pathlib import Path

import pytest

from tests.unit.plan.test_plan import TINY, config
from trainer.base.base import Description
from trainer.base.describe.description import describe
from trainer.plan.longest import PlannedRanks, longest_rows
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
        ((*LORA, "sharding.sequence_parallel=2"), 6, SHARED),
        ((*LORA, "train.activation_checkpointing=none"), 6, KEEPING),
        ((*LORA, "quant.type=nf4"), 6, IN_4_BITS),
        ((*LORA, "objective.name=dpo"), 6, DPO),
        ((*LORA, "sharding.scope=node"), 1, ALONE),
        ((*PLAIN, "tuning.method=full", "objective.name=dpo"), 6, FULL_DPO),
    ],
    ids=["lora", "alone", "node", "full", "cpu", "shared", "keeping", "4-bits", "dpo", "alone on a node", "full dpo"],
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


def test_virtual_tokens_take_places_of_a_row() -> None:
    plan = make_plan(config(*PLAIN, "tuning.method=prompt", "tuning.virtual_tokens=4"), llama(), 6, 2, None)
    assert {name: {**asdict(plan.batch), **asdict(plan.memory_per_gpu)}[name] for name in PROMPT} == PROMPT


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


@pytest.mark.parametrize(("limit", "held"), [("1", 2 * 1000), ("0.000001", 0)])
def test_the_part_that_sees_is_whole_on_each_rank_unless_its_features_are_kept(limit: str, held: int) -> None:
    sees = replace(llama(), architecture=replace(llama().architecture, weights_beside=1000))
    over = (*LORA, "data.format=pictures", "data.images.read_ahead=1000000", f"sharding.tower_limit={limit}")
    plan = make_plan(config(*over), sees, 6, 2, None)
    assert (plan.memory_per_gpu.frozen_tower, plan.memory_per_host.pictures_read_ahead) == (held, 2 * 1000000)
    assert make_plan(config(*LORA), sees, 6, 2, None).memory_per_gpu.frozen_tower == 0
