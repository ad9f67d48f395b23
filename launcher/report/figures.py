"""Every figure that a report shows, read from the run's folder alone: its records, its evaluations and its samples.

The page (page.py) only lays them out. No figure is invented if the records have none: it is None, an empty list, or a
sentence in `RunFigures.notes`. Damaged results of evaluations are named there and left out.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from launcher.report.history import (
    FEW_POINTS,
    History,
    HistoryReader,
    PastStart,
    Point,
    finite_points,
    means,
    thinned,
)
from launcher.report.over_steps import Figure
from launcher.report.trained import (
    UNITS,
    DataFigures,
    Figures,
    data_figures,
    newest_manifest,
    read_settings,
    repeat_figures,
    trained_figures,
)
from launcher.view.status import Follower, RunStatus, late_parts
from launcher.view.watch import late_sentence
from trainer.config.registry import kinds
from trainer.errors import NOT_JSON
from trainer.run import layout
from trainer.run.evaluations import json_number
from trainer.run.folder import name_of
from trainer.run.lines import slow_sentence, wrong_sentence
from trainer.run.owner import StoreClock
from trainer.run.records import PARTS, Record, measures
from trainer.state.checkpoint.manifest import committed_steps, readable_manifests
from trainer.store.store import Store

_COUNTS = {"epoch", "passes", "tokens", *UNITS, "seconds", "data_repeats"}
"""Numbers of a step that are no measure over time."""
_COUNTED_ELSEWHERE = {"save_seconds", "evaluate_seconds", "look_seconds", "keep_seconds"}
"""Times that are no part of the `seconds` of any step, or lie within its other parts, as looks for wrong bytes do. A
save's wait is told by the commit, too.
"""
_EVAL_COUNTS = {"step", "time", "clock", "tokens", *UNITS, "seconds"}
_MOST_CHECKPOINTS = 50
_MOST_SAMPLES, _MOST_STEPS, _LONGEST = 12, 6, 1500


Number = Annotated[float | None, BeforeValidator(json_number)]


class Loss(BaseModel):
    """Nats a target token, and e to that power."""

    loss: Number = None
    perplexity: Number = None


class SetResult(BaseModel):
    """The losses on one set.

    `difference` is the adapter's loss minus the base's. `interval` is its 95 % interval, if there are documents enough
    for one. `data` is the fingerprint of the set's documents, and `trained_on` the number of them that were trained on;
    earlier evaluations lack both. `server` is the server that answered instead of ranks.
    """

    data: str | None = None
    documents: int | None = None
    trained_on: int | None = None
    tokens: int | None = None
    base: Loss | None = None
    adapter: Loss | None = None
    difference: Number = None
    interval: tuple[Number, Number] | None = None
    server: str | None = None


class MetricResult(BaseModel):
    """One metric of a task.

    `stderr` is the adapter's standard error, `base_stderr` the base's, which earlier evaluations lack. `server` is as
    for a set.
    """

    base: Number = None
    adapter: Number = None
    base_stderr: Number = None
    stderr: Number = None
    server: str | None = None


class Spread(BaseModel):
    """The gap in log-probability between paired sentences, in nats."""

    mean: Number = None
    std: Number = None


class BiasResult(BaseModel):
    """The gaps of one group of paired sentences."""

    pairs: int | None = None
    base: Spread | None = None
    adapter: Spread | None = None
    server: str | None = None


class EvaluationFigures(BaseModel):
    """One `capstan evaluate`: of the adapter after `step` updates, beside its base."""

    step: int
    made: Number = None
    sets: dict[str, SetResult] = {}
    tasks: dict[str, dict[str, MetricResult]] = {}
    bias: dict[str, BiasResult] = {}


class SampleText(BaseModel):
    """A prompt and its answers, including the base's if the base was asked too."""

    prompt: str
    base: str | None = None
    adapter: str | None = None


class SampleFigures(BaseModel):
    """The answers after `step` updates. `left_out` prompts are not shown."""

    step: int
    samples: list[SampleText]
    left_out: int = 0


@dataclass(frozen=True)
class Curve:
    """A measure over the steps that count.

    `points` include the extremes of all steps. `means` are there if there are more steps than points.
    """

    points: list[Point]
    means: list[Point]
    steps: int


@dataclass(frozen=True)
class RunFigures:
    """A run as its folder describes it.

    `held_out` has the curves of evaluation sets by measure and set; "" is the unnamed set. `measured` has the curves of
    everything else that was measured every so many steps, by action and figure. `over_steps` has the lines of the
    figures in `over_steps/`, by figure and line.

    `Figures` are the parts that are only shown and not computed with. The page finds each of their values by its place
    in what `--json` prints.
    """

    run: str
    name: str
    made: float
    state: str
    reason: str
    trained: Figures
    data: list[DataFigures]
    progress: Figures
    curves: dict[str, Curve]
    held_out: dict[str, dict[str, list[Point]]]
    measured: dict[str, dict[str, list[Point]]]
    over_steps: dict[str, dict[str, list[Point]]]
    starts: list[PastStart]
    commits: list[Figures]
    checkpoints: list[Figures]
    skipped_steps: list[int]
    failed_saves: int
    time: list[Figures]
    memory: list[Figures]
    experts: list[Figures]
    evaluations: list[EvaluationFigures]
    samples: list[SampleFigures]
    cost: Figures | None
    repeat: Figures | None
    settings: dict[str, Any]
    notes: list[str]

    @property
    def restarts(self) -> list[PastStart]:
        """The starts after the first that went on from a state."""
        return [start for start in self.starts if start.step is not None][1:]

    def to_json(self) -> dict[str, Any]:
        """Return plain values under the names above. A curve has the points that the page shows."""
        tree = asdict(self)
        for name in ("evaluations", "samples"):
            tree[name] = [found.model_dump() for found in getattr(self, name)]
        for start, figures in zip(self.starts, tree["starts"], strict=True):
            del figures["lifetime"]
            figures |= {"began": start.lifetime.began, "lasted": start.lasted, "rank_hours": start.rank_hours}
        return tree | {"restart_count": len(self.restarts)}


def read_figures(folder: Store, clock: Callable[[], float] | None = None) -> RunFigures:
    """Return the figures of the run in `folder` now. `clock` is the store's by default.

    Raises `StorageError` when the store cannot be read. Damage raises nothing.
    """
    return FiguresReader(folder, clock).read()


class FiguresReader:
    """Reads a run's figures again and again, of its records each time only those that are new."""

    def __init__(self, folder: Store, clock: Callable[[], float] | None = None) -> None:
        self._folder, self._clock = folder, clock or StoreClock(folder)
        self._status, self._history = Follower(folder, self._clock), HistoryReader(folder)
        self._checkpoints: dict[int, Figures] = {}

    def read(self) -> RunFigures:
        """Return the figures of now. Raises `StorageError` when the store cannot be read."""
        committed = committed_steps(self._folder)
        newest = sorted(committed, reverse=True)[:_MOST_CHECKPOINTS]
        self._checkpoints = {step: self._checkpoints.get(step) or _checkpoint(self._folder, step) for step in newest}
        records = self._status.read(), self._history.read()
        return _figures(self._folder, self._clock, *records, committed, list(self._checkpoints.values()))


def _checkpoint(folder: Store, step: int) -> Figures:
    """Return what the manifest of a step says, or the `problem` with it."""
    problems: list[str] = []
    names = ("bytes", "world_size", "shards", "generation", "eval_loss", "sha256")
    for found in readable_manifests(folder, problems, [step]):
        proof = found.shards[0].sha256 if found.shards else ""
        told = (found.size, found.world_size, len(found.shards), found.generation, found.eval_loss, proof)
        return {"step": step, **dict(zip(names, told, strict=True)), "problem": ""}
    return {"step": step, **dict.fromkeys(names), "problem": "; ".join(problems)}


def _figures(
    folder: Store,
    clock: Callable[[], float],
    status: RunStatus,
    history: History,
    committed: Iterable[int],
    checkpoints: list[Figures],
) -> RunFigures:
    notes: list[str] = []
    settings, manifest = read_settings(folder, notes), newest_manifest(folder, notes)
    evaluations = read_evaluations(folder, notes)
    starts = [record for record in history.others["start"] if "data" in record]
    notes += other_data((of, record["step"], key) for record in starts for of, key in record["data"].items())
    notes += other_data((name, one.step, of.data) for one in evaluations for name, of in one.sets.items())
    for start in history.others["start"]:
        notes += (f"Start {start.get('generation')}: {late_sentence(*late)}" for late in late_parts(start).items())
    notes += map(slow_sentence, history.others["slow_rank"])
    notes += map(wrong_sentence, history.others["wrong_bytes"])
    if not history.steps.steps:
        notes.append("No step is recorded, so there is nothing to draw over steps.")
    return RunFigures(
        run=folder.uri,
        name=name_of(folder),
        made=clock(),
        state=status.state,
        reason=status.reason,
        trained=trained_figures(settings, manifest, history),
        data=data_figures(folder, settings, manifest, history, notes),
        progress=_progress(history, status.total_steps),
        curves=_curves(history),
        held_out=_held_out(history.others["eval"]),
        measured=_measured(history.others["measured"]),
        over_steps=_over_steps(history),
        starts=history.starts,
        commits=_commits(history.others["commit"], committed),
        checkpoints=checkpoints,
        skipped_steps=[record["step"] for record in history.others["skip"]],
        failed_saves=len(history.others["save_failed"]),
        time=_time(history),
        memory=_memory(history),
        experts=_experts(history.others["experts"]),
        evaluations=evaluations,
        samples=read_samples(folder, notes),
        cost=_cost(history, settings.get("track.price_per_gpu_hour")),
        repeat=repeat_figures(folder, settings, manifest),
        settings=settings.tree,
        notes=notes,
    )


def _progress(history: History, total: int | None) -> Figures:
    """Return how far the run is. Losses are means over the step's targets, in nats; `accuracy` is of classes."""
    steps = history.steps
    losses, seconds = list(steps.values("loss")), steps.sum("seconds")
    went_on_from = next((start.step for start in reversed(history.starts) if start.step), 0)
    return {
        "step": steps.steps[-1] if steps.steps else went_on_from,
        "total_steps": total,
        "tokens": int(steps.sum("tokens")),
        "tokens_per_second": steps.sum("tokens") / seconds if seconds else None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "accuracy": next(reversed(list(steps.values("accuracy"))), None),
        "lost_steps": sum(start.lost_steps for start in history.starts),
        "lost_seconds": math.fsum(start.lost_seconds for start in history.starts),
    }


def _curves(history: History) -> dict[str, Curve]:
    """Return a curve for each measure: every number that steps have, except counts of a step and parts of its time."""
    names = (name for name in history.steps.names if name not in _COUNTS and not name.endswith("_seconds"))
    every = {name: list(history.steps.points(name)) for name in names}
    return {name: Curve(thinned(points), means(points), len(points)) for name, points in every.items()}


def _held_out(records: Iterable[Record]) -> dict[str, dict[str, list[Point]]]:
    found: dict[str, dict[str, dict[float, float]]] = {}
    for record in records:
        of = str(record.get("set") or "")
        for name in record.keys() - _EVAL_COUNTS:
            for step, value in finite_points([(record.get("step"), record[name])]):
                found.setdefault(name, {}).setdefault(of, {})[step] = value
    return {
        name: {of: thinned(sorted(points.items())) for of, points in sets.items()}
        for name, sets in sorted(found.items())
    }


def _measured(records: Iterable[Record]) -> dict[str, dict[str, list[Point]]]:
    found: dict[str, dict[str, dict[float, float]]] = {}
    for record in records:
        for name, value in measures(record).items():
            found.setdefault(record["by"], {}).setdefault(name, {})[record["step"]] = value
    return {
        by: {name: thinned(sorted(points.items())) for name, points in sorted(curves.items())}
        for by, curves in sorted(found.items())
    }


def figures_over_steps() -> dict[str, Figure]:
    """Return the figures of the files in `over_steps/`."""
    return kinds("launcher.report.over_steps", "FIGURES")


def _over_steps(history: History) -> dict[str, dict[str, list[Point]]]:
    every = {name: figure.read(history) for name, figure in figures_over_steps().items()}
    return {
        name: {line: thinned(finite_points(points), FEW_POINTS) for line, points in lines.items()}
        for name, lines in every.items()
    }


def _commits(records: Iterable[Record], committed: Iterable[int]) -> list[Figures]:
    """Return the commits that were recorded, or that are `committed` in the store.

    A kill may come between a commit and its record. The training waited `stall_seconds` for a commit.
    """
    every: dict[int, Record] = {step: {} for step in committed} | {record["step"]: record for record in records}
    facts = ("bytes", "seconds", "stall_seconds")
    return [{"step": step, **{name: every[step].get(name) for name in facts}} for step in sorted(every)]


def _time(history: History) -> list[Figures]:
    """Return where the time went from the first start to the last record of each, in seconds on the clock.

    The parts add up to the whole: the last part is the rest, such as waits between steps and the end.
    """
    whole = math.fsum(start.lasted for start in history.starts)
    steps = history.steps
    parts = {part: math.fsum(start.seconds.get(part, 0) for start in history.starts) for part in PARTS}
    within = {
        name: steps.sum(name) for name in steps.names if name.endswith("_seconds") and name not in _COUNTED_ELSEWHERE
    }
    parts["steps"] = steps.sum("seconds") - math.fsum(within.values())
    parts |= {f"steps: {name.removesuffix('_seconds')}": seconds for name, seconds in within.items()}
    parts["steps done again after a restart"] = math.fsum(start.lost_seconds for start in history.starts)
    parts["waiting for a commit"] = math.fsum(record.get("stall_seconds", 0) for record in history.others["commit"])
    parts["evaluations"] = steps.sum("evaluate_seconds")
    parts["the rest"] = max(0.0, whole - math.fsum(parts.values()))
    shown = {name: seconds for name, seconds in parts.items() if seconds > 0} if whole else {}
    return [{"name": name, "seconds": seconds, "share": seconds / whole} for name, seconds in shown.items()]


def _memory(history: History) -> list[Figures]:
    """Return the bytes that the plan said, and the most that were measured, if either is known.

    The parts of the plan add up to its sum. The plan treats all ranks alike. Rank 0 is measured, on the host by its
    process alone.
    """
    plan = history.newest("plan")
    device = "one rank" if plan.get("device") == "cpu" else "one GPU"
    rows = (
        (device, "memory_per_gpu", "device_peak_bytes"),
        ("one host, without the processes themselves", "memory_per_host", ""),
        ("rank 0's process on its host", "", "host_peak_bytes"),
    )
    return [found for row in rows if (found := _memory_of(history, plan, *row))]


def _memory_of(history: History, plan: Record, of: str, planned: str, measured: str) -> Figures | None:
    parts = {part: size for part, size in plan.get(planned, {}).items() if isinstance(size, int) and size}
    total, peak = parts.pop("total", None), max(history.steps.values(measured), default=None)
    if total is None and peak is None:
        return None
    return {
        "of": of,
        "planned": total,
        "measured": None if peak is None else int(peak),
        "planned_parts": parts,
    }


def _experts(records: Sequence[Record]) -> list[Figures]:
    """Return the loads of each mixture's layer in the newest steps of training.

    They are the visits to its busiest and its least busy expert over the mean, and how many experts saw no token.
    """
    newest = next((record for record in reversed(records) if record.get("of") == "train"), {})
    every = {
        layer: [load for _, load in finite_points([(0, load) for load in loads])]
        for layer, loads in newest.get("shares", {}).items()
    }
    return [
        {
            "layer": layer,
            "experts": len(loads),
            "busiest": max(loads) / fmean(loads),
            "least": min(loads) / fmean(loads),
            "unused": loads.count(0),
        }
        for layer, loads in every.items()
        if math.fsum(loads) > 0
    ]


def _cost(history: History, price: Any) -> Figures | None:
    """Return the hours of GPUs, if a start had one; else those of ranks on CPUs, which have no price here.

    `lost_hours` are those for steps that had to be done again. The energy is in watt hours: the hours at `watts`, the
    mean power of rank 0's GPU in its steps.
    """
    on_gpu = [start for start in history.starts if start.device and start.device.startswith("cuda")]
    counted = on_gpu or history.starts
    hours = math.fsum(start.rank_hours for start in counted)
    if not hours:
        return None
    lost = math.fsum((start.world_size or 0) * start.lost_seconds / 3600 for start in counted)
    each = price if on_gpu and isinstance(price, int | float) else None
    device = str(on_gpu[-1].device if on_gpu else "CPU")
    model = re.search(r"\((.+)\)$", device)  # cuda:0 (NVIDIA H100)
    watts = _mean_watts(history)
    return {
        "device": model[1] if model else device,
        "hours": hours,
        "lost_hours": lost,
        "price_per_hour": each,
        "price": None if each is None else each * hours,
        "watts": watts,
        "energy": None if watts is None else watts * hours,
    }


def _mean_watts(history: History) -> float | None:
    """Return the mean over the time of the steps that have a reading."""
    seconds = dict(history.steps.points("seconds"))
    read = [(watts, seconds[step]) for step, watts in history.steps.points("device_watts") if seconds.get(step)]
    whole = math.fsum(took for _, took in read)
    return math.fsum(watts * took for watts, took in read) / whole if whole else None


M = TypeVar("M", bound=BaseModel)


def read_evaluations(folder: Store, notes: list[str]) -> list[EvaluationFigures]:
    """Return all evaluations, by step."""
    found = [_parsed(EvaluationFigures, folder.get(key), key, notes) for key in _keys(folder, layout.EVALUATIONS)]
    return sorted(filter(None, found), key=lambda evaluation: evaluation.step)


def other_data(seen: Iterable[tuple[str, int, object]]) -> Iterator[str]:
    """Yield a sentence for each set that has other documents than before.

    `seen` has in order the set's name, the step of its evaluation, and its fingerprint.
    """
    last = dict[str, str]()
    for name, step, data in seen:
        if isinstance(data, str) and last.setdefault(name, data) != data:
            last[name] = data
            yield f"{name} is other data from step {step} on, so its losses do not compare with those before."


def read_samples(folder: Store, notes: list[str]) -> list[SampleFigures]:
    """Return the samples of the first step and of the newest ones, with long texts cut."""
    keys = _keys(folder, layout.SAMPLES)
    found = []
    for key in [*keys[:1], *keys[1:][1 - _MOST_STEPS :]]:
        lines = folder.get(key).splitlines()
        samples = [sample for line in lines if (sample := _parsed(SampleText, line, key, notes))]
        shown = [_cut(sample) for sample in samples[:_MOST_SAMPLES]]
        if shown and (step := layout.step_of_result(key)) is not None:
            found.append(SampleFigures(step=step, samples=shown, left_out=len(samples) - len(shown)))
    return found


def _keys(folder: Store, prefix: str) -> list[str]:
    return sorted(entry.key for entry in folder.list(prefix) if layout.step_of_result(entry.key) is not None)


def _parsed(kind: type[M], data: bytes, key: str, notes: list[str]) -> M | None:
    try:
        return kind.model_validate(json.loads(data))
    except (ValidationError, *NOT_JSON):
        notes.append(f"{key} is damaged, and what it says is left out.")
        return None


def _cut(sample: SampleText) -> SampleText:
    long = {name: f"{text[:_LONGEST]} […]" for name, text in sample if text is not None and len(text) > _LONGEST}
    return sample.model_copy(update=long)
