"""This file knows which servers take an exported adapter beside its base, by their documented rules.

vLLM: vllm/config/lora.py (`MaxLoRARanks`) gives the ranks. vllm/lora/peft_helper.py covers DoRA, modules_to_save, and
ranks and alphas by module, which it reads as PEFT does. docs.vllm.ai, features/lora, covers experts: each matrix has a
name of its own (`layout=vllm`), unless the server takes both layouts or the base's files hold stacks.

SGLang: python/sglang/srt/lora/lora_config.py and lora_manager.py (`validate_new_adapter`) ask for one rank and one
alpha, no DoRA, and no tokens that the base lacks. docs.sglang.ai, advanced_features/lora, lists the modules.

Both servers read only LoRA, including rsLoRA's scaling, and nothing beside its two matrices.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

VLLM, SGLANG = "vLLM", "SGLang"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_USUAL_RANK = 16
_MATRIX = re.compile(r"\.lora_[AB]\.weight$")
_STACK = re.compile(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$")


def refusals(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the reasons, each a clause, for which each server refuses this adapter.

    The adapter is given by its `settings` (adapter_config.json) and its tensors. A server that takes it has no reasons.
    """
    tensors = list(names)
    both = list(_of_both(settings, tensors))
    return {VLLM: [*both, *_of_vllm(settings, tensors)], SGLANG: [*both, *_of_sglang(settings, tensors)]}


def _of_both(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    if settings.get("peft_type") != "LORA":
        yield f"it loads LoRA adapters, and this is {settings.get('peft_type', 'none of PEFT')}"
        return
    if settings.get("use_dora"):
        yield "it has no DoRA"
    if saved := settings.get("modules_to_save"):
        yield f"it takes no whole modules (modules_to_save: {', '.join(saved)})"
    if settings.get("trainable_token_indices"):
        yield "it takes no rows of new tokens (trainable_token_indices)"
    if settings.get("bias", "none") != "none":
        yield f"it takes no biases (bias: {settings['bias']})"
    known = "modules_to_save", "trainable_token"
    others = [name for name in names if not _MATRIX.search(name) and not any(part in name for part in known)]
    if others and not settings.get("use_dora"):
        yield f"it reads matrices A and B alone, and there is {others[0]}"


def _of_vllm(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    if (rank := _largest_rank(settings)) > VLLM_RANKS[-1]:
        yield f"its largest rank is {VLLM_RANKS[-1]}, and this has {rank}"
    if any(_STACK.search(name) for name in names):
        yield (
            "it wants each expert's matrices by their own names where the base's files have them so: export with"
            " layout=vllm, or start it with --enable-mixed-moe-lora-format and load the adapter with is_3d_lora_weight"
        )


def _largest_rank(settings: Mapping[str, Any]) -> int:
    return max(settings.get("r", 0), *(settings.get("rank_pattern") or {}).values(), 0)


def _of_sglang(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if any(value != settings.get(usual) for value in (settings.get(field) or {}).values()):
            yield f"it knows one {usual} for all modules ({field})"
    if any(_STACK.search(name) for name in names):
        yield "it wants each expert's matrices by their own names: export with layout=vllm"


def remarks(settings: Mapping[str, Any], found: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each server that would refuse, and one with the option that vLLM needs to take the adapter."""
    lines = [f"{server} would refuse it beside its base: {'; '.join(why)}." for server, why in found.items() if why]
    rank = _largest_rank(settings)
    if not found[VLLM] and rank > _VLLM_USUAL_RANK:
        lines.append(f"vLLM takes it with --max-lora-rank {next(size for size in VLLM_RANKS if size >= rank)}.")
    if any(found.values()) and settings.get("task_type", "CAUSAL_LM") == "CAUSAL_LM":
        lines.append("Every server takes the merged model: --format merged.")
    return lines
