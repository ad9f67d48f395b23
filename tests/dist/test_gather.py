"""A decoder layer is gathered as one, in the same order on every rank, and neither the host nor the device waits
without need.
"""

import json
from pathlib import Path

import pytest

from tests.dist import gather
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.plan.plan import make_plan
from trainer.state.zero.policy import build_deepspeed_config

LAYERS = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base of six layers."""
    return Workshop(tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS)


def with_policy(workshop: Workshop, name: str, policy: str, **zero: object) -> Config:
    """A run by one of our policies, whose section zero_optimization has these keys too."""
    tree = json.loads((Path(__file__).parents[2] / f"ds_configs/{policy}.json").read_text())
    tree["zero_optimization"] |= zero
    file = workshop.folder / f"{name}.json"
    file.write_text(json.dumps(tree))
    return workshop.config(name, f"sharding.deepspeed={file}")


@pytest.mark.long
def test_one_rank_waits_for_its_device_a_few_times_a_micro_batch(deep: Workshop, tmp_path: Path) -> None:
    """Of 32 layers. Where parameters lie in host memory it waits once for each gather: the control."""
    deeper = Workshop(tmp_path, num_hidden_layers=32, shard_size="10MB")
    (alone,) = launch(1, gather.host_waits, dump_config(with_policy(deeper, "alone", "single_gpu")), timeout=200)
    assert alone.get("default", 0) + alone.get("device", 0) + alone.get("event", 0) < 10
    (moved,) = launch(
        1,
        gather.host_waits,
        dump_config(with_policy(deep, "moved", "zero3_offload_cpu", stage3_param_persistence_threshold=300)),
    )
    assert moved["side"] >= 2 * LAYERS - 1
    assert moved.get("default", 0) + moved.get("device", 0) < 10


def test_gathers_are_at_most_two_layers_ahead_of_what_the_device_computes(deep: Workshop) -> None:
    """The host asks for a gather while it is in the layer before: one layer at most may then be under way on the
    device.
    """
    config = dump_config(with_policy(deep, "ahead", "zero3_offload_cpu", stage3_param_persistence_threshold=300))
    (found,) = launch(1, gather.host_waits, config)
    assert found["furthest"] == 1
    assert found["most"] <= found["room"]
    assert launch(1, gather.host_waits, config, False)[0]["furthest"] > LAYERS, "the control: nobody waits"


def test_all_ranks_begin_the_same_collectives_in_the_same_order(workshop: Workshop) -> None:
    """With two process groups in a pass: a base that a node shares, and adapters that all ranks do."""
    config = with_policy(workshop, "order", "zero3", stage3_param_persistence_threshold=300)
    text = dump_config(config.model_copy(update={"sharding": config.sharding.model_copy(update={"scope": "node"})}))
    ranks = launch(4, gather.starts, text, [1, 2, 3], ranks_per_node=2, timeout=200)
    for number in range(3):
        assert len({json.dumps(rank["set"][number]) for rank in ranks}) == 4, "the control: sets have other orders"
        orders = [rank["orders"][number] for rank in ranks]
        assert orders[0] == orders[1] == orders[2] == orders[3]
        assert {size for size, _, _ in orders[0]} == {2, 4}


def test_a_layer_is_one_gather_and_no_more_than_three_are_whole(deep: Workshop) -> None:
    config = with_policy(deep, "counted", "zero3", stage3_param_persistence_threshold=3000)
    for rank in launch(2, gather.gathers, dump_config(config)):
        counts, passes = rank["counts"], 2 * LAYERS - 1  # the last layer is kept for its backward pass
        packed = [count for name, count in counts.items() if name.endswith("uint8")]
        assert packed == [passes]
        assert sum(counts.values()) <= passes + 4  # embedding, head, and the reduction of gradients
        assert 1 < rank["most"] <= 3
        assert rank["left"] == []
        assert rank["calls"] == 0, "graphs of earlier passes are still there"
        assert rank["allocator"] == "expandable_segments:True"


def test_the_heads_gather_begins_before_the_last_layer_is_computed(deep: Workshop) -> None:
    """Parameters of many bytes are gathered each by itself, which is no matter of results."""
    config = dump_config(with_policy(deep, "large", "zero3", stage3_param_persistence_threshold=3000))
    for rank in launch(2, gather.gathers, config, 2**10):
        packed = [count for name, count in rank["counts"].items() if name.endswith("uint8")]
        assert rank["groups"] > 1
        assert packed == [(2 * LAYERS - 1) * rank["groups"]]
        assert rank["first"] == "head"
    late = dump_config(
        with_policy(deep, "late", "zero3", stage3_param_persistence_threshold=3000, stage3_prefetch_bucket_size=0)
    )
    assert launch(2, gather.gathers, late)[0]["first"] == "last layer", "the control: nothing is gathered ahead"


def test_a_layer_is_freed_though_one_of_its_inputs_gets_no_gradient(deep: Workshop) -> None:
    config = dump_config(with_policy(deep, "idle", "zero3", stage3_param_persistence_threshold=3000))
    assert all(rank["most"] <= 3 for rank in launch(2, gather.gathers, config, 2**28, True))
    held = launch(2, gather.gathers, config, 2**28, True, False)
    assert all(rank["most"] > 3 and rank["left"] == [] for rank in held), (
        "the control: layers are held to the pass's end"
    )


@pytest.mark.long
def test_no_more_is_whole_than_three_layers_or_the_head_and_a_layer(tmp_path: Path) -> None:
    """A device that is late with the layer before the last one would have the head come on top of two layers."""
    large = Workshop(tmp_path, num_hidden_layers=LAYERS, vocab_size=4000)
    config = with_policy(large, "room", "zero3_offload_cpu", stage3_param_persistence_threshold=300)
    found, endless = (launch(1, gather.host_waits, dump_config(config), True, bounded)[0] for bounded in (True, False))
    assert found["most"] <= found["room"] < endless["most"]
    planned = make_plan(config, resolve_base(config.model).description, 1, 1, None).memory_per_gpu.gathered_layers
    assert found["room"] == pytest.approx(planned, rel=0.05)


def test_a_parameter_that_is_read_outside_of_its_modules_call_is_not_gathered(tmp_path: Path) -> None:
    """Llama 4 asks its embedding for the device, which DeepSpeed would answer with a gather through the hooks that are
    not there.
    """
    config = with_policy(Workshop(tmp_path, "llama4"), "read", "zero3", stage3_param_persistence_threshold=0)
    assert [rank["left"] for rank in launch(2, gather.gathers, dump_config(config))] == [[], []]


def test_what_stays_whole_follows_from_the_base(workshop: Workshop) -> None:
    config = workshop.config("whole", "sharding.deepspeed=zero3")
    key = "stage3_param_persistence_threshold"
    for world_size, whole in ((2, 12_345), (1, 2**62)):
        built = build_deepspeed_config(config, world_size, 1, on_gpu=True, whole=12_345)
        assert built["zero_optimization"][key] == whole
        assert not any("live" in name or "prefetch" in name for name in built["zero_optimization"])
