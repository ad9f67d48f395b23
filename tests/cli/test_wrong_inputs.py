"""A user's mistake: one clear sentence, the right exit code, no traceback, before any rank starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import ENVIRONMENT, Capstan
from tests.material import Workshop, commit
from trainer.config import dump_config
from trainer.store.store import open_store


def refused(done, exit_code: int, *words: str) -> None:
    assert done.returncode == exit_code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("capstan: "), done.stderr
    for word in words:
        assert word in last, last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=5", ("train.step: unknown setting", "'steps'")),
        ("datta.train=5", ("datta: unknown setting", "'data'")),
        ("quant.type=nf5", ("quant.type: 'nf5'", "Allowed are fp4", "Did you mean nf4?")),
        ("data.sequence_length=100000", ("data.sequence_length: 100000", "256 positions", "Lower it")),
        ("model.layers=3", ("model.layers: 3", "2 layers")),
        ("model.base=/nowhere/at/all", ("model.base", "/nowhere/at/all", "does not exist")),
        ("tuning.targets=[lm_head]", ("tuning.targets", "lm_head")),
        ("sharding.deepspeed=zero9", ("sharding.deepspeed", "zero9", "zero3")),
        ("data.train=[{path: missing-*.jsonl}]", ("data.train[0].path", "missing-*.jsonl")),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(capstan: Capstan, config: Path, override, words):
    refused(capstan("train", config, override), 3 if "missing-" in override else 2, *words)


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("override", "nearest"),
    [("tuning.method=lorra", "lora"), ("objective.name=dppo", "dpo"), ("optim.name=adamw8bit", "adamw_8bit")],
)
def test_an_unknown_kind_of_a_thing_is_named_with_the_nearest(
    capstan: Capstan, config: Path, command: str, override: str, nearest: str
):
    setting, _, given = override.partition("=")
    refused(
        capstan(command, config, override),
        2,
        f"{setting}: {given!r} is not allowed",
        f"Did you mean {nearest}?",
    )


def test_debug_shows_the_traceback_too(capstan: Capstan, config: Path):
    done = capstan("--debug", "train", config, "train.step=5")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_start_is_refused_for_a_tracker_that_is_unknown(capstan: Capstan, config: Path):
    done = capstan("train", config, "track.trackers=[wandbb]", "--dry-run")
    refused(done, 2, "track.trackers: 'wandbb' is not allowed. Allowed are ", "Did you mean wandb?")


@pytest.mark.parametrize("name", ["..", ".", "a\nb", "", "-", "~no-such-user/x", "x" * 5000])
def test_what_can_be_no_run_is_refused(capstan: Capstan, tmp_path: Path, name: str):
    (tmp_path / "store").mkdir()
    refused(capstan("status", "--store", tmp_path / "store", "--", name), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "run.yaml", "--ranks-per-node", "0"),
        ("checkpoints", "prune", "mine", "--orphan-hours", "inf"),
        ("checkpoints", "prune", "mine", "--orphan-hours", "nan"),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_an_option_that_is_no_number_to_count_with_is_refused(
    capstan: Capstan, config: Path, arguments: tuple[str, ...]
):
    done = capstan(*arguments)
    assert done.returncode == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_is_unknown_is_refused(capstan: Capstan, config: Path):
    refused(capstan("plan", config, "--gpu", "nan"), 2, "--gpu: 'nan' is no GPU that is known here.")


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("model.base", "~no-such-user/x"),
        ("model.base", "x" * 300),
        ("run.store", "~no-such-user/x"),
        ("sharding.deepspeed", "x" * 300),
    ],
    ids=lambda value: value[:20],
)
def test_what_can_be_no_path_is_refused(capstan: Capstan, config: Path, setting: str, path: str):
    refused(
        capstan("train", config, f"{setting}={path}", "--dry-run"), 2, f"{setting}: ", "cannot be a path on this mac"
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("evaluate", "begun"), 7, ("has no committed checkpoint",)),
        (("evaluate", "mine"), 2, ("there is nothing to evaluate", "eval.sets", "--set NAME=PATH")),
        (
            ("evaluate", "mine", "--step", "9", "--bias", "pairs.jsonl"),
            2,
            ("no committed checkpoint of step 9", "are: 4"),
        ),
        (("evaluate", "mine", "--base", "--best"), 2, ("--base evaluates the base alone",)),
        (("evaluate", "mine", "--set", "general"), 2, ("--set: expected NAME=PATH",)),
        (("evaluate", "mine", "--set", "general=missing.jsonl"), 3, ("eval.sets.general", "missing.jsonl")),
        (("evaluate", "mine", "--tasks", "missing.yaml"), 2, ("eval.tasks", "missing.yaml", "does not exist")),
        (("evaluate", "mine", "--bias", "odd.jsonl"), 2, ("eval.bias", "odd.jsonl:1", '"pair"')),
        (("generate", "mine", "--prompts", "odd.jsonl"), 2, ("--prompts", "odd.jsonl:1", "prompt")),
        (("generate", "mine"), 2, ("there is no prompt",)),
        (("generate", "mine", "--top-p", "0.5"), 2, ("--top-p", "--temperature")),
        (("generate", "mine", "--image", "a.png"), 2, ("--image", "was trained on text (data.format: prompt")),
    ],
    ids=lambda value: " ".join(value[2:4]) if isinstance(value, tuple) and value[0] in ("evaluate", "generate") else "",
)
def test_what_cannot_be_evaluated_or_answered_is_refused_before_a_rank_starts(
    capstan: Capstan,
    workshop: Workshop,
    tmp_path: Path,
    arguments: tuple[str, ...],
    exit_code: int,
    words: tuple[str, ...],
):
    store = open_store(str(tmp_path / "store"))
    config = workshop.config("mine", f"run.store={tmp_path / 'store'}")
    commit(store.sub("mine"), config)
    store.sub("begun").put("config.yaml", dump_config(config).encode())
    (tmp_path / "odd.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "pairs.jsonl").write_text('{"group": "a", "pair": ["b c", "b d"]}\n')
    refused(
        capstan(*arguments, *(("--bias", "pairs.jsonl") if arguments[1] == "begun" else ()), "--store", "store"),
        exit_code,
        *words,
    )


def test_a_missing_configuration(capstan: Capstan):
    refused(capstan("train", "nothing.yaml"), 2, "nothing.yaml")


def test_a_base_without_safetensors(capstan: Capstan, config: Path, workshop: Workshop, tmp_path: Path):
    base = shutil.copytree(workshop.base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    (base / "pytorch_model.bin").write_bytes(b"old format")
    refused(capstan("train", config, f"model.base={base}"), 2, "model.base", "safetensors", "save_pretrained")


def test_a_tokenizer_that_is_larger_than_the_embedding(
    capstan: Capstan, config: Path, workshop: Workshop, tmp_path: Path
):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one-too-many"] = 259
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(capstan("train", config, f"model.base={base}"), 2, "tokenizer", "260 tokens", "259 rows")


def test_a_truncated_weights_file(capstan: Capstan, config: Path, workshop: Workshop, tmp_path: Path):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    victim = sorted(base.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(capstan("train", config, f"model.base={base}"), 2, victim.name, "Copy it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("none of the 0 rows",)),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n', (":2", "not JSON")),
        ('{"prompt": "a", "answer": "b"}\n', (":1", "completion", "answer", "data.fields")),
        ('{"prompt": "a", "completion": ""}\n', ("none of the 1 rows", "1 without a token to train")),
    ],
    ids=["empty", "not-json", "missing-field", "nothing-to-train"],
)
def test_data_that_cannot_be_used(capstan: Capstan, config: Path, tmp_path: Path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    refused(capstan("data", "build", config, f"data.train=[{{path: {path}}}]"), 3, *words)


def test_a_store_that_cannot_be_written(capstan: Capstan, config: Path, tmp_path: Path):
    (tmp_path / "a-file").write_text("in the way")
    refused(capstan("train", config, f"run.store={tmp_path / 'a-file' / 'runs'}"), 6, "run.store", "a-file")


def test_resume_of_a_run_that_does_not_exist_names_those_that_do(capstan: Capstan, tmp_path: Path):
    open_store(str(tmp_path / "store")).put("mine/config.yaml", b"")
    refused(capstan("resume", "mime", "--store", tmp_path / "store"), 2, "'mime'", "'mine'")


def test_resume_with_nothing_committed(capstan: Capstan, config: Path, tmp_path: Path):
    open_store(str(tmp_path / "store")).put("mine/config.yaml", config.read_bytes())
    refused(capstan("resume", "mine", "--store", tmp_path / "store"), 7, "no committed checkpoint")


def test_two_runs_of_one_name(capstan: Capstan, config: Path, tmp_path: Path, workshop: Workshop):
    commit(open_store(str(tmp_path / "store")).sub("mine"), workshop.config("mine"))
    refused(
        capstan("train", config), 2, "run.name: ", "mine exists", f"capstan resume mine --store {tmp_path / 'store'}"
    )


def test_a_name_that_was_claimed_a_moment_ago(capstan: Capstan, config: Path, tmp_path: Path):
    open_store(str(tmp_path / "store")).put("mine/config.yaml", config.read_bytes())
    refused(capstan("train", config), 2, "run.name: ", "has not begun", "capstan status mine --store")


def test_a_destination_that_holds_something_is_not_overwritten(capstan: Capstan, config: Path, tmp_path: Path):
    open_store(str(tmp_path / "store")).put("mine/config.yaml", config.read_bytes())
    refused(capstan("export", "mine", tmp_path, "--store", tmp_path / "store"), 2, "not empty")


def test_a_merge_that_cannot_be_is_refused_by_its_dry_run_too(capstan: Capstan, workshop: Workshop, tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    for name, overrides in (("cut", ["model.layers=1"]), ("whole", [])):
        commit(store.sub(name), workshop.config(name, *overrides))
    for dry_run in ("--dry-run", "--json"):
        done = capstan(
            "export", "cut", tmp_path / "merged", "--format", "merged", dry_run, "--store", tmp_path / "store"
        )
        refused(done, 2, "no merged model", "first 1 layers", "Take --format peft")
    planned = capstan(
        "export", "whole", "merged", "--format", "merged", "--dry-run", "--json", "--store", tmp_path / "store"
    )
    told = json.loads(planned.stdout)
    assert (told["step"], told["dry_run"], Path(told["destination"]).name) == (4, True, "merged"), planned.stderr
    assert not (tmp_path / "merged").exists()
    done = capstan("export", "whole", "merged", "--format", "merged", "--json", "--store", tmp_path / "store")
    merged = json.loads(done.stdout)
    assert (merged["step"], merged["merged"]) == (4, True)
    said = [line for line in done.stderr.splitlines() if not line.endswith(" s so far")]
    assert said == [], "nothing is said but that it takes long, where it does"
    assert merged["bytes"] == sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())


@pytest.mark.parametrize("ranks", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["ray", "torchrun"])
def test_a_gpu_that_is_asked_for_and_is_not_there(
    capstan: Capstan, config: Path, tmp_path: Path, ranks: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in ranks.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    done = capstan("train", config, "cluster.gpus_per_worker=1", timeout=200)
    refused(done, 2, "cluster.gpus_per_worker: 1", "shows no GPU", "set it to 0")
    assert not (tmp_path / "store/mine").exists()


def test_gpus_that_this_torch_cannot_use(
    capstan: Capstan, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}:{ENVIRONMENT['PATH']}")
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "0")
    if not torch.cuda.is_available():
        refused(capstan("train", config, timeout=200), 2, "cluster.gpus_per_worker", "has 1 GPU, but this torch")


def test_the_plan_names_the_device(capstan: Capstan, config: Path):
    planned = {
        setting: json.loads(capstan("plan", config, f"cluster.gpus_per_worker={setting}", "--json").stdout)
        for setting in (0, 1)
    }
    assert [planned[setting]["device"] for setting in (0, 1)] == ["cpu", "gpu"]


@pytest.mark.timeout(700)
def test_weights_of_another_shape_than_the_architecture(
    capstan: Capstan, config: Path, workshop: Workshop, tmp_path: Path
):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        if name in tensors:
            tensors[name] = tensors[name][:-2].clone()
            save_file(tensors, path, metadata={"format": "pt"})
    words = ("model.layers.0.mlp.up_proj.weight", "[170, 64]", "[172, 64]", "Copy the model again")
    # Before a rank, a cluster or a queue is asked for, and each verb says the same.
    for verb in (("plan", "--json"), ("train",), ("submit", "ray")):
        done = capstan(*verb, config, f"model.base={base}", timeout=300)
        refused(done, 2, *words)
        assert "rank" not in done.stderr
        if verb[0] == "plan":
            (wrong,) = json.loads(done.stdout)["mismatches"]
            assert all(word in wrong for word in words)
