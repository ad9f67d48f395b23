"""The configuration of a smoke run: a user's own in small, or one for the sample that is made on the spot."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.smoke.verdict import STEPS
from trainer.config import Config, Data, Source, assignment, override, parse_config
from trainer.data.source.files import expand
from trainer.data.source.reading import rows
from trainer.errors import DataError
from trainer.processes.devices import local_gpus
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts


@dataclass(frozen=True)
class Scale:
    """How much a smoke run trains: its steps, and at most so many rows in each."""

    steps: int = STEPS
    rows: int = 2


OF_TEXT, OF_PICTURES = Scale(), Scale(steps=40, rows=4)
COMMIT_EVERY = 5
SEQUENCE_LENGTH = 512
ROWS_OF_A_SOURCE = 2000
ANSWERS, ANSWER_TOKENS = 8, 4
REGEX = "^[a-z]+"


def config_of_sample(
    base: str,
    train: Sequence[str],
    dtype: str,
    overrides: Sequence[str],
    store: str,
    layers: int | None = None,
    *,
    online: bool = False,
    images: bool = False,
) -> Config:
    """Return the configuration of the sample with this base, these files of rows and this type of numbers.

    `online` learns from rewards of what it samples, and `images` from rows with pictures.
    """
    rewarded = {"objective": {"name": "grpo"}, "rollout": {"reward": "regex"}} if online else {}
    tree: dict[str, Any] = {
        **rewarded,
        "run": {"name": "smoke"},
        "model": {"base": base, "dtype": "bf16" if local_gpus() else dtype},
        # One file of the sample has more rows than the run takes. Halves of its rows teach as much in a third of the
        # time.
        "data": {"train": [{"path": train[0]}], "sequence_length": SEQUENCE_LENGTH // 2},
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "train": {"steps": STEPS},
    }
    if images:
        tree["data"] |= {"format": "pictures", "sequence_length": SEQUENCE_LENGTH}
        tree |= {"optim": {"lr": 1e-2, "warmup_steps": 2}, "train": {"steps": STEPS, "global_batch": OF_PICTURES.rows}}
    return scale_down(
        parse_config(json.dumps(tree), overrides), store, "", layers, scale=OF_PICTURES if images else OF_TEXT
    )


def made_once(
    directory: Path, made_with: dict[str, Any], make: Callable[[], dict[str, Any]], report: Callable[[str], None]
) -> dict[str, Any]:
    """Return what `make` returns, from `sample.json` in `directory` if it was made with the same before.

    The file is written last, and says that what it describes is complete."""
    done = directory / "sample.json"
    if done.exists() and (record := json.loads(done.read_text()))["made_with"] == made_with:
        report(f"already made: {directory}")
        return record["sample"]
    done.unlink(missing_ok=True)
    sample = make()
    unfinished = done.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"made_with": made_with, "sample": sample}, indent=2))
    unfinished.replace(done)
    return sample


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSON lines, and return the file's path."""
    # A table may have columns that JSON has no values for, such as dates.
    lines = (json.dumps(row, default=str) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def rows_with_regex(rows: str, directory: Path) -> str:
    """Return a file of the sample's chat rows whose answers are a regular expression.

    Some of the base's own answers match it.
    """
    answer = {"role": "assistant", "content": REGEX}
    questions = [json.loads(line)["messages"][0] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    rewarded = ({"messages": [question, answer]} for question in questions[:ROWS_OF_A_SOURCE])
    return write_rows(directory / "rewarded.jsonl", rewarded)


def first_rows(data: Data, directory: Path) -> list[Source]:
    """Return the first rows of each source, as files in `directory`: a smoke run need not tokenize a whole data set."""

    def bad(error: DataError) -> None:
        if data.on_bad_row == "fail":
            raise error

    small: list[Source] = []
    for index, source in enumerate(data.train):
        found = (row for file in expand([source], "data.train") for _, row in rows(file, bad))
        path = write_rows(directory / f"source-{index}.jsonl", islice(found, ROWS_OF_A_SOURCE))
        small.append(source.model_copy(update={"path": path, "subset": None, "split": None}))
    return small


def learns_from_rollouts(config: Config) -> bool:
    return isinstance(find_objective(config), LearnsFromRollouts)


def scale_down(config: Config, store: str, ray_address: str, layers: int | None, *, scale: Scale = OF_TEXT) -> Config:
    """Return the same run with fewer steps, tokens and ranks, but its base, data, adapter and optimizer."""
    workers = min(config.cluster.most_workers or 2, local_gpus() or 2, 2)
    settings: dict[str, Any] = {
        "run.store": store,
        "train.steps": scale.steps,
        "train.epochs": None,
        "train.global_batch": min(config.train.global_batch, scale.rows),
        "train.micro_batch": 1,
        "data.sequence_length": min(config.data.sequence_length, SEQUENCE_LENGTH),
        "checkpoint.every_steps": COMMIT_EVERY,
        "checkpoint.keep_last": scale.steps,
        "cluster.workers": workers,
        "cluster.spares": 0,
        "sharding.sequence_parallel": min(config.sharding.sequence_parallel, workers),
        "cluster.gpus_per_worker": None,
        "model.attention": "auto",
        "optim.warmup_steps": min(config.optim.warmup_steps, 2),
        "optim.warmup_ratio": None,
        "train.sample_every": 0,
        "train.deterministic": bool(local_gpus()),  # a run that was killed is compared with one that was not
        "eval.every": 0,
        "eval.sets": {},
        "checkpoint.keep_best": 0,
        "cluster.ray.address": ray_address or None,
        "retry.failures": 0,
        "retry.skip_bad_window": False,
        "track.flush_seconds": 0.5,
    }
    if learns_from_rollouts(config):
        given = config.rollout
        settings |= {
            "rollout.engine": "own",
            "rollout.serve": {},
            "rollout.max_lag": None,
            "rollout.answers": min(given.answers, ANSWERS),
            "rollout.max_tokens": min(given.max_tokens, ANSWER_TOKENS),
            "rollout.held_out": 0,
            "rollout.updates": 1,
        }
    if layers:
        settings["model.layers"] = layers
    return override(config, *(assignment(key, value) for key, value in settings.items()))
