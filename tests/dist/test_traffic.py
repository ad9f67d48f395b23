"""Where the base is sharded inside nodes, no frozen weight crosses between them, and what crosses is what `plan`
says.
"""

from tests.dist import traffic
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config
from trainer.plan.plan import make_plan


def test_only_what_the_adapters_need_crosses_between_nodes(workshop: Workshop) -> None:
    config = workshop.config("traffic", "sharding.scope=node", "train.global_batch=8")
    datasets = workshop.prepare(config)
    results = launch(4, traffic.step_traffic, dump_config(config), datasets.train, ranks_per_node=2)
    planned = make_plan(config, resolve_base(config.model).description, 4, 2, None).traffic_per_step
    for rank, received in enumerate(results):
        node = rank // 2
        assert received["frozen"] == [[2 * node, 2 * node + 1]]
        assert len(received["begun"]) == 3  # all ranks' two, and the node's
        assert min(received["begun"]) > 0, "a group's communicator would begin inside of the first pass"
        inside, across = received["inside"], received["across"]
        # No packed weight; what the loop agrees on are numbers and counts.
        assert set(across) == {"torch.float32", "torch.bfloat16", "torch.float64", "torch.int64"}
        assert across["torch.float32"] == planned.adapter_gradients
        assert (
            0 < across["torch.bfloat16"] <= planned.adapter_gathers
        )  # what is still there from the forward is not gathered again
        assert across["torch.float64"] + across["torch.int64"] < 1000
        assert sum(across.values()) * 2 / 3 <= planned.from_other_nodes  # two of a rank's three peers
        assert 0 < sum(inside.values()) <= planned.base_gathers
