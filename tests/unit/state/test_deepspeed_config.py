"""A policy and a run's configuration become one DeepSpeed dictionary, and nothing stands in two places."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import Config, parse_config
from trainer.errors import ConfigError
from trainer.state.zero.policy import WHOLE, build_deepspeed_config, choose_policy, policy_names

RUN = "run: {name: demo}\nmodel: {base: /models/tiny}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"


def config(*overrides: str) -> Config:
    return parse_config(RUN, overrides)


@pytest.fixture
def own_policy(tmp_path):
    """Writes a policy file and returns the configuration that names it."""

    def write(policy: Any, text: str | None = None) -> Config:
        path = tmp_path / "my.json"
        path.write_text(json.dumps(policy) if text is None else text)
        return config(f"sharding.deepspeed={path}")

    return write


def refusal(given: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_config(given, world_size=2, accumulation=1, on_gpu=True)
    return str(caught.value)


def values(tree: Any):
    if isinstance(tree, dict):
        for value in tree.values():
            yield from values(value)
    else:
        yield tree


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_is_accepted_and_complete(policy: str):
    built = build_deepspeed_config(config(f"sharding.deepspeed={policy}"), world_size=4, accumulation=3, on_gpu=True)
    assert built["zero_optimization"]["stage"] == 3
    assert built["train_batch_size"] == 4 * 3
    assert built["communication_data_type"] == "fp32"
    assert "optimizer" not in built
    assert "auto" not in values(built)


@pytest.mark.parametrize("policy", policy_names())
def test_deepspeed_knows_every_key_of_every_policy(policy: str):
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    built = build_deepspeed_config(config(f"sharding.deepspeed={policy}"), world_size=1, accumulation=2, on_gpu=True)
    read = DeepSpeedConfig(built)
    assert read.gradient_accumulation_steps == 2
    assert read.bfloat16_config.enabled
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_allow_untested_optimizer
    assert not read.zero_force_ds_cpu_optimizer, "the optimizer is ours, wherever its states lie"
    assert read.steps_per_print > 10**9, "the lines of a run are ours"
    DeepSpeedZeroConfig(**built["zero_optimization"])  # refuses what it does not know


def test_auto_is_zero3_on_gpus_single_gpu_on_one_and_cpu_without():
    assert choose_policy(config(), 8, on_gpu=True) == "zero3"
    assert choose_policy(config(), 2, on_gpu=True) == "zero3"
    assert choose_policy(config(), 1, on_gpu=True) == "single_gpu"
    assert choose_policy(config(), 2, on_gpu=False) == "cpu"
    assert choose_policy(config("sharding.deepspeed=zero3_offload_cpu"), 1, on_gpu=False) == "zero3_offload_cpu"


def test_one_rank_gathers_nothing_unless_its_parameters_are_on_the_host(tmp_path: Path):
    def whole(policy: str, world_size: int) -> int:
        built = build_deepspeed_config(config(f"sharding.deepspeed={policy}"), world_size, 1, on_gpu=True, whole=77)
        return built["zero_optimization"]["stage3_param_persistence_threshold"]

    assert whole("zero3", 2) == 77
    assert whole("zero3", 1) > 10**18
    assert whole("zero3_offload_cpu", 1) == 77
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 5}}')
    assert whole(str(own), 2) == 5


def test_a_file_of_the_current_folder_is_none_of_the_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usual = build_deepspeed_config(config("sharding.deepspeed=zero3"), 2, 1, on_gpu=True)
    (tmp_path / "zero3").write_text('{"zero_optimization": {"stage3_prefetch_bucket_size": 7}}')
    monkeypatch.chdir(tmp_path)
    assert build_deepspeed_config(config("sharding.deepspeed=zero3"), 2, 1, on_gpu=True) == usual


def test_the_run_decides_precision_clipping_and_batch():
    given = config("model.dtype=fp32", "optim.grad_clip=0.5", "train.micro_batch=4")
    built = build_deepspeed_config(given, world_size=2, accumulation=5, on_gpu=False)
    assert built["bf16"] == {"enabled": False}
    assert built["gradient_clipping"] == 0.5
    assert (built["train_micro_batch_size_per_gpu"], built["gradient_accumulation_steps"]) == (1, 5)


def test_an_own_policy_is_taken_as_it_is(own_policy):
    zero = {"stage3_prefetch_bucket_size": 7, "offload_param": {"device": "cpu"}}
    built = build_deepspeed_config(own_policy({"zero_optimization": zero}), 2, 1, on_gpu=True)
    assert built["zero_optimization"] == {"stage3_param_persistence_threshold": WHOLE, **zero, "stage": 3}


def test_deepspeeds_own_clock_is_off_unless_a_policy_turns_it_on(own_policy):
    for timers, given in (({"throughput": {"enabled": False}}, {}), ({"throughput": {"enabled": True}}, None)):
        policy = own_policy({"timers": timers} if given is None else given)
        assert build_deepspeed_config(policy, 2, 1, on_gpu=True)["timers"] == timers


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("gradient_clipping", 1.0, "optim.grad_clip"),
        ("train_batch_size", 8, "train.global_batch"),
        ("optimizer", {"type": "AdamW"}, "the section optim"),
        ("scheduler", {"type": "WarmupLR"}, "optim.schedule"),
        ("bf16", {"enabled": True}, "model.dtype"),
        ("fp16", {"enabled": True}, "model.dtype"),
    ],
)
def test_a_key_of_the_run_is_refused_with_its_owner(own_policy, key: str, value: Any, owner: str):
    message = refusal(own_policy({key: value}))
    assert message == f"sharding.deepspeed: my.json sets {key}, which belongs to {owner}. Remove it there."


def test_a_policy_that_is_nested_without_end_is_one_sentence(own_policy):
    assert "cannot be read" in refusal(own_policy(None, "[" * 100_000))


def test_a_policy_that_is_no_text_is_one_sentence(own_policy, tmp_path: Path):
    given = own_policy({})
    (tmp_path / "my.json").write_bytes(b'{"zero_optimization": "\xff"}')
    assert "cannot be read: 'utf-8' codec can't decode byte 0xff" in refusal(given)


def test_another_stage_is_refused(own_policy):
    message = refusal(own_policy({"zero_optimization": {"stage": 2}}))
    assert message.startswith(
        "sharding.deepspeed: my.json sets zero_optimization.stage to 2. Capstan trains with stage 3."
    )


def test_parameters_on_nvme_are_refused_with_the_reason(own_policy):
    message = refusal(own_policy({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/local"}}}))
    assert "offload_param.device to 'nvme', but DeepSpeed swaps parameters through buffers of model.dtype" in message
    assert message.endswith("Set it to cpu.")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("device", "nvme", "to 'nvme', where checkpoints do not find the moments. Set it to cpu."),
        ("ratio", 0.5, "to 0.5, which DeepSpeed's own CPU Adam alone can do. Remove it there."),
        ("super_offload", True, "to True, which DeepSpeed's own CPU Adam alone can do. Remove it there."),
    ],
)
def test_moments_where_they_cannot_be_updated_or_saved_are_refused(own_policy, key: str, value: Any, reason: str):
    offload = {"device": "cpu", key: value}
    message = refusal(own_policy({"zero_optimization": {"offload_optimizer": offload}}))
    assert message == f"sharding.deepspeed: my.json sets zero_optimization.offload_optimizer.{key} {reason}"


def test_a_zero_setting_that_the_run_owns_is_refused(own_policy):
    message = refusal(own_policy({"zero_optimization": {"zero_hpz_partition_size": 8}}))
    assert "zero_optimization.zero_hpz_partition_size, which belongs to sharding.scope" in message


def test_a_key_that_deepspeed_would_ignore_is_refused(own_policy):
    message = refusal(own_policy({"zero_optimisation": {"stage": 3}}))
    assert message.endswith("sets zero_optimisation, which would have no effect. Did you mean zero_optimization?")


def test_every_refused_key_is_named_at_once(own_policy):
    assert len(refusal(own_policy({"gradient_clipping": 1, "bf16": {"enabled": True}})).splitlines()) == 2


def test_auto_in_a_policy_leaves_the_decision_to_the_run(own_policy):
    policy = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    built = build_deepspeed_config(own_policy(policy), world_size=2, accumulation=1, on_gpu=True)
    assert built["zero_optimization"] == {"stage3_param_persistence_threshold": WHOLE, "stage": 3}
    assert (built["train_batch_size"], built["bf16"]) == (2, {"enabled": True})


def test_an_unknown_policy_is_refused_with_those_there_are():
    assert (
        refusal(config("sharding.deepspeed=zero4"))
        == "sharding.deepspeed: 'zero4' is neither a file nor a policy's name. Allowed are auto, cpu, single_gpu,"
        " zero3, zero3_offload_cpu, zero3_offload_optimizer, or the path of your own DeepSpeed JSON."
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("{,}", "line 1, column 2 is not JSON"), ("[]", "is not a JSON object")]
)
def test_a_policy_that_is_no_json_object_is_refused(own_policy, text: str, expected: str):
    assert expected in refusal(own_policy(None, text))


def test_settings_of_zero_are_an_object(own_policy: Any):
    assert "zero_optimization to 3. It must be an object with DeepSpeed's ZeRO settings." in refusal(
        own_policy({"zero_optimization": 3})
    )
