"""The tiny bases of tests/families.py are stored as the families' published models are."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, rows
from tests.material import make_base
from tests.stored import read_index
from trainer.store.store import open_store

# Names in the index of a published model of the family, where transformers calls or shapes the parameters otherwise.
PUBLISHED = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    "qwen3-moe": ("model.layers.1.mlp.experts.4.gate_proj.weight",),
    "qwen2-moe": ("model.layers.0.mlp.experts.4.up_proj.weight", "model.layers.0.mlp.shared_expert_gate.weight"),
    "qwen3-next": ("model.layers.0.linear_attn.in_proj_qkvz.weight", "model.layers.1.mlp.experts.0.down_proj.weight"),
    "gpt-oss": ("model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.self_attn.sinks"),
    "gemma4": ("model.embed_tokens_per_layer.weight", "model.layers.0.layer_scalar"),
    "deepseek-v3": ("model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.experts.5.up_proj.weight"),
    "minimax-m2": (
        "model.layers.0.block_sparse_moe.e_score_correction_bias",
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    ),
    "nemotron-h": (
        "backbone.embeddings.weight",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.1.mixer.experts.0.up_proj.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
    ),
    "llama4": ("model.layers.1.feed_forward.experts.gate_up_proj", "model.layers.1.feed_forward.router.weight"),
    "granitemoe": ("model.layers.0.block_sparse_moe.input_linear.weight",),
    "ernie4_5-moe": ("model.layers.1.mlp.moe_statics.e_score_correction_bias",),
    "kimi-linear": ("model.layers.1.block_sparse_moe.experts.0.w1.weight",),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    return cache(lambda kind: make_base(folder / kind, kind))


@pytest.mark.parametrize("kind", rows(FAMILIES))
def test_the_files_are_several_and_hold_what_transformers_reads(base_of: Callable[[str], Path], kind: str) -> None:
    read: Any = AutoModelForCausalLM.from_pretrained(base_of(kind), dtype=torch.bfloat16, output_loading_info=True)
    model, report = read
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert len(list(base_of(kind).glob("*.safetensors"))) > 1
    constant = [name for name, value in model.state_dict().items() if value.numel() > 1 and value.min() == value.max()]
    assert not constant, "a mix-up of these would not be seen"


@pytest.mark.parametrize("kind", PUBLISHED)
def test_tensors_have_the_names_of_published_models(base_of: Callable[[str], Path], kind: str) -> None:
    assert set(PUBLISHED[kind]) <= read_index(open_store(str(base_of(kind)))).keys()
