"""Kills the processes of runs with `cluster.keeper` by SIGKILL: `python -m tests.keeper_kills [KILLS [SEED]]` prints a
line for each kill, and a sentence for all that is not as it should be.

At moments that the seed draws it kills a rank, several ranks, the keeper or the driver, and a rank while it copies an
update to the keeper's memory. A run that has ended for that is resumed as a user would do it. Each run's losses, norms
and checkpoints are in the end those of a run that nobody killed, to the last bit; and no process, no memory and no
folder is left.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil

from tests.kills import CAPSTAN, ENVIRONMENT, MARK, ROOT, left_by
from tests.material import Workshop
from trainer.config import dump_config
from trainer.run.records import generations, read_records
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.scratch import collect_leftovers
from trainer.store.store import Store

RANKS, STEPS, COMMIT_EVERY, KILLS_A_RUN = 3, 120, 20, 15
SECONDS = 900.0
KINDS = {"rank": 6, "ranks": 3, "copy": 5, "keeper": 2, "driver": 2}
"""How often each kind of kill is drawn. `copy` kills a rank while it copies an update."""
_LATEST = 3.0
"""So many seconds after the ranks are there, at most, some of them are killed: while they load, restore or train."""
_COPY_SECONDS = 5.0
_ZERO = bytes(8)


class Killed:
    """A run whose processes are killed, and that is resumed until it has ended well."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self.run, self.mark, self.resumed = workshop.store.sub(name), uuid4().hex, 0
        self.log = workshop.folder / f"{name}.out"
        self._file = workshop.folder / f"{name}.yaml"
        self._temporary = workshop.folder / f"{name}.tmp"
        self._temporary.mkdir()
        config = workshop.config(
            name,
            *(f"cluster.workers={RANKS}", "cluster.keeper=true", "cluster.gpus_per_worker=0"),
            *(f"train.steps={STEPS}", f"checkpoint={{every_steps: {COMMIT_EVERY}, keep_last: 1000}}"),
            *("model.dtype=fp32", "retry.failures=100000", "track.flush_seconds=0.2"),
        )
        self._file.write_text(dump_config(config), encoding="utf-8")
        self._driver = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        words = ["resume", self.run.uri] if committed_steps(self.run) else ["train", str(self._file)]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary), MARK: self.mark}
        with self.log.open("ab") as log:
            return subprocess.Popen([*CAPSTAN, *words], env=environment, stdout=log, stderr=log, start_new_session=True)

    def tend(self) -> bool:
        """Start the run again if its driver has failed or was killed. Returns whether the run has finished."""
        code = self._driver.poll()
        if code:
            self.resumed += 1
            self._driver = self._start()
        return code == 0

    def _processes(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """The keeper, if there is one, and the ranks: forked by it, or started by the driver."""
        keepers, ranks = list[psutil.Process](), list[psutil.Process]()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._driver.pid).children():
                with suppress(psutil.NoSuchProcess):
                    words = child.cmdline()
                    if "launcher.start.keeper" in words:
                        keepers.append(child)
                        ranks += child.children()
                    elif "launcher.start.local_ranks" in words:
                        ranks.append(child)
        return keepers, ranks

    def kill(self, kind: str, draw: random.Random) -> str | None:
        """Kill what `kind` says at a moment that is drawn. Returns what was killed, or None if the run had finished."""
        deadline, wait = time.monotonic() + SECONDS, draw.uniform(0, _LATEST)
        chosen, several = draw.randrange(RANKS), draw.randint(2, RANKS)
        while True:
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-5000:]
            if self.tend():
                return None
            keepers, ranks = self._processes()
            if len(ranks) == RANKS and (keepers or kind not in ("keeper", "copy")):
                break
            if len(ranks) == RANKS:  # there is no keeper any more, until the next driver has one
                kind = "driver"
            time.sleep(0.02)
        time.sleep(wait)
        said = f"{kind}, {wait:.1f} s after the ranks were there"
        victims = {
            "rank": [ranks[chosen]],
            "ranks": draw.sample(ranks, several),
            "copy": [ranks[chosen]],
            "keeper": keepers,
            "driver": [psutil.Process(self._driver.pid)],
        }[kind]
        if kind == "copy":
            said += ", while it copied" if _copies(keepers[0].pid, chosen) else ", which copied nothing"
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if kind == "driver":
            self._driver.wait()
            if left := left_by(self.mark):
                return f"{said}: WRONG: left {left}"
        return said

    def finish(self) -> list[str]:
        """Wait until the run has finished. Returns a sentence for each thing that it has left behind."""
        deadline = time.monotonic() + SECONDS
        while not self.tend():
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-5000:]
            time.sleep(0.1)
        wrong = []
        if left := left_by(self.mark):
            wrong.append(f"the processes {left} are left")
        for folder in self._temporary.iterdir():
            os.utime(folder, (0, 0))
        collect_leftovers(str(self._temporary))
        if folders := sorted(folder.name for folder in self._temporary.iterdir() if folder.name.startswith("capstan-")):
            wrong.append(f"the folders {folders} are left")
        return wrong

    def end(self) -> None:
        self._driver.kill()
        self._driver.wait()


def _copies(keeper: int, rank: int) -> bool:
    """Wait until this rank writes to one of the slots of its updates, whose first word is 0 meanwhile."""
    deadline = time.monotonic() + _COPY_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            for file in Path(f"/proc/{keeper}/fd").iterdir():
                if os.readlink(file).startswith(f"/memfd:rank {rank}: updates "):
                    with file.open("rb", buffering=0) as memory:
                        return _is_written(memory.fileno(), deadline)
        time.sleep(0.02)
    return False


def _is_written(memory: int, deadline: float) -> bool:
    while time.monotonic() < deadline:
        stride = os.fstat(memory).st_size // 2
        words = [os.pread(memory, 8, place) for place in (0, stride)] if stride else []
        if words and words[0] != words[1] and _ZERO in words and _seen(memory, stride):
            return True
    return False


def _seen(memory: int, stride: int) -> bool:
    """Whether both slots were written before: the first update ever leaves the other slot empty for long."""
    return all(any(os.pread(memory, 64, place + 4096)) for place in (0, stride))


def came_of(run: Store) -> tuple[dict[int, tuple[float, float]], dict[int, list[str]]]:
    """Loss and gradient norm of each step, and the hashes of the shards of each checkpoint.

    Raises `AssertionError` if a step was made twice with other values.
    """
    steps = dict[int, tuple[float, float]]()
    for generation in sorted(generations(run)):
        for record in read_records(run, generation):
            if record["kind"] == "step":
                figures = record["loss"], record["grad_norm"]
                assert steps.setdefault(record["step"], figures) == figures, f"step {record['step']} differs"
    shards = {step: [shard.sha256 for shard in read_manifest(run, step).shards] for step in committed_steps(run)}
    return steps, shards


def differences(run: Store, expected: Store) -> list[str]:
    """A sentence for each thing in which a run differs from the expected one."""
    try:
        steps, shards = came_of(run)
    except AssertionError as error:
        return [str(error)]
    expected_steps, expected_shards = came_of(expected)
    wrong = list[str]()
    if lost := sorted(expected_steps.keys() - steps.keys()):
        wrong.append(f"the records of the steps {lost[:20]} are lost")
    if other := [step for step in steps if steps[step] != expected_steps[step]]:
        wrong.append(f"the losses or norms of the steps {sorted(other)[:20]} differ")
    first = max(expected_shards)
    if shards.get(first) != expected_shards[first]:
        wrong.append(f"the checkpoint of step {first} differs")
    common = (step for step in shards.keys() & expected_shards.keys() if shards[step] != expected_shards[step])
    if other := sorted(common):
        wrong.append(f"the checkpoints of the steps {other} differ")
    return wrong


def repeated(run: Store) -> int:
    """The updates that were made again."""
    made = [r["step"] for g in generations(run) for r in read_records(run, g) if r["kind"] == "step"]
    return len(made) - len(set(made))


def main(kills: int, seed: int) -> int:
    print(f"seed {seed}", flush=True)
    draw, wrong, done, began, run = random.Random(seed), 0, 0, time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        undisturbed = Killed(workshop, "undisturbed")
        assert not undisturbed.finish()
        while done < kills:
            run += 1
            killed = Killed(workshop, f"killed-{run}")
            try:
                count = 0
                while done < kills and count < KILLS_A_RUN:
                    said = killed.kill(draw.choices([*KINDS], [*KINDS.values()])[0], draw)
                    if said is None:
                        break
                    wrong += "WRONG" in said
                    count, done = count + 1, done + 1
                    print(f"{done}: {said}", flush=True)
                found: Sequence[str] = [*killed.finish(), *differences(killed.run, undisturbed.run)]
            finally:
                killed.end()
            wrong += len(found)
            came = "; ".join(found) or "losses, norms and checkpoints are those of a run that nobody killed"
            again, minutes = repeated(killed.run), (time.monotonic() - began) / 60
            print(
                f"run {run}: {count} kills, resumed {killed.resumed} times, {again} updates made again:"
                f" {'WRONG: ' if found else ''}{came} ({minutes:.1f} min)",
                flush=True,
            )
            if found:
                print(killed.log.read_text(errors="replace")[-3000:], flush=True)
    print(f"{done} kills in {run} runs: {wrong or 'nothing'} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int((*sys.argv, "", "")[2] or random.randrange(10**6)))
    )
