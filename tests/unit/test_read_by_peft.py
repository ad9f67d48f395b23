"""An adapter of which PEFT would load a part is not written. The families are those whose present names PEFT takes for names in files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from tests.every_model import settings_of
from tests.material import byte_tokenizer
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.export.write.read_by_peft import check_peft_reads
from trainer.tuning.shared.peft_folder import PREFIX, SETTINGS, WEIGHTS

RANK = 2


def adapter(shapes: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """LoRA's files of rank 2 over the named layers of (out, in) features."""
    weights = {}
    for name, (out, given) in shapes.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(RANK, given)
        weights[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(out, RANK)
    settings = {"peft_type": "LORA", "r": RANK, "target_modules": list(shapes), "task_type": "CAUSAL_LM"}
    return {WEIGHTS: save(weights), SETTINGS: json.dumps(settings).encode()}


@pytest.mark.parametrize(
    ("kind", "layer", "is_read"),
    [
        ("laguna", "model.layers.1.self_attn.o_proj", True),
        ("laguna", "model.layers.1.mlp.shared_experts.down_proj", False),
        ("llama", "model.layers.1.mlp.down_proj", True),
    ],
)
def test_an_adapter_is_read_whole_or_refused(tmp_path: Path, kind: str, layer: str, is_read: bool) -> None:
    config = settings_of(kind)
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        weight = AutoModelForCausalLM.from_config(config).get_submodule(layer).weight
    files = adapter({layer: tuple(weight.shape)})
    if is_read:
        check_peft_reads(files, Model(base=str(tmp_path)))
    else:
        with pytest.raises(ConfigError, match=r"--format peft: PEFT would load .* --format merged"):
            check_peft_reads(files, Model(base=str(tmp_path)))
