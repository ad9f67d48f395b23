"""What vLLM and SGLang would refuse of an adapter is told before either is started, each by its own rules."""

from typing import Any

import pytest

from trainer.servers import adapter_refusals, remarks

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_dora": False, "bias": "none", "modules_to_save": None}
MATRICES = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
STACK = [f"base_model.model.model.layers.0.mlp.experts{part}.lora_A.weight" for part in (".base_layer", "")]
SINGLE = ["base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"]


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"r": 512}, {"rank_pattern": {}, "alpha_pattern": None}]
)
@pytest.mark.parametrize("names", [MATRICES, SINGLE])
def test_lora_and_rslora_are_taken(settings: dict[str, Any], names: list[str]) -> None:
    assert adapter_refusals(LORA | settings, names) == {"vLLM": [], "SGLang": []}


@pytest.mark.parametrize(
    ("settings", "names", "vllm", "sglang"),
    [
        ({"use_dora": True}, [*MATRICES, "q_proj.lora_magnitude_vector.weight"], ["no DoRA"], ["no DoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head.modules_to_save.weight"], ["lm_head"], ["lm_head"]),
        (
            {"trainable_token_indices": {"embed_tokens": [5]}},
            [*MATRICES, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
            ["new tokens"],
            ["new tokens"],
        ),
        ({"bias": "all"}, MATRICES, ["bias: all"], ["bias: all"]),
        ({"peft_type": "IA3"}, [], ["this is IA3"], ["this is IA3"]),
        ({}, ["norm.weight"], ["there is norm.weight"], ["there is norm.weight"]),
        ({"r": 640}, MATRICES, ["largest rank is 512, and this has 640"], []),
        ({"rank_pattern": {"o_proj": 8}}, MATRICES, [], ["one r for all modules"]),
        (
            {"rank_pattern": {"o_proj": 640}},
            MATRICES,
            ["largest rank is 512, and this has 640"],
            ["one r for all modules"],
        ),
        ({"alpha_pattern": {"o_proj": 8}}, MATRICES, [], ["one lora_alpha for all modules"]),
        ({}, STACK, ["layout=vllm, or start it with --enable-mixed-moe-lora-format"], ["layout=vllm"]),
    ],
    ids=str,
)
def test_all_else_is_refused_with_the_reason(
    settings: dict[str, Any], names: list[str], vllm: list[str], sglang: list[str]
) -> None:
    found = adapter_refusals(LORA | settings, names)
    for server, expected in (("vLLM", vllm), ("SGLang", sglang)):
        assert len(found[server]) == len(expected), found
        assert all(part in why for part, why in zip(expected, found[server], strict=True)), found
    lines = remarks(LORA | settings, found)
    assert sum("would refuse it beside its base" in line for line in lines) == bool(vllm) + bool(sglang)
    assert lines[-1] == "Every server takes the merged model: --format merged."


@pytest.mark.parametrize(
    ("rank", "told"), [(16, []), *((rank, ["vLLM takes it with --max-lora-rank 32."]) for rank in (17, 32))]
)
def test_a_rank_above_vllms_default_needs_an_option(rank: int, told: list[str]) -> None:
    settings = LORA | {"r": rank}
    assert remarks(settings, adapter_refusals(settings, MATRICES)) == told


def test_the_option_is_for_the_largest_rank_of_any_module() -> None:
    settings = LORA | {"rank_pattern": {"o_proj": 17}}
    assert "vLLM takes it with --max-lora-rank 32." in remarks(settings, adapter_refusals(settings, MATRICES))


def test_what_is_no_language_model_is_not_said_to_be_served_merged() -> None:
    settings = LORA | {"use_dora": True}
    assert remarks(settings, adapter_refusals(settings, MATRICES))[-1].startswith("Every server takes the merged model")
    classes = settings | {"task_type": "SEQ_CLS"}
    assert not any("merged" in line for line in remarks(classes, adapter_refusals(classes, MATRICES)))
