"""A base of whose config.json something is not understood has sizes that nobody knows."""

from typing import Any

import pytest

from tests.unit.base.test_published_models import MODELS
from tests.unit.plan.test_plan import LLAMA_70B
from trainer.base.describe.description import describe, unrecognised

ARCHITECTURE = describe(LLAMA_70B).architecture


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({}, None),
        (
            {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}},
            None,
        ),  # read, or refused, by the formats
        ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, None),
        ({"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}, None),
        ({"expert_dtype": "fp4"}, "expert_dtype"),
        ({"llm": {"quantization_config": {"quant_method": "fp8"}}}, "llm.quantization_config"),
        ({"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}, "16 experts (ffn_config.moe_num_experts)"),
        ({"n_routed_experts": 512, "moe_topk": 12}, "512 experts (n_routed_experts)"),
        ({"llm": {"quantization_config": None}, "expert_dtype": ""}, None),
        ({"num_experts": 1}, None),
        ({"num_experts": None, "n_shared_experts": 2}, None),
        ({"num_local_experts": 4, "num_experts_per_tok": 4}, None),  # each token passes all of them
    ],
)
def test_formats_and_experts_that_nobody_read_are_named(more: dict[str, Any], named: str | None) -> None:
    found = unrecognised({**LLAMA_70B, **more}, ARCHITECTURE)
    assert [named in sentence for sentence in found] == [True] if named else not found


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_understood(name: str) -> None:
    assert not describe(MODELS[name].config).unrecognised
