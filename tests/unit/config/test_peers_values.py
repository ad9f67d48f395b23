"""What the values of other tools mean here. The expectations follow their documentation."""

from typing import Any

import pytest

from trainer.config.peers import conversions as of
from trainer.config.peers.conversions import Inconvertible
from trainer.config.peers.table import OFF, PEERS, Needless, RefusedKey, To, Together, Unsupported, read_peer, said_of

CPU = {"device": "cpu"}
YARN = {"model.rope_scaling.rope_type": "yarn", "model.rope_scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("convert", "given", "expected"),
    [
        (of.number, "2e-4", 2e-4),
        (of.whole, "8", 8),
        (of.kept, 2, {"checkpoint.keep_last": 2}),
        (of.kept, 1, {"checkpoint.keep_last": 1}),
        (of.kept, 0, {"checkpoint.keep_every": 1}),
        (of.kept, -1, {"checkpoint.keep_every": 1}),
        (of.pair, (0.9, "0.95"), [0.9, 0.95]),
        (of.passes, 3.0, 3),
        (of.passes, 0.5, 0.5),
        *((of.flag, value, True) for value in (True, "True", "1", "yes", "auto", 1)),
        *((of.flag, value, False) for value in (False, "false", "0", "no", 0, None)),
        *((of.switched, value, True) for value in (True, "unsloth", "1")),
        *((of.switched, value, False) for value in (False, "False", "0", "no", "", 0)),
        (of.names, "q_proj, v_proj k_proj", ["q_proj", "v_proj", "k_proj"]),
        (of.names, ["a", 1], ["a", "1"]),
        (of.names, 5, ["5"]),
        (of.dtype, "torch.BFloat16", "bf16"),
        (of.dtype, "float32", "fp32"),
        (of.optimizer, "OptimizerNames.PAGED_ADAMW_8BIT", "adamw_8bit"),
        (of.attention, "FA2", {"model.attention": "flash_attention_2"}),
        (of.attention, "xformers", {}),
        (of.rope_scaling, {"rope_type": "yarn", "factor": 4.0}, YARN),
        (of.rope_scaling, {"type": "yarn", "factor": 4.0}, YARN),
        (of.steps, "100", 100),
        (of.steps, "1e2", 100),
        (of.steps, 1, 1),
        (of.steps, 0, 0),
        (of.steps, -1, 0),
        (of.warmup, 0.1, {"optim.warmup_ratio": 0.1}),
        (of.warmup, 0, {"optim.warmup_steps": 0}),
        (of.warmup, 1, {"optim.warmup_steps": 1}),
        (of.warmup_ratio, "0.03", {"optim.warmup_ratio": 0.03}),
        (of.warmup_ratio, 0, {}),
        (of.schedule, "cosine", {"optim.schedule": "cosine", "optim.min_lr_ratio": 0.0}),
        (of.schedule, "linear", {"optim.schedule": "linear", "optim.min_lr_ratio": 0.0}),
        (of.schedule, "cosine_with_min_lr", {"optim.schedule": "cosine"}),
        (of.schedule, "constant_with_warmup", {"optim.schedule": "constant"}),
        *((of.targets, value, "all-linear") for value in ("all", "all-linear", "all_linear", ["all-linear"])),
        (of.targets, "q_proj,v_proj", ["q_proj", "v_proj"]),
        *((of.targets, value, [f"re:{value}"]) for value in ("q|v", r".*\.q_proj", "[qv]_proj", "(q)", "^q", "q$", "q?", ".*q_proj")),
        (of.layers, [3, 2, 4], [2, 5]),
        (of.layers, "7", [7, 8]),
        (of.adapter, "out/lora", "out/lora"),
        (of.adapter, "lora", "./lora"),
        (of.offload, "ds/z3_offload.json", {"sharding.deepspeed": "zero3_offload_cpu"}),
        (of.offload, "ds/z3_offload_opt.json", {}),
        (of.offload, "z3_offload_all_without_opt.json", {"sharding.deepspeed": "zero3_offload_cpu"}),
        (of.offload, "z3.json", {}),
        (of.offload, {"zero_optimization": {"offload_param": CPU}}, {"sharding.deepspeed": "zero3_offload_cpu"}),
        (
            of.offload,
            {"zero_optimization": {"offload_param": {"device": "nvme"}, "offload_optimizer": CPU}},
            {"sharding.deepspeed": "zero3_offload_cpu"},
        ),
        (of.offload, {"zero_optimization": {"offload_optimizer": CPU}}, {"sharding.deepspeed": "zero3_offload_optimizer"}),
        (of.offload, {"zero_optimization": {"offload_optimizer": {"device": "none"}}}, {}),
        (of.offload, {"train_batch_size": 8}, {}),
        (of.run_folder, "./outputs/my run", {"run.name": "my-run", "run.store": "outputs"}),
        (of.run_folder, "/data/runs/x", {"run.name": "x", "run.store": "/data/runs"}),
        (of.run_folder, ".hidden", {"run.name": "hidden"}),
        (of.run_folder, "bases", {"run.name": "bases-run"}),
        (of.run_folder, "x" * 150, {"run.name": "x" * 100}),
        (of.run_folder, "", {"run.name": "run"}),
        (of.trackers, "all", {}),
        (of.trackers, ["wandb", "tensorboard", "none"], {"track.trackers": ["wandb"]}),
        (of.held_out, 0.1, 0.1),
        (of.held_out, 1, 1),
        (of.held_out, 500.0, 500),
        (of.share_held_out, 0.1, 0.1),
    ],
)  # fmt: skip
def test_a_value_has_its_meaning(convert: Any, given: Any, expected: Any) -> None:
    found = convert(given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("convert", "given", "why"),
    [
        (of.text, " ", "is no text"),
        (of.number, "many", "is no number"),
        *((of.number, value, "is no number that a setting could have") for value in ("inf", "nan", 1e300, -1e300)),
        (of.whole, 2.5, "is no whole number"),
        (of.pair, [1], "are no two numbers"),
        (of.pair, [0.9, 0.95, 0.99], "are no two numbers"),
        (of.flag, "perhaps", "neither true nor false"),
        (of.rope_scaling, "yarn", "names no factor"),
        (of.rope_scaling, {"type": "dynamic"}, "'dynamic' does not exist here"),
        (of.steps, "epoch", "'epoch' is no number of steps"),
        (of.steps, 0.1, "0.1 is a share of all steps"),
        (of.warmup, 1.5, "is no whole number"),
        (of.dtype, "float16", "model.dtype is bf16 or fp32"),
        (of.layers, [1, 3], "is one range of layers"),
        (of.layers, [], "is one range of layers"),
        (of.adapter, "a,b", "several adapters"),
        (of.trackers, ["swanlab"], "swanlab: track.trackers are"),
        (of.held_out, 1.5, "a share of the rows below 1, or a whole number"),
        (of.share_held_out, 1, "leaves nothing to train on"),
    ],
)
def test_a_value_without_a_counterpart_says_why(convert: Any, given: Any, why: str) -> None:
    with pytest.raises(Inconvertible, match=why):
        convert(given)


def test_a_key_is_looked_up_with_the_sections_around_it_from_the_nearest_on() -> None:
    for peer in PEERS:
        for section, row in peer.rows.items():
            if section.endswith(".*"):
                inside = f"{section[:-1]}anything.deeper"
                nearer = [name for name in peer.rows if name.endswith("*") and inside.startswith(name[:-1])]
                assert peer.row(inside) is peer.rows[max(nearer, key=len)], (peer.name, section, row)
        assert peer.row("no_such_key_of_anybody") is None


def test_a_table_that_takes_over_another_has_its_rows_and_tables_but_those_that_it_lacks() -> None:
    pairs = [(peer, read_peer(peer.takes)) for peer in PEERS if peer.takes]
    assert all(taken.tables.keys() <= peer.tables.keys() for peer, taken in pairs)
    assert all(taken.rows.keys() & peer.rows.keys() for peer, taken in pairs)
    assert any(taken.tables for _, taken in pairs)
    assert any(taken.rows.keys() - peer.rows.keys() for peer, taken in pairs)


def test_keys_ask_for_nothing_by_values_of_their_own_or_those_of_all() -> None:
    rows = [row for peer in PEERS for row in peer.rows.values() if isinstance(row, Unsupported)]
    assert {row.idle == OFF for row in rows} == {True, False}


def test_a_key_of_a_peer_is_named_as_it_is_called_here() -> None:
    assert said_of("num_train_epochs", (To, Together)) == "It is train.epochs here."
    assert said_of("num_train_epochs", (Needless, Unsupported, RefusedKey)) is None
    assert said_of("no_such_key_of_anybody", (To, Together)) is None
    both = "pretrained_model_name_or_path"  # a setting in one section of a peer, and none in another
    assert said_of(both, (To, Together)) == "It is model.base here."
    assert (said_of(both, (Needless, Unsupported, RefusedKey)) or "").startswith("That of ")
