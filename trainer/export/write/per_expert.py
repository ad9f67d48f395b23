"""PEFT's folder of adapters on a mixture's experts, in the layout that vLLM reads if it differs from PEFT's.

vLLM reads PEFT's stacked layout for those classes whose files hold a layer's experts as one tensor (`is_3d_moe_weight`,
gpt-oss, Qwen3.5, Llama 4). For the others it expects the adapter of each matrix by itself, under the name that this
matrix has in the files of the base: `...mlp.experts.3.gate_proj.lora_A.weight`,
`...block_sparse_moe.experts.3.w1.lora_A.weight` (https://docs.vllm.ai/en/latest/features/lora, "Mixed 2D and 3D MoE
adapters"; vllm/lora/model_manager.py). It has one rank and one scaling for the whole adapter.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_settings import model_config
from trainer.base.find.locate import base_files, describe_base, in_bucket
from trainer.config import Model
from trainer.errors import NotFound
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import open_store
from trainer.tuning.experts.method import saved_as
from trainer.tuning.shared.linear_adapters import PREFIX, SETTINGS, WEIGHTS

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def per_expert_files(files: Mapping[str, bytes], model: Model) -> dict[str, bytes]:
    """Return an adapter's files, name -> content, with the experts' adapters as vLLM reads them. `model` is the base.

    In a stack gate and up share their A; here each has a copy of it. Everything else stays as it was. An adapter
    without experts, or of a base whose files hold stacks, stays as it was as a whole.
    """
    described: dict[str, Any] = json.loads(files[SETTINGS])
    weights, stacks = load(files[WEIGHTS]), saved_as(describe_base(model).architecture)
    there = {name: saved for name, saved in stacks.items() if f"{PREFIX}{saved.b}.weight" in weights}
    if not there or not _stored_singly(model):
        return dict(files)
    empty = meta_model(model_config(base_files(model), model.layers))
    rank = next(iter(described["rank_pattern"].values()), described["r"])
    power = 0.5 if described["use_rslora"] else 1.0
    factor = math.pow(rank / described["r"], power)  # of the experts' scaling to that of the other adapters
    single, alone = set[str](), set[str]()
    for name, saved in there.items():
        a, b = (weights[f"{PREFIX}{part}.weight"] for part in saved)
        experts = empty.get_parameter(name).shape[0]
        up = b.view(len(b), -1, experts).permute(2, 0, 1)  # (E, outputs, rank)
        ups = _by_file(empty, name, up if factor == 1 else (up.float() * factor).to(up.dtype))
        if len(ups) < experts:
            continue  # the files hold the stack
        down = a.view(experts, -1, a.shape[1]).repeat(1, len(ups) // experts, 1)
        for kind, parts in (("lora_A", _by_file(empty, name, down)), ("lora_B", ups)):
            weights |= {f"{PREFIX}{path}.{kind}.weight": part.contiguous() for path, part in parts.items()}
        for part in saved:
            del weights[f"{PREFIX}{part}.weight"]
        single |= {path.rpartition(".")[2] for path in ups}
        alone.add(".".join(name.split(".")[-2:]))
    if not alone:
        return dict(files)
    others = set(described["target_parameters"]) - alone
    # These are linear layers that only PEFT must be told of by their weights, see `as_peft_reads`.
    linear = {name for name in others if name.endswith(".weight")}
    described["target_parameters"] = sorted(others - linear) or None
    single |= {name.removesuffix(".weight").rpartition(".")[2] for name in linear}
    described["target_modules"] = sorted({*described["target_modules"], *single})
    described |= {"r": rank, "rank_pattern": {}}
    content = save(weights, metadata={"format": "pt"})
    return {**files, WEIGHTS: content, SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode()}


def _stored_singly(model: Model) -> bool:
    """Return whether the files of the base hold experts by themselves.

    A single file needs no index; then transformers tells.
    """
    try:
        index = (
            open_store(model.base, setting="model.base").get(INDEX_FILE)
            if in_bucket(model.base)
            else (base_files(model) / INDEX_FILE).read_bytes()
        )
    except (NotFound, FileNotFoundError):
        return True
    return any(_ONE_EXPERT.search(name) for name in json.loads(index)["weight_map"])


def _by_file(model: PreTrainedModel, name: str, values: Tensor) -> dict[str, Tensor]:
    """Return `values` of the parameter `name` in the parts and under the names in which transformers would save it.

    The names lack `.weight`.
    """
    parts = revert_weight_conversion(model, {name: values})
    return {
        path.removesuffix(".weight"): torch.squeeze(part, 0) if part.ndim > 2 else part for path, part in parts.items()
    }
