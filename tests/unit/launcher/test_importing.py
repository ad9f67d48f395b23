"""Other tools' configurations become ours: every key that they document is carried over or named with a reason, and
what comes out is planned.
"""

import ast
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.init.importing.importing import JOINS, Imported, import_files
from launcher.init.importing.mapping import Outcome, source_paths
from tests.material import make_base, make_labelled, make_pairs
from trainer.config import fields, load_config, parse_config
from trainer.config.peers.table import Needless, RefusedKey, To, Together, Unsupported
from trainer.config.source import with_replaced
from trainer.data.format.formats import RowForm
from trainer.data.render.chat_template import template_text
from trainer.errors import ConfigError

PEERS = Path(__file__).parents[2] / "peers"
DATASET_INFO = PEERS / "data" / "dataset_info.json"
_BESIDE = ("accelerate.yaml", DATASET_INFO.name)
FILES = sorted(path for path in PEERS.glob("*/*.*") if path.is_file() and path.name not in _BESIDE)
SETTINGS = {name for name, _ in fields()}
# Modules whose classes say which keys TRL's scripts and accelerate take, as they are installed.
CLASSES = {
    "trl": [
        ("transformers", "training_args.py"),
        *[("trl", f"trainer/{name}_config.py") for name in ("base", "sft", "dpo", "kto", "model")],
        ("trl", "experimental/orpo/orpo_config.py"),
        ("trl", "experimental/cpo/cpo_config.py"),
        ("trl", "scripts/utils.py"),
    ],
    "accelerate": [("accelerate", "commands/config/config_args.py")],
}
# The values of keys with which a file would be another training.
ORDINARY = {
    "stage": "sft",
    "rl": "dpo",
    "reward_model": False,
    "adapter": "lora",
    "finetuning_type": "lora",
    "tuner_type": "lora",
    "train_type": "lora",
    "name": "lora",
    "use_peft": True,
    "skip_prepare_dataset": False,
    "export_dir": "",
    **dict.fromkeys("pref_loss pref_beta pref_ftx".split(), None),
    **dict.fromkeys(JOINS["llamafactory"][0].tables["media"].split(), False),
    **dict.fromkeys(" ".join(JOINS["ms-swift"][0].tables[name] for name in ("media", "pictures")).split(), None),
    **dict.fromkeys(("task_type", "problem_type", "num_labels"), None),
    "rlhf_type": "dpo",
    "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
    "_target_": "NeMoAutoModelForCausalLM.from_pretrained",
    "peft._target_": "PeftConfig",
    "loss_fn._target_": "MaskedCrossEntropy",
}
OF_A_SOURCE = ("DatasetConfig",)
EXPECTED: dict[str, dict[str, Any]] = yaml.safe_load((PEERS / "expected.yaml").read_text())


def documented(peer: str) -> Iterator[str]:
    """The keys that a peer documents: of the lists in tests/peers, or of the classes of the installed package."""
    if (listed := PEERS / f"{peer}.txt").exists():
        yield from listed.read_text().split()
    for package, name in CLASSES.get(peer, ()):
        spec = importlib.util.find_spec(package)
        assert spec
        assert spec.submodule_search_locations
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / name).read_text())
        for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            place = "datasets[]." if kind.name in OF_A_SOURCE else ""
            for line in kind.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield f"{place}{line.target.id}"


def test_control_characters_and_line_breaks_of_a_file_stay_in_its_comments(tmp_path: Path) -> None:
    """A file of ours with any of them could not be read, and a terminal would obey them."""
    theirs = 'base_model: "x\\e]0;title\\a"\n"odd\\e[31m\\nrun: {seed: 5}\\u2028#": 3\nadapter: lora\n'
    text = imported_text(theirs + "datasets: [{path: a.jsonl, type: alpaca}]\n", tmp_path, "axolotl").text
    assert "\x1b" not in text
    assert yaml.safe_load(text)["model"]["base"] == "x\x1b]0;title\x07"
    assert yaml.safe_load(text)["run"]["seed"] == 42


@pytest.mark.parametrize("peer", JOINS)
def test_every_documented_key_is_carried_over_or_named_with_a_reason(peer: str, tmp_path: Path) -> None:
    keys = sorted(set(documented(peer)))
    assert len(keys) > 30
    tree: dict[str, Any] = {}
    for key in keys:
        node, *inner = tree, *key.split(".")
        *around, leaf = inner
        for part in around:
            below = [{}] if part.endswith("[]") else {}
            node = node.setdefault(part.removesuffix("[]"), below)
            node = node[0] if isinstance(node, list) else node
            if not isinstance(node, dict):
                break
        else:
            refused = isinstance(JOINS[peer][0].row(key), RefusedKey)
            node.setdefault(
                leaf.removesuffix("[]"), None if refused else ORDINARY.get(key, ORDINARY.get(leaf, "something"))
            )
    imported = imported_text(yaml.safe_dump(tree), tmp_path, peer)
    assert len(imported.keys) > 0.9 * len(keys)
    silent = [outcome.key for outcome in imported.keys if not (outcome.settings or outcome.why)]
    assert not silent
    assert [outcome.key for outcome in imported.keys if outcome.status == "unknown"] == []
    assert not [key for key in keys if not JOINS[peer][0].row(key) and not JOINS[peer][0].opens(key)]


def imported_text(text: str, folder: Path, peer: str | None = None) -> Imported:
    (folder / "theirs.yaml").write_text(text)
    return import_files([folder / "theirs.yaml"], peer)


def test_a_key_that_nobody_documents_is_said_to_be_unknown(tmp_path: Path) -> None:
    found = imported_text("base_model: x\nadapter: lora\nmicro_batch_size: 1\nlora_rr: 8\n", tmp_path)
    assert {outcome.key: outcome.status for outcome in found.keys}["lora_rr"] == "unknown"
    assert "lora_rr: 8" in found.text


def test_an_empty_section_is_no_unknown_key(tmp_path: Path) -> None:
    known = "base_model: x\nadapter: lora\nmicro_batch_size: 1\n"
    found = imported_text(f"{known}special_tokens: {{}}\nfsdp_config: {{}}\npeft: {{}}\n", tmp_path, "axolotl")
    of_sections = {outcome.key: outcome.status for outcome in found.keys if outcome.value == {}}
    assert of_sections == {"peft": "not needed"}
    assert not [outcome.key for outcome in found.keys if outcome.status == "unknown"]


@pytest.mark.parametrize("peer", JOINS)
def test_rows_name_settings_that_exist_and_reasons_that_are_sentences(peer: str) -> None:
    for key, row in JOINS[peer][0].rows.items():
        if isinstance(row, To | Together):
            assert row.setting in SETTINGS, key
        elif isinstance(row, Needless | Unsupported | RefusedKey):
            assert re.fullmatch(r"[A-Z`a-z].{20,}\.", row.why), key
    assert set(JOINS[peer][0].defaults) <= set(JOINS[peer][0].rows)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of tests/peers, the data that they name, and small bases in the place of theirs."""
    folder = tmp_path_factory.mktemp("site")
    bases = {kind: make_base(folder / kind, kind, max_position_embeddings=4096) for kind in ("llama", "phi3")}
    for base in bases.values():  # as instruction-tuned bases have one
        told = json.loads((base / "tokenizer_config.json").read_text())
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        (base / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": template}))
    (folder / "data").mkdir()
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows = {
        "talk": talk,
        "texts": {"body": "once upon a time"},
        "alpaca": {"question": "why?", "reply": "because"},
        "squad": {"context": "Bo is.", "question": "Who?", "answers": {"text": ["Bo"], "answer_start": [0]}},
        "hellaswag": {"ctx": "A man", "endings": ["sits.", "stands."], "label": "1"},
        "raw": {"text": "once upon a time"},
        "plain": {"instruction": "say", "input": "", "output": "said"},
    }
    for name, row in rows.items():
        (folder / "data" / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    make_pairs(folder / "data" / "pairs.jsonl")
    make_labelled(folder / "data" / "labelled.jsonl")
    shutil.copy(DATASET_INFO, folder / "data")
    v1 = {"a": {"path": "data/alpaca.jsonl", "converter": "alpaca"}, "b": {"path": "somebody/rows"}}
    (folder / "data" / "v1.yaml").write_text(yaml.safe_dump(v1))
    for path in FILES:
        kind = "phi3" if "phi3" in path.read_text() else "llama"
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_text(path.read_text().replace("BASE", str(bases[kind])))
    return folder


def test_there_are_five_files_or_more_of_each_peer() -> None:
    counts = {
        folder: sum(path.parent.name == folder for path in FILES) for folder in {path.parent.name for path in FILES}
    }
    assert counts == {
        "automodel": 4,
        "axolotl": 6,
        "llamafactory": 5,
        "llamafactory-v1": 1,
        "ms-swift": 4,
        "ms-swift-megatron": 1,
        "trl": 6,
    }
    assert {f"{path.parent.name}/{path.name}" for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_becomes_what_it_says_and_is_planned(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    ours = name.replace("/", "-") + ".yaml"
    done = CliRunner().invoke(app, ["import", name, "-o", ours, "--force", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["from"] == [JOINS[name.split("/")[0]][0].title]  # found out by the keys
    settings = found["settings"]
    assert {key: settings.get(key) for key in EXPECTED[name]} == EXPECTED[name]
    assert not [outcome for outcome in found["keys"] if outcome["status"] == "unknown"]
    load_config(ours)
    planned = CliRunner().invoke(app, ["plan", ours, "--json"])
    assert planned.exit_code == 0, (planned.output, planned.exception)
    assert json.loads(planned.stdout)["memory_per_gpu"]["total"] > 0


def test_data_sets_are_described_by_the_file_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("model_name_or_path: x\nstage: sft\ndataset: texts\n")
    found = import_files([tmp_path / "theirs.yaml"], data_info=DATASET_INFO)
    (source,) = found.settings["data.train"]
    assert source == {
        "path": str(DATASET_INFO.with_name("texts.jsonl")),
        "format": "alpaca",
        "fields": {"instruction": "body"},
    }
    (tmp_path / "theirs.yaml").write_text("base_model: x\nadapter: lora\nmicro_batch_size: 1\n")
    with pytest.raises(ConfigError, match="--data-info: axolotl has no dataset_info.json"):
        import_files([tmp_path / "theirs.yaml"], data_info=DATASET_INFO)


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("axolotl", "base_model: x\nreward_model: true\n"),
        ("llamafactory", "model_name_or_path: x\nstage: rm\nfinetuning_type: full\ndataset: dpo_mix_en\n"),
        ("trl", "model_name_or_path: x\ncenter_rewards_coefficient: 0.1\ndataset_name: a/b\n"),
    ],
)
def test_a_head_over_a_base_that_learns_itself_does_not_become_lora(peer: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuning.method: full has no adapter.* trains the whole base"):
        imported_text(text, tmp_path, peer)


@pytest.mark.parametrize(
    ("sizes", "workers", "rows"),
    [
        ("dp_shard_size: 4\ndp_replicate_size: 2\ncontext_parallel_size: 2", 16, 2 * 8),
        ("expert_parallel_size: 4\ndp_shard_size: 2", 8, 2 * 8),
        ("expert_parallel_size: 4", 4, 2 * 4),
        ("context_parallel_size: 2", None, 2),
    ],
)
def test_the_batch_counts_the_devices_that_parallelism_names(
    sizes: str, workers: int | None, rows: int, tmp_path: Path
) -> None:
    text = f"base_model: x\nadapter: lora\nmicro_batch_size: 2\n{sizes}\n"
    settings = imported_text(text, tmp_path, "axolotl").settings
    assert (settings.get("cluster.workers"), settings["train.global_batch"]) == (workers, rows)
    (tmp_path / "theirs.yaml").write_text(text)
    assert import_files([tmp_path / "theirs.yaml"], "axolotl", gpus=32).settings["cluster.workers"] == 32


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("axolotl", "base_model: x\nrl: ipo\nadapter: lora\n"),
        ("trl", "model_name_or_path: x\nuse_peft: true\nloss_type: ipo\n"),
        ("llamafactory", "model_name_or_path: x\nstage: dpo\npref_loss: ipo\n"),
    ],
)
def test_ipo_is_of_whole_answers_here(peer: str, text: str, tmp_path: Path) -> None:
    found = imported_text(text, tmp_path, peer)
    assert found.settings["objective.loss_type"] == "ipo"
    assert any("takes the mean over an answer's tokens" in line for line in found.to_do)


@pytest.mark.parametrize(
    ("peer", "text", "said"),
    [
        ("trl", "model_name_or_path: x\ndataset_name: a/b\nmax_steps: 9\ndataset_streaming: true\n", True),
        ("trl", "model_name_or_path: x\ndataset_name: a/b\ndataset_streaming: true\n", False),
        (
            "trl",
            "model_name_or_path: x\nmax_steps: 9\nstreaming: true\ndatasets: [{path: a/b, split: 'train[:99]'}]\n",
            False,
        ),
        (
            "llamafactory",
            "model_name_or_path: x\nstage: pt\ndataset: refinedweb\nmax_steps: 9\nstreaming: true\n",
            True,
        ),
        ("axolotl", "base_model: x\nmax_steps: 9\npretraining_dataset: [{path: a/b, type: pretrain}]\n", True),
    ],
)
def test_rows_that_are_read_while_training_are_said_to_be_compiled(
    peer: str, text: str, said: bool, tmp_path: Path
) -> None:
    found = imported_text(text, tmp_path, peer)
    assert any("give it take, such as" in line for line in found.to_do) == said


INSTRUCTED = "### Instruction:\n{instruction}\n\n### Response:\n"


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("alpaca", INSTRUCTED),
        ("alpaca:chat", "USER: {instruction}\nASSISTANT:"),
        ("gpteacher", INSTRUCTED),
        ("jeopardy", INSTRUCTED.replace("instruction}", "question}")),
        ("{format: '[INST] {instruction} [/INST]', no_input_format: '<{instruction}>'}", "<{instruction}>"),
        ("{field_instruction: q, field_system: s, system_format: '<<{system}>>'}", "{q} "),
    ],
)
def test_the_text_around_alpacas_rows_is_written(kind: str, last: str, tmp_path: Path) -> None:
    text = f"base_model: x\nadapter: lora\nchat_template: chatml\ndatasets:\n- {{path: a/b, type: {kind}}}\n"
    found = imported_text(text, tmp_path, "axolotl")
    (source,) = parse_config(found.text).data.train
    assert source.format == "prompt_completion"
    assert source.templates["prompt"][-1].endswith(last)
    assert len(source.templates["prompt"]) == (4 if "field_system" in kind else 2)
    assert found.settings["data.tokenize_apart"]
    assert {outcome.key: outcome.status for outcome in found.keys}["chat_template"] == "not needed"
    assert not [outcome for outcome in found.keys if outcome.status in ("not supported", "unknown")]


@pytest.mark.parametrize(("template", "written"), [("", True), ("chat_template: chatml\n", False)])
def test_texts_beside_a_named_template_are_said_to_be_others(template: str, written: bool, tmp_path: Path) -> None:
    """A template is for all data sets here, and those texts have none."""
    sets = "datasets:\n- {path: a/b, type: alpaca}\n- {path: a/c, type: chat_template}\n"
    found = imported_text(f"base_model: x\nadapter: lora\n{template}{sets}", tmp_path, "axolotl")
    assert found.settings["data.train"][0]["format"] == ("prompt_completion" if written else "alpaca")
    assert "data.tokenize_apart" not in found.settings
    lost = [outcome.key for outcome in found.keys if outcome.status == "not supported"]
    assert lost == ([] if written else ["datasets[0].type"])


def test_what_is_lost_is_said_with_what_holds_instead(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    lost = {
        outcome.key: outcome.why
        for outcome in import_files(["axolotl/full.yaml"]).keys
        if outcome.status == "not supported"
    }
    assert set(lost) == {"lr_scheduler"}
    assert "Left at cosine" in lost["lr_scheduler"]
    text = import_files(["trl/sft.yaml"]).text
    assert "hf_abcdefghijklmnop" not in text


ODD = {
    "assistant-only": (
        "trl",
        {"assistant_only_loss": True, "completion_only_loss": False},
        {"data.train_on.roles": None},
        {},
    ),
    "positions-scaled": (
        "axolotl",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"model.rope_scaling.rope_type": "yarn", "model.rope_scaling.factor": 4.0},
        {},
    ),
    "positions-scaled-by-a-name": (
        "llamafactory",
        {"rope_scaling": "yarn"},
        {"model.rope_scaling.rope_type": None},
        {"rope_scaling": "names no factor"},
    ),
    "in-8-bits": (
        "axolotl",
        {"adapter": "lora", "load_in_8bit": True},
        {"quant.type": "int8", "quant.double": None},
        {"load_in_8bit": "activations stay in 16 bits"},
    ),
    "8-bits": ("llamafactory", {"quantization_bit": 8}, {"quant.type": "int8", "quant.double": None}, {}),
    "8-bits-of-trl": ("trl", {"use_peft": True, "load_in_8bit": True}, {"quant.type": "int8"}, {}),
    "8-bits-of-v1": (
        "llamafactory-v1",
        {"peft_config": {"name": "lora"}, "quant_config": {"quantization_bit": 8}},
        {"quant.type": "int8"},
        {},
    ),
    "an-adapters-keys-without-one": (
        "axolotl",
        {"lora_r": 8, "lora_target_linear": True},
        {"tuning.method": "full", "tuning.rank": None, "tuning.targets": None},
        {"lora_r": "no effect there either", "lora_target_linear": "Without adapter the base itself learns"},
    ),
    "parts-that-learn": (
        "axolotl",
        {"unfrozen_parameters": ["^lm_head.weight$", "model.layers.4[4-9]+.mlp"]},
        {"tuning.train": [r"re:lm_head\.weight", r"re:model\.layers\.4[4-9]+\.mlp.*"]},
        {},
    ),
    "layers-that-learn": (
        "llamafactory",
        {"finetuning_type": "freeze"},
        {"tuning.method": "full", "tuning.train": ["*.-2.*", "*.-1.*"], "quant.type": "none"},
        {},
    ),
    "first-layers-that-learn": (
        "llamafactory-v1",
        {
            "peft_config": {
                "name": "freeze",
                "freeze_trainable_layers": -1,
                "freeze_trainable_modules": "mlp,self_attn",
                "freeze_extra_modules": ["embed_tokens"],
            }
        },
        {"tuning.train": ["*.0.mlp*", "*.0.self_attn*", "*embed_tokens*"]},
        {},
    ),
    "all-but-some-that-learn": (
        "ms-swift",
        {
            "tuner_type": "full",
            "freeze_parameters": ["model.embed_tokens"],
            "freeze_parameters_regex": "norm",
            "trainable_parameters": ["model.norm"],
        },
        {"tuning.train": [r"re:(?!model\.embed_tokens.*|.*(?:norm).*).*", r"re:model\.norm.*"]},
        {},
    ),
    "rotations": (
        "llamafactory",
        {"finetuning_type": "oft", "oft_block_size": 16, "oft_target": "q_proj,v_proj"},
        {"tuning.method": "oft", "tuning.block": 16, "tuning.targets": ["q_proj", "v_proj"], "tuning.rank": None},
        {},
    ),
    "unlikely-targets": ("axolotl", {"use_dft": True}, {"objective.dft": True}, {}),
    "uncertain-targets": (
        "axolotl",
        {"use_eaft": True, "eaft_alpha": 0.5, "eaft_k": 30},
        {"objective.eaft": 0.5, "objective.eaft_tokens": 30, "objective.eaft_scale": 1.0},
        {},
    ),
    "uncertain-targets-there": (
        "llamafactory",
        {"use_eaft_loss": True},
        {"objective.eaft": 1.0, "objective.eaft_scale": 3.0, "objective.eaft_tokens": None},
        {},
    ),
    "uncertain-targets-off": ("axolotl", {"eaft_k": 30}, {"objective.eaft": None}, {"eaft_k": "without use_eaft"}),
    "noise": ("trl", {"neftune_noise_alpha": 5}, {"objective.neftune_alpha": 5.0}, {}),
    "another-start": (
        "axolotl",
        {"adapter": "lora", "peft_init_lora_weights": "orthogonal"},
        {"tuning.init": "orthogonal"},
        {},
    ),
    "a-start-in-the-base": (
        "axolotl",
        {"adapter": "lora", "peft_init_lora_weights": "pissa"},
        {"tuning.init": None},
        {"peft_init_lora_weights": "kaiming, gaussian or orthogonal"},
    ),
    "a-quadratic-rise": (
        "axolotl",
        {"lr_quadratic_warmup": True, "lr_scheduler": "cosine", "warmup_steps": 9},
        {"optim.warmup_power": 2},
        {},
    ),
    "a-quadratic-rise-of-none": (
        "axolotl",
        {"lr_quadratic_warmup": True, "lr_scheduler": "linear", "warmup_steps": 9},
        {"optim.warmup_power": None},
        {"lr_quadratic_warmup": "cosine alone"},
    ),
    "no-system": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "chat_template", "drop_system_message": True}], "min_sample_len": 9},
        {"data.drop_system": True, "data.min_length": 9},
        {},
    ),
    "no-system-in-one": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl", "drop_system_message": True}]},
        {"data.drop_system": None},
        {"datasets[1].drop_system_message": "One answer for all"},
    ),
    "a-teachers-rows": (
        "axolotl",
        {
            "kd_trainer": True,
            "kd_ce_alpha": 0.1,
            "kd_alpha": 0.9,
            "kd_temperature": 2.0,
            "plugins": ["axolotl.integrations.kd.KDPlugin"],
            "datasets": [{"path": "a.jsonl", "type": "axolotl.integrations.kd.chat_template", "logprobs_field": "l"}],
            "sample_packing": True,
        },
        {
            "objective.name": "distil",
            "objective.next_tokens": 0.1,
            "objective.temperature": 2.0,
            "objective.teacher": "FILL-IN",
            "data.packing": True,
            "data.train": [{"path": "a.jsonl"}],
        },
        {"datasets[0].logprobs_field": "capstan teach"},
    ),
    "a-teacher-on-a-server": (
        "axolotl",
        {
            "kd_trainer": True,
            "kd_online_server_base_url": "http://a:1",
            "kd_temperature": 2.0,
            "plugins": ["axolotl.integrations.kd.KDPlugin"],
            "datasets": [{"path": "a.jsonl", "type": "chat_template"}],
        },
        {"objective.name": "distil", "objective.teacher": "http://a:1", "objective.temperature": None},
        {},
    ),
    "experts-in-whole-numbers": (
        "accelerate",
        {"kt_config": {"enabled": True, "kt_backend": "AMXINT8"}},
        {"quant.type": "int8", "sharding.deepspeed": "zero3_offload_cpu"},
        {"kt_config.kt_backend": "only the experts"},
    ),
    "qwen-without-thoughts": (
        "llamafactory",
        {"model_name_or_path": "Qwen/Qwen3-8B", "template": "qwen3_nothink"},
        {"data.template": "chatml"},
        {"template": "no tools"},
    ),
    "qwen-that-has-none": (
        "llamafactory",
        {"model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "template": "qwen3_nothink"},
        {"data.template": None},
        {},
    ),
    "template-of-an-older-family": (
        "llamafactory",
        {"model_name_or_path": "/models/Qwen2.5-Omni-7B", "template": "qwen2_omni"},
        {"data.template": None},
        {"template": "The base's own tokenizer brings the template of its family."},
    ),
    "template-of-another-family": (
        "llamafactory",
        {"model_name_or_path": "Qwen/Qwen2.5-7B", "template": "qwen2_omni"},
        {"data.template": None},
        {"template": "qwen2_omni is none of ours"},
    ),
    "published-in-fp4-and-learning": (
        "axolotl",
        {"model_quantization_config": "Mxfp4Config", "model_quantization_config_kwargs": {"dequantize": True}},
        {"quant.type": "none", "tuning.method": "full"},
        {"model_quantization_config": "16-bit values"},
    ),
    "unlikely-targets-there": ("llamafactory", {"use_dft_loss": True}, {"objective.dft": True}, {}),
    "thoughts": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "field_thinking": "thinking", "template_thinking_key": "thinking"}]},
        {},
        {"datasets[0].field_thinking": "the template reads it"},
    ),
    "thoughts-by-another-name": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "field_thinking": "why", "template_thinking_key": "thinking"}]},
        {},
        {"datasets[0].field_thinking": "rename it to thinking"},
    ),
    "experts-on-the-host": ("llamafactory", {"use_kt": True}, {"sharding.deepspeed": "zero3_offload_cpu"}, {}),
    "published-in-fp4": (
        "axolotl",
        {"adapter": "lora", "model_quantization_config": "Mxfp4Config"},
        {"quant.type": "stored"},
        {},
    ),
    "published-in-fp4-and-read-in-16": (
        "axolotl",
        {
            "adapter": "lora",
            "model_quantization_config": "Mxfp4Config",
            "model_quantization_config_kwargs": {"dequantize": True},
        },
        {"quant.type": "none"},
        {"model_quantization_config": "16-bit values"},
    ),
    "scales-in-16-bits": (
        "axolotl",
        {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        {"quant.double": False},
        {},
    ),
    "text-over-a-base-that-sees": (
        "axolotl",
        {"processor_type": "AutoProcessor", "freeze_mm_modules": True},
        {},
        {"processor_type": "on texts"},
    ),
    "prompts-too": ("trl", {"completion_only_loss": False}, {"data.train_on.roles": "all"}, {}),
    "no-steps": (
        "axolotl",
        {"warmup_steps": 0, "warmup_ratio": 0.1},
        {"optim.warmup_steps": 0, "optim.warmup_ratio": None},
        {"warmup_ratio": "be they 0"},
    ),
    "steps-are-none": (
        "trl",
        {"warmup_steps": 0, "warmup_ratio": 0.1},
        {"optim.warmup_steps": None, "optim.warmup_ratio": 0.1},
        {"warmup_steps": "leave it to the ratio"},
    ),
    "both-masks": (
        "llamafactory",
        {"train_on_prompt": True, "mask_history": True},
        {"data.train_on.roles": "all"},
        {"mask_history": "refuses it"},
    ),
    "shares-of-steps": (
        "axolotl",
        {"eval_steps": 0.25, "save_steps": 0.5, "num_epochs": 2, "val_set_size": 0.1},
        {"eval.per_epoch": 2, "checkpoint.per_epoch": 1, "eval.every": None},
        {},
    ),
    "by-epoch": (
        "llamafactory",
        {"eval_strategy": "epoch", "save_strategy": "epoch", "val_size": 0.1, "early_stopping_steps": 2},
        {"eval.per_epoch": 1, "checkpoint.per_epoch": 1, "train.stop_when.no_better": 2, "checkpoint.keep_best": 1},
        {},
    ),
    "nothing-to-evaluate": (
        "axolotl",
        {"evals_per_epoch": 4, "val_set_size": 0.0},
        {"eval.per_epoch": None},
        {"evals_per_epoch": "nothing is evaluated"},
    ),
    "pairs": (
        "axolotl",
        {"rl": "dpo", "sequence_len": 1000, "adapter": "lora", "lora_dropout": 0.1},
        {"data.sequence_length": 2000, "tuning.dropout": None},
        {"lora_dropout": "TRL sets lora_dropout to 0"},
    ),
    "constant": (
        "trl",
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
        {"optim.schedule": "constant", "optim.warmup_ratio": None},
        {"warmup_ratio": "does not rise first"},
    ),
    "constant-with-warmup": (
        "trl",
        {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1},
        {"optim.schedule": "constant", "optim.warmup_ratio": 0.1},
        {},
    ),
    "texts-in-pieces": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "completion"}]},
        {"data.on_too_long": "split"},
        {},
    ),
    "pretraining": (
        "llamafactory",
        {"stage": "pt"},
        {"data.on_too_long": "split", "data.packing": True},
        {},
    ),
    "templates": (
        "axolotl",
        {"chat_template": "chatml", "special_tokens": {"eos_token": "<|im_end|>", "pad_token": None}},
        {"data.template": "chatml", "model.special_tokens.eos": "<|im_end|>"},
        {},
    ),
    "another-template": (
        "axolotl",
        {"chat_template": "alpaca"},
        {"data.template": None},
        {"chat_template": "none of ours"},
    ),
    "a-template-by-type": (
        "axolotl",
        {"rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "chatml.intel"}]},
        {"data.template": "chatml"},
        {},
    ),
    "a-question-in-another-field": (
        "axolotl",
        {"rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "llama3.icr"}]},
        {"data.train": [{"path": "a.jsonl", "format": "preference", "fields": {"prompt": "input"}}]},
        {},
    ),
    "pairs-with-a-prompt": (
        "axolotl",
        {"rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "chatml.prompt_pairs"}]},
        {"data.train": [{"path": "a.jsonl"}], "data.template": "chatml"},
        {},
    ),
    "an-article-beside-a-question": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "context_qa"}]},
        {
            "data.train": [
                {
                    "path": "a.jsonl",
                    "format": "alpaca",
                    "fields": {"instruction": "question", "input": "article", "output": "answer"},
                }
            ]
        },
        {},
    ),
    **{
        f"{kind}-is-none-of-ours": (
            "axolotl",
            {"datasets": [{"path": "a.jsonl", "type": kind}]},
            {"data.train": [{"path": "a.jsonl"}]},
            {"datasets[0].type": f"{kind} is not a format of ours"},
        )
        for kind in ("reflection", "summarizetldr", "metharme")
    },
    "segments": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "input_output"}]},
        {"data.train": [{"path": "a.jsonl", "format": "segments"}], "data.tokenize_apart": True},
        {},
    ),
    "segments-beside-others": (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "input_output"}, {"path": "b.jsonl"}]},
        {"data.tokenize_apart": None},
        {"datasets[0].type": "segment by segment"},
    ),
    "simpo-with-another-term": (
        "axolotl",
        {"rl": "simpo", "cpo_alpha": 0.5},
        {"objective.name": "simpo"},
        {"cpo_alpha": "no such training"},
    ),
    "an-adapter-to-begin-from": (
        "llamafactory",
        {"adapter_name_or_path": "saves/sft", "lora_rank": 8},
        {"tuning.start": "saves/sft"},
        {},
    ),
    "expressions": (
        "axolotl",
        {
            "adapter": "lora",
            "lora_target_modules": r"model.layers.[\d]+.mlp.(up|down)_proj",
            "peft_layers_to_transform": [2, 3],
        },
        {"tuning.targets": [r"re:model.layers.[\d]+.mlp.(up|down)_proj"], "tuning.layers": [2, 4]},
        {},
    ),
    "watchdog": (
        "axolotl",
        {"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 4},
        {"train.stop_when.loss_above": 5.0, "train.stop_when.loss_steps": 4},
        {},
    ),
    "arguments-of-a-schedule": (
        "trl",
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2, "lr_end": 1e-4}, "learning_rate": 1e-3},
        {"optim.schedule": "polynomial", "optim.power": 2, "optim.min_lr_ratio": 0.1},
        {},
    ),
    "a-reward-model": (
        "axolotl",
        {
            "reward_model": True,
            "num_labels": 1,
            "center_rewards_coefficient": 0.01,
            "adapter": "lora",
            "sequence_len": 1000,
            "lora_modules_to_save": ["score"],
            "datasets": [{"path": "a.jsonl", "type": "bradley_terry.chat_template"}],
        },
        {
            "objective.name": "reward",
            "objective.center_rewards": 0.01,
            "tuning.modules_to_save": None,
            "data.sequence_length": 2000,
            "data.train": [
                {
                    "path": "a.jsonl",
                    "format": "preference_alpaca",
                    "fields": {"instruction": "input", "input": "nothing"},
                }
            ],
        },
        {"lora_modules_to_save": "learns in any case", "num_labels": "of a reward model has one"},
    ),
    "a-share-as-warm-up": (
        "axolotl",
        {"warmup_steps": 0.1},
        {"optim.warmup_ratio": 0.1, "optim.warmup_steps": None},
        {"warmup_steps": ""},
    ),
    "rows-in-order": ("axolotl", {"curriculum_sampling": True}, {}, {"curriculum_sampling": "that run.seed draws"}),
    "a-template-of-the-base": (
        "axolotl",
        {
            "base_model": "Qwen/Qwen2.5-0.5B",
            "chat_template": "qwen_25",
            "eval_max_new_tokens": 128,
            "attention": "flash",
        },
        {"data.template": None},
        {"chat_template": "of its family", "eval_max_new_tokens": "tables of answers"},
    ),
    "a-template-of-those-that-do-not-think": (
        "llamafactory",
        {"model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "template": "qwen3_nothink"},
        {"data.template": None},
        {"template": "of its family"},
    ),
    "a-template-of-a-version": (
        "llamafactory",
        {"model_name_or_path": "deepseek-ai/DeepSeek-V3-0324-BF16", "template": "deepseek3"},
        {"data.template": None},
        {"template": "of its family"},
    ),
    "a-template-of-others": (
        "axolotl",
        {"base_model": "Qwen/Qwen2.5-0.5B", "chat_template": "qwen3"},
        {"data.template": None},
        {"chat_template": "none of ours"},
    ),
    "rewards-of-pairs": (
        "llamafactory",
        {"stage": "rm", "dataset": "dpo_mix_en"},
        {
            "objective.name": "reward",
            "data.train": [
                {"path": "hf://llamafactory/DPO-En-Zh-20k", "format": "preference_sharegpt", "subset": "en"}
            ],
        },
        {},
    ),
    "rewards-by-a-key": (
        "trl",
        {"center_rewards_coefficient": 0.01, "use_peft": True, "lora_modules_to_save": ["score"]},
        {"objective.name": "reward", "optim.lr": 1e-4},
        {},
    ),
    "known-by-name": (
        "llamafactory",
        {"dataset": "identity,ultrachat_200k"},
        {
            "data.train": [
                {"path": "data/identity.json", "format": "alpaca"},
                {"path": "hf://HuggingFaceH4/ultrachat_200k", "format": "chat", "split": "train_sft"},
            ]
        },
        {"dataset": ""},
    ),
    "copies-of-a-base-that-learns": (
        "axolotl",
        {"dp_replicate_size": 2},
        {"sharding.scope": None},
        {"dp_replicate_size": "is divided over all ranks"},
    ),
    "copies-of-a-base-with-adapters": (
        "axolotl",
        {"adapter": "lora", "dp_replicate_size": 2, "lr_quadratic_warmup": True, "lr_scheduler": "linear"},
        {"sharding.scope": "node"},
        {"lr_quadratic_warmup": "beside lr_scheduler: cosine alone"},
    ),
    "one-copy-of-a-base-with-adapters": (
        "axolotl",
        {"adapter": "lora", "dp_replicate_size": 1},
        {"sharding.scope": None},
        {},
    ),
    "rows-of-a-batch": (
        "axolotl",
        {"adapter": "lora", "batch_size": 10, "micro_batch_size": 4},
        {"train.global_batch": 8, "train.micro_batch": 4},
        {},
    ),
    "fewer-rows-of-a-batch-than-of-a-micro-batch": (
        "axolotl",
        {"adapter": "lora", "batch_size": 3, "micro_batch_size": 4},
        {"train.global_batch": 4, "train.micro_batch": 4},
        {},
    ),
    "a-share-of-warm-up": (
        "axolotl",
        {"adapter": "lora", "max_steps": 1000, "warmup_ratio": 0.05},
        {"optim.warmup_steps": 50, "optim.warmup_ratio": None},
        {},
    ),
    "one-step-of-warm-up-is-two": (
        "axolotl",
        {"adapter": "lora", "max_steps": 20, "warmup_ratio": 0.05},
        {"optim.warmup_steps": 2, "optim.warmup_ratio": None},
        {},
    ),
    "a-tower-that-learns": (
        "axolotl",
        {
            "adapter": "lora",
            "processor_type": "AutoProcessor",
            "skip_prepare_dataset": True,
            "image_size": [20, 30],
            "freeze_mm_modules": False,
        },
        {"data.images.max_pixels": 600},
        {"freeze_mm_modules": "stays as it is"},
    ),
    "codes-that-learn-in-16-bits": (
        "axolotl",
        {"model_quantization_config": "Mxfp4Config"},
        {"tuning.method": "full", "quant.type": "none"},
        {"model_quantization_config": "full learns in 16 bits"},
    ),
    "texts-by-one-path": (
        "axolotl",
        {"adapter": "lora", "pretraining_dataset": "a/b"},
        {"data.train": [{"path": "hf://a/b", "format": "text"}]},
        {},
    ),
    "a-shard-of-rows": (
        "axolotl",
        {"adapter": "lora", "seed": 7, "datasets": [{"path": "a.jsonl", "type": "completion", "shards": 4}]},
        {"data.train": [{"path": "a.jsonl", "format": "text", "take": 0.25, "take_seed": 7}]},
        {},
    ),
    "messages-of-other-keys": (
        "axolotl",
        {
            "adapter": "lora",
            "datasets": [
                {
                    "path": "a.jsonl",
                    "type": "chat_template",
                    "message_property_mappings": {"role": "who", "content": "says"},
                    "message_field_training": "learn",
                }
            ],
        },
        {},
        {
            "datasets[0].message_property_mappings": "role and content, or from and value",
            "datasets[0].message_field_training": "key is train, or weight",
        },
    ),
    "pairs-by-fields": (
        "axolotl",
        {
            "adapter": "lora",
            "rl": "dpo",
            "datasets": [
                {
                    "path": "a.jsonl",
                    "type": {
                        "field_prompt": "q",
                        "field_chosen": "c",
                        "field_rejected": "rejected",
                        "prompt_format": "x",
                    },
                }
            ],
        },
        {"data.train": [{"path": "a.jsonl", "format": "preference", "fields": {"prompt": "q", "chosen": "c"}}]},
        {"datasets[0].type.prompt_format": "text"},
    ),
    "labels-by-fields": (
        "axolotl",
        {
            "adapter": "lora",
            "rl": "kto",
            "datasets": [{"path": "a.jsonl", "type": {"field_completion": "c", "field_label": "good"}}],
        },
        {"data.train": [{"path": "a.jsonl", "format": "labelled", "fields": {"completion": "c", "label": "good"}}]},
        {},
    ),
    "pairs-in-a-chat-template": (
        "axolotl",
        {
            "adapter": "lora",
            "rl": "dpo",
            "datasets": [{"path": "a.jsonl", "type": "chat_template.default", "field_chosen": "good"}],
        },
        {
            "data.train": [
                {
                    "path": "a.jsonl",
                    "format": "preference_sharegpt",
                    "fields": {"messages": "messages", "chosen": "good"},
                }
            ]
        },
        {},
    ),
    "a-teacher-in-reverse": (
        "axolotl",
        {"adapter": "lora", "plugins": ["axolotl.integrations.kd.KDPlugin"], "kd_trainer": True, "kd_beta": 1},
        {"objective.name": "distil", "objective.divergence": "reverse"},
        {},
    ),
    "segments-trained-whole": (
        "axolotl",
        {"adapter": "lora", "train_on_inputs": True, "datasets": [{"path": "a.jsonl", "type": "input_output"}]},
        {"data.tokenize_apart": True},
        {"train_on_inputs": "Segments say themselves"},
    ),
    "saves-by-a-share-of-the-steps": (
        "trl",
        {"max_steps": 1001, "save_strategy": "steps", "save_steps": 0.1},
        {"checkpoint.every_steps": 101},
        {},
    ),
    "steps-of-warm-up-before-a-ratio": (
        "trl",
        {"warmup_steps": 10, "warmup_ratio": 0.1},
        {"optim.warmup_steps": 10, "optim.warmup_ratio": None},
        {"warmup_ratio": "go before a ratio"},
    ),
    "a-tower-alone": (
        "llamafactory",
        {
            "finetuning_type": "lora",
            "dataset": "d",
            "dataset_dir": {"d": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"images": "seen"}}},
            "image_max_pixels": 500,
            "freeze_vision_tower": False,
        },
        {"data.images.max_pixels": 500},
        {"freeze_vision_tower": "to both encoder and projector, never to one alone"},
    ),
    "an-unknown-loss": (
        "llamafactory",
        {"stage": "dpo", "pref_loss": "apo_zero"},
        {"objective.name": "dpo"},
        {"pref_loss": "apo_zero is none of sigmoid, hinge"},
    ),
    "some-rows-of-a-set-that-nothing-describes": (
        "llamafactory",
        {"dataset": "d", "max_samples": 100},
        {"data.train": [{"path": "data/d.json", "take": 100}]},
        {"dataset": "dataset_info.json, which says what d is, is not in data"},
    ),
    "data-online": (
        "llamafactory",
        {"dataset": "a/b", "dataset_dir": "ONLINE"},
        {"data.train": [{"path": "hf://a/b"}]},
        {},
    ),
    "rows-by-a-script": (
        "llamafactory",
        {"dataset": "d", "dataset_dir": {"d": {"script_url": "code", "file_name": "a.json"}}},
        {},
        {"dataset": "d is made by a script, which is never run"},
    ),
    "sets-that-are-not-here": (
        "llamafactory-v1",
        {"train_dataset": "missing.yaml"},
        {"data.train": [{"path": "FILL-IN"}]},
        {"train_dataset": "missing.yaml, which names the data sets, is not here"},
    ),
    "a-loss-of-a-plugin": (
        "ms-swift",
        {"loss_type": "cosent"},
        {"objective.name": "sft"},
        {"loss_type": "next-token loss"},
    ),
    "a-loss-of-another-objective": (
        "ms-swift",
        {"rlhf_type": "kto", "loss_type": "hinge"},
        {},
        {"loss_type": "hinge is not a loss of rlhf_type: kto"},
    ),
    "simpos-margin": (
        "ms-swift",
        {"rlhf_type": "simpo"},
        {"objective.name": "simpo", "objective.gamma": 1.0},
        {},
    ),
    "weights-of-answers-where-none-are-judged": (
        "ms-swift",
        {"desirable_weight": 2.0, "undesirable_weight": 2.0},
        {"objective.desirable_weight": None, "objective.undesirable_weight": None},
        {"desirable_weight": "no effect without rlhf_type"},
    ),
    "an-optimizer-of-megatron": ("ms-swift", {"optimizer": "muon"}, {"optim.name": "muon"}, {}),
    "8-bits-of-ms-swift": (
        "ms-swift",
        {"tuner_type": "lora", "quant_bits": 8, "quant_method": "bnb"},
        {"quant.type": "int8"},
        {},
    ),
    "bits-that-learn": (
        "ms-swift",
        {"tuner_type": "full", "quant_bits": 4},
        {"quant.type": "none"},
        {"quant_bits": "full learns in 16 bits"},
    ),
    "weights-of-a-loss": (
        "ms-swift",
        {"loss_scale": "default+react"},
        {},
        {"loss_scale": "react: every trained token weighs the same"},
    ),
    "rows-are-there-to-evaluate": (
        "ms-swift",
        {"dataset": "a.jsonl", "val_dataset": "b.jsonl", "split_dataset_ratio": 0.1, "save_strategy": "epoch"},
        {"data.held_out": None, "eval.per_epoch": 1},
        {"split_dataset_ratio": "val_dataset is there"},
    ),
    "nothing-is-evaluated": (
        "ms-swift",
        {"dataset": "a.jsonl", "split_dataset_ratio": 0.1, "eval_strategy": "no"},
        {"data.held_out": None},
        {"split_dataset_ratio": "holds nothing out with eval_strategy: no"},
    ),
    "no-name-of-a-set": (
        "ms-swift",
        {"dataset": "<dataset>"},
        {"data.train": [{"path": "FILL-IN"}]},
        {"dataset": "<dataset> is no name of a data set, and no path."},
    ),
    "a-mixer-with-splits": (
        "trl",
        {"dataset_mixer": {"a/b": 1.0}, "dataset_splits": ["train_sft", "test_sft"]},
        {
            "data.train": [{"path": "hf://a/b", "split": "train_sft"}],
            "data.eval": [{"path": "hf://a/b", "split": "test_sft"}],
        },
        {},
    ),
    "a-split-to-evaluate": (
        "trl",
        {"dataset_name": "a/b", "eval_strategy": "steps"},
        {"data.eval": [{"path": "hf://a/b", "split": "test"}]},
        {},
    ),
    "a-share-that-is-no-number": (
        "trl",
        {"datasets": [{"path": "a/b", "fraction": "half"}, {"path": "c/d", "fraction": 0.5}]},
        {},
        {"datasets[0].fraction": "half"},
    ),
    "a-weight-that-is-no-number": (
        "trl",
        {"dataset_mixture": {"datasets": [{"id": "a/b", "weight": "half"}]}},
        {},
        {"dataset_mixture.datasets[0].weight": "half"},
    ),
    "weights-that-are-no-pair": (
        "trl",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0], "beta": 0.1},
        {"objective.sft_weight": None},
        {"loss_weights": "are no two numbers"},
    ),
    "two-losses-of-which-the-first-has-another-weight": (
        "trl",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 1.0], "beta": 0.1},
        {"objective.sft_weight": None},
        {"loss_weights": "Losses are not added up"},
    ),
    "offloaded-by-fsdp": (
        "accelerate",
        {"fsdp_config": {"fsdp_offload_params": True}},
        {"sharding.deepspeed": "zero3_offload_cpu"},
        {},
    ),
    "offloaded-to-a-disk": (
        "accelerate",
        {"deepspeed_config": {"offload_optimizer_device": "nvme"}},
        {"sharding.deepspeed": "zero3_offload_optimizer"},
        {},
    ),
    "all-offloaded": (
        "accelerate",
        {"deepspeed_config": {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}},
        {"sharding.deepspeed": "zero3_offload_cpu"},
        {},
    ),
    "experts-in-other-bits": (
        "accelerate",
        {"kt_config": {"enabled": True, "kt_backend": "AMXFP8"}},
        {"quant.type": None},
        {"kt_config.kt_backend": "in 16 bits, or in 8 or 4"},
    ),
    "offloaded-and-learning": (
        "axolotl",
        {"fsdp_config": {"offload_params": True}},
        {"tuning.method": "full", "sharding.deepspeed": "zero3_offload_optimizer"},
        {},
    ),
    "offloaded-with-adapters": (
        "axolotl",
        {"adapter": "lora", "fsdp_config": {"offload_params": True}},
        {"sharding.deepspeed": "zero3_offload_cpu"},
        {},
    ),
    "a-decay-of-steps": (
        "trl",
        {
            "max_steps": 100,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 20, "num_warmup_steps": 5, "min_lr_ratio": 0.1},
        },
        {"optim.decay_ratio": 0.2, "optim.min_lr_ratio": 0.1},
        {},
    ),
    "an-argument-of-another-schedule": (
        "trl",
        {"lr_scheduler_kwargs": {"gamma": 0.5}},
        {},
        {"lr_scheduler_kwargs": "gamma: docs/configuration.md lists what optim.schedule has"},
    ),
    "cycles-of-a-schedule-without-any": (
        "trl",
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"optim.schedule": "cosine", "optim.cycles": None},
        {"lr_scheduler_kwargs": "num_cycles: docs/configuration.md lists what optim.schedule has"},
    ),
    "cycles-of-a-schedule-with-restarts": (
        "trl",
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"optim.cycles": 2},
        {},
    ),
    "roles-of-other-names": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "roles": {"user": ["human"], "assistant": ["bot"]}}]},
        {},
        {"datasets[0].roles": "assistant (gpt)"},
    ),
    "ends-of-all-turns": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "train_on_eos": "all"}]},
        {"data.train_on.end": None},
        {"datasets[0].train_on_eos": "that are trained, or none"},
    ),
    "no-ends": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "train_on_eot": "none", "train_on_eos": "last"}]},
        {"data.train_on.end": False},
        {},
    ),
    "turns-of-the-model-alone": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "roles_to_train": ["gpt"]}]},
        {"data.train_on.roles": None},
        {},
    ),
    "turns-of-users-too": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "roles_to_train": ["gpt", "human"]}]},
        {"data.train_on.roles": ["assistant", "user"]},
        {},
    ),
    "losses-of-more-than-a-whole": (
        "axolotl",
        {"adapter": "lora", "plugins": ["axolotl.integrations.kd.KDPlugin"], "kd_trainer": True, "kd_ce_alpha": 1.0},
        {"objective.next_tokens": 0.5},
        {"kd_ce_alpha": "there the loss is 2 times as large"},
    ),
    "a-part-of-a-long-texts-column": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a.jsonl", "type": "completion", "text_column": "body"}]},
        {"data.train": [{"path": "a.jsonl", "format": "text", "fields": {"text": "body"}}]},
        {},
    ),
    "wide-adapters": (
        "llamafactory",
        {"lora_rank": 32, "val_size": 0.1},
        {"tuning.rank": 32, "tuning.alpha": 64.0, "data.train_on.frame": "tail"},
        {},
    ),
    "packed-by-attention": (
        "llamafactory",
        {"neat_packing": True, "use_muon": True, "lora_alpha": 5},
        {"data.packing": True, "optim.name": "muon", "tuning.alpha": 5.0},
        {},
    ),
    "pretraining-in-rows": (
        "llamafactory",
        {"stage": "pt", "packing": False},
        {"data.packing": False, "data.on_too_long": None},
        {},
    ),
    "no-limit-of-steps": (
        "trl",
        {"max_steps": -1, "num_train_epochs": 2},
        {"train.steps": None, "train.epochs": 2},
        {},
    ),
    "no-evaluation-whatever-its-steps": (
        "llamafactory",
        {"val_size": 0.1, "eval_strategy": "no", "eval_steps": 50},
        {"eval.every": None},
        {},
    ),
    "simpo-as-the-peers-have-it": ("axolotl", {"rl": "simpo"}, {"objective.beta": 0.1, "objective.gamma": 0.5}, {}),
    "one-of-two-betas": ("axolotl", {"adam_beta1": 0.8}, {"optim.betas": [0.8, 0.999]}, {}),
    "dropout-that-is-asked-for": (
        "trl",
        {"use_peft": True, "loss_type": "ipo", "lora_dropout": 0.1, "disable_dropout": False},
        {"objective.name": "dpo", "tuning.dropout": 0.1},
        {},
    ),
    "rows-of-a-batch-on-two-gpus": (
        "axolotl",
        {"adapter": "lora", "batch_size": 10, "micro_batch_size": 4, "ray_num_workers": 2},
        {"train.global_batch": 16},
        {},
    ),
    "a-long-runs-warm-up": ("axolotl", {"max_steps": 10000}, {"optim.warmup_steps": 100}, {}),
    "a-short-runs-warm-up": ("axolotl", {"max_steps": 40}, {"optim.warmup_steps": 2}, {}),
    "prompts-of-pairs": (
        "axolotl",
        {"rl": "dpo", "adapter": "lora", "train_on_inputs": True, "sample_packing": True},
        {"data.train_on.roles": None, "data.packing": False},
        {},
    ),
    "a-beta-of-ones-own": ("ms-swift", {"rlhf_type": "simpo", "beta": 0.5}, {"objective.beta": 0.5}, {}),
    "4-bits-of-ms-swift": (
        "ms-swift",
        {"tuner_type": "lora", "quant_bits": 4},
        {"quant.type": "nf4", "quant.double": True, "data.train_on.frame": "tail"},
        {},
    ),
    "rows-to-evaluate-on": (
        "ms-swift",
        {"dataset": "a.jsonl#5", "val_dataset": "b.jsonl", "data_seed": 7},
        {"eval.every": 500, "data.train": [{"path": "a.jsonl", "take": 5, "take_seed": 7}]},
        {},
    ),
    "pairs-are-not-packed": ("llamafactory", {"stage": "dpo", "packing": True}, {"data.packing": False}, {}),
    "a-set-of-ones-own-by-a-known-name": (
        "llamafactory",
        {"dataset": "identity", "dataset_dir": "mine"},
        {"data.train": [{"path": "mine/identity.json"}]},
        {"dataset": "is not in mine"},
    ),
    "some-of-the-rows-that-a-set-has": (
        "llamafactory",
        {
            "dataset": "d",
            "dataset_dir": {"d": {"ms_hub_url": "m/s", "hf_hub_url": "h/f", "num_samples": 50}},
            "max_samples": 20,
        },
        {"data.train": [{"path": "hf://h/f", "format": "alpaca", "take": 20, "take_seed": 42}]},
        {},
    ),
    "the-last-turn": (
        "llamafactory",
        {"mask_history": True, "do_train": True, "do_predict": True},
        {"data.train_on.turns": "last"},
        {},
    ),
    "a-system-message-beside-the-turns": (
        "llamafactory",
        {
            "dataset": "d",
            "dataset_dir": {
                "d": {"hf_hub_url": "h/f", "formatting": "openai", "columns": {"messages": "m", "system": "s"}}
            },
        },
        {"data.train": [{"path": "hf://h/f", "format": "sharegpt", "fields": {"messages": "m", "system": "s"}}]},
        {},
    ),
    "a-new-adapter-over-one-that-is-there": (
        "llamafactory",
        {"adapter_name_or_path": "saves/sft", "create_new_adapter": True},
        {"tuning.start": None},
        {"adapter_name_or_path": "merge the adapter that is there"},
    ),
    "without-padding": (
        "llamafactory-v1",
        {"batching_strategy": "padding_free", "peft_config": {"name": "lora"}},
        {"data.packing": False, "quant.type": "none"},
        {},
    ),
    "rows-that-are-filled": ("llamafactory-v1", {"batching_strategy": "dynamic_batching"}, {"data.packing": True}, {}),
    "simpo-of-cpo": ("trl", {"script": "cpo", "loss_type": "simpo"}, {"objective.name": "simpo"}, {}),
    "not-the-assistant-alone": (
        "trl",
        {"assistant_only_loss": False, "dataset_text_field": "text"},
        {"data.train_on.roles": "all", "data.fields": None},
        {},
    ),
    "scales-in-32-bits": (
        "trl",
        {"use_peft": True, "load_in_4bit": True},
        {"quant.type": "nf4", "quant.double": None, "tuning.targets": ["q_proj", "v_proj"]},
        {},
    ),
    "shares-of-a-mixture": (
        "trl",
        {"datasets": [{"path": "a/b", "fraction": 0.25}, {"path": "c/d", "fraction": 0.75}]},
        {"data.train": [{"path": "hf://a/b", "fraction": 0.25}, {"path": "hf://c/d"}]},
        {"datasets[1].fraction": "The rest of the tokens"},
    ),
    "spikes-by-the-peers-patience": (
        "axolotl",
        {"loss_watchdog_threshold": 5.0},
        {"train.stop_when.loss_above": 5.0, "train.stop_when.loss_steps": 3},
        {},
    ),
    "a-rate-by-a-share": (
        "trl",
        {"learning_rate": 1e-3, "lr_scheduler_kwargs": {"min_lr": 2e-4}, "adam_beta2": 0.95},
        {"optim.min_lr_ratio": 0.2, "optim.betas": [0.9, 0.95]},
        {},
    ),
    "a-project-of-a-service-that-is-off": (
        "axolotl",
        {"wandb_project": "p", "use_wandb": False},
        {"track.trackers": None},
        {},
    ),
    "tokens-that-are-added-twice": (
        "llamafactory",
        {"add_tokens": "<a>,<b>", "add_special_tokens": "<b>,<c>"},
        {"model.add_tokens": ["<a>", "<b>", "<c>"]},
        {},
    ),
    "experts-in-4-bits": (
        "accelerate",
        {"kt_config": {"enabled": True, "kt_backend": "AMXINT4"}},
        {"quant.type": "nf4"},
        {},
    ),
    "muon-as-it-is-given": (
        "llamafactory-v1",
        {"optim_config": {"name": "muon", "wd": 0.05, "adamw_betas": [0.8, 0.9]}},
        {"optim.name": "muon", "optim.weight_decay": 0.05, "optim.betas": [0.8, 0.9]},
        {},
    ),
    "a-whole-split": (
        "axolotl",
        {"adapter": "lora", "datasets": [{"path": "a/b", "type": "chat_template", "split": "train[:100%]"}]},
        {"data.train": [{"path": "hf://a/b"}]},
        {},
    ),
    "two-losses-of-pairs": (
        "trl",
        {"script": "dpo", "loss_type": ["sigmoid", "hinge"]},
        {"objective.loss_type": None, "objective.sft_weight": None},
        {"loss_type": "objective.loss_type is one of sigmoid"},
    ),
    "a-weight-of-the-pairs-loss": (
        "trl",
        {"script": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 1.0]},
        {"objective.sft_weight": None},
        {"loss_weights": "Losses are not added up"},
    ),
    "four-bits-by-their-adapters-name": (
        "axolotl",
        {"adapter": "qlora", "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}},
        {"quant.type": "nf4", "quant.double": True},
        {},
    ),
    "a-constant-rate-from-the-first-step": (
        "axolotl",
        {"adapter": "lora", "lr_scheduler": "constant", "max_steps": 100},
        {"optim.warmup_steps": None, "optim.warmup_ratio": None},
        {},
    ),
    "a-system-message-of-one-data-set-alone": (
        "axolotl",
        {
            "adapter": "lora",
            "datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl", "drop_system_message": True}],
        },
        {"data.drop_system": None},
        {"datasets[1].drop_system_message": "One answer for all data sets"},
    ),
    "a-batch-of-whole-micro-batches-on-each-gpu": (
        "axolotl",
        {"adapter": "lora", "batch_size": 7, "micro_batch_size": 2, "num_processes": 4},
        {"train.global_batch": 24},
        {},
    ),
    "a-commit-after-each-step": (
        "trl",
        {"save_strategy": "steps", "save_steps": 1, "max_steps": 10},
        {"checkpoint.every_steps": 1, "checkpoint.per_epoch": None},
        {},
    ),
    "a-last-rate-of-the-libraries": (
        "trl",
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-3},
        {"optim.min_lr_ratio": 1e-4},
        {},
    ),
    "8-bits-of-another-kind": (
        "llamafactory",
        {"quantization_bit": 8, "quantization_method": "hqq"},
        {"quant.type": "nf4"},
        {"quantization_bit": "Here in 4"},
    ),
    "one-process": ("ms-swift", {"ENV": {"NPROC_PER_NODE": "1"}}, {"cluster.workers": None}, {}),
    "a-training-that-also-predicts": (
        "llamafactory",
        {"do_train": True, "do_predict": True},
        {"objective.name": "sft"},
        {},
    ),
    "texts-one-by-one": (
        "llamafactory",
        {"stage": "pt", "packing": False},
        {"data.packing": False, "data.on_too_long": None},
        {},
    ),
    "turns-of-pairs": (
        "llamafactory",
        {"stage": "dpo", "mask_history": True},
        {"data.train_on.turns": None},
        {},
    ),
    "strength-by-the-rank": ("llamafactory", {"lora_rank": 4}, {"tuning.alpha": 8.0, "tuning.rank": 4}, {}),
    "the-fewest-rows-of-several-limits": (
        "llamafactory",
        {
            "dataset": "d",
            "dataset_dir": {"d": {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "num_samples": 10}},
            "max_samples": 5,
        },
        {"data.train": [{"path": "hf://a/b", "format": "alpaca", "take": 5, "take_seed": 42}]},
        {},
    ),
    "a-whole-base-is-in-16-bits": (
        "llamafactory-v1",
        {"quant_config": {"name": "bnb", "quantization_bit": 4}},
        {"tuning.method": "full", "quant.type": "none"},
        {},
    ),
    "layers-that-learn-are-in-16-bits": (
        "llamafactory-v1",
        {"peft_config": {"name": "freeze"}, "quant_config": {"name": "bnb", "quantization_bit": 4}},
        {"tuning.method": "full", "quant.type": "none"},
        {},
    ),
    "an-adapter-over-4-bits": (
        "llamafactory-v1",
        {"peft_config": {"name": "lora"}, "quant_config": {"name": "bnb", "quantization_bit": 4}},
        {"tuning.method": "lora", "quant.type": "nf4"},
        {},
    ),
    "an-adapter-over-16-bits": (
        "llamafactory-v1",
        {"peft_config": {"name": "lora"}},
        {"tuning.method": "lora", "quant.type": "none"},
        {},
    ),
    "a-role-of-ones-own": (
        "llamafactory",
        {
            "dataset": "d",
            "dataset_dir": {"d": {"hf_hub_url": "a/b", "formatting": "sharegpt", "tags": {"user_tag": "asker"}}},
        },
        {"data.train": [{"path": "hf://a/b", "format": "sharegpt"}]},
        {"dataset": "d: the role asker is unknown; roles are system, user (human)"},
    ),
    "texts-around-a-row-beside-a-template": (
        "axolotl",
        {
            "adapter": "lora",
            "chat_template": "chatml",
            "datasets": [
                {"path": "a/b", "type": {"format": "Q {instruction}", "system_prompt": "s", "field_instruction": "q"}},
                {"path": "a/c", "type": "chat_template"},
            ],
        },
        {
            "data.train": [
                {"path": "hf://a/b", "format": "alpaca", "fields": {"instruction": "q"}},
                {"path": "hf://a/c"},
            ],
            "data.template": "chatml",
        },
        {
            "datasets[0].type.format": "The row becomes a conversation",
            "datasets[0].type.system_prompt": "The row becomes a conversation",
        },
    ),
    "pairs-of-messages": (
        "axolotl",
        {"adapter": "lora", "rl": "orpo", "datasets": [{"path": "a/b", "type": "chat_template.argilla"}]},
        {"objective.name": "orpo", "data.train": [{"path": "hf://a/b"}]},
        {},
    ),
    "a-data-set-without-keys": (
        "axolotl",
        {"adapter": "lora", "datasets": ["a.jsonl", {"path": "b.jsonl", "type": "completion"}]},
        {"data.train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "format": "text"}]},
        {"datasets[0]": "Capstan does not know it"},
    ),
    "no-such-number-of-epochs": (
        "axolotl",
        {"adapter": "lora", "num_epochs": -3},
        {"train.epochs": 1},
        {"num_epochs": "train.epochs: -3 is not allowed"},
    ),
    "one-machine": ("accelerate", {"num_machines": 1, "num_processes": 2}, {"cluster.slurm.nodes": None}, {}),
    "two-machines": ("accelerate", {"num_machines": 2, "num_processes": 4}, {"cluster.slurm.nodes": 2}, {}),
    "bf16-is-off": ("llamafactory-v1", {"bf16": False}, {"model.dtype": "fp32", "optim.weight_decay": 0.01}, {}),
}


@pytest.mark.parametrize(("peer", "keys", "settings", "reasons"), ODD.values(), ids=ODD)
def test_keys_that_meet_each_other_mean_what_they_mean_there(
    peer: str, keys: dict[str, Any], settings: dict[str, Any], reasons: dict[str, str], tmp_path: Path
) -> None:
    made = imported_text(yaml.safe_dump({"stage": "sft", **keys} if peer == "llamafactory" else keys), tmp_path, peer)
    for setting, value in settings.items():
        assert made.settings.get(setting) == value
    found = {outcome.key: outcome.why for outcome in made.keys}
    for key, words in reasons.items():
        assert words in found[key]


@pytest.mark.parametrize(
    ("path", "files", "revision", "places"),
    [
        ("a/b", None, None, ["hf://a/b"]),
        ("a/b", ["x.jsonl", "y.jsonl"], "v1", ["hf://a/b@v1/x.jsonl", "hf://a/b@v1/y.jsonl"]),
        ("json", {"test": "y.jsonl", "train": ["x.jsonl"]}, None, ["x.jsonl"]),
        ("json", {"held": "file:///y.jsonl"}, None, ["/y.jsonl"]),
        ("json", {}, None, ["json"]),
        ("json", "https://huggingface.co/datasets/a/b/resolve/main/x.jsonl", None, ["hf://a/b/x.jsonl"]),
        ("json", "https://huggingface.co/datasets/a/b/raw/v1/x.jsonl?download=1", None, ["hf://a/b@v1/x.jsonl"]),
        ("/data/", ["x.jsonl", "/y.jsonl", "s3://c/z.jsonl"], None, ["/data/x.jsonl", "/y.jsonl", "s3://c/z.jsonl"]),
        ("file:///data/x.jsonl", None, None, ["/data/x.jsonl"]),
        ("my/rows", None, None, ["my/rows"]),  # a folder that is here
        ("my/data.jsonl", None, None, ["my/data.jsonl"]),
    ],
)
def test_rows_are_where_a_path_and_its_files_say(
    path: str, files: Any, revision: str | None, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "rows").mkdir(parents=True)
    assert source_paths(path, files, revision) == places


def of_pictures(tmp_path: Path, peer: str, text: str, **sets: Any) -> dict[str, Any]:
    """The settings of a file with these data sets. They are those of a run."""
    (tmp_path / "dataset_info.json").write_text(json.dumps(sets))
    made = imported_text(text.replace("HERE", str(tmp_path)), tmp_path, peer)
    parse_config(made.text.replace("FILL-IN", "one"))
    return made.settings


SHAREGPT = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "seen"}}


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ("", {"max_frames": 128, "max_pixels": 65_536}),
        ("video_maxlen: 16\nvideo_max_pixels: 9999\n", {"max_frames": 16, "max_pixels": 9999}),
    ],
)
def test_videos_and_their_limits_are_carried_over(given: str, limits: dict[str, int], tmp_path: Path) -> None:
    watched = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "videos": "clips"}}
    text = f"model_name_or_path: x\nstage: sft\ndataset_dir: HERE\ndataset: watched\n{given}"
    found = of_pictures(tmp_path, "llamafactory", text, watched=watched)
    assert {name: found[f"data.videos.{name}"] for name in limits} == limits
    assert found["data.format"] == "pictures"
    (source,) = found["data.train"]
    assert source["fields"] == {"messages": "talk", "videos": "clips"}
    assert found["data.images.root"]


def test_conversations_with_sounds_are_carried_over(tmp_path: Path) -> None:
    heard = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "audios": "sounds"}}
    text = "model_name_or_path: x\nstage: sft\ndataset_dir: HERE\ndataset: heard\n"
    found = of_pictures(tmp_path, "llamafactory", text, heard=heard)
    assert found["data.format"] == "pictures"
    (source,) = found["data.train"]
    assert source["fields"] == {"messages": "talk", "audios": "sounds"}
    assert found["data.images.root"]


def test_conversations_with_pictures_are_carried_over(tmp_path: Path) -> None:
    head = "model_name_or_path: x\nstage: sft\ndataset_dir: HERE\nfreeze_vision_tower: true\n"
    plain = {"file_name": "b.json", "formatting": "sharegpt"}
    found = of_pictures(tmp_path, "llamafactory", f"{head}dataset: seen,plain\n", seen=SHAREGPT, plain=plain)
    assert (found["data.format"], found["data.images.root"]) == ("pictures", str(tmp_path))
    assert [source.get("format") for source in found["data.train"]] == [None, None]
    assert found["data.train"][0]["fields"] == {"messages": "talk", "images": "seen"}
    found = of_pictures(tmp_path, "llamafactory", f"{head}dataset: seen\nmedia_dir: HERE/photos\n", seen=SHAREGPT)
    assert found["data.images.root"] == f"{tmp_path}/photos"
    assert (found["data.images.max_pixels"], found["data.images.min_pixels"]) == (768 * 768, 32 * 32)
    limits = "image_max_pixels: 262144\nimage_min_pixels: 256\n"
    found = of_pictures(tmp_path, "llamafactory", f"{head}{limits}dataset: seen\n", seen=SHAREGPT)
    assert (found["data.images.max_pixels"], found["data.images.min_pixels"]) == (262144, 256)
    found = of_pictures(tmp_path, "llamafactory", f"{head}{limits}dataset: plain\n", plain=plain)
    assert "data.images.max_pixels" not in found
    rows = "datasets: [{path: HERE/a.jsonl, type: chat_template, field_messages: talk}]\n"
    switches = "processor_type: AutoProcessor\nskip_prepare_dataset: true\nremove_unused_columns: false\n"
    found = of_pictures(tmp_path, "axolotl", f"base_model: x\nadapter: lora\n{switches}{rows}")
    assert (found["data.format"], found["data.train"][0].get("format")) == ("pictures", None)
    assert "data.images.max_pixels" not in found
    for size, pixels in (("512", 512**2), ("[640, 480]", 640 * 480)):
        text = f"base_model: x\nadapter: lora\n{switches}image_size: {size}\n{rows}"
        assert of_pictures(tmp_path, "axolotl", text)["data.images.max_pixels"] == pixels
    found = of_pictures(tmp_path, "trl", "model_name_or_path: x\nscript: sft_vlm\ndataset_name: c/d\nuse_peft: true\n")
    assert (found["data.format"], found["objective.name"]) == ("pictures", "sft")


def test_answers_with_pictures_are_carried_over(tmp_path: Path) -> None:
    head, lf = "model_name_or_path: x\ndataset_dir: HERE\n", "llamafactory"
    columns = {"messages": "talk", "images": "seen"}
    pairs = {**SHAREGPT, "ranking": True, "columns": {**columns, "chosen": "yes", "rejected": "rejected"}}
    for loss, name in (("sigmoid", "dpo"), ("orpo", "orpo")):
        text = f"{head}stage: dpo\npref_loss: {loss}\ndataset: seen\n"
        found = of_pictures(tmp_path, lf, text, seen=pairs)
        assert (found["data.format"], found["objective.name"]) == ("preference_pictures", name)
        (source,) = found["data.train"]
        assert source["fields"] == {"prompt": "talk", "images": "seen", "chosen": "yes"}
    judged = {**SHAREGPT, "columns": {**columns, "kto_tag": "good"}}
    found = of_pictures(tmp_path, lf, f"{head}stage: kto\ndataset: seen\n", seen=judged)
    assert found["data.format"] == "labelled_pictures"
    assert found["data.train"][0]["fields"] == {"prompt": "talk", "images": "seen", "label": "good"}
    found = of_pictures(tmp_path, lf, "model_name_or_path: x\nstage: dpo\ndataset: rlhf_v\n")
    assert found["data.train"] == [{"path": "hf://llamafactory/RLHF-V", "fields": {"prompt": "conversations"}}]
    assert found["data.format"] == "preference_pictures"
    found = of_pictures(tmp_path, lf, "model_name_or_path: x\nstage: sft\ndataset: llava_1k_en\n")
    assert (found["data.format"], found["data.train"][0]["subset"]) == ("pictures", "en")
    found = of_pictures(tmp_path, "trl", "model_name_or_path: x\nscript: dpo_vlm\ndataset_name: c/d\nuse_peft: true\n")
    assert (found["data.format"], found["objective.name"]) == ("preference_pictures", "dpo")


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (
            r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|q)_proj",
            r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj",
        ),
        (r"model\.text_model\.layers.*v_proj", r"model\.layers.*v_proj"),
        (r"language_model.model.layers.*v_proj", r"model.layers.*v_proj"),
        (r".*layers.*v_proj", r".*layers.*v_proj"),
    ],
)
def test_expressions_for_layers_of_a_class_that_sees_are_those_of_its_decoder(
    given: str, ours: str, tmp_path: Path
) -> None:
    switches = "processor_type: AutoProcessor\nskip_prepare_dataset: true\nattn_implementation: flash_attention_2\n"
    rows = "datasets: [{path: HERE/a.jsonl, type: chat_template}]\n"
    text = f"base_model: x\nadapter: lora\nlora_target_modules: '{given}'\n{switches}{rows}"
    found = of_pictures(tmp_path, "axolotl", text)
    assert found["tuning.targets"] == [f"re:{ours}"]
    assert "model.attention" not in found  # rows with pictures have sdpa or eager


@pytest.mark.parametrize(
    ("columns", "stage", "said"),
    [
        ({"formatting": "alpaca"}, "sft", "whose rows have pictures and are no conversations"),
        ({"ranking": True}, "sft", "in .*a.json rows of the format preference_pictures"),
    ],
)
def test_what_is_no_conversation_with_pictures_is_refused(
    columns: dict[str, Any], stage: str, said: str, tmp_path: Path
) -> None:
    text = f"model_name_or_path: x\nstage: {stage}\ndataset: seen\ndataset_dir: HERE\n"
    with pytest.raises(ConfigError, match=said):
        of_pictures(tmp_path, "llamafactory", text, seen={**SHAREGPT, **columns})


def test_a_size_of_llamafactorys_second_trainer_is_a_random_choice(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("a: {path: a.jsonl, size: 500, weight: 2.0, converter: alpaca}\n")
    found = imported_text(f"model: x\ntrain_dataset: {tmp_path}/d.yaml\n", tmp_path, "llamafactory-v1").settings
    source = {"path": "a.jsonl", "format": "alpaca", "weight": 2.0, "take": 500, "take_seed": 42}
    assert found["data.train"] == [source]


def test_ranks_that_share_a_row_are_one_of_the_batch(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("micro_batch_size: 2\ntensor_parallel_size: 2\ncontext_parallel_size: 2\n")
    settings = import_files([tmp_path / "theirs.yaml"], "axolotl", gpus=8).settings
    assert settings["train.global_batch"] == 4
    assert settings["sharding.sequence_parallel"] == 2


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("axolotl", "base_model: x\nprocess_reward_model: true\n"),
        ("axolotl", "base_model: x\ndatasets: [{path: a.jsonl, type: stepwise_supervised}]\n"),
        ("axolotl", "base_model: x\nmodel_type: AutoModelForSequenceClassification\nnum_labels: 3\n"),
        ("axolotl", "base_model: x\nrl: gdpo\n"),
        ("axolotl", "base_model: x\nrl: grpo\n"),
        ("axolotl", "base_model: x\nadapter: lora\nrelora: true\n"),
        ("axolotl", "base_model: x\nadapter: vera\n"),
        ("axolotl", "base_model: x\nlisa_n_layers: 4\n"),
        ("axolotl", "base_model: x\nunfrozen_parameters: ['^lm_head.weight$[:100]']\n"),
        ("axolotl", "base_model: x\nqat: {weight_dtype: int4}\n"),
        ("axolotl", "base_model: x\nload_in_4bit: true\n"),
        ("llamafactory", "model_name_or_path: x\nstage: sft\nfinetuning_type: adalora\n"),
        ("llamafactory", "model_name_or_path: x\nstage: sft\nfinetuning_type: full\nuse_badam: true\n"),
        ("llamafactory", "model_name_or_path: x\nstage: sft\nfinetuning_type: freeze\nuse_llama_pro: true\n"),
        ("llamafactory-v1", "model: x\npeft_config: {name: vera}\n"),
        ("ms-swift", "model: x\ndataset: [a.jsonl]\ntuner_type: boft\n"),
        ("ms-swift", "model: x\ndataset: [a.jsonl]\ntuner_type: full\nfreeze_parameters_ratio: 0.5\n"),
        ("ms-swift", "model: x\ndataset: [a.jsonl]\nreward_funcs: [accuracy]\n"),
        ("trl", "model_name_or_path: x\nscript: cpo\n"),
        ("trl", "model_name_or_path: x\nscript: run_mlm\n"),
        ("trl", "model_name_or_path: x\nscript: sft\nload_in_4bit: true\n"),
        ("trl", "model_name_or_path: x\ntemperature: 0.7\n"),
        ("axolotl", "base_model: x\nprocessor_type: AutoProcessor\nskip_prepare_dataset: true\nrl: dpo\n"),
        ("axolotl", "base_model: x\nplugins: [axolotl.integrations.diffusion.DiffusionPlugin]\n"),
        ("llamafactory", "model_name_or_path: x\nstage: sft\ndo_predict: true\neval_dataset: d\n"),
        ("llamafactory", "model_name_or_path: x\nstage: ppo\ndataset: d\n"),
        ("llamafactory", "model_name_or_path: x\nadapter_name_or_path: y\nexport_dir: z\n"),
        ("llamafactory", "model_name_or_path: x\ntemplate: llama3\ninfer_backend: huggingface\n"),
        ("llamafactory-v1", "model: x\npeft_config: {name: lora, export_dir: merged}\n"),
        ("trl", "model_name_or_path: x\nreward_funcs: [accuracy]\nlearning_rate: 1e-6\n"),
        ("trl", "model_name_or_path: x\nscript: grpo_vlm\n"),
    ],
)
def test_a_file_that_would_become_another_training_is_refused(peer: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this is no training that can be carried over\. .* Nothing was written\."):
        imported_text(text, tmp_path, peer)


@pytest.mark.parametrize("key", ["use_peft_lora: true", "freeze_all_but: head", "trainable: [head]"])
def test_an_unknown_key_that_says_what_learns_is_not_guessed(key: str, tmp_path: Path) -> None:
    text = f"model_name_or_path: x\nlearning_rate: 1e-6\nscript: sft\nseed: 3\n{key}\n"
    with pytest.raises(ConfigError, match=f"{key.partition(':')[0]}: .* by its name it says what learns"):
        imported_text(text, tmp_path, "trl")
    off = text.replace(key, f"{key.partition(':')[0]}: false")
    assert imported_text(off, tmp_path, "trl").settings["tuning.method"] == "full"


def test_beside_an_adapter_an_unknown_key_that_asks_for_another_one_is_not_guessed(tmp_path: Path) -> None:
    text = "model_name_or_path: x\nstage: sft\ndataset: d\nfinetuning_type: lora\n"
    with pytest.raises(ConfigError, match="use_new_lora: True: .* by its name it says what learns"):
        imported_text(f"{text}use_new_lora: true\n", tmp_path)
    (found,) = (one for one in imported_text(f"{text}lora_glow: 3\n", tmp_path).keys if one.key == "lora_glow")
    assert found.status == "unknown"


@pytest.mark.parametrize(
    "text",
    [
        "model: x\ntrain_dataset: data/v1_dpo_demo.yaml\n",
        "model: x\ntrain_dataset: data/rows.jsonl\npref_beta: 0.1\n",
        "model: x\ntrain_dataset: PAIRS\n",
    ],
)
def test_llamafactorys_second_trainer_over_answers_is_no_sft(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("a: {path: a.jsonl, converter: pair}\n")
    with pytest.raises(ConfigError, match=r"as a file of the first trainer.* Nothing was written\."):
        imported_text(text.replace("PAIRS", f"{tmp_path}/d.yaml"), tmp_path, "llamafactory-v1")


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ("a: [\n", "FILL-IN", "is not YAML"),
        ("- a.jsonl\n", "FILL-IN", None),
        (None, "FILL-IN", "d.yaml, which names the data sets, is not here"),
        ("a: {path: a.jsonl}\nb: {}\nc: text\n", "a.jsonl", None),
    ],
)
def test_data_sets_of_a_file_that_cannot_be_read_are_asked_for(
    text: str | None, path: str, why: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "d.yaml").write_text(text)
    found = imported_text("model: x\ntrain_dataset: d.yaml\n", tmp_path, "llamafactory-v1")
    assert found.settings["data.train"] == [{"path": path}]
    (outcome,) = (one for one in found.keys if one.key == "train_dataset")
    assert (outcome.status, why is None or why in outcome.why) == ("not supported" if why else "mapped", True)


@pytest.mark.parametrize(
    ("name", "text", "offloaded"),
    [
        ("ds.json", '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "zero3_offload_optimizer"),
        ("ds.json", '{"zero_optimization": {"offload_param": {"device": "cpu"}}}', "zero3_offload_cpu"),
        ("ds_offload.json", '{"zero_optimization": {}}', None),
        ("ds_offload.json", "{", "zero3_offload_cpu"),  # no file that says more than its name
        ("ds.json", "{", None),
    ],
)
def test_a_deepspeed_file_says_what_is_offloaded(name: str, text: str, offloaded: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = imported_text(f"base_model: x\nadapter: lora\ndeepspeed: {name}\n", tmp_path, "axolotl")
    assert found.settings.get("sharding.deepspeed") == offloaded


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    for name in ("bytes.yaml", "none.yaml"):
        with pytest.raises(ConfigError, match=f"the file '.*{name}' cannot be read: "):
            import_files([tmp_path / name])
    text = "model_name_or_path: x\nstage: sft\ndataset: d\n"
    (tmp_path / "theirs.yaml").write_text(text)
    for name in ("bytes.yaml", "none.yaml"):
        with pytest.raises(ConfigError, match=f"--data-info: .*{name} cannot be read as JSON: "):
            import_files([tmp_path / "theirs.yaml"], data_info=tmp_path / name)


@pytest.mark.parametrize(("stage", "said"), [("", True), ("stage: sft\n", False)])
def test_llamafactorys_own_stage_is_said_where_a_file_names_none(stage: str, said: bool, tmp_path: Path) -> None:
    found = imported_text(f"{stage}model_name_or_path: x\ndataset: d\ntemplate: default\n", tmp_path, "llamafactory")
    assert found.settings["objective.name"] == "sft"
    assert any(line.startswith("objective.name: sft, LLaMA-Factory's default") for line in found.to_do) == said


def imported_command(text: str, folder: Path, peer: str | None = None) -> Imported:
    (folder / "train.sh").write_text(text)
    return import_files([folder / "train.sh"], peer)


def test_what_is_within_quotes_ends_no_command_line(tmp_path: Path) -> None:
    text = (
        "python trl/scripts/sft.py --model_name_or_path x --dataset_name a/b \\\n  --eos_token '<|im_end|>' \\\n"
        '  --lora_target_modules "(q|k)_proj" --use_peft --lora_r 32 2>&1 | tee log\n'
    )
    found = imported_command(text, tmp_path)
    wanted = {"tuning.method": "lora", "tuning.rank": 32, "tuning.targets": ["re:(q|k)_proj"]}
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not [outcome.key for outcome in found.keys if outcome.status == "unknown"]


def test_of_a_scripts_commands_the_one_with_the_options_is_read(tmp_path: Path) -> None:
    text = "pip install --upgrade trl && cd here; trl sft --model_name_or_path x --dataset_name a/b --use_peft > log\n"
    assert (
        imported_command("trl dpo --model_name_or_path x --dataset_name a/b \\", tmp_path).settings["model.base"] == "x"
    )
    found = imported_command(f"{text}echo --use_dora\n", tmp_path).settings
    assert (found["model.base"], found["tuning.method"]) == ("x", "lora")
    with pytest.raises(ConfigError, match="holds 2 command lines"):
        imported_command(f"{text}\n{text.replace('--use_peft', '')}", tmp_path)


def test_a_command_of_trls_says_what_is_trained(tmp_path: Path) -> None:
    options = "--model_name_or_path x --dataset_name a/b --learning_rate 1e-6"
    assert imported_command(f"trl dpo {options}", tmp_path).settings["objective.name"] == "dpo"
    for command in ("trl grpo", "trl vllm-serve", "python grpo_agent.py", "accelerate launch ppo/ppo_tldr.py"):
        with pytest.raises(ConfigError, match="this is no training that can be carried over"):
            imported_command(f"{command} {options}", tmp_path, "trl")


@pytest.mark.parametrize(("name", "objective"), [("dpo_full.yaml", "dpo"), ("mine.yaml", "sft")])
def test_the_name_of_a_file_tells_the_trainer_where_no_key_does(name: str, objective: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("model_name_or_path: x\ndataset_name: a/b\n")
    found = import_files([tmp_path / name], "trl")
    assert found.settings.get("objective.name", "sft") == objective
    said = any(line.startswith("objective.name: the file does not say which") for line in found.to_do)
    assert said == (objective == "sft")
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: x\ndataset_name: a/b\n")
    with pytest.raises(ConfigError, match="the file grpo, which says grpo: this is no training"):
        import_files([tmp_path / "grpo.yaml"], "trl")


@pytest.mark.parametrize(
    ("command", "thinking", "said"),
    [
        ("swift sft --model Qwen/Qwen3-8B", "always", False),
        ("megatron sft --model Qwen/Qwen3.5-35B-A3B", "always", False),
        ("swift sft --model Qwen/Qwen3-8B --loss_scale ignore_empty_think", "always", False),
        ("swift sft --model Qwen/Qwen3-8B --loss_scale last_round", None, True),
        ("swift sft --model Qwen/Qwen3-8B --disable_ignore_empty_think true", None, True),
        ("swift sft --model Qwen/Qwen3-8B --add_non_thinking_prefix false", None, True),
        ("swift rlhf --rlhf_type dpo --model Qwen/Qwen3-8B", None, True),
        ("swift sft --model deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", None, True),
        ("swift pt --model Qwen/Qwen3-8B", None, False),
        ("swift sft --model Qwen/Qwen3-4B-Instruct-2507", None, False),
    ],
)
def test_ms_swift_writes_an_empty_block_into_the_answers_of_a_hybrid_base(
    command: str, thinking: str | None, said: bool, tmp_path: Path
) -> None:
    found = imported_text(f"{command} --dataset hf::c/d", tmp_path)
    assert found.settings.get("data.thinking") == thinking
    assert any(line.startswith("data.thinking: ms-swift writes") for line in found.to_do) == said


@pytest.mark.parametrize(
    ("scale", "settings", "lost"),
    [
        ("default", {"train_on.end": "last", "train_on.frame": "tail"}, ""),
        ("last_round", {"train_on.end": "last", "train_on.frame": "tail", "train_on.turns": "last"}, ""),
        ("all", {"train_on.roles": "all"}, ""),
        ("ignore_empty_think", {"train_on.end": "last", "train_on.frame": "tail"}, ""),
        ("all+ignore_empty_think", {"train_on.roles": "all"}, ""),
        ("hermes", {"train_on.end": "last", "train_on.frame": "tail"}, "hermes: every trained token weighs the same."),
        ("all+hermes", {"train_on.roles": "all"}, "hermes: every trained token weighs the same."),
        (
            "last_round+ignore_empty_think+react",
            {"train_on.end": "last", "train_on.frame": "tail", "train_on.turns": "last"},
            "react: every trained token weighs the same.",
        ),
    ],
)
def test_what_ms_swift_trains_of_a_conversation_is_carried_over(
    scale: str, settings: dict[str, str], lost: str, tmp_path: Path
) -> None:
    found = imported_text(f"swift sft --model a/b --loss_scale {scale} --dataset hf::c/d", tmp_path)
    trained = {name.removeprefix("data."): found.settings[name] for name in found.settings if "train_on" in name}
    assert trained == settings
    assert [one.why for one in found.keys if one.status == "not supported"] == ([lost] if lost else [])


def test_the_folder_of_a_recipe_tells_the_trainer_where_nothing_else_does(tmp_path: Path) -> None:
    for folder, objective in (("sft", "sft"), ("orpo", "orpo"), ("dpo", "dpo")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config_full.yaml").write_text("model_name_or_path: x\ndataset_name: a/b\n")
        found = import_files([tmp_path / folder / "config_full.yaml"], "trl")
        assert found.settings["objective.name"] == objective
        assert not any(line.startswith("objective.name") for line in found.to_do)
    (tmp_path / "dpo" / "sft.yaml").write_text("model_name_or_path: x\ndataset_name: a/b\n")
    assert import_files([tmp_path / "dpo" / "sft.yaml"], "trl").settings["objective.name"] == "sft"
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "config.yaml").write_text("model_name_or_path: x\ndataset_name: a/b\n")
    with pytest.raises(ConfigError, match="the file's folder, which is called grpo: this is no training"):
        import_files([tmp_path / "grpo" / "config.yaml"], "trl")


def test_keys_that_are_not_needed_for_one_reason_share_a_line_without_their_values() -> None:
    why, found = "Capstan does so anyway.", ("a", "b", "c")
    keys = tuple(Outcome("TRL", name, 7, "not needed", {}, why if name != "c" else "It prints less.") for name in found)
    cells = Imported(("TRL",), "", {}, keys, ()).table().columns[0].cells
    assert [str(cell) for cell in cells] == ["a, b", "c: 7"]


def test_keys_without_a_value_are_not_reported_and_losses_come_first(tmp_path: Path) -> None:
    found = imported_text("base_model: x\nadapter: lora\nlora_model_dir:\nlora_rr: 1\n", tmp_path, "axolotl")
    assert [outcome.key for outcome in found.keys] == ["base_model", "adapter", "lora_rr"]
    assert str(next(iter(found.table().columns[0].cells))) == "lora_rr: 1"


def test_trl_and_accelerate_together_make_one_configuration(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    both = import_files(["trl/sft.yaml", PEERS / "trl/accelerate.yaml"])
    assert both.peers == ("TRL", "accelerate")
    assert both.settings["cluster.workers"] == 16
    assert both.settings["train.global_batch"] == 2 * 4 * 16
    assert both.settings["cluster.slurm.nodes"] == 2
    assert both.settings["optim.grad_clip"] == 0.5
    assert both.settings["sharding.deepspeed"] == "zero3_offload_optimizer"
    alone = import_files([PEERS / "trl/accelerate.yaml"])
    assert any(line.startswith("model.base: not in the file") for line in alone.to_do)
    parse_config(alone.text)


def test_no_secret_of_a_file_is_shown(tmp_path: Path) -> None:
    names = ("hub_token", "push_to_hub_token", "swanlab_api_key", "my_secret", "s3_password", "lark_webhook_url")
    known = "base_model: x\nadapter: lora\nlora_r: 8\nmicro_batch_size: 1\nseed: 1\nsequence_len: 64\nnum_epochs: 1\n"
    found = imported_text(known + "".join(f"{name}: hidden-words\n" for name in names), tmp_path, "axolotl")
    assert {outcome.key: outcome.value for outcome in found.keys if outcome.key in names} == dict.fromkeys(
        names, "(not shown)"
    )
    assert "hidden-words" not in found.text


def test_ms_swift_accumulates_to_16_rows_or_more(tmp_path: Path) -> None:
    line = "NPROC_PER_NODE=2 swift sft --model a/b --dataset hf::c/d --tuner_type lora --per_device_train_batch_size"
    batches = [imported_text(f"{line} {rows}", tmp_path).settings["train.global_batch"] for rows in (1, 3, 9)]
    assert batches == [16, 18, 18]
    shared = imported_text(f"{line.replace('=2', '=4')} 1 --sequence_parallel_size 2", tmp_path).settings
    assert shared["train.global_batch"] == 8  # of four GPUs two share a row


def test_two_trainings_in_one_import_are_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    with pytest.raises(ConfigError, match="More than one of the files describes a training"):
        import_files(["trl/sft.yaml", "trl/kto.yaml"])


def test_what_the_environment_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_BASE", "a/b")
    text = "base_model: ${oc.env:THE_BASE}\nadapter: lora\nlora_r: ${env:NO_SUCH_RANK,12}\n"
    settings = imported_text(text, tmp_path, "axolotl").settings
    assert (settings["model.base"], settings["tuning.rank"]) == ("a/b", 12)


def test_the_batch_counts_the_gpus_that_are_told(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    assert import_files(["axolotl/qlora.yml"], gpus=8).settings["train.global_batch"] == 64
    assert any("--gpus" in line for line in import_files(["axolotl/qlora.yml"]).to_do)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", "its keys fit"),
        ("nothing_of_it: 1\n", "none of its keys"),
        ("run: {}\nmodel: {}\ndata: {}\ntrain: {}\n", "is a configuration of Capstan already"),
        ("- a\n- b\n", "no keys"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_what_is_no_configuration_of_theirs_is_refused_in_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        imported_text(text, tmp_path)
    with pytest.raises(ConfigError, match="is not known"):
        imported_text(text, tmp_path, "unsloth")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: x\nadapter: lora\nlora_rr: 1\nlora_ss: 2\nlora_tt: 3\n", "3 of its 5 keys are none of axolotl's"),
        ("model: {_component_: torchtune.models.llama3}\nseed: 1\n", "a file of torchtune"),
    ],
)
def test_a_file_of_a_tool_that_is_not_read_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{words}.* Nothing was written\\."):
        imported_text(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("swift rlhf --rlhf_type grpo --model a/b --dataset c/d", "rlhf_type: grpo"),
        ("swift rlhf --rlhf_type cpo --model a/b --dataset c/d", "rlhf_type: cpo"),
        ("swift infer --model a/b --dataset c/d", "swift infer"),
        ("swift sft --model a/b --dataset c/d --task_type embedding", "task_type: embedding"),
        ("swift sft --model a/b --dataset c/d --task_type seq_cls --num_labels 1", "a number as its answer"),
        ("USE_AUDIO_IN_VIDEO=1 swift sft --model a/b --dataset c/d", "USE_AUDIO_IN_VIDEO, so rows of images"),
        ("swift sft --model a/b-vl --dataset c/d --norm_bbox none1", "norm_bbox, so rows of images"),
        ("swift pt --model a/b-vl --dataset c/d", "swift pt, and vl, so rows of pictures"),
        ("swift rlhf --rlhf_type dpo --model a/b-vl --dataset c/d", "dpo of rows with pictures"),
        ("swift sft --model a/b-vl --dataset c/d AI-ModelScope/alpaca-gpt4-data-en", "rows of the format alpaca"),
        ("swift sft --config not-here.yaml", "has its keys in not-here.yaml, which is not here"),
        ("swift sft not-here.yaml", "has its keys in not-here.yaml, which is not here"),
    ],
)
def test_a_file_of_ms_swifts_that_trains_otherwise_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        imported_text(text, tmp_path)


def test_ms_swifts_runs_over_pictures_are_carried_over(tmp_path: Path) -> None:
    def made(more: str, before: str = "") -> Any:
        text = f"{before} swift sft --model Qwen/Qwen2.5-VL-7B-Instruct --tuner_type lora --max_length 64 {more}"
        return imported_text(text, tmp_path)

    on_hub = "--dataset hf::c/d"
    for found, pixels in (
        (made(on_hub), None),
        (made(on_hub, "MAX_PIXELS=1003520 VIDEO_MAX_PIXELS=50176"), 1003520),
        (made(f"{on_hub} --max_pixels 512000"), 512000),
    ):
        assert found.settings["data.format"] == "pictures"
        assert found.settings.get("data.images.max_pixels") == pixels
        assert not any("data.images.root" in line for line in found.to_do)
        parse_config(found.text.replace("FILL-IN", "one"))
    assert any("from the folder that it is started in" in line for line in made("--dataset rows.jsonl").to_do)
    assert made("--dataset rows.jsonl", "ROOT_IMAGE_DIR=/photos").settings["data.images.root"] == "/photos"
    assert any("MAX_PIXELS is $PIXELS" in line for line in made(on_hub, "MAX_PIXELS='$PIXELS'").to_do)

    squares = made(on_hub, "IMAGE_MAX_TOKEN_NUM=1024 IMAGE_MIN_TOKEN_NUM=4 VIDEO_MAX_TOKEN_NUM=128").settings
    limits = ("images.max_pixels", "images.min_pixels", "videos.max_pixels")
    assert [squares[f"data.{name}"] for name in limits] == [1024 * 1024, 4 * 1024, 128 * 1024]

    def lost(more: str) -> list[str]:
        return [outcome.key for outcome in made(f"{on_hub} {more}").keys if outcome.status == "not supported"]

    assert made(f"{on_hub} --freeze_vit false --freeze_aligner false").settings["tuning.towers"] == "lora"
    scaled = made(f"{on_hub} --freeze_vit false --freeze_aligner false --use_rslora true").settings
    assert (scaled["tuning.method"], scaled["tuning.towers"]) == ("rslora", "lora")
    assert "tuning.towers" not in made(f"{on_hub} --freeze_vit true --freeze_aligner true").settings
    assert lost("--freeze_vit true --freeze_aligner true") == []
    assert lost("--freeze_vit false") == ["freeze_vit"]
    both = made(f"{on_hub} --freeze_vit false --freeze_aligner false --use_dora true")
    assert "tuning.towers" not in both.settings
    lacks = {outcome.key: outcome.why for outcome in both.keys if outcome.status == "not supported"}
    assert set(lacks) == {"freeze_vit", "freeze_aligner"}
    assert all("only with tuning.method lora or rslora" in why for why in lacks.values())
    assert lost("--freeze_vit false --freeze_aligner false --vit_lr 1e-5") == ["vit_lr"]
    assert lost("--freeze_llm true") == ["freeze_llm"]
    of_text = made("--dataset AI-ModelScope/alpaca-gpt4-data-en --freeze_vit true", "MAX_PIXELS=1003520")
    assert (of_text.settings.get("data.format"), of_text.settings["data.train"][0]["format"]) == (None, "alpaca")


@pytest.mark.parametrize(
    ("before", "model", "rows", "limits"),
    [
        ("", "Qwen/Qwen2.5-Omni-7B", "c/d", {}),
        ("ENABLE_AUDIO_OUTPUT=0 USE_AUDIO_IN_VIDEO=0", "a/b", "c/d", {}),
        ("ENABLE_AUDIO_OUTPUT=0 USE_AUDIO_IN_VIDEO=", "a/b", "c/d", {}),
        ("ENABLE_AUDIO_OUTPUT=0 USE_AUDIO_IN_VIDEO=False", "a/b", "c/d", {}),
        ("ENABLE_AUDIO_OUTPUT=0 USE_AUDIO_IN_VIDEO=None", "a/b", "c/d", {}),
        ("", "Qwen/Qwen2-Audio-7B-Instruct", "c/d", {}),
        ("", "a/b", "c/d:video", {}),
        ("", "openbmb/MiniCPM-V-4", "c/d", {}),
        ("FPS_MAX_FRAMES=16 VIDEO_MAX_PIXELS=50176", "a/b", "c/d", {"max_frames": 16, "max_pixels": 50176}),
    ],
)
def test_ms_swifts_runs_over_videos_and_sounds_are_carried_over(
    before: str, model: str, rows: str, limits: dict[str, int], tmp_path: Path
) -> None:
    text = f"{before} swift sft --model {model} --tuner_type lora --max_length 64 --dataset hf::{rows}"
    found = imported_text(text, tmp_path)
    assert found.settings["data.format"] == "pictures"
    assert {name.removeprefix("data.videos."): found.settings[name] for name in found.settings if "videos" in name} == (
        limits
    )
    parse_config(found.text.replace("FILL-IN", "one"))
    sampled = imported_text(f"FPS=1 VIDEO_TOTAL_PIXELS=9 {text}", tmp_path).to_do
    assert any(
        "FPS=1, VIDEO_TOTAL_PIXELS=9: here the base's own processor chooses the frames" in one for one in sampled
    )


@pytest.mark.parametrize(
    ("more", "lost", "said"),
    [
        ("--use_chat_template false", True, False),
        ("--task_type seq_cls --num_labels 3 --use_chat_template false", False, False),
        ("--task_type seq_cls --num_labels 3", False, True),
    ],
)
def test_what_rows_without_a_chat_template_become_is_said(more: str, lost: bool, said: bool, tmp_path: Path) -> None:
    found = imported_text(f"swift sft --model a/b --tuner_type lora --dataset hf::c/d --max_length 64 {more}", tmp_path)
    assert [outcome.key for outcome in found.keys if outcome.status == "not supported"] == ["use_chat_template"] * lost
    assert any("writes the chat template around a text" in line for line in found.to_do) == said


def test_a_row_is_never_cut_silently_where_the_peer_limits_no_length(tmp_path: Path) -> None:
    swift = "swift sft --model a/b --tuner_type lora --dataset hf::c/d"
    automodel = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.chat_dataset.ChatDataset")
    for text in (swift, automodel):
        assert imported_text(text, tmp_path).settings["data.on_too_long"] == "fail"
    assert imported_text(f"{swift} --max_length 64", tmp_path).settings["data.on_too_long"] == "drop"


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("train[64:192]", {"skip": 64, "take": 128}),
        ("train[64:]", {"skip": 64}),
        ("train[:64]", {"take": 64}),
        ("train[:50%]", {"take": 0.5}),
        ("train[5%:]", None),
        ("train[64:64]", None),
    ],
)
def test_a_part_of_a_split_is_what_a_source_takes(split: str, part: dict[str, int] | None, tmp_path: Path) -> None:
    text = f"base_model: x\nadapter: lora\ndatasets: [{{path: a/b, type: chat_template, split: '{split}'}}]\n"
    found = imported_text(text, tmp_path, "axolotl")
    (source,) = found.settings["data.train"]
    assert {name: source[name] for name in ("take", "skip") if name in source} == (part or {})
    lost = [outcome.key for outcome in found.keys if outcome.status == "not supported"]
    assert lost == ([] if part else ["datasets[0].split"])


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(-1, {"checkpoint.keep_every": 1}), (0, {"checkpoint.keep_every": 1}), (2, {"checkpoint.keep_last": 2})],
)
def test_a_limit_of_none_keeps_every_checkpoint(limit: int, kept: dict[str, int], tmp_path: Path) -> None:
    options = "--model_name_or_path x --dataset_name a/b"
    found = imported_command(f"trl sft {options} --save_total_limit {limit}", tmp_path).settings
    assert {name: value for name, value in found.items() if name.startswith("checkpoint.keep")} == kept


@pytest.mark.parametrize(("trainer", "limit"), [("dpo", 256), ("orpo", None), ("kto", None)])
def test_only_trls_dpo_limits_every_prompt(trainer: str, limit: int | None, tmp_path: Path) -> None:
    options = "--model_name_or_path x --dataset_name a/b --max_prompt_length 256"
    found = imported_command(f"trl {trainer} {options}", tmp_path)
    assert found.settings.get("data.prompt_length") == limit
    (key,) = (outcome for outcome in found.keys if outcome.key == "max_prompt_length")
    assert key.status == ("mapped" if limit else "not supported")


def test_a_mixture_of_the_alignment_handbooks_is_trls_data(tmp_path: Path) -> None:
    text = """
model_name_or_path: a/b
chat_template: "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
dataset_mixture:
  datasets:
  - {id: c/d, config: SFT, split: talk, columns: [messages], weight: 0.5}
  - {id: e/f, weight: 1.0}
  seed: 3
  test_split_size: 0.1
"""
    found = imported_text(text, tmp_path, "trl")
    data = parse_config(found.text).data
    assert found.settings["data.train"] == [
        {"path": "hf://c/d", "take": 0.5, "take_seed": 3, "subset": "SFT", "split": "talk"},
        {"path": "hf://e/f"},
    ]
    assert (data.held_out, template_text(data)) == (0.1, data.template)
    assert not [outcome.key for outcome in found.keys if outcome.status in ("not supported", "unknown")]


@pytest.mark.parametrize(
    ("tool", "line", "held_out"),
    [
        ("axolotl", "base_model: a/b\nval_set_size: 500", 500),
        ("llamafactory", "model_name_or_path: a/b\nstage: sft\nval_size: 500", 500),
        ("trl", "model_name_or_path: a/b\ndataset_mixture: {datasets: [{id: c/d}], test_split_size: 1000}", 1000),
        ("axolotl", "base_model: a/b\nval_set_size: 0.05", 0.05),
    ],
)
def test_a_number_of_rows_to_evaluate_on_is_a_number_here(
    tmp_path: Path, tool: str, line: str, held_out: float
) -> None:
    assert imported_text(line, tmp_path, tool).settings["data.held_out"] == held_out


def test_a_subset_of_modelscopes_rows_has_its_text_around_them(tmp_path: Path) -> None:
    text = "swift sft --model a/b --dataset swift/self-cognition:empty_think#5 --model_name Bo --tuner_type lora"
    found = imported_text(text, tmp_path)
    (source,) = parse_config(found.text).data.train
    assert source.write == {"question": "{query}", "answer": "<think>\n\n</think>\n\n{response}"}
    assert (source.replace, source.take, source.subset) == ({"{{NAME}}": "Bo"}, 5, None)


def test_a_command_line_has_the_keys_of_the_file_that_it_names_too(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("model: a/b\ntuner_type: lora\ndataset: c/d\nlearning_rate: 1e-3\nseed: 7\n")
    (tmp_path / "sft.sh").write_text("NPROC_PER_NODE=2 NNODES=2 swift sft sft.yaml --seed 8\n")
    found = import_files([tmp_path / "sft.sh"])
    assert found.peers == ("ms-swift",)
    settings = {name: found.settings.get(name) for name in ("model.base", "optim.lr", "run.seed", "cluster.workers")}
    assert settings == {"model.base": "a/b", "optim.lr": 1e-3, "run.seed": 8, "cluster.workers": 4}
    # ms-swift accumulates to 16 rows.
    assert found.settings["train.global_batch"] == 16


def test_names_of_modelscope_become_those_of_the_hub_or_are_asked_for(tmp_path: Path) -> None:
    text = (
        "swift sft --model ZhipuAI/GLM-4-9B-0414 --dataset AI-ModelScope/alpaca-gpt4-data-en:default#5 ms::a/b --seed 1"
    )
    found = imported_text(text, tmp_path)
    assert found.settings["model.base"] == "zai-org/GLM-4-9B-0414"
    assert [source["path"] for source in found.settings["data.train"]] == ["hf://vicgalle/alpaca-gpt4", "hf://a/b"]
    assert "subset" not in found.settings["data.train"][0]  # of ModelScope's alone
    assert any(line.startswith("data.train: a/b is its name on ModelScope") for line in found.to_do)
    found = imported_text("swift sft --model LLM-Research/gemma-2-2b --dataset hf::a/b --tuner_type full", tmp_path)
    assert any(line.startswith("model.base: LLM-Research/gemma-2-2b is its name on ModelScope") for line in found.to_do)
    assert not any(line.startswith("data.train") for line in found.to_do)
    assert found.settings["optim.lr"] == 1e-5
    changed = imported_text("swift sft --model a/b --dataset lvjianjin/AdvertiseGen --tuner_type lora", tmp_path)
    lost = {outcome.key: outcome.why for outcome in changed.keys if outcome.status == "not supported"}
    assert "ms-swift changes its rows by code" in lost["dataset"]


def test_rows_that_ms_swift_changes_by_code_are_changed_by_settings_where_these_can(tmp_path: Path) -> None:
    found = imported_text("swift sft --model a/b --dataset AI-ModelScope/LongAlpaca-12k --tuner_type lora", tmp_path)
    ((text, other),) = found.settings["data.train"][0]["replace"].items()
    assert [with_replaced(row, text, other) for row in ("Answer:  so \n", "No. Answer: so")] == ["so", "No. Answer: so"]
    found = imported_text("swift rlhf --model a/b --dataset AI-ModelScope/orpo-dpo-mix-40k", tmp_path)
    assert found.settings["data.train"][0]["without"] == {"source": "toxic-dpo-v0.2"}
    assert found.settings["objective.name"] == "dpo"  # rlhf's own where rlhf_type names none


def test_rows_about_the_model_have_the_name_of_their_language(tmp_path: Path) -> None:
    line = "swift sft --model a/b --dataset swift/self-cognition#500 --tuner_type lora --model_author Us --model_name"
    chinese, other = imported_text(f"{line} 小黄 Bo", tmp_path).settings["data.train"]
    assert (chinese["without"], other["without"]) == ({"tag": "en"}, {"tag": "zh"})
    assert (chinese["replace"]["{{NAME}}"], other["replace"]["{{NAME}}"]) == ("小黄", "Bo")
    assert chinese["replace"]["{{AUTHOR}}"] == other["replace"]["{{AUTHOR}}"] == "Us"
    assert (chinese["take"], chinese["take_seed"]) == (other["take"], other["take_seed"])
    assert len(imported_text(f"{line} Bo", tmp_path).settings["data.train"]) == 1


def test_a_value_that_no_setting_could_have_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    rows = "chat_dataset.ChatDataset, split: 'train[:10]', shuffle_seed: 1.0e+300"
    path.write_text(AUTOMODEL.format(recipe=NEXT, model=LOADED, rows=f"llm.{rows}"))
    with pytest.raises(ConfigError, match=r"a value cannot be read: 1e\+300 is no number"):
        import_files([path])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "x.sh",
            "megatron pt --model a/b --dataset b.jsonl --lr 1e-4 --train_iters 5 --global_batch_size x --streaming true",
        ),
        ("x.yaml", "model: a/b\ntuner_type: lora\ndataset: swift/self-cognition\nmodel_name: true\n"),
    ],
)
def test_values_of_other_types_are_no_traceback(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert import_files([path]).settings["objective.name"] == "sft"


MEANT = {
    "the end of the last turn": (
        "base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a.jsonl, type: chat_template, train_on_eos: last}]\n",
        {"data.train_on.end": "last"},
    ),
    "dpo with its next-token loss": (
        "model_name_or_path: a/b\nscript: dpo\nloss_type: [hinge, sft]\nloss_weights: [1.0, 0.2]\ndataset_name: c/d\n",
        {"objective.loss_type": "hinge", "objective.sft_weight": 0.2},
    ),
}


@pytest.mark.parametrize(("text", "wanted"), MEANT.values(), ids=MEANT)
def test_a_value_has_its_meaning(text: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    found = import_files([path])
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not [outcome for outcome in found.keys if outcome.status in ("not supported", "unknown")]


def test_dropout_before_an_adapter_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    text = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.chat_dataset.ChatDataset")
    path.write_text(f"{text}peft: {{target_modules: ['*_proj'], dropout: 0.1, dropout_position: pre}}\n")
    (outcome,) = [one for one in import_files([path]).keys if one.key == "peft.dropout_position"]
    assert outcome.status == "not needed"


ROUTED = {
    "a mixture's loss by transformers": (
        "swift sft --model Qwen/Qwen3-30B-A3B --router_aux_loss_coef 1e-3",
        (1e-3, None),
    ),
    "none for a base without one": ("swift sft --model moonshotai/Moonlight-16B-A3B --router_aux_loss_coef 1e-3", None),
    "a layer's by Megatron": (
        "megatron sft --model Qwen/Qwen3-30B-A3B --lr 1e-4 --moe_aux_loss_coeff 1e-6",
        (1e-6, "layers"),
    ),
    "turned off": ("megatron sft --model Qwen/Qwen3-30B-A3B --lr 1e-4 --moe_aux_loss_coeff 0", None),
    "of no kind": (
        "megatron sft --model a/b --lr 1e-4 --moe_aux_loss_coeff 1e-3 --moe_router_load_balancing_type none",
        None,
    ),
}


@pytest.mark.parametrize(("text", "wanted"), ROUTED.values(), ids=ROUTED)
def test_the_routers_loss_is_that_of_the_trainer(
    text: str, wanted: tuple[float, str | None] | None, tmp_path: Path
) -> None:
    found = imported_text(f"{text} --dataset rows.jsonl", tmp_path)
    loss, of = (found.settings.get(f"objective.{name}") for name in ("router_loss", "router_loss_of"))
    assert (loss, of) == (wanted or (None, None))
    assert not [outcome for outcome in found.keys if outcome.status == "not supported"]


def test_losses_of_routers_that_are_counted_otherwise_are_lost(tmp_path: Path) -> None:
    line = "megatron sft --dataset rows.jsonl --lr 1e-4 --moe_aux_loss_coeff"
    for given in (
        "1e-3 --model zai-org/GLM-4.5-Air",
        "1e-3 --model a/b --moe_router_load_balancing_type seq_aux_loss",
        "1e-3 1e-4 --model a/b",
    ):
        found = imported_text(f"{line} {given}", tmp_path)
        assert "objective.router_loss" not in found.settings
        assert [outcome.key for outcome in found.keys if outcome.status == "not supported"]


AUTOMODEL = """\
recipe: {recipe}
step_scheduler: {{global_batch_size: 8, num_epochs: 1}}
model: {{_target_: nemo_automodel.{model}, pretrained_model_name_or_path: a/b-Instruct}}
dataset: {{_target_: nemo_automodel.components.datasets.{rows}, path_or_dataset: c/d}}
optimizer: {{_target_: torch.optim.AdamW, lr: 1.0e-5}}
"""
NEXT, LOADED = "TrainFinetuneRecipeForNextTokenPrediction", "NeMoAutoModelForCausalLM.from_pretrained"
MORE = ", pretrained_model_name_or_path: a/b}\n"  # ends the section of the model and begins another


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "FinetuneRecipeForVLM"}, "recipe: FinetuneRecipeForVLM"),
        ({"recipe": "a.b.TrainEagle3Recipe"}, "recipe: TrainEagle3Recipe"),
        ({"model": "NeMoAutoModelForCausalLM.from_config"}, "so a base without weights"),
        ({"model": "NeMoAutoModelForImageTextToText.from_pretrained"}, "NeMoAutoModelForImageTextToText"),
        ({"rows": "llm.mock.build_unpacked_dataset"}, "so rows that are mock's"),
        ({"rows": "llm.megatron_dataset.MegatronPretraining"}, "so rows that are megatron's"),
        ({"model": LOADED + MORE + "peft: {_target_: a.OtherConfig"}, "peft._target_: OtherConfig"),
        ({"model": LOADED + MORE + "loss_fn: {_target_: a.MDLMCrossEntropyLoss"}, "loss_fn._target_: MDLMCrossEnt"),
        ({"model": LOADED + MORE + "teacher_model: {pretrained_model_name_or_path: big"}, "teacher_model"),
        ({"model": LOADED + MORE + "qat: {enabled: true"}, "qat.enabled: True"),
    ],
)
def test_a_file_of_automodels_that_trains_otherwise_is_refused(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    parts = {"recipe": NEXT, "model": LOADED, "rows": "llm.squad.make_squad_dataset"}
    assert imported_text(AUTOMODEL.format(**parts), tmp_path).settings["train.epochs"] == 1
    with pytest.raises(ConfigError, match=f"{said}.*Nothing was written"):
        imported_text(AUTOMODEL.format(**parts | given), tmp_path)


@pytest.mark.parametrize(("kind", "seed"), [("chat_dataset.ChatDataset", 3), ("squad.make_squad_dataset", None)])
def test_only_automodels_conversations_are_shuffled_before_their_split_is_cut(
    kind: str, seed: int | None, tmp_path: Path
) -> None:
    cut = f"llm.{kind}, split: 'train[:10]', shuffle_seed: 3"
    found = imported_text(AUTOMODEL.format(recipe=NEXT, model=LOADED, rows=cut), tmp_path)
    (source,) = found.settings["data.train"]
    assert (source["take"], source.get("take_seed")) == (10, seed)


@pytest.mark.parametrize(("kind", "stored"), [("lora", "int8"), ("full", "none")])
def test_a_base_that_learns_itself_is_in_16_bits_whatever_the_launchers_file_says(
    kind: str, stored: str, tmp_path: Path
) -> None:
    launched = {"distributed_type": "NO", "kt_config": {"enabled": True, "kt_backend": "AMXINT8"}}
    (tmp_path / "acc.yaml").write_text(yaml.safe_dump(launched))
    theirs = {"model_name_or_path": "a/b", "stage": "sft", "finetuning_type": kind, "dataset": "d"}
    (tmp_path / "lf.yaml").write_text(yaml.safe_dump(theirs))
    assert import_files([tmp_path / "lf.yaml", tmp_path / "acc.yaml"]).settings["quant.type"] == stored


@pytest.mark.parametrize(
    ("more", "settings", "lost"),
    [
        ("", {"data.train_on.frame": True, "data.train_on.end": None}, set()),
        ("peft: {match_all_linear: true}\n", {"tuning.targets": "all-linear"}, {"peft.match_all_linear"}),
        (
            "peft: {exclude_modules: ['*.out_proj', '*lm_head']}\n",
            {"tuning.targets": [r"re:(?!(?:.*\.out_proj|.*lm_head)$).*"]},
            set(),
        ),
        ("qat: {enabled: false, qat_config: {groupsize: 256}}\n", {}, set()),
        ("fp8: {enabled: true, recipe_name: tensorwise}\n", {}, set()),
        (
            "quantization: {load_in_4bit: true}\n",
            {"tuning.method": "full", "quant.type": "none"},
            {"quantization.load_in_4bit"},
        ),
        (
            "peft: {target_modules: q_proj}\nquantization: {load_in_4bit: true}\n",
            {"quant.type": "fp4", "quant.double": False},
            set(),
        ),
        (
            "packed_sequence: {packed_sequence_size: 512}\ndistributed: {dp_size: 2, tp_size: 3}\n",
            {"data.sequence_length": 512, "cluster.workers": 6},
            set(),
        ),
        ("checkpoint: {checkpoint_dir: /runs/}\n", {"run.store": "/runs"}, set()),
        (
            "peft: {target_modules: q_proj}\nquantization: {load_in_8bit: true}\n",
            {"tuning.targets": ["q_proj"], "quant.type": "int8"},
            set(),
        ),
        ("distributed: {dp_replicate_size: 2}\n", {"sharding.scope": "node"}, set()),
        ("distributed: {dp_replicate_size: 1}\n", {"sharding.scope": None}, set()),
        ("lr_scheduler: {lr_decay_style: constant, min_lr: 1.0e-6}\n", {"optim.schedule": "constant"}, set()),
        (
            "packed_sequence: {packed_sequence_size: 512, drop_long_samples: true}\n",
            {"data.packing": True, "data.sequence_length": 512, "data.on_too_long": "drop"},
            set(),
        ),
    ],
)
def test_sections_of_automodel_mean_what_they_mean_there(
    more: str, settings: dict[str, Any], lost: set[str], tmp_path: Path
) -> None:
    text = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.squad.make_squad_dataset")
    found = imported_text(text + more, tmp_path)
    assert {name: found.settings.get(name) for name in settings} == settings
    assert {outcome.key for outcome in found.keys if outcome.status in ("not supported", "unknown")} == lost
    (source,) = found.settings["data.train"]
    assert source["format"] == "question_answer"
    assert any("By its name a/b-Instruct has one; if that is wrong" in line for line in found.to_do)
    # The batch of all devices is declared there.
    assert not any("counted for one GPU" in line for line in found.to_do)


@pytest.mark.parametrize(
    ("old", "new", "settings"),
    [
        ("c/d}", "c/d, revision: v2}", {"data.train": [{"path": "hf://c/d@v2"}]}),
        (
            "c/d}",
            "c/d, split: 'train[:9]', limit_dataset_samples: 3}",
            {"data.train": [{"path": "hf://c/d", "take": 9}]},
        ),
        (
            "c/d}",
            "c/d, shuffle_seed: 3}",  # all rows, in whatever order
            {"data.train": [{"path": "hf://c/d"}]},
        ),
        (
            "c/d}",
            "c/d, mask_reasoning_content: true, seq_length: 64, truncation: do_not_truncate}",
            {"data.train_on.thinking": False, "data.sequence_length": 64, "data.on_too_long": None},
        ),
        ("c/d}", "c/d, truncation: longest_first}", {"data.on_too_long": "truncate"}),
        ("lr: 1.0e-5", "lr: 1.0e-5, weight_decay: 0.1", {"optim.name": "adamw", "optim.weight_decay": 0.1}),
        ("AdamW, lr: 1.0e-5", "Adam, lr: 1.0e-5, weight_decay: 0.1", {"optim.name": "adam"}),
        ("AdamW, lr: 1.0e-5", "Adam, lr: 1.0e-5", {"optim.name": "adamw", "optim.weight_decay": 0.0}),
        (", num_epochs: 1", "", {"train.epochs": 10, "optim.schedule": "constant"}),
        (
            ", num_epochs: 1}",
            ", max_steps: 20000}\nlr_scheduler: {init_lr: 1.0e-6, min_lr: 2.0e-6}",
            {
                "train.steps": 20000,
                "optim.schedule": "cosine",
                "optim.warmup_steps": 1000,
                "optim.warmup_from": 0.1,
                "optim.min_lr_ratio": 0.2,
            },
        ),
        (
            ", num_epochs: 1}",
            ", max_steps: 50}\nlr_scheduler: {lr_decay_style: linear}",
            {"optim.warmup_steps": 5, "optim.warmup_from": 0.1, "optim.min_lr_ratio": 0.01},
        ),
        (
            "recipe:",
            "distributed: {dp_size: 2, cp_size: 2, pp_size: 2}\nrecipe:",
            {"cluster.workers": 8, "sharding.sequence_parallel": 2},
        ),
        (
            "recipe:",
            "peft: {target_modules: q_proj, match_all_linear: true}\nquantization: {load_in_4bit: true}\nrecipe:",
            {"tuning.targets": "all-linear", "quant.type": "fp4", "quant.double": False},
        ),
        (
            "recipe:",
            "packed_sequence: {packed_sequence_size: 0, drop_long_samples: true}\nrecipe:",
            {"data.packing": False, "data.on_too_long": "fail"},
        ),
        (
            "b-Instruct}",
            "b-Instruct, router_aux_loss_coef: 0.01}",
            {"objective.router_loss": 0.01, "objective.router_loss_of": "layers"},
        ),
        (
            "b-Instruct}",
            "b-Instruct, router_aux_loss_coef: 0.01, force_hf: true}",
            {"objective.router_loss": None, "objective.router_loss_of": None},
        ),
        ("a/b-Instruct", "openai/gpt-oss-20b", {"objective.router_loss": 0.9, "objective.router_loss_of": "layers"}),
        (
            "chat_dataset.ChatDataset, path_or_dataset: c/d",
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {question: q, context: c}",
            {
                "data.train": [
                    {
                        "path": "hf://c/d",
                        "format": "prompt_completion",
                        "write": {"prompt": "{c} {q} ", "completion": "{answer}"},
                    }
                ],
                "data.train_on.roles": None,
                "data.train_on.end": False,
            },
        ),
        (
            "chat_dataset.ChatDataset, path_or_dataset: c/d",
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {question: q, answer: a},"
            " answer_only_loss_mask: false",
            {"data.train_on.roles": "all", "data.train_on.end": False, "data.train_on.frame": None},
        ),
        (
            "chat_dataset.ChatDataset, path_or_dataset: c/d",
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {question: q, answer: a},"
            " use_hf_chat_template: true",
            {
                "data.train": [
                    {
                        "path": "hf://c/d",
                        "format": "question_answer",
                        "write": {"question": "{q}", "answer": "{a}"},
                    }
                ],
                "data.train_on.roles": None,
                "data.train_on.frame": True,
                "data.train_on.end": None,
            },
        ),
        (
            "chat_dataset.ChatDataset, path_or_dataset: c/d",
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {question: q},"
            " use_hf_chat_template: true, answer_only_loss_mask: false",
            {"data.train_on.roles": "all", "data.train_on.frame": True},
        ),
        ("c/d}", "c/d, chat_template: t.jinja}", {"data.template": "t.jinja", "data.train_on.frame": True}),
    ],
)
def test_a_value_of_automodels_has_the_meaning_that_it_has_there(
    old: str, new: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    text = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.chat_dataset.ChatDataset")
    assert old in text
    found = imported_text(text.replace(old, new), tmp_path)
    assert {name: found.settings.get(name) for name in settings} == settings


@pytest.mark.parametrize(
    ("rows", "key", "why"),
    [
        ("chat_dataset.ChatDataset, path_or_dataset: [c/d, e/f]", "path_or_dataset", "Several files: name each"),
        (
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: [c/d, e/f], column_mapping: {question: q}",
            "path_or_dataset_id",
            "Several files: name each",
        ),
        (
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {question: q, context: c},"
            " use_hf_chat_template: true",
            "column_mapping.context",
            "The context is a system message there",
        ),
        (
            "x.ColumnMappedTextInstructionDataset, path_or_dataset_id: c/d, column_mapping: {answer: a},"
            " use_hf_chat_template: true",
            "column_mapping.answer",
            "The context is a system message there",
        ),
        (
            "x.ColumnMappedTextInstructionDataset, path_or_dataset: c/d, column_mapping: {question: q, context: c}",
            "",
            "",
        ),
    ],
)
def test_what_automodels_rows_have_and_ours_do_not_is_said(rows: str, key: str, why: str, tmp_path: Path) -> None:
    text = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.chat_dataset.ChatDataset")
    found = imported_text(text.replace("chat_dataset.ChatDataset, path_or_dataset: c/d", rows), tmp_path)
    lost = {outcome.key: outcome.why for outcome in found.keys if outcome.status in ("not supported", "unknown")}
    assert list(lost) == ([f"dataset.{key}"] if key else [])
    assert all(line.startswith(why) for line in lost.values())
    assert [source["path"] for source in found.settings["data.train"]] == ["hf://c/d"]


@pytest.mark.parametrize("rows", ["", "dataset: c/d\n"])
def test_a_file_of_automodels_without_rows_trains_nothing(rows: str, tmp_path: Path) -> None:
    text = AUTOMODEL.format(recipe=NEXT, model=LOADED, rows="llm.chat_dataset.ChatDataset")
    kept = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("dataset"))
    with pytest.raises(ConfigError, match="a file without a section dataset: this is no training"):
        imported_text(kept + rows, tmp_path)


LAUNCHED = "--stage sft --model_name_or_path x --dataset d --template llama3 --finetuning_type lora --output_dir o"


@pytest.mark.parametrize(
    ("command", "workers"),
    [
        ("torchrun --nproc_per_node 4 --nnodes 2 --node_rank 0 --master_port 2 src/train.py", 8),
        ("deepspeed --num_gpus 8 --master_port=9901 src/train.py", 8),
        ("accelerate launch --num_processes 2 --config_file a.yaml src/train.py", 2),
        ("python src/train.py", None),
    ],
)
def test_a_command_line_of_llamafactory_may_begin_with_a_launcher(
    command: str, workers: int | None, tmp_path: Path
) -> None:
    (tmp_path / "train.sh").write_text(f"{command} \\\n  {LAUNCHED}\n")
    found = import_files([tmp_path / "train.sh"])
    assert found.peers == ("LLaMA-Factory",)
    assert [outcome.key for outcome in found.keys if outcome.status == "unknown"] == []
    assert found.settings.get("cluster.workers") == workers


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--no_cuda", {"cluster.gpus_per_worker": 0}),
        ("--no_streaming --max_steps -1", {"cluster.gpus_per_worker": None, "train.steps": None, "train.epochs": 3}),
    ],
)
def test_a_flag_that_begins_with_no_is_off_unless_it_is_called_so(
    flags: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "train.sh").write_text(f"python src/train.py {LAUNCHED} {flags}\n")
    found = import_files([tmp_path / "train.sh"])
    assert {name: found.settings.get(name) for name in settings} == settings


def test_a_key_that_the_objective_does_not_heed_is_not_carried_over(tmp_path: Path) -> None:
    text = "stage: sft\nmodel_name_or_path: x\ndataset: d\nfinetuning_type: lora\npref_beta: 0.3\n"
    found = imported_text(text, tmp_path)
    (beta,) = (outcome for outcome in found.keys if outcome.key == "pref_beta")
    assert (beta.status, "objective.beta" in found.settings) == ("not supported", False)
    assert beta.why == "objective.beta: has no effect with objective.name: sft. Remove it."


def test_variables_of_a_shell_script_have_their_values(tmp_path: Path) -> None:
    script = (
        "#!/bin/bash\nexport BASE=Qwen/Qwen3-4B  # ours\nN='4'\nHERE=$(pwd)\nlf-cli train --stage sft --dataset"
        " ${HERE}/d \\\n"
    )
    (tmp_path / "train.sh").write_text(
        f"{script}  --model_name_or_path $BASE --num-train-epochs ${{N}}\n# lf-cli train --stage dpo --dataset other\n"
    )
    settings = import_files([tmp_path / "train.sh"], "llamafactory").settings
    assert (settings["model.base"], settings["train.epochs"]) == ("Qwen/Qwen3-4B", 4)


def test_a_length_that_trl_does_not_limit_is_for_the_user_to_give(tmp_path: Path) -> None:
    text = "model_name_or_path: x\nuse_peft: true\ndataset_name: a/b\n"
    found = imported_text(f"{text}max_length: null\n", tmp_path, "trl")
    assert "data.sequence_length" not in found.settings
    assert any(line.startswith("data.sequence_length: max_length: null limits no length.") for line in found.to_do)
    limited = imported_text(text, tmp_path, "trl")
    assert limited.settings["data.sequence_length"] == 1024
    assert not any("max_length" in line for line in limited.to_do)


@pytest.mark.parametrize(
    ("peer", "key", "recomputes"),
    [
        ("trl", "activation_offloading", "gradient_checkpointing"),
        ("axolotl", "activation_offloading", "gradient_checkpointing"),
    ],
)
def test_offloaded_activations_are_carried_over_where_layers_are_computed_again(
    peer: str, key: str, recomputes: str, tmp_path: Path
) -> None:
    both = imported_text(f"{key}: true\n{recomputes}: true\n", tmp_path, peer)
    assert both.settings["train.activation_offload"] is True
    alone = imported_text(f"{key}: true\n{recomputes}: false\n", tmp_path, peer)
    assert "train.activation_offload" not in alone.settings
    (lost,) = (outcome for outcome in alone.keys if outcome.key == key)
    assert lost.status == "not supported"


@pytest.mark.parametrize(("rl", "answers"), [("dpo", ("chosen", "rejected")), ("kto", ("completion", "label"))])
def test_system_messages_beside_axolotls_pairs_are_read(rl: str, answers: tuple[str, str], tmp_path: Path) -> None:
    text = f"base_model: x\nadapter: lora\nrl: {rl}\ndatasets: [{{path: a/b, type: chatml.intel}}]\n"
    source = parse_config(imported_text(text, tmp_path, "axolotl").text).data.train[0]
    row = {"system": "Be short.", "question": "Why?", answers[0]: "So.", answers[1]: "Or so." if rl == "dpo" else True}
    read = RowForm(source.format or "", tuple(source.fields.items())).read(row)
    assert [(said["role"], said["content"]) for said in read["prompt"]] == [("system", "Be short."), ("user", "Why?")]


def test_references_are_followed_and_circles_end(tmp_path: Path) -> None:
    text = "base_model: ${a.b}\na: {b: '${c}'}\nc: model-${d}\nd: 7\nadapter: lora\noutput_dir: ${output_dir}/x\n"
    assert imported_text(text, tmp_path, "axolotl").settings["model.base"] == "model-7"


def test_a_file_that_exists_is_kept_without_force(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    Path("mine.yaml").write_text("mine")
    command = ["import", "trl/kto.yaml", "-o", "mine.yaml"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ConfigError)
    assert "--force" in str(refused.exception)
    CliRunner().invoke(app, [*command, "--force", "--dry-run"])
    assert Path("mine.yaml").read_text() == "mine"
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert load_config("mine.yaml").objective.name == "kto"


def test_stdout_is_the_configuration_and_the_table_is_on_stderr(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    done = CliRunner().invoke(app, ["import", "axolotl/qlora.yml"])
    assert parse_config(done.stdout).tuning.rank == 32
    assert "hub_model_id" in done.stderr
    assert "lora_r: 32" in done.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate: unknown setting. It is optim.lr here."),
        ("tuning.lora_r=8", "It is tuning.rank here."),
        ("data.cutoff_len=8", "It is data.sequence_length here."),
        ("train.gradient_accumulation_steps=8", "It is part of train.global_batch here."),
        ("train.per_device_train_batch_size=8", "It is train.micro_batch here."),
        ("train.num_train_epochs=8", "It is train.epochs here."),
        ("train.auto_find_batch_size=true", "has no counterpart here: The micro-batch is fixed"),
        ("train.micro_batch_size=2", "train.micro_batch_size: unknown setting. It is train.micro_batch here."),
        ("train.stpes=5", "Did you mean 'steps'?"),
        ("train.lr=1e-4", "Did you mean 'optim.lr'?"),
        ("train.xyz=1", "Allowed here: steps"),
    ],
)
def test_a_setting_that_another_tool_has_is_answered_with_its_name_here(override: str, sentence: str) -> None:
    whole = "run: {name: a}\nmodel: {base: x}\ndata: {train: [{path: x}]}\ntrain: {steps: 1}\n"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_config(whole, [override])


def test_the_page_says_what_the_tables_say() -> None:
    """Each row of docs/migration.md with as many of their keys as of our settings pairs them; otherwise all keys make
    the one.
    """
    titles = {
        "axolotl": "axolotl",
        "ms-swift": "ms-swift",
        "NeMo Automodel": "automodel",
        "ms-swift (megatron)": "ms-swift-megatron",
        "LLaMA-Factory": "llamafactory",
        "TRL": "trl",
        "accelerate": "accelerate",
    }
    peer, pairs = "", 0
    for line in (Path(__file__).parents[3] / "docs" / "migration.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] in titles:
            peer = titles[cells[0]]
        elif len(cells) == 3 and "`" in cells[0]:
            keys, ours = (re.findall(r"`([^`]+)`", cell) for cell in cells[:2])
            for key, setting in zip(keys, ours * (len(keys) if len(ours) == 1 else 1), strict=True):
                row = JOINS[peer][0].row(key)
                assert isinstance(row, To | Together), key
                assert row.setting == setting, (key, row.setting)
                pairs += 1
    assert pairs > 60


def test_the_sound_of_a_video_is_said_to_be_lost(tmp_path: Path) -> None:
    watched = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "videos": "clips"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"watched": watched}))
    text = f"model_name_or_path: x\nstage: sft\ndataset_dir: {tmp_path}\ndataset: watched\nuse_audio_in_video: true\n"
    found = imported_text(f"{text}audio_sampling_rate: 8000\n", tmp_path, "llamafactory")
    statuses = {outcome.key: outcome.status for outcome in found.keys}
    assert {statuses[key] for key in ("use_audio_in_video", "audio_sampling_rate")} == {"not supported"}


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("ARGS=(\n  --model $M  # which\n  --dataset a#5 $D\n)\nARGS+=(--lora_alpha 64)", '"${ARGS[@]}"'),
        ('ARGS="\n  --model $M \\\n  --dataset a#5 $D\n  --lora_alpha 64\n"', "$ARGS"),
        ('D="$D"', "--model ${M} --dataset a#5 $D --lora_alpha ${ALPHA:-64}"),
    ],
)
def test_options_of_a_shell_script_may_come_from_arrays_texts_and_values_for_want_of_others(
    head: str, options: str, tmp_path: Path
) -> None:
    script = (
        f"M=${{1:-Qwen/Qwen3-4B}}\nLR='1e-5'\nD=\"b#6 c#7\"\nGPUS=${{GPUS:-4}}\n{head}\nNPROC_PER_NODE=$GPUS swift sft"
    )
    (tmp_path / "run.sh").write_text(
        f"{script} {options} --learning_rate $LR --lora_rank 16 --output_dir out/$(date +%s) --num_train_epochs $EPOCHS\n"
    )
    found = import_files([tmp_path / "run.sh"])
    expected = {"model.base": "Qwen/Qwen3-4B", "optim.lr": 1e-5, "tuning.rank": 16, "tuning.alpha": 64.0}
    assert {name: found.settings.get(name) for name in expected} == expected
    assert found.settings["cluster.workers"] == 4
    assert [source["take"] for source in found.settings["data.train"]] == [5, 6, 7]
    unset = [line for line in found.to_do if "does not say what this is" in line]
    assert [line.partition(":")[0] for line in unset] == ["output_dir", "num_train_epochs"]


def test_a_line_with_a_number_sign_within_quotes_is_no_comment(tmp_path: Path) -> None:
    script = (
        'S="Answer.\n#### 42"\n# don\'t\nswift sft --model x --dataset a/b --columns \'{"a": "b"}\' --system "$S"\n'
    )
    (tmp_path / "run.sh").write_text(script)
    assert import_files([tmp_path / "run.sh"]).settings["data.system"] == "Answer.\n#### 42"


def test_limits_of_pictures_do_not_say_that_rows_have_any(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: Qwen/Qwen2-0.5B\nstage: sft\ndataset: mine\nfinetuning_type: lora\nimage_max_pixels: 99\n"
    )
    found = imported_text(text, tmp_path)
    assert found.settings["data.train"] == [{"path": "data/mine.json"}]
    assert "data.images.max_pixels" not in found.settings
    assert any(line.startswith("data.train: image_max_pixels limits") for line in found.to_do)


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        ("--max_epochs 3", {"train.epochs": 3, "train.steps": None, "optim.min_lr_ratio": 0.0}),
        ("--max_epochs 3 --train_iters 5", {"train.epochs": None, "train.steps": 5}),
        ("--train_iters 5 --min_lr 1e-5", {"train.steps": 5, "optim.min_lr_ratio": 0.1}),
    ],
)
def test_ms_swifts_megatron_trainer_ends_by_its_iterations_and_at_its_lowest_rate(
    more: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    text = f"megatron sft --model a/b --dataset hf::c/d --tuner_type lora --lr 1e-4 {more}"
    found = imported_text(text, tmp_path)
    assert {name: found.settings.get(name) for name in settings} == settings
    spared = [outcome.key for outcome in found.keys if "limits the run" in outcome.why]
    assert spared == (["max_epochs"] if more.count("--") == 2 and "max_epochs" in more else [])


def test_a_folder_of_a_base_is_asked_for_no_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "swift sft --model LLM-Research/gemma-2-2b --dataset hf::a/b --tuner_type full"
    assert any(line.startswith("model.base") for line in imported_text(text, tmp_path).to_do)
    (tmp_path / "LLM-Research/gemma-2-2b").mkdir(parents=True)
    assert not any(line.startswith("model.base") for line in imported_text(text, tmp_path).to_do)


def test_keys_of_earlier_versions_of_ms_swifts_megatron_trainer_are_known(tmp_path: Path) -> None:
    text = "megatron sft --load a-mcore --dataset c/d --lr 1e-5 --max_epochs 5 --save out/x --log_interval 1 --no_load_optim"
    found = imported_text(f"{text} --num_workers 16 --use_flash_attn true --tuner_type full", tmp_path)
    wanted = {"train.epochs": 5, "run.name": "x", "track.print_steps": 1}
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not [outcome.key for outcome in found.keys if outcome.status == "unknown"]


def test_a_head_of_ms_swifts_megatron_trainer_is_no_module_to_name(tmp_path: Path) -> None:
    text = "megatron sft --model Qwen/Qwen3-0.6B --dataset c/d --task_type seq_cls --num_labels 3 --tuner_type lora"
    for named, kept in (("score", None), ("score norm", ["score", "norm"])):
        found = imported_text(f"{text} --modules_to_save {named}", tmp_path)
        assert found.settings["objective.name"] == "classification"
        assert found.settings.get("tuning.modules_to_save") == kept


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: a/b\n", 0.001),
        ("model_name_or_path: mistralai/Mixtral-8x7B-v0.1\ndataset_name: a/b\nbeta: 0.1\n", 0.001),
        ("model_name_or_path: openai/gpt-oss-20b\ndataset_name: a/b\nrouter_aux_loss_coef: 0.0\n", 0.0),
        ("model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: a/b\ndesirable_weight: 1.0\n", 0.001),
        ("model_name_or_path: Qwen/Qwen3-8B\ndataset_name: a/b\n", None),
        ("model_name_or_path: deepseek-ai/DeepSeek-V2-Lite\ndataset_name: a/b\n", None),
        (
            "model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: a/b\nreward: 1\ncenter_rewards_coefficient: 0.1\n",
            None,
        ),
    ],
)
def test_routers_are_balanced_where_trl_balances_them_without_being_asked(
    text: str, loss: float | None, tmp_path: Path
) -> None:
    assert imported_text(f"{text}use_peft: true\n", tmp_path, "trl").settings.get("objective.router_loss") == loss


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("microsoft/phi-2", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("EleutherAI/pythia-1b", ["query_key_value"]),
        ("openai-community/gpt2-large", ["c_attn"]),
        ("Qwen/Qwen3-8B", ["q_proj", "v_proj"]),
        ("microsoft/Phi-3-mini-4k-instruct", ["q_proj", "v_proj"]),
    ],
)
def test_adapters_are_where_peft_puts_them_in_such_a_base(base: str, targets: list[str], tmp_path: Path) -> None:
    text = f"model_name_or_path: {base}\nuse_peft: true\ndataset_name: a/b\n"
    assert imported_text(text, tmp_path, "trl").settings["tuning.targets"] == targets


def test_muon_of_llamafactorys_second_trainer_has_its_settings(tmp_path: Path) -> None:
    text = "model: x\ntrain_dataset: a/b\nbatching_strategy: normal\noptim_config: {name: muon, momentum: 0.9, ns_steps: 5}\n"
    found = imported_text(text, tmp_path, "llamafactory-v1")
    wanted = {"optim.name": "muon", "optim.momentum": 0.9, "optim.weight_decay": 0.1, "optim.betas": [0.9, 0.95]}
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert not [outcome.key for outcome in found.keys if outcome.status == "not supported"]


def test_a_file_that_samples_answers_trains_nothing(tmp_path: Path) -> None:
    text = "model: a/b\ndataset: c/d#16\nnum_return_sequences: 4\nmax_length: 2048\nsystem: Think.\n"
    with pytest.raises(ConfigError, match="num_return_sequences: 4: this is no training that can be carried over"):
        imported_text(text, tmp_path, "ms-swift")


@pytest.mark.parametrize(
    ("keys", "thinking", "said"),
    [
        ("template: qwen3\n", None, True),
        ("template: qwen3\nenable_thinking: true\n", None, True),
        ("template: qwen3\nenable_thinking: false\n", "always", False),
        ("template: qwen3\nenable_thinking: 0\n", "always", False),
        ("template: qwen3\nenable_thinking: 'no'\n", "always", False),
        ("template: qwen3\nmask_history: true\n", None, False),
        ("template: qwen3_nothink\nenable_thinking: false\n", None, False),
        ("template: qwen3\nstage: pt\n", None, False),
    ],
)
def test_llamafactorys_empty_blocks_of_thinking_are_set_or_said(
    keys: str, thinking: str | None, said: bool, tmp_path: Path
) -> None:
    text = f"model_name_or_path: Qwen/Qwen3-8B\ndataset: alpaca_en\nfinetuning_type: lora\nstage: sft\n{keys}"
    found = imported_text(text, tmp_path)
    assert found.settings.get("data.thinking") == thinking
    assert any(line.startswith("data.thinking: LLaMA-Factory's template qwen3") for line in found.to_do) == said


@pytest.mark.parametrize(
    ("stage", "dropout"),
    [("sft", 0.1), ("dpo", None), ("dpo\npref_loss: orpo", None), ("kto", None), ("rm", 0.1)],
)
def test_llamafactory_has_no_dropout_where_answers_are_compared(
    stage: str, dropout: float | None, tmp_path: Path
) -> None:
    text = f"model_name_or_path: x\ndataset: d\nfinetuning_type: lora\nlora_dropout: 0.1\ncutoff_len: 512\nstage: {stage}\n"
    found = imported_text(text, tmp_path)
    assert found.settings.get("tuning.dropout") == dropout
    (length,) = (outcome for outcome in found.keys if outcome.key == "cutoff_len")
    assert (length.status, length.why.startswith("There prompt and answer")) == ("mapped", True)
