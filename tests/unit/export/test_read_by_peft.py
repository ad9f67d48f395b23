"""An adapter is written by names under which PEFT loads all of it. The families are those whose present names PEFT
takes for names in files.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from tests.every_model import settings_of
from tests.material import byte_tokenizer
from trainer.base.find.locate import describe_base
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.export.write import adapter as adapter_files
from trainer.export.write.adapter import as_peft_reads
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX

RANK = 2


def adapter(shapes: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """LoRA's files of rank 2 over the named layers of (out, in) features."""
    weights = {}
    for name, (out, given) in shapes.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(RANK, given)
        weights[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(out, RANK)
    settings = {"peft_type": "LORA", "r": RANK, "target_modules": list(shapes), "task_type": "CAUSAL_LM"}
    return {PEFT_WEIGHTS: save(weights), PEFT_SETTINGS: json.dumps(settings).encode()}


@pytest.mark.parametrize(
    ("kind", "layer", "saved"),
    [
        ("laguna", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        ("laguna", "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.shared_expert.down_proj"),
        ("llama", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("inkling2_text", "model.layers.1.self_attn.k_proj.sconv.weight_proj", None),
    ],
)
def test_an_adapter_is_saved_by_names_that_peft_reads_or_refused(
    tmp_path: Path, kind: str, layer: str, saved: str | None
) -> None:
    config = settings_of(kind)
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        weight = AutoModelForCausalLM.from_config(config).get_submodule(layer).weight
    files, model = adapter({layer: tuple(weight.shape)}), Model(base=str(tmp_path))
    if saved is None:
        with pytest.raises(ConfigError, match=r"--format peft: PEFT would load .* --format merged"):
            as_peft_reads(files, model)
        architecture = describe_base(model).architecture
        assert layer not in architecture.linear_layers()  # so that a run adapts what can be exported
        return
    names = {f"{PREFIX}{saved}.lora_{matrix}.weight" for matrix in "AB"}
    assert set(load(as_peft_reads(files, model)[PEFT_WEIGHTS])) == names


@pytest.mark.parametrize(
    ("layers", "more"), [("a", ""), ("ab", " and of 1 more layers"), ("cab", " and of 2 more layers")]
)
def test_the_refusal_names_the_first_layer_that_peft_would_leave_out_and_counts_the_others(
    monkeypatch: pytest.MonkeyPatch, layers: str, more: str
) -> None:
    lost = {f"{PREFIX}{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    monkeypatch.setattr(adapter_files, "_left_out", lambda *_: lost)
    monkeypatch.setattr(adapter_files, "_loaded", lambda *_: None)
    monkeypatch.setattr(adapter_files, "saved_paths", lambda model, names: dict.fromkeys(names))
    with pytest.raises(
        ConfigError, match=f"without the weights of {PREFIX}a{more}, as it takes their names for others"
    ):
        as_peft_reads(adapter(dict.fromkeys(layers, (2, 2))), Model(base="b"))
