"""The order of collectives under NCCL's rules (tests/dist/collectives.py): it comes to an end, and mixed orders do not."""

import json

import pytest

from tests.dist import collectives
from tests.dist.collectives import READS, Begun, Order, mixed, orders_of, stuck
from tests.dist.launch import launch
from tests.material import Workshop, make_labelled, make_pairs
from trainer.config import dump_config

A, B = (Begun(name, (0, 1), "allreduce", 8) for name in "ab")


def test_two_groups_in_two_orders_end_where_a_device_has_a_place_for_both_and_never_where_it_has_one() -> None:
    same: list[Order] = [[A, B, READS], [A, B, READS]]
    other: list[Order] = [[A, B, READS], [B, A, READS]]
    assert stuck(same, 1) is None
    assert stuck(other, 2) is None
    assert stuck(other, 1) == "rank 0 waits in a; rank 1 waits in b"
    assert stuck([[A, READS, B], [B, READS, A]], 2) == "rank 0 waits in a; rank 1 waits in b"
    # Where nothing orders the streams, a card may take either first, whatever its host began first.
    assert stuck(same, 1, reverse=[1]) == "rank 0 waits in a; rank 1 waits in b"
    assert stuck([[A, READS, B], [A, READS, B]], 1, reverse=[1]) is None
    found = stuck([[A], [A._replace(size=4)]], 1)
    assert (
        found
        == "collective 0 of a is another one on every rank: allreduce of 8 bytes by rank 0, allreduce of 4 bytes by rank 1"
    )


@pytest.mark.long
def test_every_kind_of_step_comes_to_an_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four ranks on two nodes: the base of a node or of all, adapters whole and divided, pairs, labels, experts, full buckets."""
    workshop, mixture = (Workshop(tmp_path_factory.mktemp("order"), kind) for kind in ("llama", "mixtral"))
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"] |= {"overlap_comm": True, "stage3_param_persistence_threshold": 300}
    divided = workshop.folder / "divided.json"
    divided.write_text(json.dumps(policy))
    policy["zero_optimization"]["reduce_bucket_size"] = 1000
    (small := workshop.folder / "small.json").write_text(json.dumps(policy))
    rows = {make.__name__: make(workshop.folder / f"{make.__name__}.jsonl", 24) for make in (make_pairs, make_labelled)}
    pairs, labels = (f'data.train=[{{"path": "{path}"}}]' for path in rows.values())
    node, apart = "sharding.scope=node", f"sharding.deepspeed={divided}"
    kinds = {
        "world": (workshop, "sharding.scope=world"),
        "world, divided adapters": (workshop, "sharding.scope=world", apart),
        "node": (workshop, node),
        "node, divided adapters": (workshop, node, apart),
        "node, small buckets": (workshop, node, f"sharding.deepspeed={small}"),
        "node, DPO": (workshop, node, apart, "objective.name=dpo", "data.format=preference", pairs),
        "node, KTO": (workshop, node, apart, "objective.name=kto", "data.format=labelled", labels),
        "node, experts": (mixture, node, apart, "tuning.experts=true", "tuning.experts_rank=3"),
    }
    runs = list[list[str]]()
    for number, (shop, *overrides) in enumerate(kinds.values()):
        config = shop.config(
            f"order-{number}", "train.steps=3", "checkpoint.every_steps=0", "train.global_batch=8", *overrides
        )
        runs.append([dump_config(config), shop.prepare(config).train])
    ranks = launch(4, collectives.recorded, runs, ranks_per_node=2, timeout=500)
    for number, name in enumerate(kinds):
        orders = orders_of([rank[number] for rank in ranks])
        communicators = {one.communicator for order in orders for one in order if one is not None}
        assert stuck(orders, 1) is None, name
        assert stuck(orders, len(communicators), reverse=[1, 2]) is None, name
        both = any(
            "node" in name and first and second and first.communicator != second.communicator
            for first, second in zip(orders[1], orders[1][1:], strict=False)
        )
        print(f"{name}: {len(orders[0])} of {len(communicators)} communicators, mixed: {stuck(mixed(orders, 1), 1)}")
        if both:
            assert stuck(mixed(orders, 1), 1), f"the control: {name}, mixed"
