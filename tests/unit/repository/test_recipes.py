"""Each recipe is a configuration that fits the GPUs that it names, and trains on the small data that comes with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.init.recipes import FILES, find_recipe, glossary, recipe_text, table, write_data
from tests.material import byte_tokenizer, make_base
from tests.recipes_page import PAGE, plans, render
from trainer.base.find.locate import known_config, resolve_base
from trainer.config import parse_config
from trainer.data.compile.inputs import with_labels
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.dataset import open_dataset
from trainer.errors import ConfigError
from trainer.store.store import open_run_store

RECIPES = table().recipes
QUICK = ("smollm2-135m-chat", "qwen3-8b-chat")
LINES = "llama-3.1 llama-3.3 qwen3- qwen3.5 gemma-3 gemma-4 mistral-small gpt-oss smollm phi glm-4.6 deepseek kimi qwen3-coder-480b".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in RECIPES]
)
def test_a_recipe_fits_the_gpus_that_it_names(name: str, tmp_path: Path) -> None:
    write_data(tmp_path, force=False)
    ((_, planned),) = plans(tmp_path, {name: RECIPES[name]})
    assert planned.plan.shortfalls == []
    assert planned.fits or RECIPES[name].on_cpu
    assert planned.length.steps


def test_every_recipe_is_a_valid_configuration_of_a_known_base_with_a_reason_for_each_setting() -> None:
    for name, recipe in RECIPES.items():
        text = recipe_text(name)
        config = parse_config(text)
        assert config.run.name == name
        assert config.cluster.workers == (None if recipe.on_cpu else recipe.gpus)
        assert (config.model.base, config.quant.type) == (recipe.base, recipe.quant)
        assert (config.train.global_batch, config.train.micro_batch) == (recipe.batch, recipe.micro_batch)
        assert config.data.sequence_length == recipe.length
        assert known_config(recipe.base), recipe.base
        settings = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith(("#", "- "))]
        assert all("  # " in line for line in settings), settings
        assert max(map(len, text.splitlines())) <= 120
    assert parse_config(recipe_text("smollm2-135m-chat")).optim.lr == 1e-3, "the recipe's own, not its goal's"
    assert {line for line in LINES if any(name.startswith(line) for name in RECIPES)} == set(LINES)
    assert {recipe.goal for recipe in RECIPES.values()} == set(table().goals)


@pytest.mark.parametrize("goal", list(table().goals))
def test_the_small_data_is_what_the_goal_reads(goal: str, tmp_path: Path) -> None:
    write_data(tmp_path / "data", force=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    base = make_base(tmp_path / "base", "llama", max_position_embeddings=8192, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    name = next(name for name, recipe in RECIPES.items() if recipe.goal == goal)
    small = [f"model.base={base}", f"run.store={tmp_path / 'runs'}", "data.sequence_length=4096"]
    small += ["objective.teacher=" + str(base)] if goal == "distillation" else []
    config = with_labels(parse_config(recipe_text(name, str(tmp_path / "data")), small))
    made = prepare(config, resolve_base(config.model), open_run_store(config))
    assert open_dataset(open_run_store(config), made.train).manifest.documents > 5


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["recipe", *arguments])


def test_the_command_lists_writes_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {row["name"] for row in json.loads(invoke("--json").stdout)["recipes"]} == set(RECIPES)
    assert "qwen3-8b-chat" in invoke().stdout
    assert invoke("qwen3-8b-chat").stdout == recipe_text("qwen3-8b-chat")
    assert invoke("qwen3-8b-chat", "-o", "run.yaml", "--data", "rows", "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert invoke("qwen3-8b-chat", "-o", "run.yaml", "--data", "rows").exit_code == 0
    assert (tmp_path / "run.yaml").read_text() == recipe_text("qwen3-8b-chat", "rows")
    assert {path.name for path in (tmp_path / "rows").iterdir()} == set(FILES)
    for name in [*FILES][1:]:
        (tmp_path / "rows" / name).unlink()
    again = invoke("--data", "rows")
    assert isinstance(again.exception, ConfigError)
    assert "--force" in str(again.exception)
    given = invoke("--data", "rows", "--force")
    assert (given.exit_code, given.stdout) == (0, ""), "the recipes are listed where nothing is asked for"
    for options in ((), ("--data", "rows")):
        assert str(invoke("-o", "other.yaml", *options).exception).startswith("-o: needs the NAME of a recipe")
    with pytest.raises(ConfigError, match="Did you mean qwen3-8b-chat"):
        find_recipe("qwen3-8b-chta")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("qwen3-8b", "NAME: 'qwen3-8b' is no recipe. Did you mean qwen3-8b-chat"),
        ("smollm2", "NAME: 'smollm2' is no recipe. Did you mean smollm2-135m-dpo or "),
        ("zzzz", "NAME: 'zzzz' is no recipe. `capstan recipe` lists all "),
    ],
)
def test_a_name_that_is_no_recipe_is_answered_with_those_like_it(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_recipe(given)
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith(f"`capstan recipe` lists all {len(RECIPES)}.")


def test_the_small_data_goes_into_a_folder_at_any_depth_and_what_prevents_it_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    told = write_data(folder, force=False)
    for line, (name, (about, _)) in zip(told, FILES.items(), strict=True):
        assert line == f"{folder / name}: {len((folder / name).read_text().splitlines())} rows, {about}"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^--data: {tmp_path}/file/rows cannot be written: .*Not a directory"):
        write_data(tmp_path / "file" / "rows", force=False)


@pytest.mark.long
def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: .venv/bin/python -m tests.recipes_page"


def test_the_page_has_every_recipe() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"| `{name}` |" not in page] == []


def test_tasks_have_right_answers_pairs_a_right_one_and_long_texts_every_sentence() -> None:
    rows = list(FILES["tasks.jsonl"][1]())
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        first, second = map(int, re.findall(r"\d+", question))
        assert int(answer) == first * second, question
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) > 50
    sentences = {entry.sentence for entry in glossary()}
    for row in FILES["pairs.jsonl"][1]():
        assert row["chosen"][0]["content"] in sentences
        assert row["rejected"][0]["content"] not in sentences
    *chapters, whole = (row["text"] for row in FILES["long.jsonl"][1]())
    assert whole == "\n\n".join(chapters)
    assert len(chapters) == len({entry.topic for entry in glossary()})
    assert all(whole.count(sentence) == 1 for sentence in sentences)
