"""Adapters of experts in vLLM's layout are those of PEFT's, by the names that the matrices have in the base's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES
from tests.material import make_base
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import parse_config
from trainer.export.write import adapter
from trainer.export.write.adapter import per_expert_files
from trainer.store.safetensors_index import INDEX_FILE
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.method import method_of

RUN = "run: {name: demo}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"


def exported(base: Path, method: str) -> tuple[dict[str, bytes], Any]:
    """A random adapter of experts (rank 3) and linear layers (rank 4) as it is exported, and the base's settings."""
    settings = (f"model.base={base}", f"tuning.method={method}", "tuning.rank=4", "tuning.alpha=8")
    config = parse_config(RUN, (*settings, "tuning.experts=true", "tuning.experts_rank=3"))
    shapes = method_of(config).shapes(read_architecture(json.loads((base / "config.json").read_bytes())))
    torch.manual_seed(3)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return method_of(config).export(weights, config.model).files, config.model


def merged_by_peft(base: Path, folder: Path, files: dict[str, bytes]) -> dict[str, Tensor]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()


def merged_by_name(base: Path, files: dict[str, bytes]) -> dict[str, Tensor]:
    """vLLM's reading: each weight in the files of `base` has an adapter of its own name, and all have one scaling."""
    described, adapter = json.loads(files[PEFT_SETTINGS]), load(files[PEFT_WEIGHTS])
    assert described["rank_pattern"] == {}
    scaling = described["lora_alpha"] / described["r"] ** (0.5 if described["use_rslora"] else 1)
    found = 0
    for file in base.glob("*.safetensors"):
        weights = load_file(file)
        for name in weights:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.weight" in adapter:
                weights[name] += scaling * adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
                found += 1
        save_file(weights, file, metadata={"format": "pt"})
    assert 2 * found == len(adapter)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen3-moe", "lora"), ("mixtral", "rslora"), ("minimax-m2", "lora"), ("ernie4_5-moe", "rslora")],
)
def test_each_matrix_in_the_files_has_its_part_of_the_stacks_adapter(tmp_path: Path, kind: str, method: str) -> None:
    base = make_base(tmp_path / "base", kind, torch.float32)
    files, model = exported(base, method)
    ours = per_expert_files(files, model)
    described = json.loads(ours[PEFT_SETTINGS])
    assert (described["r"], described["target_parameters"]) == (4, None)
    assert {"down_proj", "w2"} & set(described["target_modules"])
    theirs = merged_by_peft(base, tmp_path / "peft", files)

    broken = {**load(ours[PEFT_WEIGHTS])}
    one = next(name for name in broken if ".experts.1." in name and "lora_B" in name)
    broken[one] = broken[one].flip(0)
    results = [merged_by_name(make_base(tmp_path / "a", kind, torch.float32), ours)]
    results.append(merged_by_name(make_base(tmp_path / "b", kind, torch.float32), {**ours, PEFT_WEIGHTS: save(broken)}))
    close = [all(torch.allclose(found[name], theirs[name], atol=1e-5) for name in theirs) for found in results]
    assert close == [True, False], "the second is the control"


def test_names_are_those_of_the_files_beside_a_prefix_that_transformers_renames(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "nemotron-h", torch.float32)
    files, model = exported(base, "lora")
    stored = {name for file in base.glob("*.safetensors") for name in load_file(file) if ".experts." in name}
    found = {name for name in load(per_expert_files(files, model)[PEFT_WEIGHTS]) if ".experts." in name}
    assert found == {
        f"base_model.model.{name.removesuffix('weight')}{part}.weight"
        for name in stored
        for part in ("lora_A", "lora_B")
    }


def test_of_a_base_in_a_single_file_transformers_knows_how_it_stores_experts(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3-moe", torch.float32)
    files, model = exported(base, "lora")
    ours = per_expert_files(files, model)
    assert ours != files
    (base / INDEX_FILE).unlink()
    assert per_expert_files(files, model) == ours


@pytest.mark.parametrize("kind", ["gpt-oss", "llama4", "gemma4-moe", "qwen3_5-moe"])
def test_pefts_layout_stays_where_files_hold_stacks(tmp_path: Path, kind: str) -> None:
    """transformers writes a Qwen3.5 of text alone expert by expert, and its published files hold stacks: the index says
    so.
    """
    assert kind in FAMILIES
    base = make_base(tmp_path / "base", kind)
    if kind == "qwen3_5-moe":
        (base / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.layers.0.mlp.experts.down_proj": "1"}}))
    files, model = exported(base, "lora")
    assert per_expert_files(files, model) == files


def test_the_parts_of_a_stack_are_matrices_under_the_names_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "experts.0.up.weight": torch.ones(1, 2, 3),
        "experts.1.up.weight": torch.ones(1, 2, 3),
        "gate": torch.ones(2, 1),
    }
    monkeypatch.setattr(adapter, "revert_weight_conversion", lambda model, values: parts if "stack" in values else {})
    model: Any = None
    found = adapter._by_file(model, "stack", torch.ones(2, 2, 3))
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "experts.0.up": (2, 3),
        "experts.1.up": (2, 3),
        "gate": (2, 1),
    }
