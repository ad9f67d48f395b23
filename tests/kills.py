"""Kills commands with SIGKILL: `python -m tests.kills [KILLS [SEED [NAME ...]]]` prints a line for each of what it left
and what came of it.

Every process that a command starts, or has started, inherits a variable of its environment, by which it is found. Each
command is then given again, as a user would, and its result has to be that of one that nobody killed, to the last bit.
"""

import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import yaml

from tests.hub import Hub, serve_hub
from tests.material import Workshop, commit, make_data
from trainer.config import dump_config
from trainer.processes import guard
from trainer.run.records import generations, read_records
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.scratch import collect_leftovers
from trainer.store.store import Store

ROOT = Path(__file__).parents[1]
SECONDS = 5.0
"""So long after its command a process may still be there."""
MARK = "CAPSTAN_TEST_KILLED"
CAPSTAN = [sys.executable, "-m", "launcher.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CAPSTAN_TRUST_RUN": "1",  # its finished run is one that nobody has started
}
LATEST = {
    "build": 4.0,
    "train on 1 rank": 15.0,
    "plan": 6.0,
    "check": 4.0,
    "doctor": 6.0,
    "export": 8.0,
    "gguf": 8.0,
    "push": 8.0,
    "evaluate": 15.0,
    "evaluate on 2 ranks": 20.0,
    "evaluate on 3 ranks": 20.0,
    "teach on 2 ranks": 20.0,
}
"""Seconds after which a kill of such a command still meets it at work; of others half a minute."""


@dataclass(frozen=True)
class Task:
    """A command, the one that goes on with it after a kill, the folder of the run that it makes, and what has come of
    it.
    """

    command: list[str]
    again: list[str]
    result: Callable[[str], object]
    """Of what `again` has printed on stdout."""
    run: Store | None = None

    def steps(self) -> int:
        """The steps that the run has recorded so far."""
        found = [] if self.run is None else [r for g in generations(self.run) for r in read_records(self.run, g)]
        return max((record["step"] for record in found if record["kind"] == "step"), default=0)


class Killed:
    """Runs over small material in `folder`, each command with names of its own. `hub` takes what is pushed."""

    def __init__(self, folder: Path, hub: Hub | None = None, steps: int = 2000) -> None:
        self.folder, self.workshop, self.steps = folder, Workshop(folder), steps
        self.run, self.hub = self.workshop.store.sub("done"), hub or Hub()
        self._temporary = Path(tempfile.mkdtemp(prefix="k-"))  # short: Ray's sockets lie in it
        atexit.register(shutil.rmtree, self._temporary, ignore_errors=True)
        other = make_data(folder / "eval.jsonl", seed=9)
        config = self.workshop.config("done", f"data.eval=[{{path: {other}}}]")
        commit(self.run, config, dataset=self.workshop.prepare(config).train)

    def task(self, name: str) -> Task:
        own, out = f"run{uuid4().hex[:6]}", str(self.folder / uuid4().hex[:6])
        run = self.workshop.store.sub(own)
        match name.split():
            case ["build"]:
                command = [*CAPSTAN, "data", "build", self._config(own, run={"store": out})]
                return Task(command, command, lambda _: files_of(Path(out, "data")))
            case ["train", _, number, *_]:
                command = [*CAPSTAN, "train", self._config(own, cluster={"workers": int(number)}, train=self._train)]
                return Task(command, [*CAPSTAN, "resume", run.uri], lambda _: trained(run), run)
            case ["torchrun"]:
                command = [*TORCHRUN, *CAPSTAN, "train", self._config(own, train=self._train)]
                again = [*TORCHRUN, *CAPSTAN, "resume", run.uri]
                return Task(command, again, lambda _: trained(run), run)
            case ["evaluate", *rest]:
                workers = f"cluster.workers={rest[1] if rest else 1}"
                command = [*CAPSTAN, "evaluate", self.run.uri, workers, "--json"]
                return Task(command, command, lambda out: json.loads(out)["sets"])
            case ["teach", _, number, *_]:
                objective = {"name": "distil", "teacher": str(self.workshop.base), "top_k": 8}
                command = [*CAPSTAN, "teach", self._config(own, objective=objective, cluster={"workers": int(number)})]
                return Task(command, command, lambda _: None)
            case ["generate"]:
                command = [*CAPSTAN, "generate", self.run.uri, "--base"]
                return Task(command, command, lambda _: None)
            case ["export"]:
                command = [*CAPSTAN, "export", self.run.uri, out, "--format", "merged", "--verify"]
                return Task(command, command, lambda _: files_of(Path(out)))
            case ["gguf"]:
                command = [*CAPSTAN, "export", self.run.uri, out, "--format", "gguf-adapter"]
                return Task(command, command, lambda _: files_of(Path(out)))
            case ["push"]:
                command = [*CAPSTAN, "push", self.run.uri, f"hf://me/{own}", "--format", "merged", "--revision", own]
                return Task(command, command, lambda _: self._pushed(own))
            case ["sweep"]:
                rates = {"settings": {"optim.lr": {"grid": [1e-3, 1e-4]}}}
                config = self._config(own, sweep=rates, train=self._train, cluster={"workers": 1})
                trials = [self.workshop.store.sub(f"{own}-{number}") for number in (1, 2)]
                command = [*CAPSTAN, "sweep", config]
                return Task(command, [*CAPSTAN, "resume", run.uri], lambda _: [*map(trained, trials)], trials[1])
            case ["plan" | "check" as verb]:
                command = [*CAPSTAN, *(["data", "check"] if verb == "check" else ["plan"]), self._config(own)]
                return Task(command, command, lambda _: None)
            case ["smoke" | "doctor" as verb]:
                return Task([*CAPSTAN, verb], [*CAPSTAN, verb], lambda _: None)
        raise AssertionError(name)

    def _pushed(self, branch: str) -> dict[str, str]:
        """The hash of each file of a branch, whose repository has the same name: the card says it."""
        files = self.hub.files[branch].items()
        return digests({name: content.replace(branch.encode(), b"its-own") for name, content in files})

    @property
    def _train(self) -> dict[str, int]:
        return {"steps": self.steps}

    def _config(self, name: str, **sections: Mapping[str, object]) -> str:
        tree = yaml.safe_load(dump_config(self.workshop.config(name, "cluster.gpus_per_worker=0")))
        for section, changes in sections.items():
            tree[section] = {**tree.get(section, {}), **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    def left_by(
        self, task: Task, after: float, reached: Callable[[], bool] = lambda: False
    ) -> tuple[dict[int, str], bool]:
        """The processes, with their commands, that are there `SECONDS` after the command was killed, which it was
        `after` seconds or as soon as what is `reached`; and whether it was still at work."""
        mark = uuid4().hex
        given = {**self._environment(task), MARK: mark}
        silent = subprocess.DEVNULL
        with subprocess.Popen(
            task.command, env=given, cwd=self.folder, stdin=subprocess.PIPE, stdout=silent, stderr=silent
        ) as process:
            ends = time.monotonic() + after
            while time.monotonic() < ends and process.poll() is None and not reached():
                time.sleep(0.1)
            was_at_work = process.poll() is None
            process.kill()
        return left_by(mark), was_at_work

    def result_of(self, task: Task, command: list[str]) -> object:
        """What has come of the task by a `command` that nobody kills, or the last line that it said where it fails."""
        done = subprocess.run(
            command,
            env=self._environment(task),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            # A slow command says before it how long it has taken so far.
            return f"rc {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
        return task.result(done.stdout)

    def _environment(self, task: Task) -> dict[str, str]:
        own = {"TMPDIR": str(self._temporary), "PYTHONPATH": str(ROOT)}
        return {**ENVIRONMENT, **own, **(self.hub.environment if "push" in task.command else {})}

    def folders_left(self) -> list[str]:
        """The temporary folders that killed commands have left and that a later one would not remove when it is old."""
        ours = [path for path in self._temporary.iterdir() if path.name.startswith("capstan-")]
        for path in ours:
            os.utime(path, (0, 0))
        collect_leftovers(str(self._temporary))
        return [path.name for path in ours if path.exists()]


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}


def files_of(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    return digests({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()})


def trained(run: Store) -> object:
    """The loss of each step, and the shards of the last checkpoint."""
    losses = dict[int, float]()
    for generation in generations(run):
        losses |= {r["step"]: r["loss"] for r in read_records(run, generation) if r["kind"] == "step"}
    step = committed_steps(run)[0]
    return step, losses, [shard.sha256 for shard in read_manifest(run, step).shards]


def left_by(mark: str) -> dict[int, str]:
    """The processes, with their commands, that are still there after some seconds; they are killed then."""
    # Where other work has the processors, what ends takes longer to end.
    deadline = time.monotonic() + SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    while (left := family(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for number in left:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return left


def family(mark: str) -> dict[int, str]:
    """The processes, with their commands, that have this mark from whoever started them first."""
    found = dict[int, str]()
    for number in guard.started_with(f"{MARK}={mark}".encode()):
        with suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return {number: command for number, command in found.items() if command}  # a zombie has none


NAMES = (
    "build",
    "train on 1 rank",
    "train on 2 ranks",
    "train on 3 ranks",
    "torchrun",
    "evaluate",
    "evaluate on 2 ranks",
    "generate",
    "export",
    "gguf",
    "push",
    "sweep",
    "smoke",
)
MORE = ("evaluate on 3 ranks", "teach on 2 ranks", "plan", "check", "doctor")
"""Commands whose ranks start as those of others do: they are killed at random alone."""


_AGAIN = ("build", "train", "evaluate", "generate", "export", "gguf", "push", "sweep", "torchrun")
"""Commands that are given again after a kill. All but `generate` have a result to compare."""


class RandomKills:
    """Kills at moments that a seed draws, and what comes of each command that is given again after it."""

    def __init__(self, killed: Killed, seed: int) -> None:
        self._killed, self._draw = killed, random.Random(seed)
        self._expected = dict[str, object]()

    def kill(self, name: str) -> tuple[str, bool]:
        """Kill the command once. Returns a sentence about what came of it, and whether all was well."""
        task, latest = self._killed.task(name), self._draw.choice([self._draw.randint(1, 40), 10**6])
        by_time = latest == 10**6 or task.run is None
        after = self._draw.uniform(0.3, LATEST.get(name, 30.0)) if by_time else 120.0
        began = time.monotonic()
        left, was_at_work = self._killed.left_by(task, after, lambda: task.steps() >= latest)
        what = "killed" if was_at_work else "had ended, looked at"
        said = f"{name}, {what} after {time.monotonic() - began:.1f} s: {left or 'nothing left'}"
        if name.split()[0] not in _AGAIN:
            return said, not left
        if name not in self._expected:
            alone = self._killed.task(name)
            self._expected[name] = self._killed.result_of(alone, alone.command)
        found, expected = self._killed.result_of(task, task.again), self._expected[name]
        if isinstance(found, str):  # it was killed before it had made a run
            found = self._killed.result_of(task, task.command)
        came = "again the same" if found == expected else f"OTHER: {found} INSTEAD OF {expected}"
        folders = self._killed.folders_left()
        return (
            f"{said}; {came}{f'; folders left: {folders}' if folders else ''}",
            not left and not folders and found == expected,
        )


def main(kills: int, seed: int, names: Sequence[str]) -> int:
    wrong = 0
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, serve_hub() as hub:
        at_random = RandomKills(Killed(Path(folder), hub, steps=60), seed)
        for number in range(kills):
            said, well = at_random.kill(names[number % len(names)])
            wrong += not well
            print(said, flush=True)
    return wrong


if __name__ == "__main__":
    count, seed, *names = [*sys.argv[1:], *("40", str(random.randrange(10**6)))[len(sys.argv) - 1 :]]
    sys.exit(main(int(count), int(seed), names or (*NAMES, *MORE)))
