"""Puts a first configuration together from the answers and what fits, with the commands that come next."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel

from launcher.init.choice import GIB, Choice, Machines, Setting, choose, lengthened, parsed
from launcher.init.commented import yaml_text
from launcher.init.importing.mapping import is_hub_dataset
from trainer.base.find.locate import base_at_hand
from trainer.config import Config, Model
from trainer.data.compile.inputs import check_sources, find_train, has_conversations
from trainer.data.compile.length import BYTES_A_TOKEN, epoch_length
from trainer.data.format.unrendered import strings_of
from trainer.data.render.chat_template import NAMED, fitting_template, has_template, tokens_of
from trainer.data.source.files import SourceFile, is_of_hub, unusable
from trainer.data.source.reading import rows
from trainer.errors import CapstanError, ConfigError, shown
from trainer.plan.gpus import read_gpu
from trainer.processes.bf16 import why_processor_is_slow, why_slow
from trainer.processes.devices import described_gpus


class Goal(BaseModel):
    """A goal of goals.yaml: its settings with the reason for each, its learning rates, and the data that it needs.

    The data is described in words.
    """

    about: str
    data: str
    rates: tuple[float, float]
    rate_source: str
    trains_base: bool = False
    settings: Mapping[str, tuple[Any, str]]


GOALS: Mapping[str, Goal] = {
    name: Goal.model_validate(given)
    for name, given in yaml.safe_load(Path(__file__).with_name("goals.yaml").read_text(encoding="utf-8")).items()
}


T = TypeVar("T")
Kind = Literal["one", "slurm", "ray"]
KINDS: tuple[Kind, ...] = ("one", "slurm", "ray")
_GPUS_A_NODE = 8
_LARGE = 13e9
"""Weights above which QLoRA's learning rate is the lower one."""
_TOKENS_OF_STEP = 65536  # about this many, whatever the number of GPUs
# The tokens of a step are chosen so that an epoch has at least so many steps. If there are still few steps, the run
# passes over the data more often.
_STEPS_OF_EPOCH, _FEWEST_STEPS, _MOST_EPOCHS = 50, 150, 3
_EVALUATIONS = 10
_ROWS_SEEN = 256  # of each file; the longest row decides how long rows should be
_LITTLE, _FEW_HELD_OUT = 1_000_000, 0.1  # tokens, and share of rows


@dataclass(frozen=True)
class InitAnswers:
    """The answers that a first configuration is made of.

    `gpu` is a name or a size of memory, and `gpus` how many there are. None is what is found here.
    """

    base: str
    data: str
    goal: str
    machine: str
    gpu: str | None
    gpus: int | None


@dataclass(frozen=True)
class Initial:
    """A configuration as text, what its plan says, and the commands that come next."""

    path: str
    config: str
    settings: dict[str, Any]
    gpus: int
    gpu: str
    gpu_bytes: int
    next: tuple[str, ...]
    missing: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines for people: what is missing or unfit in the data, and the next commands."""
        return [*self.missing, "next:", *(f"  {line}" for line in self.next)]


def initial_config(answers: InitAnswers, path: Path) -> Initial:
    """Return a configuration for `answers`, to be written to `path`.

    Raises:
        ConfigError: an answer is not allowed, or the base cannot be found.
        DoesNotFit: the base does not fit these GPUs in any way.
    """
    if answers.goal not in GOALS:
        raise ConfigError(f"--goal: {shown(answers.goal)} is not allowed. Allowed are {', '.join(GOALS)}.")
    if answers.machine not in KINDS:
        raise ConfigError(f"--machine: {shown(answers.machine)} is not allowed. Allowed are {', '.join(KINDS)}.")
    goal = GOALS[answers.goal]
    at_hand = base_at_hand(Model(base=answers.base))
    base, files = at_hand.description, at_hand.directory
    is_large = base.architecture.weights("embedding", "head", "linear", "experts", "small") > _LARGE
    machine = _machine(answers)
    given: dict[str, Setting] = {
        "run.name": (_name(answers), "the run's folder in the store"),
        "run.store": ("runs", "a folder, or s3://, gs:// or az://"),
        "model.base": (answers.base, "a directory, a bucket's URI or a Hub id"),
        **goal.settings,
        "data.train": ([{"path": _source(answers.data)}], goal.data),
        "optim.lr": (goal.rates[is_large], f"{goal.rate_source}; `capstan sweep` finds a better one"),
        "optim.warmup_ratio": (0.03, "of all steps"),
        "train.epochs": (1, "passes over the data"),
        "checkpoint.every_minutes": (15, "what a crash may cost"),
    }
    given |= _type(machine)
    given |= _template(parsed(given), files) if files else {}
    # The size of the files gives the number. It is None if the size cannot be seen from here.
    tokens = found.tokens if (found := epoch_length(parsed(given), files, None)) else None
    given["data.held_out"] = (
        (_FEW_HELD_OUT, "so much of it is evaluated and never trained on; as there is little, more than usual")
        if tokens and tokens < _LITTLE
        else (0.02, "so much of it is evaluated and never trained on")
    )
    step = _TOKENS_OF_STEP if tokens is None else max(1, min(_TOKENS_OF_STEP, tokens // _STEPS_OF_EPOCH))
    chosen = choose(given, base, machine, trains_base=goal.trains_base, tokens=step)
    if longest := _looked_at(parsed(given), _longest):
        chosen = lengthened(chosen, base, machine, step, longest)
    chosen.settings.update(_length(chosen, tokens))
    settings = {**chosen.settings, **_cluster(answers, machine, chosen)}
    values = {name: value for name, (value, _) in settings.items()}
    reasons = {name: (why,) for name, (_, why) in settings.items()}
    text = yaml_text(values, reasons, _head(answers, machine, chosen))
    return Initial(
        path=str(path),
        config=text,
        settings=values,
        gpu_bytes=chosen.plan.memory_per_gpu.total,
        gpu=machine.gpu,
        gpus=chosen.gpus,
        next=_next(answers, path),
        missing=(*([at_hand.said] if at_hand.said else []), *_refused(parsed(settings), files)),
    )


def _type(machine: Machines) -> dict[str, Setting]:
    """Return `model.dtype: fp32` with the reason for it, if the machine multiplies bf16 slowly."""
    slow = why_processor_is_slow() if machine.gpus == 0 else None if machine.bf16 else f"{machine.gpu} has no bf16"
    return {"model.dtype": ("fp32", f"{slow}, so bf16 would be slow")} if slow else {}


def _template(config: Config, directory: Path) -> dict[str, Setting]:
    """Return a named template whose tokens the base has, or the first template, with its tokens.

    A base that lacks these has never seen them, so an adapter learns their rows too. `directory` has the base's own
    template. The result is empty if the base has a template, or if the rows that can be read here are no conversations.
    """
    if has_template(config.data, directory) or not _looked_at(config, lambda files: any(map(has_conversations, files))):
        return {}
    name = fitting_template(tokens_of(directory)) or next(iter(NAMED))
    found: dict[str, Setting] = {
        "data.template": (name, f"{NAMED[name].source}; the base has no chat template of its own")
    }
    if config.tuning.method != "full":
        why = "the template's, which such a base has not learnt: their rows learn too; vLLM takes them merged"
        found["model.add_tokens"] = (list(NAMED[name].tokens), why)
    return found


def _longest(files: Sequence[SourceFile]) -> int:
    """Return about how many tokens the longest of the files' first rows has."""
    first = (row for file in files for _, row in islice(rows(file, lambda _: None), _ROWS_SEEN))
    return max((sum(map(len, strings_of(row))) for row in first), default=0) // BYTES_A_TOKEN


def _looked_at(config: Config, look: Callable[[Sequence[SourceFile]], T]) -> T | None:
    """Return what `look` finds in the files of the training data; None if they cannot be read from here."""
    if any(is_of_hub(source) for source in config.data.train):
        return None
    try:
        return look(find_train(config).files)
    except CapstanError:
        return None


def _length(chosen: Choice, tokens: int | None) -> dict[str, Setting]:
    """Return the passes over the data and how often the run is evaluated, from the steps of an epoch."""
    if tokens is None:
        return {"eval.every": (50, "steps; before the first one too")}
    in_step, length = (chosen.settings[name][0] for name in ("train.global_batch", "data.sequence_length"))
    steps = max(1, round(tokens / (in_step * length)))
    epochs = min(_MOST_EPOCHS, -(-_FEWEST_STEPS // steps))
    every = max(1, round(steps * epochs / _EVALUATIONS))
    return {
        "train.epochs": (epochs, f"passes over the data, about {steps:,} steps each, as it has some {tokens:,} tokens"),
        "eval.every": (every, f"steps, about {_EVALUATIONS} times in all; before the first one too"),
    }


def _refused(config: Config, files: Path | None) -> tuple[str, ...]:
    """Return the reasons why training would refuse the data that lies here.

    Files may be missing, or the goal cannot learn from their rows.
    """
    lacking = unusable(config.data)
    if files and not lacking and all("://" not in source.path for source in config.data.train):
        try:
            check_sources(config, files)
        except CapstanError as error:
            lacking = [str(error)]
    return tuple(lacking)


def _machine(answers: InitAnswers) -> Machines:
    """Return the GPUs that the answers name, or those of this machine."""
    local = described_gpus() if answers.machine == "one" or not answers.gpu else []
    if answers.gpu:
        gpu = read_gpu(answers.gpu, "--gpu")
        count = answers.gpus or (None if answers.machine != "one" else max(1, len(local)))
        name = gpu.name or f"GPU of {gpu.memory / GIB:.0f} GiB"
        return Machines(count, gpu.memory, _GPUS_A_NODE, name, gpu.bf16)
    if local:
        smallest = min(local, key=lambda found: found.memory)
        count = answers.gpus or (len(local) if answers.machine == "one" else None)
        return Machines(count, smallest.memory, max(len(local), 1), smallest.name, why_slow(None) is None)
    if answers.machine == "one" and not answers.gpus:
        return Machines(0, None, 1, "CPU")
    raise ConfigError(
        "--gpu: this machine has no GPU to go by. Give the name of yours, such as H100, or its memory, such as 80GiB."
    )


def _cluster(answers: InitAnswers, machine: Machines, chosen: Choice) -> dict[str, Setting]:
    """Return the settings of the cluster that runs it."""
    if answers.machine == "ray":
        return {"cluster.ray.address": ("auto", "the cluster that this machine is part of, or host:port")}
    if answers.machine == "one":
        return {}
    # Every node has as many.
    per_node = max(count for count in range(1, machine.per_node + 1) if chosen.gpus % count == 0)
    return {
        "cluster.slurm.nodes": (chosen.gpus // per_node, "machines"),
        "cluster.slurm.gpus_per_node": (per_node, "your site may also want gpu_type, partition and account"),
        "cluster.slurm.time": ("24:00:00", "of one job; the run goes on by itself in the next"),
    }


def _head(answers: InitAnswers, machine: Machines, chosen: Choice) -> list[str]:
    goal = GOALS[answers.goal]
    head = [
        f"{answers.goal}: {goal.about}. Beside or above each setting is the reason for it; docs/configuration.md has"
        " all settings."
    ]
    if machine.memory is None:
        return [*head, "No GPU was found, so this is for the CPU: to try the way, not to train a large base."]
    each = f"{chosen.plan.memory_per_gpu.total / GIB:.1f} of {machine.memory / GIB:.1f} GiB"
    return [*head, f"By the plan it takes {each} on each of {chosen.gpus} x {machine.gpu}."]


def _next(answers: InitAnswers, path: Path) -> tuple[str, ...]:
    start = "train" if answers.machine == "one" else f"submit {answers.machine}"
    file = shlex.quote(str(path))
    return f"capstan data show {file}", f"capstan plan {file}", f"capstan {start} {file}"


def _name(answers: InitAnswers) -> str:
    stem = answers.base.rstrip("/").rpartition("/")[2] or "run"
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', stem).strip('._-') or 'run'}-{answers.goal}"[:100]


def _source(data: str) -> str:
    return f"hf://{data}" if "://" not in data and is_hub_dataset(data) else data
