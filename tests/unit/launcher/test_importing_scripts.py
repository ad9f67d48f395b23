"""A training script of TRL's is read by its syntax tree: plain values become settings, computed ones are named, nothing
is run.
"""

import json
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
        "quant.type": "fp4",
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


def test_defaults_of_peft_bitsandbytes_and_transformers_are_theirs(tmp_path: Path) -> None:
    text = """
data = load_dataset("owner/quotes").map(lambda row: row)
model = AutoModelForCausalLM.from_pretrained("b", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
model = get_peft_model(model, LoraConfig(bias="none", task_type="CAUSAL_LM", loftq_config={"bits": 4}))
Trainer(model=model, args=TrainingArguments(output_dir="o"), train_dataset=data)
"""
    found = imported(tmp_path, text)
    wanted = {"tuning.rank": 8, "tuning.alpha": 8.0, "tuning.dropout": 0.0, "quant.type": "fp4", "optim.lr": 5e-5}
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not found.settings["train.activation_checkpointing"]
    assert [outcome.key for outcome in found.keys if outcome.status == "not supported"] == ["LoraConfig.loftq_config"]
    assert found.to_do[0].startswith("data.train: its rows, by load_dataset('owner/quotes').map, is computed")


def test_unsloths_models_are_adapters_over_4_bits(tmp_path: Path) -> None:
    text = """
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Llama-3.2-1B", max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing="unsloth", random_state=3)
SFTTrainer(model=model, train_dataset=rows, packing=True, args=SFTConfig(learning_rate=2e-4, seed=5))
"""
    found = imported(tmp_path, text).settings
    wanted = {
        "model.base": "unsloth/Llama-3.2-1B",
        "quant.type": "nf4",
        "quant.double": True,
        "tuning.method": "lora",
        "tuning.rank": 4,
        "tuning.alpha": 16.0,
        "data.sequence_length": 512,
        "data.packing": True,
        "run.seed": 5,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert "down_proj" in found["tuning.targets"]


NOTEBOOK = """
dataset = load_dataset("owner/talk", split="train")
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/gemma-3-4b-it", load_in_4bit=True)
model = FastModel.get_peft_model(model, r=8, finetune_vision_layers=False, finetune_mlp_modules=False)
trainer = SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig(learning_rate=2e-4, completion_only_loss=False))
trainer = train_on_responses_only(trainer, instruction_part="<user>", response_part="<model>")
if False:
    model, tokenizer = FastModel.from_pretrained(model_name="gemma_lora", load_in_8bit=True)
other = AutoPeftModelForCausalLM.from_pretrained("gemma_lora")
held_out = load_dataset("owner/talk", split="test")
"""


def test_what_is_loaded_to_try_the_adapter_is_not_what_was_trained(tmp_path: Path) -> None:
    found = imported(tmp_path, NOTEBOOK)
    wanted = {
        "model.base": "unsloth/gemma-3-4b-it",
        "quant.type": "nf4",
        "tuning.targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "data.train": [{"path": "hf://owner/talk"}],
        "data.train_on.roles": None,
    }
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not [outcome.key for outcome in found.keys if outcome.status == "not supported"]
    assert not any("data.train_on" in line for line in found.to_do)


def test_the_base_is_what_the_trainer_is_given_and_no_reference(tmp_path: Path) -> None:
    text = """
mine = AutoModelForCausalLM.from_pretrained("trained")
reference = AutoModelForCausalLM.from_pretrained("kept")
a = load_dataset("owner/a")
b = load_dataset("owner/b")
both = concatenate_datasets([a, b])
DPOTrainer(model=mine, ref_model=reference, train_dataset=both, args=TrainingArguments(seed=1))
"""
    found = imported(tmp_path, text)
    assert (found.settings["model.base"], found.settings["objective.name"]) == ("trained", "dpo")
    assert any(line.startswith("data.train: what becomes of load_dataset('owner/b')") for line in found.to_do)


def test_the_code_cells_of_a_notebook_are_a_script(tmp_path: Path) -> None:
    cells = ["%%bash\npip install x", "%%capture\nif True:\n    !pip install \\\n  trl\n", NOTEBOOK, "?SFTConfig\n"[1:]]
    told = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    words = {"cell_type": "markdown", "source": ["SFTConfig is (not code"]}
    (tmp_path / "tuned.ipynb").write_text(json.dumps({"cells": [words, *told]}))
    assert import_files([tmp_path / "tuned.ipynb"]).settings == imported(tmp_path, NOTEBOOK).settings
    (tmp_path / "tuned.ipynb").write_text("{}")
    with pytest.raises(ConfigError, match="is no notebook that can be read"):
        import_files([tmp_path / "tuned.ipynb"])


@pytest.mark.parametrize(
    ("given", "objective"),
    [
        ("num_labels=3", "classification"),
        ("num_labels=3, problem_type='multi_label_classification'", "multilabel_classification"),
    ],
)
def test_a_head_is_classification_and_no_language_model(tmp_path: Path, given: str, objective: str) -> None:
    model = (
        f"m = AutoModelForSequenceClassification.from_pretrained('b', {given})\nTrainer(m, TrainingArguments(seed=1))\n"
    )
    found = imported(tmp_path, f"{model}load_dataset('imdb')\nLoraConfig(lora_dropout=0.1)\n")
    wanted = {"objective.name": objective, "tuning.dropout": 0.1, "data.sequence_length": 1024}
    assert {name: found.settings.get(name) for name in wanted} == wanted, "as with no answers to compare"
    assert any("hf://OWNER/imdb" in line for line in found.to_do)


def test_a_trainers_first_argument_may_be_the_base(tmp_path: Path) -> None:
    found = imported(tmp_path, "SFTTrainer('Qwen/Qwen3-0.6B', args=SFTConfig(output_dir='o'))").settings
    assert (found["model.base"], found["tuning.method"]) == ("Qwen/Qwen3-0.6B", "full")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def (", "is no Python that can be read"),
        ("print(1)", "calls none of SFTConfig, DPOConfig"),
        ("a = SFTConfig()\nb = GRPOConfig()", "calls GRPOConfig: this is no training that can be carried over"),
        ("m = AutoModelForSeq2SeqLM.from_pretrained('t5')\nTrainingArguments()", "calls AutoModelForSeq2SeqLM"),
        ("GRPOTrainer('b', args=TrainingArguments())", "calls GRPOTrainer"),
        ("SFTTrainer('b', UnslothVisionDataCollator(m, t), args=SFTConfig())", "calls UnslothVisionDataCollator"),
        ("m = FastVisionModel.from_pretrained('v')\nSFTConfig()", "calls FastVisionModel"),
        (
            "m = AutoModelForSequenceClassification.from_pretrained('b', num_labels=1)\nTrainingArguments()",
            "a head of one number: this is no training that can be carried over",
        ),
    ],
)
def test_what_is_no_training_script_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(tmp_path, text)
