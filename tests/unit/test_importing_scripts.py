"""A training script of TRL's is read by its syntax tree: plain values become settings, computed ones are named, nothing is run."""

from pathlib import Path

import pytest

from launcher.init.importing.importing import Imported, import_files
from trainer.errors import ConfigError

SCRIPT = """
import torch
from trl import DPOConfig, DPOTrainer
NAME = "Qwen/Qwen2.5-0.5B"
raise SystemExit("a script is never run")
quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(NAME, quantization_config=quantized, dtype=torch.bfloat16)
rows = load_dataset("json", data_files="pairs.jsonl", split="train[:200]")
arguments = DPOConfig(
    output_dir="out/dpo", beta=0.2, max_length=512, eval_strategy="epoch", save_strategy="epoch", run_name=f"x{NAME}"
)
trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, peft_config=LoraConfig(r=4, lora_dropout=0.1))
"""


def imported(tmp_path: Path, text: str) -> Imported:
    (tmp_path / "dpo.py").write_text(text)
    return import_files([tmp_path / "dpo.py"])


def test_calls_with_plain_values_become_settings(tmp_path: Path) -> None:
    found = imported(tmp_path, SCRIPT)
    wanted = {
        "model.base": "Qwen/Qwen2.5-0.5B",
        "model.dtype": "bf16",
        "quant.type": "nf4",
        "quant.double": True,
        "objective.name": "dpo",
        "objective.beta": 0.2,
        "tuning.rank": 4,
        "data.train": [{"path": "pairs.jsonl", "take": 200}],
        "data.sequence_length": 1024,
        "checkpoint.per_epoch": 1,
    }
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert "tuning.dropout" not in found.settings, "TRL turns it off"
    assert "eval.per_epoch" not in found.settings, "nothing is evaluated"
    assert found.to_do[0] == "run_name: f'x{NAME}' is computed by the script, which is not run. Give the value."


@pytest.mark.parametrize(
    ("text", "words"), [("def (", "is no Python that can be read"), ("print(1)", "calls none of SFTConfig, DPOConfig")]
)
def test_what_is_no_training_script_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(tmp_path, text)
