"""Every example trains in small: its own settings, over a base and rows that are made here."""

import json
from pathlib import Path

import pytest

from launcher.view.status import read_generation
from tests.dist import runs
from tests.dist.launch import launch
from tests.families import rows
from tests.material import Workshop, make_data, make_labelled, make_pairs
from trainer.config import Config, dump_config, load_config
from trainer.config.section import part
from trainer.state.checkpoint.manifest import committed_steps
from trainer.train.every.sample import SampleSettings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

# One for each objective and kind of data; what each method and setting does is proven where it is at home.
QUICK = ("dpo", "evaluation", "kto", "smoke-cpu")


def in_small(path: Path, workshop: Workshop) -> Config:
    """The example with what is large or elsewhere replaced; its rows are prompts and completions where they are
    conversations.
    """
    example = load_config(path)
    given = example.data
    made = {"preference": make_pairs, "labelled": make_labelled}.get(given.format, make_data)
    rows = made(workshop.folder / f"{given.format}.jsonl")
    other = str(make_data(workshop.folder / "eval.jsonl", seed=8))
    prompts = make_data(workshop.folder / "prompts.jsonl", documents=2, seed=9)
    held_out = [{"path": other}] if given.eval else []
    sources = [source.model_copy(update={"path": str(rows)}).model_dump(mode="json") for source in given.train]
    sets = {name: {"path": other, "format": "prompt_completion"} for name in example.eval.sets}
    large = {
        "run.store": workshop.folder / "store",
        "model.base": workshop.base,
        "model.dtype": "fp32",
        "data.train": json.dumps(sources),
        "data.held_out": 0.3 if given.held_out else 0,
        "data.eval": json.dumps(held_out),
        "data.format": "prompt_completion" if given.format in ("auto", "chat") else given.format,
        "data.sequence_length": 96,
        "eval.sets": json.dumps(sets),
        "eval.prompts": str(prompts) if example.eval.prompts else "null",
        "eval.max_tokens": 4,
        "train.sample_every": min(part(example.train, SampleSettings).sample_every, 1),
        "train.epochs": "null",
        "optim.lr": 0.001,
        "optim.warmup_steps": 0,
        "train.steps": 2,
        "train.global_batch": 2,
        "sharding.deepspeed": workshop.policy,
        "cluster.threads_per_worker": 1,
    }
    if example.tuning.method == "oft":
        large["tuning.block"] = 4  # which divides the small base's layers
    return load_config(path, [f"{name}={value}" for name, value in large.items()])


@pytest.mark.parametrize(
    "path", rows(EXAMPLES, [path for path in EXAMPLES if path.stem in QUICK]), ids=lambda path: path.stem
)
def test_an_example_trains_in_small(workshop: Workshop, path: Path) -> None:
    config = in_small(path, workshop)
    datasets = workshop.prepare(config)
    (outcome,) = launch(1, runs.run, dump_config(config), datasets.train, "start", datasets.eval, datasets.sets)
    assert outcome["outcome"] == "finished", outcome
    run = workshop.store.sub(config.run.name)
    assert [record["grad_norm"] > 0 for record in read_generation(run, 1)["step"]] == [True, True]
    assert committed_steps(run)[0] == 2
