"""A training script of TRL's is read by its syntax tree: plain values become settings, computed ones are named, nothing
is run.
"""

import json
from pathlib import Path
from typing import Any

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
    output_dir="out/dpo", beta=0.2, max_length=512, eval_strategy="epoch", save_strategy="epoch", run_name=f"x{NAME.upper()}"
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
    assert found.to_do[0] == "run_name: f'x{NAME.upper()}' is computed by the script, which is not run. Give the value."


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
dataset = load_dataset("owner/others")
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
    cells = [
        "%%bash\npip install x",
        "%%capture\nif True:\n    !pip install \\\n  trl\n",
        f"%%time\n{NOTEBOOK}",
        "?SFTConfig\n"[1:],
    ]
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
    of_a_reward = model.replace("Trainer(", "RewardTrainer(").replace(given, "num_labels=1")
    of_a_reward = imported(tmp_path, f"{of_a_reward}LoraConfig(lora_dropout=0.1)\n")
    assert of_a_reward.settings["objective.name"] == "reward", "as its trainer says"


def test_a_trainers_first_argument_may_be_the_base(tmp_path: Path) -> None:
    found = imported(tmp_path, "SFTTrainer('Qwen/Qwen3-0.6B', args=SFTConfig(output_dir='o'))").settings
    assert (found["model.base"], found["tuning.method"]) == ("Qwen/Qwen3-0.6B", "full")


TRAINER = "SFTTrainer('b', args=SFTConfig(), "


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
        ("m = LlamaForCausalLM(c)\nTrainer(m, TrainingArguments())", "calls LlamaForCausalLM"),
        (
            "m = AutoModelForCausalLM.from_config(c)\nTrainer(m, TrainingArguments())",
            "calls AutoModelForCausalLM.from_c",
        ),
        (f"from peft import IA3Config\n{TRAINER}peft_config=IA3Config())", "calls PEFT's IA3Config"),
        (f"import peft\n{TRAINER}peft_config=peft.IA3Config())", "calls PEFT's IA3Config"),
        (f"{TRAINER}peft_config=chosen())", "computes the kind of its adapter"),
        (f"{TRAINER})\nfor p in m.parameters():\n    p.requires_grad = False", "sets p.requires_grad"),
        (f"model.lm_head.requires_grad_(True)\nLoraConfig(r=8)\n{TRAINER})", "calls model.lm_head.requires_grad_"),
        (f"class T(SFTTrainer):\n    def compute_loss(self): ...\n{TRAINER})", "its own, with compute_loss"),
        (f"{TRAINER}compute_loss_func=mine)", "has a loss of its own"),
        (f"{TRAINER}data_collator=DataCollatorForLanguageModeling(t, mlm=True))", "guessed"),
        (f"model.model.layers = model.model.layers[:4]\n{TRAINER})", "replaces model.model.layers"),
        (f"m = PeftModel.from_pretrained(m, 'a', is_trainable=True)\n{TRAINER})", "goes on with an adapter"),
    ],
)
def test_what_is_no_training_script_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("for p in m.parameters():\n    p.requires_grad = False\nLoraConfig(r=8)\n", "lora"),
        ("def hook(a, b, output):\n    output.requires_grad_(True)\nLoraConfig(r=8)\n", "lora"),
        ("from transformers import DataCollatorForLanguageModeling as D\nD(t, mlm=False)\n", "full"),
    ],
)
def test_what_changes_nothing_of_what_learns_is_read_over(tmp_path: Path, text: str, method: str) -> None:
    assert imported(tmp_path, f"{text}{TRAINER})").settings["tuning.method"] == method


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizers=(mine, None)", "optim.name: optimizers=(mine, None)"),
        ("data_collator=DataCollatorForCompletionOnlyLM('###')", "data.train_on: what DataCollatorForCompletionOnlyLM"),
    ],
)
def test_what_a_trainer_is_handed_and_only_the_script_knows_is_said(tmp_path: Path, argument: str, said: str) -> None:
    found = imported(tmp_path, f"{TRAINER}{argument})")
    assert any(said in line for line in found.to_do), found.to_do
    assert not any("optim.name" in line for line in imported(tmp_path, f"{TRAINER}optimizers=(None, None))").to_do)


MAPPED = """
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Llama-3.2-1B")
model = FastLanguageModel.get_peft_model(model, r=16)
{before}
dataset = load_dataset("owner/rows", split="train")
dataset = dataset.map(made, batched={batched})
trainer = SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig(learning_rate=2e-4))
{after}
"""
ALPACA = '''
prompt = """### Question:
{}

### Answer:
{}"""
EOS_TOKEN = tokenizer.eos_token
def made(examples):
    """A text of each row."""
    texts = []
    for asked, said in zip(examples["question"], examples["reply"]):
        text = prompt.format(asked, said) + EOS_TOKEN
        texts.append(text)
    return {"text": texts,}
'''
ASKED = """
def talk(examples):
    convos = []
    for asked, said in zip(examples["question"], examples["reply"]):
        convos.append([{"role": "user", "content": asked}, {"role": "assistant", "content": f"{{{said}}}"}])
    return {"conversations": convos}
def made(examples):
    return {"text": [tokenizer.apply_chat_template(one, tokenize=False) for one in examples["conversations"]]}
"""
EACH = """
def made(example):
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": example["talk"][0]["value"]},
        {"role": "assistant", "content": example["talk"][1]["value"]}]}
"""
RENDERED = """
def made(examples):
    convos = examples["dialogue"]
    return {"text": [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False).removeprefix("<bos>")
        for convo in convos]}
"""
STORED = """
def made(example):
    kept = {"said": example["reply"]["text"]}
    example["text"] = f"Q: {example['question']} {{{{?}}}}\\nA: " + kept["said"] + tokenizer.eos_token
    return example
"""


@pytest.mark.parametrize(
    ("before", "batched", "source", "trained"),
    [
        (
            ALPACA,
            True,
            {"format": "text", "write": {"text": "### Question:\n{question}\n\n### Answer:\n{reply}"}},
            None,
        ),
        (
            ASKED + "dataset = dataset.map(talk, batched=True)",
            True,
            {"format": "question_answer", "write": {"question": "{question}", "answer": "{{{reply}}}"}},
            "whole",
        ),
        (
            EACH,
            False,
            {
                "format": "alpaca",
                "write": {"system": "Be brief.", "instruction": "{talk.0.value}", "output": "{talk.1.value}"},
            },
            "whole",
        ),
        (RENDERED, True, {"fields": {"messages": "dialogue"}}, "whole"),
        (STORED, False, {"format": "text", "write": {"text": "Q: {question} {{{{?}}}}\nA: {reply.text}"}}, None),
    ],
)
def test_functions_over_the_rows_are_followed(
    before: str, batched: bool, source: dict[str, Any], trained: str | None, tmp_path: Path
) -> None:
    text = MAPPED.replace("{before}", before).replace("{batched}", str(batched)).replace("{after}", "")
    found = imported(tmp_path, text)
    assert found.settings["data.train"] == [{"path": "hf://owner/rows", **source}]
    assert found.settings.get("data.train_on.roles") == trained
    assert not any("is computed by the script" in line for line in found.to_do)
    # What a name stands for later, when the adapter is tried out, says nothing of the training.
    after = 'prompt = "other {} {}"\ndef made(examples):\n    return {"text": examples["other"]}\ndataset.map(made)'
    assert imported(tmp_path, text + after).settings == found.settings


@pytest.mark.parametrize(
    "rows",
    [
        'dataset = dataset.cast_column("audio", Audio(sampling_rate=24000))',
        'def made(example):\n    return {"text": clean(example["image"])}',
        'def made(example):\n    return {"text": clean(example.get("audio"))}',
    ],
)
def test_rows_of_images_or_sound_are_no_texts(rows: str, tmp_path: Path) -> None:
    text = MAPPED.replace("{before}", ALPACA).replace("{batched}", "True").replace("{after}", "")
    with pytest.raises(ConfigError, match="so of images, video or sound"):
        imported(tmp_path, text.replace("trainer =", f"{rows}\ntrainer ="))
    imported(tmp_path, f"{text}\n{rows}")  # what is tried out after the training


def test_tools_of_a_rendered_conversation_are_a_field(tmp_path: Path) -> None:
    given = RENDERED.replace("tokenize = False,", 'tokenize=False, tools=examples["functions"],')
    text = MAPPED.replace("{before}", given).replace("{batched}", "True").replace("{after}", "")
    (source,) = imported(tmp_path, text).settings["data.train"]
    assert source["fields"] == {"messages": "dialogue", "tools": "functions"}
    (source,) = imported(tmp_path, text.replace("functions", "tools")).settings["data.train"]
    assert source["fields"] == {"messages": "dialogue"}, "here tools are read from a field of that name"


@pytest.mark.parametrize(
    "function",
    [
        "def made(examples):\n    return {'text': [clean(one) for one in examples['text']]}",
        "def made(examples):\n    return {'text': examples['text']}",  # without the end that every text gets here
        "def made(example):\n    for one in example['talk']:\n        text = one['value']\n    return {'text': text}",
        "def made(examples):\n    return {'text': [tokenizer.apply_chat_template(one, tools=t, tokenize=False) for one in examples['talk']]}",
        "def made(examples):\n    if 'a' in examples:\n        return {'text': examples['a'] + tokenizer.eos_token}\n    return {}",
        "def made(examples):\n    return {'other': examples['text']}",
        "def made(examples):\n    return {'chosen': examples['good'], 'prompt': examples['asked']}",
        "def made(example):\n    return {'messages': example['talk']['turns']}",
        "def made(examples):\n    for one in examples['a']:\n        return {'text': one + tokenizer.eos_token}\n    return {'text': examples['b'] + tokenizer.eos_token}",
        "EOS_TOKEN = '<end>'\ndef made(example):\n    return {'text': example['text'] + EOS_TOKEN}",
        "prompt = '{} {}'\ndef made(example):\n    return {'text': prompt.format(example['a']) + tokenizer.eos_token}",
        "def made(example):\n    return {'messages': [{'role': 'user', 'content': example['a'], 'name': 'me'},"
        " {'role': 'assistant', 'content': example['b']}]}",
        *(
            f"def made(examples):\n    return {{'text': [tokenizer.apply_chat_template(one{words}) for one in examples['talk']]}}"
            for words in (
                "",  # ids
                ", tokenize=True",
                ", tokenize=False, add_generation_prompt=True",
                ", tokenize=False, continue_final_message=True",
                ", tokenize=False, add_generation_prompt=asks",
                ", tokenize=False, chat_template=other",
            )
        ),
        "made = compute",
        "def made(example):\n    pass",
        "def made(example):\n    return example['talk']",
        "def made(example):\n    return {'messages': 'Q: ' + example['a']}",
        "def made(example):\n    return {'messages': ['a', 'b']}",
        "def made(example):\n    return {'messages': [{'role': 'assistant', 'content': example['a']},"
        " {'role': 'user', 'content': example['b']}]}",
        "def made(example):\n    return {'messages': [{'role': example['who'], 'content': 'a'},"
        " {'role': 'assistant', 'content': example['a']}]}",
        "def made(example):\n    return {'chosen': {'a': 'x'}, 'rejected': 'b'}",
        "def made(examples):\n    return {'text': [tokenizer.apply_chat_template('a' + one, tokenize=False) for one in examples['talk']]}",
        *(
            f"def made(example):\n    {lines}return {{'text': {text} + tokenizer.eos_token}}"
            for lines, text in (
                ("", "example['a'] + tokenizer.eos_token + example['b']"),
                ("example.kept['b'] = 'a'\n    ", "example['b']"),
                ("example[name] = 'a'\n    ", "example['b']"),
                ("kept = 'a'\n    kept['b'] = 'a'\n    ", "kept['b']"),
                ("", "example[0]"),
                ("", "{name: example['a']}['a']"),
                ("", "{'a': example['a']}['b']"),
                ("", "example['a'] * 2"),
                ("", "example['a'].removeprefix('x')"),
                ("", "'{x} {}'.format(example['a'])"),
                ("", "'{}'.format(example['a'], sep=1)"),
                ("", "BOS + example['a']"),
                ("", "f\"{example['a']!r}\""),
                ("", "f\"{example['a']:>3}\""),
            )
        ),
        *(
            f"def made(examples):\n    {lines}return {{'text': {text}}}"
            for lines, text in (
                ("for a, b, c in zip(examples['a'], examples['b']):\n        kept = a + EOS\n    ", "kept"),
                ("", "[one + EOS for one in examples['a'] if one]"),
            )
        ),
    ],
)
def test_a_function_that_is_not_followed_is_named(function: str, tmp_path: Path) -> None:
    batched = str("examples" in function)
    text = MAPPED.replace("{before}", function).replace("{batched}", batched).replace("{after}", "")
    found = imported(tmp_path, text)
    assert found.settings["data.train"] == [{"path": "hf://owner/rows"}]
    assert any(line.startswith("data.train: its rows, by") for line in found.to_do), found.to_do


@pytest.mark.parametrize(
    ("lines", "text", "written"),
    [
        ("", "example['a'] + EOS", "{a}"),
        ("", "[example['a'] + EOS]", "{a}"),
        ("", "'' + example['a'] + EMPTY + EOS", "{a}"),
        ("", "{'a': example['a']}['a'] + EOS", "{a}"),
        ("", "'{{x}} {}'.format(example['a']) + EOS", "{{x}} {a}"),
        ("example['q'] = 'Q: ' + example['a']\n    ", "example['q'] + EOS", "Q: {a}"),
        ("kept = example['a']['b']\n    ", "kept[0] + EOS", "{a.b.0}"),
        ("'Its text.'\n    pass\n    ", "'A: ' + example['a'] + EOS", "A: {a}"),
    ],
)
def test_a_text_is_written_of_all_parts_that_a_function_adds_up(
    lines: str, text: str, written: str, tmp_path: Path
) -> None:
    function = f"EMPTY = ''\ndef made(example):\n    {lines}return {{'text': {text}}}"
    script = MAPPED.replace("{before}", function).replace("{batched}", "False").replace("{after}", "")
    found = imported(tmp_path, script)
    assert found.settings["data.train"] == [{"path": "hf://owner/rows", "format": "text", "write": {"text": written}}]
    assert not any("is computed" in line for line in found.to_do)


def test_a_conversation_in_the_usual_field_needs_no_name(tmp_path: Path) -> None:
    given = RENDERED.replace("dialogue", "conversations").replace("add_gen", "continue_final_message=False, add_gen")
    text = MAPPED.replace("{before}", given).replace("{batched}", "True").replace("{after}", "")
    found = imported(tmp_path, text)
    assert found.settings["data.train"] == [{"path": "hf://owner/rows"}]
    assert not any("is computed" in line for line in found.to_do)


def test_what_becomes_of_other_rows_says_nothing_of_those_that_are_trained_on(tmp_path: Path) -> None:
    text = MAPPED.replace("{before}", ALPACA).replace("{batched}", "True").replace("{after}", "")
    others = "def other(row):\n    return {'text': row['other'] + tokenizer.eos_token}\n{} = {}.map(other)\ntrainer ="
    for name in ("eval_dataset", "test_data", "valid_ds", "kept"):
        found = imported(tmp_path, text.replace("trainer =", others.replace("{}", name)))
        assert found.settings == imported(tmp_path, text).settings


def test_of_rows_that_are_loaded_under_one_name_the_last_ones_are_trained_on(tmp_path: Path) -> None:
    text = "rows = load_dataset('a/first')\nrows = load_dataset('a/last')\n"
    found = imported(tmp_path, f"{text}SFTTrainer(model='b', args=SFTConfig(), train_dataset=rows)\n")
    assert found.settings["data.train"] == [{"path": "hf://a/last"}]


def test_a_mask_over_a_written_text_is_not_carried_over_silently(tmp_path: Path) -> None:
    after = 'trainer = train_on_responses_only(trainer, "### Question:", "### Answer:")'
    text = MAPPED.replace("{before}", ALPACA).replace("{batched}", "True").replace("{after}", after)
    assert any(line.startswith("data.train: its rows, by a function") for line in imported(tmp_path, text).to_do)


def test_unsloths_template_becomes_the_one_of_that_name(tmp_path: Path) -> None:
    for name, ours, lost in (("chatml", "chatml", False), ("llama-3", "llama3", False), ("vicuna", None, True)):
        given = f"tokenizer = get_chat_template(tokenizer, chat_template={name!r})\n{RENDERED}"
        text = MAPPED.replace("{before}", given).replace("{batched}", "True").replace("{after}", "")
        found = imported(tmp_path, text)
        assert found.settings.get("data.template") == ours
        assert (
            any(outcome.key == "chat_template" and outcome.status == "not supported" for outcome in found.keys) == lost
        )


UNSLOTH = """
model = FastModel.get_peft_model(FastModel.from_pretrained("b")[0], target_modules={targets})
trainer = UnslothTrainer(model, train_dataset=rows, args=UnslothTrainingArguments(learning_rate=1e-4, embedding_learning_rate=1e-5))
"""


def test_embedding_and_head_among_unsloths_targets_learn_whole_at_their_own_rate(tmp_path: Path) -> None:
    found = imported(tmp_path, UNSLOTH.replace("{targets}", '["q_proj", "embed_tokens", "lm_head"]'))
    assert found.settings["tuning.targets"] == ["q_proj"]
    assert found.settings["tuning.modules_to_save"] == ["embed_tokens", "lm_head"]
    assert found.settings["optim.modules_ratio"] == 0.1
    both = imported(tmp_path, UNSLOTH.replace("{targets}", '["q_proj", "lm_head"], modules_to_save=["embed_tokens"]'))
    assert both.settings["tuning.modules_to_save"] == ["embed_tokens", "lm_head"]
    without = imported(tmp_path, UNSLOTH.replace("{targets}", '["q_proj"]'))
    assert "optim.modules_ratio" not in without.settings
    (key,) = (outcome for outcome in without.keys if outcome.key == "embedding_learning_rate")
    assert key.status == "not needed"


def test_unsloths_class_of_the_base_says_what_is_trained(tmp_path: Path) -> None:
    text = """
model, tokenizer = FastModel.from_pretrained("b", auto_model=AutoModelForSequenceClassification, num_labels={labels})
model = FastModel.get_peft_model(model)
Trainer(model, args=TrainingArguments(), train_dataset=load_dataset("a/b"))
"""
    assert imported(tmp_path, text.replace("{labels}", "6")).settings["objective.name"] == "classification"
    with pytest.raises(ConfigError, match="a head of one number"):
        imported(tmp_path, text.replace("{labels}", "1"))


@pytest.mark.parametrize(
    ("loads", "path"),
    [
        ('url = "https://huggingface.co/datasets/a/b/raw/main/c/d.csv"\nrows = load_dataset("csv", data_files={"train": url})', "hf://a/b/c/d.csv"),
        ('rows = load_dataset("csv", data_files="https://huggingface.co/datasets/a/b/resolve/v2/d.csv?download=true")', "hf://a/b@v2/d.csv"),
        ('rows = Dataset.from_json("made.json")', "made.json"),
        ('rows = Dataset.from_csv(path_or_paths="made.csv")', "made.csv"),
    ],
)  # fmt: skip
def test_files_of_rows_are_found_by_their_readers(loads: str, path: str, tmp_path: Path) -> None:
    found = imported(tmp_path, f"{loads}\nSFTTrainer('b', train_dataset=rows, args=SFTConfig())")
    assert found.settings["data.train"] == [{"path": path}]


def test_a_file_of_rows_whose_name_is_computed_is_named(tmp_path: Path) -> None:
    found = imported(
        tmp_path, "rows = Dataset.from_json(f'{x}.json')\nSFTTrainer('b', train_dataset=rows, args=SFTConfig())"
    )
    assert any("what Dataset.from_json(f'{x}.json') reads is computed" in line for line in found.to_do)


def test_products_of_plain_values_are_plain(tmp_path: Path) -> None:
    text = """
rank = 8
model = FastModel.get_peft_model(FastModel.from_pretrained("b")[0], r=rank, lora_alpha=rank * 2)
SFTTrainer(model, args=SFTConfig(bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported()))
"""
    found = imported(tmp_path, text)
    assert (found.settings["tuning.rank"], found.settings["tuning.alpha"]) == (8, 16.0)
    assert not any("is computed" in line for line in found.to_do)


MIXED = """
one = load_dataset("unsloth/OpenMathReasoning-mini", split="cot")
other = load_dataset("a/b", split="train")
def talk(examples):
    found = []
    for asked, said in zip(examples["problem"], examples["solution"]):
        found.append([{{"role": "user", "content": asked}}, {{"role": "assistant", "content": said}}])
    return {{"conversations": found}}
texts = tokenizer.apply_chat_template(list(one.map(talk, batched=True)["conversations"]), tokenize=False)
others = tokenizer.apply_chat_template(list(standardize_sharegpt(other)["conversations"]), tokenize=False)
share = 0.25
some = pd.Series(others)
some = some.sample({count}, random_state=2407)
data = pd.concat([pd.Series(texts), pd.Series(some)])
mixed = Dataset.from_pandas(pd.DataFrame(data))
mixed = mixed.shuffle(seed=1)
SFTTrainer(model="m/m", train_dataset=mixed, args=SFTConfig(max_steps=3))
"""


def test_two_data_sets_that_a_notebook_mixes_are_two_sources(tmp_path: Path) -> None:
    path = tmp_path / "mixed.py"
    path.write_text(MIXED.format(count="int(len(texts) * (share / (1 - share)))"))
    found = import_files([path])
    assert found.settings["data.train"] == [
        {
            "path": "hf://unsloth/OpenMathReasoning-mini",
            "format": "question_answer",
            "write": {"question": "{problem}", "answer": "{solution}"},
            "split": "cot",
        },
        {"path": "hf://a/b", "take": 6417, "take_seed": 2407},
    ]
    assert not [line for line in found.to_do if line.startswith("data.train")]


def test_a_sample_is_as_long_as_it_was_drawn(tmp_path: Path) -> None:
    path, few = tmp_path / "mixed.py", "few = pd.Series(texts)\nfew = few.sample(90, random_state=3)\n"
    path.write_text(MIXED.format(count="int(len(few) / 3)").replace("some = pd", f"{few}some = pd", 1))
    assert [source.get("take") for source in import_files([path]).settings["data.train"]] == [None, 30]


def test_a_share_may_be_added_up(tmp_path: Path) -> None:
    (tmp_path / "mixed.py").write_text(MIXED.format(count="int(9 - 3 + 2 * 0.5)"))
    assert import_files([tmp_path / "mixed.py"]).settings["data.train"][1]["take"] == 7


def test_a_single_data_set_that_a_notebook_renders_is_followed_too(tmp_path: Path) -> None:
    """Rows to evaluate on are what the trainer gets for it, in the same form."""
    text = MIXED.format(count="9").replace("pd.concat([pd.Series(texts), pd.Series(some)])", "pd.Series(texts)")
    test = "eval_dataset=load_dataset('a/c', split='test'), args=SFTConfig(eval_strategy='epoch', "
    (tmp_path / "one.py").write_text(text.replace("args=SFTConfig(", test))
    found = import_files([tmp_path / "one.py"]).settings
    made = {"format": "question_answer", "write": {"question": "{problem}", "answer": "{solution}"}}
    assert found["data.train"] == [{"path": "hf://unsloth/OpenMathReasoning-mini", "split": "cot", **made}]
    assert found["data.eval"] == [{"path": "hf://a/c", "split": "test", **made}]


def test_a_mixture_follows_the_functions_as_they_are_where_it_is_made(tmp_path: Path) -> None:
    path, text = tmp_path / "mixed.py", MIXED.format(count="9")
    path.write_text(text)
    settings = import_files([path]).settings
    earlier = "def talk(examples):\n    return {'conversations': examples['other']}\n"
    path.write_text(text.replace("def talk", f"{earlier}def talk", 1))
    assert import_files([path]).settings == settings, "the newer one of a name counts"
    first = "def first(examples):\n    return {'problem': examples['asked']}\ndef talk"
    twice = text.replace("def talk", first, 1).replace("one.map(talk", "one.map(first, batched=True).map(talk")
    path.write_text(twice)
    train = import_files([path]).settings["data.train"]
    assert train[0]["write"] == {"question": "{asked}", "answer": "{solution}"}, "both maps are followed"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokenize=False)\nothers", "tokenize=False, add_generation_prompt=True)\nothers"),
        ("random_state=2407", "random_state=2407, replace=True"),
        ('tokenizer.apply_chat_template(list(standardize_sharegpt(other)["conversations"]), tokenize=False)', "other"),
        ("pd.Series(some)])", "pd.Series(some), 9])"),
        ("pd.Series(some)])", "pd.Series(unknown)])"),
    ],
)
def test_a_mixture_that_is_made_otherwise_is_asked_for(old: str, new: str, tmp_path: Path) -> None:
    path, text = tmp_path / "mixed.py", MIXED.format(count="9")
    assert old in text
    path.write_text(text.replace(old, new))
    assert any(line.startswith("data.train: what becomes of load_dataset") for line in import_files([path]).to_do)


@pytest.mark.parametrize("count", ["int(len(others) / 2)", "count_of(texts)", "None", "int(texts)", "len(9)"])
def test_a_mixture_whose_share_is_not_known_is_asked_for(count: str, tmp_path: Path) -> None:
    path = tmp_path / "mixed.py"
    path.write_text(MIXED.format(count=count))
    assert [line for line in import_files([path]).to_do if line.startswith("data.train: what becomes of load_dataset")]


PAIRED = """
dataset = load_dataset("owner/pairs", split="train")
def made(row):
    return {"prompt": "Q: " + row["asked"], "chosen": row["good"] + tokenizer.eos_token, "rejected": row["bad"]}
dataset = dataset.map(made)
model = AutoModelForCausalLM.from_pretrained("b")
DPOTrainer(model=model, args=DPOConfig(output_dir="o"), train_dataset=dataset, peft_config=LoraConfig(r=4))
"""


def test_pairs_that_a_function_makes_are_written_as_it_makes_them(tmp_path: Path) -> None:
    found = imported(tmp_path, PAIRED)
    (source,) = found.settings["data.train"]
    assert source["format"] == "preference"
    assert source["write"] == {"prompt": "Q: {asked}", "chosen": "{good}", "rejected": "{bad}"}
    again = imported(tmp_path, PAIRED.replace('row["bad"]', "worse(row)"))
    assert "format" not in again.settings["data.train"][0]
    assert any(line.startswith("data.train: its rows, by dataset.map,") for line in again.to_do)


@pytest.mark.parametrize(
    ("before", "call", "setting", "value"),
    [
        ("", "AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path='a/b')", "model.base", "a/b"),
        ("", "LlamaForCausalLM.from_pretrained('a/b')", "model.base", "a/b"),
        ("", "AutoModelForCausalLM.from_pretrained('a/b', load_in_4bit=True)", "quant.type", "fp4"),
        ("B = 'a/b'\n", "AutoModelForCausalLM.from_pretrained(B)\nB = './out'", "model.base", "a/b"),
        ("L = {'r': 4, 'lora_alpha': 8}\n", "LoraConfig(**L)", "tuning.rank", 4),
        ("L = dict(r=4)\n", "LoraConfig(**L)", "tuning.rank", 4),
        ("L = {'rank': [2, 4]}\n", "LoraConfig(r=L['rank'][1])", "tuning.rank", 4),
        ("big = False\n", "LoraConfig(r=8 if big else 4)", "tuning.rank", 4),
        ("n = 'x'\n", "SFTConfig(output_dir=f'./{n}-run')", "run.name", "x-run"),
        ("p.add_argument('-r', '--rank', type=int, default=4)\n", "LoraConfig(r=args.rank)", "tuning.rank", 4),
        (
            "@dataclass\nclass A:\n    rank: int = field(default=4)\n",
            "LoraConfig(r=script_args.rank)",
            "tuning.rank",
            4,
        ),
        ("def f(r=1):\n    pass\nr = 4\n", "LoraConfig(r=r)", "tuning.rank", 4),
        ("class C:\n    rank = 4\n", "LoraConfig(r=C.rank)", "tuning.rank", 4),
        ("class C:\n    rank: int = 4\nc = C()\n", "LoraConfig(r=c.rank)", "tuning.rank", 4),
        ("def f(r, b=1):\n    return LoraConfig(r=r)\nf(4)\n", "LoraConfig", "tuning.rank", 4),
        ("def f(b, r=4):\n    return LoraConfig(r=r)\nf(1)\n", "LoraConfig", "tuning.rank", 4),
        ("n = 9\n", "LoraConfig(r=n // 2)", "tuning.rank", 4),
        ("r = 2\ndef f():\n    return LoraConfig(r=r)\nr = 4\nf()\n", "LoraConfig", "tuning.rank", 4),
        ("r = 2\nif big:\n    r = 4\n    kept = LoraConfig(r=r)\n", "LoraConfig", "tuning.rank", 4),
        ("a, r = 2, 4\n", "LoraConfig(r=r)", "tuning.rank", 4),
        ("*a, r = [2, 4]\n", "LoraConfig(r=r)", "tuning.rank", 4),
    ],
)
def test_values_are_found_where_a_script_writes_them(
    before: str, call: str, setting: str, value: Any, tmp_path: Path
) -> None:
    text = f"{before}model = {call}\nSFTTrainer(model=model, args=SFTConfig(), peft_config=LoraConfig())\n"
    text = text.replace(", peft_config=LoraConfig()", "") if "LoraConfig" in call else text
    assert imported(tmp_path, text).settings[setting] == value


@pytest.mark.parametrize(
    ("calls", "rank"),
    [
        ("", 2),
        ("f()", 2),
        ("f(4)", 4),
        ("f(r=4)", 4),
        ("f(4)\nf(4)", 4),
        ("f(4)\nf(8)", None),
        ("f(4)\nf()", None),
        ("f(*given)", None),
        ("f(**given)", None),
    ],
)
def test_an_argument_is_what_all_calls_of_a_function_give_it(calls: str, rank: int | None, tmp_path: Path) -> None:
    text = f"def f(r=2):\n    SFTTrainer('b', args=SFTConfig(), peft_config=LoraConfig(r=r))\n{calls}\n"
    found = imported(tmp_path, text)
    asked = any(line.startswith("lora_r: r is computed") for line in found.to_do)
    assert (None if asked else found.settings["tuning.rank"]) == rank


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("", "8 // 0"),
        ("p.add_argument('--rank', default=4)\n", "model.rank"),
        ("p.add_argument('--rank', default=4)\n", "args.own.rank"),
        ("p.add_argument('rank', default=4)\n", "args.rank"),
        ("p.add_argument('--rank', default=None)\n", "args.rank"),
        ("p.add_argument('--rank', default=chosen())\n", "args.rank"),
        ("", "not asked()"),
        ("", "n['a']"),
        ("n = {'b': 4}\n", "n['a']"),
        ("n = 4\n", "n[0]"),
    ],
)
def test_a_value_that_has_no_plain_one_is_computed(before: str, value: str, tmp_path: Path) -> None:
    found = imported(tmp_path, f"{before}SFTTrainer('b', args=SFTConfig(), peft_config=LoraConfig(r={value}))\n")
    assert any(line.startswith(f"lora_r: {value} is computed") for line in found.to_do)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("r = 4\nr *= 2\n", "lora_r: r is computed"),
        ("r = 4\nif big:\n    r = 8\n", "lora_r: r is computed"),
        ("r = 4\nr = choose()\n", "lora_r: r is computed"),
        ("for r in (4, 8):\n    pass\n", "lora_r: r is computed"),
        ("r = parse(options)\n", "lora_r: r is computed"),
        ("a, r = pair\n", "lora_r: r is computed"),
        ("a, *r = 2, 4\n", "lora_r: r is computed"),
        ("def f(r):\n    return LoraConfig(r=r)\nf(4)\nf(8)\n", "lora_r: r is computed"),
    ],
)
def test_a_value_that_depends_on_what_runs_is_asked_for(before: str, said: str, tmp_path: Path) -> None:
    text = f"{before}SFTTrainer(model='b', args=SFTConfig(), peft_config=LoraConfig(r=r))\n"
    assert any(line.startswith(said) for line in imported(tmp_path, text).to_do)
    text = f"{before}SFTTrainer(model='b', args=SFTConfig(**options), peft_config=LoraConfig())\n"
    assert any(line.startswith("what **options says is computed") for line in imported(tmp_path, text).to_do)


def test_defaults_of_a_scripts_own_options_are_said_to_be_some(tmp_path: Path) -> None:
    text = "p.add_argument('--lr', default=3e-4)\nSFTTrainer(model='b', args=SFTConfig(learning_rate=args.lr))\n"
    found = imported(tmp_path, text)
    assert found.settings["optim.lr"] == 3e-4
    assert any("own options have their defaults, such as lr 0.0003" in line for line in found.to_do)
    text = "p.add_argument('--pack-rows', action='{}')\nSFTTrainer(model='b', args=SFTConfig(packing=args.pack_rows))\n"
    found = imported(tmp_path, text.format("store_true"))
    assert found.settings["data.packing"] is False
    assert any("own options have their defaults, such as pack_rows False" in line for line in found.to_do)
    assert "packing: args.pack_rows is computed" in " ".join(imported(tmp_path, text.format("store_false")).to_do)


@pytest.mark.parametrize(
    ("trained", "source", "held_out", "said"),
    [
        ("d['train_sft']", {"split": "train_sft"}, None, ""),
        ("d.select(range(10))", {"take": 10}, None, ""),
        ("d.shuffle(seed=7).select(range(10))", {"take": 10, "take_seed": 7}, None, ""),
        ("d['a'].select(range(5, 15))", {"split": "a", "take": 10, "skip": 5}, None, ""),
        ("d.train_test_split(test_size=0.1, seed=1)['train']", {}, 0.1, ""),
        ("d.train_test_split(train_size=0.9)['train']", {}, 0.1, ""),
        ("d.train_test_split(0.2)['train']", {}, 0.2, ""),
        ("d.train_test_split()['train']", {}, 0.25, ""),
        ("d.shuffle().select(range(10))", {"take": 10, "take_seed": 42}, None, ""),
        ("d['a']['b']", {"split": "a"}, None, "data.train: which rows d['a']['b'] are,"),
        ("d.select(range(-5, 5))", {}, None, "data.train: which rows select(range(-5, 5)) takes,"),
        ("d.shuffle(seed=7).select(range(5, 9))", {}, None, "data.train: which rows select(range(5, 9)) takes,"),
        ("d.take(9).take(5)", {"take": 9}, None, "data.train: which rows take(5) takes,"),
        ("d.unique('q')", {}, None, "data.train: which rows unique('q') leaves,"),
        ("d.shard(4, 0)", {}, None, "data.train: which rows shard(4, 0) leaves,"),
        ("d.skip(3)", {}, None, "data.train: which rows skip(3) leaves,"),
        ("d.train_test_split(share)['train']", {}, None, "data.held_out: what train_test_split(share) leaves out,"),
        ("tidy(d.take(10), 1)", {"take": 10}, None, ""),
        (
            "d.filter(lambda row: row['n'] > 1)",
            {},
            None,
            "data.train: which rows filter(lambda row: row['n'] > 1) leaves,",
        ),
        ("d.select(chosen)", {}, None, "data.train: which rows select(chosen) takes,"),
        ("d.rename_column('q', 'prompt')", {}, None, "data.fields: what rename_column('q', 'prompt') renames,"),
    ],
)
def test_the_rows_are_those_that_the_trainer_gets(
    trained: str, source: dict[str, Any], held_out: float | None, said: str, tmp_path: Path
) -> None:
    text = f"d = load_dataset('a/b')\nd = {trained}\nSFTTrainer(model='b', args=SFTConfig(), train_dataset=d)\n"
    found = imported(tmp_path, text)
    assert found.settings["data.train"] == [{"path": "hf://a/b", **source}]
    assert found.settings.get("data.held_out") == held_out
    assert [line for line in found.to_do if "computed" in line] == [
        f"{line} is computed by the script, which is not run. Give the value." for line in [said] if line
    ]


def test_a_script_evaluates_on_what_its_trainer_is_given(tmp_path: Path) -> None:
    text = "d = load_dataset('a/b', 'sub')\nSFTTrainer(model='b', train_dataset=d['train'], eval_dataset=d['test'],"
    found = imported(tmp_path, f"{text} args=SFTConfig(eval_strategy='steps', eval_steps=5))\n")
    assert found.settings["data.eval"] == [{"path": "hf://a/b", "subset": "sub", "split": "test"}]
    assert found.settings["eval.every"] == 5


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("None", False),
        ("nothing", False),
        ("same", False),
        ("copy.deepcopy(model)", False),
        ("create_reference_model(model)", False),
        ("other", True),
        ("'a/c'", True),
        ("load()", True),
    ],
)
def test_a_reference_that_is_not_the_base_is_said(reference: str, said: bool, tmp_path: Path) -> None:
    text = (
        "model = AutoModelForCausalLM.from_pretrained('a/b')\nsame = AutoModelForCausalLM.from_pretrained('a/b')\n"
        f"other = AutoModelForCausalLM.from_pretrained('a/c')\nnothing = None\nDPOTrainer(model, {reference}, args=DPOConfig())\n"
    )
    found = imported(tmp_path, text)
    assert found.settings["model.base"] == "a/b"
    assert any(line.startswith(f"objective.reference: ref_model={reference}") for line in found.to_do) == said


@pytest.mark.parametrize(
    ("lines", "stored"),
    [
        ("if False:\n    {}", "none"),
        ("if 0:\n    {}\nelse:\n    pass", "none"),
        ("if False:\n    pass\nelse:\n    {}", "fp4"),
        ("if True:\n    {}", "fp4"),
        ("if few_gpus:\n    {}", "fp4"),
    ],
)
def test_what_a_script_never_does_is_not_read(lines: str, stored: str, tmp_path: Path) -> None:
    text = f"{lines.format('BitsAndBytesConfig(load_in_4bit=True)')}\n{TRAINER}peft_config=LoraConfig())"
    assert imported(tmp_path, text).settings["quant.type"] == stored


@pytest.mark.parametrize(("given", "said"), [("last_response_only=True", True), ("last_response_only=False", False)])
def test_unsloths_mask_over_all_but_the_last_turn_is_asked_for(given: str, said: bool, tmp_path: Path) -> None:
    text = f"trainer = {TRAINER}peft_config=LoraConfig())\ntrainer = train_on_responses_only(trainer, {given})\n"
    found = imported(tmp_path, text)
    assert any(line.startswith("data.train_on.turns: last, as last_response_only") for line in found.to_do) == said


def test_evaluations_that_are_no_better_end_a_script_and_its_rows_are_asked_for(tmp_path: Path) -> None:
    text = "SFTTrainer('b', args=SFTConfig(eval_strategy='epoch'), train_dataset=load_dataset('a/b'), eval_dataset="
    stop = "callbacks=[EarlyStoppingCallback(early_stopping_patience=3)])\n"
    found = imported(tmp_path, f"{text}load_dataset('a/b', split='test'), {stop}")
    assert (found.settings["train.stop_when.no_better"], found.settings["checkpoint.keep_best"]) == (3, 1)
    found = imported(tmp_path, f"{text}made(), {stop}")
    assert any(line.startswith("data.eval: eval_dataset=made() is computed") for line in found.to_do)


def test_of_several_trainings_the_first_one_is_read(tmp_path: Path) -> None:
    text = (
        "d = load_dataset('a/b')\na = SFTTrainer(model='b', args=SFTConfig(max_steps=5), train_dataset=d)\n"
        "DPOTrainer(model='b', args=DPOConfig(beta=0.3, packing=True), peft_config=LoraConfig(r=4), train_dataset=d)\n"
    )
    found = imported(tmp_path, text)
    wanted = {"objective.name": "sft", "tuning.method": "full", "train.steps": 5, "data.packing": False}
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert "The script trains 2 times. This is the first one, of line 2." in found.to_do
    found = imported(tmp_path, f"PatchDPOTrainer()\n{text[text.index('DPO') :]}".replace("train_dataset=d", "beta=0.3"))
    assert (found.settings["objective.name"], found.settings["tuning.rank"]) == ("dpo", 4)
    assert not [line for line in found.to_do if line.startswith("The script trains")]


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ("SFTConfig()", "bf16"),
        ("SFTConfig(bf16=False)", "fp32"),
        ("SFTConfig(fp16=True)", "fp32"),
        ("TrainingArguments('o')", "fp32"),
        ("TrainingArguments('o', bf16=True)", "bf16"),
    ],
)
def test_weights_in_fp32_are_computed_with_in_bf16_where_the_trainer_does(
    arguments: str, dtype: str, tmp_path: Path
) -> None:
    text = "model = AutoModelForCausalLM.from_pretrained('b', dtype=torch.float32)\n"
    found = imported(tmp_path, f"{text}SFTTrainer(model=model, args={arguments})\n")
    assert found.settings["model.dtype"] == dtype


def test_a_line_of_a_notebook_that_begins_with_an_operator_is_none_of_the_shell(tmp_path: Path) -> None:
    code = "!pip install trl\n%time\nif (1\n    != 2 and 7\n    % 5):\n    SFTTrainer(model='a/b', args=SFTConfig())\n"
    cells = [{"cell_type": "code", "source": code.splitlines(keepends=True)}]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert import_files([tmp_path / "n.ipynb"]).settings["model.base"] == "a/b"


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ("AutoModelForCausalLM.from_pretrained('Qwen/Qwen3-30B-A3B')", 0.001),
        ("FastLanguageModel.from_pretrained('Qwen/Qwen3-30B-A3B', full_finetuning=True)", 0.0),
    ],
)
def test_unsloths_trainers_balance_no_routers(model: str, loss: float, tmp_path: Path) -> None:
    found = imported(tmp_path, f"model = {model}\nSFTTrainer(model=model, args=SFTConfig())\n")
    assert found.settings["objective.router_loss"] == loss


def test_unsloths_bases_in_8_bits_are_in_no_4(tmp_path: Path) -> None:
    text = "FastModel.get_peft_model(FastModel.from_pretrained('a/b', load_in_8bit=True))"
    found = imported(tmp_path, f"model = {text}\nSFTTrainer(model=model, args=SFTConfig())\n")
    assert found.settings["quant.type"] == "int8"


@pytest.mark.parametrize(
    "text",
    [
        "model = FastLanguageModel.from_pretrained('a/b', full_finetuning=True, qat_scheme='int4')\n",
        "model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained('a/b'), qat_scheme='int4')\n",
    ],
)
def test_learning_for_rounded_weights_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No training learns for weights that are rounded"):
        imported(tmp_path, f"{text}SFTTrainer(model=model, args=SFTConfig())\n")
