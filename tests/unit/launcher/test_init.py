"""A first configuration fits the machine that it is for, says why each setting is as it is, and overwrites nothing
unasked.
"""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.init.commented import check_new, yaml_text
from launcher.init.initial import GOALS, InitAnswers, Initial, _machine, _name, initial_config
from tests.codes import FORMATS
from tests.unit.repository.test_examples import LLAMA_8B, LLAMA_70B
from trainer.base.find.locate import describe_base
from trainer.config import Config, load_config, parse_config
from trainer.data.render.chat_template import NAMED
from trainer.errors import ConfigError, DoesNotFit
from trainer.plan.gpus import read_gpu
from trainer.plan.longest import LongestRow
from trainer.plan.plan import make_plan

GIB = 2**30
BASES = {"8b": LLAMA_8B, "70b": LLAMA_70B}


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """Folders 8b and 70b that have a config.json and no weights."""
    for name, sizes in BASES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**sizes, "architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def first(
    folder: Path, base: str, gpu: str, gpus: int | None = None, goal: str = "sft", machine: str = "one"
) -> Initial:
    answers = InitAnswers(str(folder / base), str(folder / "rows.jsonl"), goal, machine, gpu, gpus)
    return initial_config(answers, folder / "run.yaml")


def needed(text: str, gpus: int, *overrides: str, memory: int | None = None) -> int:
    """Bytes of one GPU by the plan, for a GPU of so much `memory`; without it with all layers computed again."""
    config = parse_config(text, overrides)
    return make_plan(config, describe_base(config.model), gpus, min(gpus, 8), memory).memory_per_gpu.total


@pytest.mark.parametrize(
    ("base", "gpu", "gpus", "quant", "offload"),
    [
        ("8b", "80GiB", 1, "none", None),
        ("8b", "RTX 4090", 1, "nf4", None),
        ("8b", "12GiB", 1, "nf4", None),
        ("70b", "80GiB", 8, "none", None),
        ("70b", "24GiB", 4, "nf4", None),
        ("70b", "24GiB", 1, "nf4", "zero3_offload_cpu"),
    ],
)
def test_it_fits_by_the_plan(bases: Path, base: str, gpu: str, gpus: int, quant: str, offload: str | None) -> None:
    made = first(bases, base, gpu, gpus)
    assert made.settings["quant.type"] == quant
    assert made.settings.get("sharding.deepspeed") == offload
    assert made.gpus == gpus
    memory = 24564 * 2**20 if gpu == "RTX 4090" else int(gpu.removesuffix("GiB")) * GIB
    assert needed(made.config, gpus, memory=memory) == made.gpu_bytes <= 0.9 * memory
    config = parse_config(made.config)
    assert config.train.global_batch % (gpus * config.train.micro_batch) == 0
    assert f"{made.gpu_bytes / GIB:.1f} of" in made.config
    # What was not taken would not have fitted: weights in 16 bits, or the base on the GPU.
    if quant == "nf4":
        assert needed(made.config, gpus, "quant.type=none") > 0.6 * memory
    if offload:
        assert needed(made.config, gpus, "sharding.deepspeed=auto") > 0.9 * memory


def test_of_a_cluster_it_takes_as_few_gpus_as_suffice(bases: Path) -> None:
    made = first(bases, "70b", "24GiB", machine="slurm")
    config = parse_config(made.config)
    assert made.gpus == config.cluster.most_workers
    assert (config.cluster.slurm.nodes, config.cluster.slurm.gpus_per_node) == (1, made.gpus)
    assert made.gpus > 1
    longest = f"data.sequence_length={config.data.sequence_length}"
    fewer = made.gpus // 2
    resized = (f"cluster.workers={fewer}", "train.micro_batch=1", longest, "sharding.deepspeed=auto")
    assert made.settings.get("sharding.deepspeed") or needed(made.config, fewer, *resized) > 0.9 * 24 * GIB
    many = parse_config(first(bases, "70b", "80GiB", 12, machine="slurm").config)
    assert (many.cluster.slurm.nodes, many.cluster.slurm.gpus_per_node) == (2, 6)
    ray = first(bases, "8b", "80GiB", 4, machine="ray")
    assert parse_config(ray.config).cluster.ray.address == "auto"
    for found, command in ((made, "submit slurm"), (ray, "submit ray")):
        assert found.next[-1] == f"capstan {command} {bases}/run.yaml"


def test_the_rate_of_a_large_base_is_lower(bases: Path) -> None:
    assert first(bases, "8b", "80GiB").settings["optim.lr"] == 2e-4
    assert first(bases, "70b", "80GiB", 8).settings["optim.lr"] == 1e-4
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (bases / "8b/config.json").write_text(json.dumps({**LLAMA_8B, **experts, "architectures": ["MixtralForCausalLM"]}))
    assert first(bases, "8b", "80GiB", 8).settings["optim.lr"] == 1e-4, "experts are weights, too"


def test_a_gpu_without_bf16_gets_fp32_and_a_name_is_that_of_the_base(bases: Path) -> None:
    old, new = (first(bases, "8b", gpu, 8) for gpu in ("V100", "H100"))
    assert parse_config(old.config).model.dtype == "fp32"
    assert re.search("V100.* has no bf16, so bf16 would be slow", old.config)
    assert "model.dtype" not in new.settings
    named = [_name(InitAnswers(base, "", "dpo", "one", None, None)) for base in ("/x/.base!/", "org/Model-8B", "///")]
    assert named == ["base-dpo", "Model-8B-dpo", "run-dpo"]


@pytest.mark.parametrize("goal", GOALS)
def test_every_goal_makes_a_valid_configuration_with_a_reason_behind_each_setting(bases: Path, goal: str) -> None:
    made = first(bases, "8b", "80GiB", 8, goal)
    config = parse_config(made.config)
    assert config.objective.name == (goal if goal not in ("full",) else "sft")
    assert (config.tuning.method == "full") == (goal == "full")
    settings = [line for line in made.config.splitlines() if ": " in line and not line.lstrip().startswith(("#", "-"))]
    assert len(settings) > 12
    lines = made.config.splitlines()
    above = {line for before, line in zip(lines, lines[1:], strict=False) if before.lstrip().startswith("# ")}
    assert [line for line in settings if "  # " not in line and line not in above] == []
    assert "..." not in made.config


def test_without_a_gpu_it_is_for_the_cpu(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.init.initial.described_gpus", list)
    answers = InitAnswers(str(bases / "8b"), "somebody/rows", "sft", "one", None, None)
    made = initial_config(answers, bases / "run.yaml")
    assert parse_config(made.config).cluster.gpus_per_worker == 0
    assert made.settings["quant.type"] == "nf4"
    assert made.settings["data.train"] == [{"path": "hf://somebody/rows"}]
    with pytest.raises(ConfigError, match="--gpu"):
        initial_config(InitAnswers(str(bases / "8b"), "a/b", "sft", "slurm", None, None), bases / "run.yaml")


def test_the_smallest_gpu_of_a_machine_decides_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [SimpleNamespace(name=name, memory=size * 2**30) for name, size in (("H100", 80), ("L4", 24), ("A100", 40))]
    monkeypatch.setattr("launcher.init.initial.described_gpus", lambda: there)
    found = _machine(InitAnswers("b", "rows.jsonl", "sft", "one", None, None))
    assert (found.gpu, found.memory, found.gpus) == ("L4", 24 * 2**30, 3)


def test_a_base_that_is_in_4_bits_already_stays_so(bases: Path) -> None:
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (bases / "8b" / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": given}))
    assert first(bases, "8b", "80GiB").settings["quant.type"] == "nf4"
    with pytest.raises(ConfigError, match="quant"):
        first(bases, "8b", "80GiB", 8, "full")
    (bases / "8b" / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": FORMATS["int4-32"][0]}))
    assert first(bases, "8b", "80GiB").settings["quant.type"] == "stored"
    small = first(bases, "8b", "5GiB").settings
    assert (small["quant.type"], small["sharding.deepspeed"]) == ("stored", "zero3_offload_cpu")


def talks(folder: Path, count: int, words: int = 30) -> None:
    """`rows.jsonl` of so many conversations."""
    turns = [{"role": "user", "content": "a " * words}, {"role": "assistant", "content": "b " * words}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * count)


@pytest.mark.parametrize(("own", "name"), [((), "chatml"), (("<start_of_turn>", "<end_of_turn>"), "gemma")])
def test_a_base_without_a_chat_template_gets_one_by_name_and_learns_its_tokens(
    bases: Path, own: tuple[str, ...], name: str
) -> None:
    talks(bases, 10)
    tokens = [{"content": token, "special": True} for token in own]
    (bases / "8b" / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    made = first(bases, "8b", "80GiB")
    config = parse_config(made.config)
    assert (config.data.template, config.model.add_tokens) == (name, list(NAMED[name].tokens))
    assert not made.missing
    assert "model.add_tokens" not in first(bases, "8b", "80GiB", 8, "full").settings
    (bases / "8b" / "chat_template.jinja").write_text("{{ messages }}")
    assert "data.template" not in first(bases, "8b", "80GiB").settings


@pytest.mark.parametrize(("answer", "templated"), [([{"role": "assistant", "content": "b"}], True), ("b", False)])
def test_so_does_one_whose_answers_to_compare_are_conversations(bases: Path, answer: Any, templated: bool) -> None:
    other = [{"role": "assistant", "content": "c"}] if templated else "c"
    asked: Any = [{"role": "user", "content": "a"}] if templated else "a"
    row = {"prompt": asked, "chosen": answer, "rejected": other}
    (bases / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert (first(bases, "8b", "80GiB", goal="dpo").settings.get("data.template") == "chatml") == templated


@pytest.mark.parametrize("rows", [20, 1000, 100_000])
def test_batch_epochs_and_evaluations_follow_from_how_much_data_there_is(bases: Path, rows: int) -> None:
    talks(bases, rows)
    (bases / "8b" / "chat_template.jinja").write_text("{{ messages }}")
    config = parse_config(first(bases, "8b", "80GiB").config)
    tokens = (bases / "rows.jsonl").stat().st_size / 4
    steps = tokens / (config.train.global_batch * config.data.sequence_length)
    assert config.train.epochs is not None
    assert config.eval.every == pytest.approx(max(1, steps * config.train.epochs / 10), abs=1)
    assert config.train.global_batch * config.data.sequence_length <= 65536
    if rows == 1000:
        assert (config.train.global_batch, config.train.epochs, config.data.held_out) == (1, 3, 0.1)
    if rows == 100_000:
        assert (steps >= 50, config.train.epochs, config.data.held_out) == (True, 2, 0.02)


def test_a_run_of_a_cluster_may_take_as_many_as_64_gpus(bases: Path) -> None:
    assert first(bases, "70b", "24GiB", goal="full", machine="slurm").gpus == 64


def test_rows_are_no_longer_than_the_positions_of_a_small_base(bases: Path) -> None:
    described = {**LLAMA_8B, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 300}
    (bases / "8b" / "config.json").write_text(json.dumps(described))
    assert first(bases, "8b", "80GiB").settings["data.sequence_length"] == 300


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_step_has_no_more_tokens_on_more_gpus(bases: Path, gpus: int) -> None:
    talks(bases, 100_000)
    config = parse_config(first(bases, "8b", "80GiB", gpus).config)
    assert config.train.global_batch * config.data.sequence_length == 65536
    assert config.train.global_batch % (gpus * config.train.micro_batch) == 0


def test_rows_are_as_long_as_the_longest_document_where_that_fits(bases: Path) -> None:
    def planned(tokens: int, gpu: str) -> Config:
        (bases / "rows.jsonl").write_text(json.dumps({"text": "abc " * tokens}) + "\n")
        found = first(bases, "8b", gpu, goal="sft")
        config = parse_config(found.config)
        read = read_gpu(gpu, "--gpu").memory
        assert make_plan(config, describe_base(config.model), 1, 1, read).shortfalls == []
        assert found.gpu_bytes <= 0.9 * read
        return config

    config = planned(30_000, "80GiB")
    assert config.data.sequence_length == 15 * 2048
    assert config.train.micro_batch * config.train.global_batch == 1
    cut = planned(200_000, "16GiB")
    assert 15 * 2048 < cut.data.sequence_length < 131072
    assert cut.train.activation_offload
    described = {**LLAMA_8B, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 20_000}
    (bases / "8b" / "config.json").write_text(json.dumps(described))
    assert planned(30_000, "80GiB").data.sequence_length == 20_000, "the base has no more positions"


def test_rows_that_gpus_share_are_so_many_as_there_are_groups(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = LongestRow({"sharding.sequence_parallel": 4, "train.micro_batch": 1}, 40_000, 0, 0)
    monkeypatch.setattr("launcher.init.choice.longest_rows", lambda *_: [line])
    (bases / "rows.jsonl").write_text(json.dumps({"text": "abc " * 30_000}) + "\n")
    config = parse_config(first(bases, "8b", "80GiB", 4).config)
    assert config.sharding.sequence_parallel == 4
    assert config.train.global_batch == 1


def test_where_nothing_fits_it_says_how_near_it_is(bases: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"512 tokens on 1 GPU take .* of 4\.0 GiB") as refused:
        first(bases, "70b", "4GiB", 1, "full")
    least = float(str(refused.value).partition(" take ")[2].partition(" GiB")[0])
    assert 130 < least < 260, "70 G weights of two bytes, with masters and moments in the host's memory"


def invoke(folder: Path, *more: str) -> Any:
    command = ["init", str(folder / "run.yaml"), "--base", str(folder / "8b"), "--gpu", "24GB"]
    return CliRunner().invoke(app, [*command, *more])


def test_a_file_is_written_once_and_planned(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bases)
    written = invoke(bases, "--data", "rows.jsonl", "--json")
    assert written.exit_code == 0, written.output
    found = json.loads(written.stdout)
    assert (bases / "run.yaml").read_text() == found["config"]
    assert [line.split()[:2] for line in found["next"]] == [
        ["capstan", "data"],
        ["capstan", "plan"],
        ["capstan", "train"],
    ]
    assert not found["missing"]
    pairs = invoke(bases, "--data", "rows.jsonl", "--goal", "dpo", "--json", "--dry-run")
    assert "objective.name: dpo learns from preference" in "".join(json.loads(pairs.stdout)["missing"])
    assert load_config(bases / "run.yaml").quant.type == "nf4"
    refused = invoke(bases, "--data", "rows.jsonl")
    assert isinstance(refused.exception, ConfigError)
    assert "--force" in str(refused.exception)
    (bases / "run.yaml").write_text("mine")
    dry = invoke(bases, "--data", "no-rows.jsonl", "--dry-run")
    assert "no-rows.jsonl" in dry.stderr
    assert parse_config(dry.stdout).data.sequence_length == 4096
    assert (bases / "run.yaml").read_text() == "mine"
    assert invoke(bases, "--data", "rows.jsonl", "--force").exit_code == 0
    assert (bases / "run.yaml").read_text() == found["config"]
    for place in (bases / "none" / "run.yaml", bases):
        with pytest.raises(ConfigError, match="cannot be written: its folder must exist, and it must not be a folder"):
            check_new(place, force=True)


def test_a_source_keeps_the_order_of_its_keys_and_has_a_line() -> None:
    sources = [{"path": "b.jsonl", "format": "chat"}, {"path": "a.jsonl"}]
    assert yaml_text({"data.train": sources, "run.name": "a"}, {}, ["made"], ["end"]) == (
        "# made\nrun:\n  name: a\ndata:\n  train:\n    - {path: b.jsonl, format: chat}\n    - {path: a.jsonl}\n# end\n"
    )


def test_a_long_value_stays_on_its_line_below_its_comment() -> None:
    value = ["ein Stück", "*.jsonl"] * 20
    text = yaml_text({"run.tags": value}, {"run.tags": ["why"]}, [])
    assert text == f"run:\n  # why\n  tags: [{', '.join(value)}]\n".replace("*.jsonl", "'*.jsonl'")


def test_the_next_commands_can_be_typed_as_they_stand(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bases)
    command = ["init", "Ann's run.yaml", "--base", str(bases / "8b"), "--gpu", "24GB", "--data", "rows.jsonl", "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    assert [shlex.split(line)[-1] for line in found["next"]] == ["Ann's run.yaml"] * 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--data: missing"),
        (["--data", ""], "--data: empty. Give it a value"),
        (["--data", "x", "--base", " "], "--base: empty. Give it a value"),
        (["--data", "x", "--gpus", "1000000000"], "--gpus: 1,000,000,000 is more than any cluster has"),
        (["--data", "x", "--goal", "ppo"], "--goal: 'ppo' is not allowed"),
        (["--data", "x", "--machine", "cloud"], "--machine: 'cloud' is not allowed"),
        (["--data", "x", "--gpu", "H1000"], "H1000"),
        (["--data", "x", "--base", "/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_or_missing_answer_is_one_sentence(bases: Path, more: list[str], words: str) -> None:
    refused = invoke(bases, *more)
    assert isinstance(refused.exception, ConfigError)
    assert words in str(refused.exception)
    assert not (bases / "run.yaml").exists()


def test_in_a_terminal_it_asks(bases: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher.cli", "init", "asked.yaml", "--gpu", "80GiB"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=bases) as process:
        try:
            os.write(ours, b"8b\nrows.jsonl\ndpo\n\n")
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
    assert process.returncode == 0, said.decode()
    assert "The base" in said.decode()
    assert load_config(bases / "asked.yaml").objective.name == "dpo"
