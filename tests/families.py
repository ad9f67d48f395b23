"""Tiny settings of the families of models, each with every kind of layer that its family has.

Hybrid patterns, dense layers before mixtures of experts, layers with and without a sliding window, with and without
rotary positions: a base of two to four layers has all of them. No size is a power of two where it need not be, so that
no weight has whole blocks and no two matrices of one layer have one shape by chance.
"""

from collections.abc import Container, Iterable
from typing import Any

# Families that together have every kind of layer and of storage, for those tests that are a table of families.
QUICK = (
    *("llama", "phi3", "gemma2", "gpt-oss", "qwen3-next", "gemma4", "deepseek-v3", "nemotron-h", "llama4"),
    "granitemoe-hybrid",
)


def rows(values: Iterable[Any], quick: Container[Any] = QUICK) -> list[Any]:
    """The values as a test's parameters, of which all but the `quick` ones are marked long; a tuple is of several
    parameters.
    """
    return [value if value in quick else _long(*value if isinstance(value, tuple) else (value,)) for value in values]


def _long(*values: Any) -> Any:
    import pytest  # not on a machine that is lent for its card, where benchmarks/gpu.py takes the families below

    return pytest.param(*values, marks=pytest.mark.long)


# A vocabulary of 256 bytes and three special tokens.
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Ordinary decoders of an awkward width, whose heads together are not as wide as the hidden states.
_NARROW: dict[str, Any] = {"hidden_size": 44, "head_dim": 10, "intermediate_size": 70}
# The rotary frequencies of YaRN, which differ from one stretch of positions to the next.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Multi-head latent attention, as DeepSeek-V2 has it.
_LATENT: dict[str, Any] = {
    "hidden_size": 44,
    "intermediate_size": 70,
    "num_key_value_heads": 4,
    "q_lora_rank": 22,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
# A router that chooses groups of experts first; six experts, two a token, and a shared one.
_GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 19,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
# Gated DeltaNet in turn with full attention.
_DELTA: dict[str, Any] = {
    **_NARROW,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 12,
}
_GRANITE: dict[str, Any] = {
    "hidden_size": 44,
    "num_attention_heads": 2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
}

# The name of a base here -> its model_type and its settings beside `SIZES`, for tests that go over many cases of each.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "phi3": {"model_type": "phi3", "sliding_window": 16},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 24, "sliding_window": 16, "tie_word_embeddings": True},
    # Experts of 3,010 and 1,505 weights: an odd number of nibbles, and no whole blocks.
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 35,
        "head_dim": 10,
        "intermediate_size": 43,
        "num_local_experts": 3,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "moe_intermediate_size": 43,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "hidden_size": 35,
        "head_dim": 10,
        "intermediate_size": 43,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    # Weights whose number is no multiple of a block: 1,440, 720 and 1,800.
    "ragged": {
        "model_type": "llama",
        "hidden_size": 36,
        "head_dim": 10,
        "intermediate_size": 50,
        "num_hidden_layers": 1,
    },
    # Tensors smaller than a block, and odd numbers of weights: 10 and 35.
    "speck": {
        "model_type": "llama",
        "hidden_size": 5,
        "head_dim": 2,
        "intermediate_size": 7,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    },
}

# The same, of every family: for tests that go over each once.
FAMILIES: dict[str, dict[str, Any]] = {
    **{kind: settings for kind, settings in KINDS.items() if kind not in ("llama-tied", "ragged", "speck")},
    "gemma3-mixed": {**KINDS["gemma3"], "layer_types": ["sliding_attention", "full_attention"]},
    # Its queries are scaled by their positions, beyond the 16th.
    "ministral3": {
        "model_type": "ministral3",
        **_NARROW,
        "rope_parameters": {**_YARN, "max_position_embeddings": 256, "llama_4_scaling_beta": 0.1},
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "hidden_size": 44,
        "intermediate_size": 70,
        "num_attention_heads": 2,
        "moe_intermediate_size": 19,
        "shared_expert_intermediate_size": 27,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        **_DELTA,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "moe_intermediate_size": 19,
        "shared_expert_intermediate_size": 27,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [2],
    },
    "qwen3_5": {"model_type": "qwen3_5_text", **_DELTA},
    "qwen3_5-moe": {
        "model_type": "qwen3_5_moe_text",
        **_DELTA,
        "moe_intermediate_size": 19,
        "shared_expert_intermediate_size": 27,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    # Embeddings of each layer's own, and layers that take keys and values from an earlier one, as E2B has them.
    "gemma4": {
        "model_type": "gemma4_text",
        "hidden_size": 44,
        "head_dim": 10,
        "global_head_dim": 12,
        "intermediate_size": 50,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": 259,
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 2.0,
    },
    # Experts beside a dense MLP, and keys that are values too, as 26B-A4B has them.
    "gemma4-moe": {
        "model_type": "gemma4_text",
        "hidden_size": 44,
        "head_dim": 10,
        "global_head_dim": 12,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "intermediate_size": 50,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 19,
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        **_LATENT,
        **_GROUPED,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **_LATENT,
        **_GROUPED,
        "first_k_dense_replace": 1,
        "rope_parameters": _YARN,
    },
    "glm4": {"model_type": "glm4", **_NARROW, "head_dim": 12, "attention_bias": True},
    "glm4-moe": {
        "model_type": "glm4_moe",
        **_NARROW,
        **_GROUPED,
        "head_dim": 12,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "glm4-moe-lite": {
        "model_type": "glm4_moe_lite",
        **_LATENT,
        **_GROUPED,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax-m2": {
        "model_type": "minimax_m2",
        "hidden_size": 44,
        "head_dim": 12,
        "rotary_dim": 6,
        "intermediate_size": 19,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "nemotron-h": {
        "model_type": "nemotron_h",
        "hidden_size": 44,
        "head_dim": 10,
        "intermediate_size": 70,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 10,
        "n_groups": 2,
        "chunk_size": 16,
        **_GROUPED,
        "moe_shared_expert_intermediate_size": 27,
    },
    # Chunks, positions without rotation, and a temperature that grows with the position, beyond the 16th.
    "llama4": {
        "model_type": "llama4_text",
        "hidden_size": 44,
        "head_dim": 10,
        "intermediate_size": 19,
        "intermediate_size_mlp": 70,
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 1, 0],
        "moe_layers": [1, 2],
        "num_local_experts": 5,
        "attention_chunk_size": 16,
        "floor_scale": 16,
    },
    "olmo2": {"model_type": "olmo2", "hidden_size": 44, "num_attention_heads": 2, "intermediate_size": 70},
    "olmo3": {
        "model_type": "olmo3",
        "hidden_size": 44,
        "num_attention_heads": 2,
        "intermediate_size": 70,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "olmoe": {
        "model_type": "olmoe",
        "hidden_size": 44,
        "num_attention_heads": 2,
        "intermediate_size": 19,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "smollm3": {
        "model_type": "smollm3",
        "hidden_size": 44,
        "num_attention_heads": 2,
        "intermediate_size": 70,
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
    },
    "granite": {"model_type": "granite", **_GRANITE, "intermediate_size": 70},
    "granitemoe": {
        "model_type": "granitemoe",
        **_GRANITE,
        "intermediate_size": 19,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "granitemoe-hybrid": {
        "model_type": "granitemoehybrid",
        **_GRANITE,
        "intermediate_size": 19,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 27,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 11,
        "mamba_d_state": 6,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 16,
    },
    "seed-oss": {"model_type": "seed_oss", **_NARROW, "attention_out_bias": True},
    "cohere2": {
        "model_type": "cohere2",
        **_NARROW,
        "logit_scale": 0.7,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "exaone4": {
        "model_type": "exaone4",
        **_NARROW,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "ernie4_5": {"model_type": "ernie4_5", **_NARROW, "use_bias": True, "tie_word_embeddings": True},
    "ernie4_5-moe": {
        "model_type": "ernie4_5_moe",
        **_NARROW,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 19,
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    # Values are narrower than queries and keys.
    "mimo-v2-flash": {
        "model_type": "mimo_v2_flash",
        **_NARROW,
        **_GROUPED,
        "head_dim": 18,
        "v_head_dim": 14,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 16,
    },
    "kimi-linear": {
        "model_type": "kimi_linear",
        **_LATENT,
        **_GROUPED,
        "q_lora_rank": None,
        "num_local_experts": 6,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_num_heads": 2,
        "linear_head_dim": 10,
    },
}
