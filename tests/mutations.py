"""Breaks the product, one line at a time, and tells whether the quick tests notice.

    python -m tests.mutations [WORD ...]                 ten chosen lines, one a package, each with the tests that have to fail
    python -m tests.mutations --random N SEED [STAGES]   N random ones over all packages: tests/random_mutations.py

Each is a change of one line in a copy of the checkout, in which those quick tests run that have to fail. They pass in
the copy before, which is the control. A WORD picks the mutations whose names contain it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.random_mutations import drawn, nearest

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """`old` is in `file` once; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "nf4: every expert is read from the place of the first",
        "trainer/base/partitions/filling.py",
        "start = index * layout.numel\n",
        "start = 0\n",
        ("tests/dist/test_load.py", "-k", "logits and 2-ranks-nf4"),
    ),
    Mutation(
        "order: every epoch has the order of the first",
        "trainer/data/order/order.py",
        "self._key = self.epoch + (self.turn << 32)",
        "self._key = self.turn << 32",
        ("tests/unit/data/test_data_order.py",),
    ),
    Mutation(
        "pack: a bin that a document would fill is passed over",
        "trainer/data/order/pack.py",
        "bisect_left(rooms, length)",
        "bisect_left(rooms, length + 1)",
        ("tests/unit/data/test_data_order.py",),
    ),
    Mutation(
        "loss: a rank divides by its own targets, not by those of all",
        "trainer/train/loop.py",
        "ranks.total(torch.tensor(mine))",
        "torch.tensor(mine)",
        ("tests/dist/test_gradients.py", "-k", "plain_pytorch and fp32"),
    ),
    Mutation(
        "commit: a start that another has overtaken commits",
        "trainer/state/checkpoint/checkpoints.py",
        "if newest > self.generation:",
        "if newest > self.generation + 1:",
        ("tests/dist/test_checkpoint.py", "-k", "overtaken"),
    ),
    Mutation(
        "restore: the last shard that holds a part of an interval is not read",
        "trainer/state/checkpoint/contents.py",
        "range(begin // length, -(-end // length))",
        "range(begin // length, max(1, end // length))",
        ("tests/dist/test_checkpoint.py", "-k", "comes_back and lora-rank-3"),
    ),
    Mutation(
        "merge: the adapter's product is a fiftieth too large",
        "trainer/tuning/lora/method.py",
        "LowRankUpdate(up, down, self.scaling)",
        "LowRankUpdate(up, down, 1.02 * self.scaling)",
        ("tests/dist/test_merge.py", "-k", "what_peft_merges_bit_by_bit and llama"),
    ),
    Mutation(
        "plan: scales are counted with half of their bytes",
        "trainer/plan/sizes.py",
        "else [4 * blocks]",
        "else [2 * blocks]",
        ("tests/unit/plan/test_plan.py", "tests/unit/plan/test_published_memory.py"),
    ),
    Mutation(
        "retry: a failure fewer is forgiven than retry.failures says",
        "launcher/policy/retry.py",
        "if len(failures) > rules.failures:",
        "if len(failures) >= rules.failures:",
        ("tests/unit/launcher/test_retry.py",),
    ),
    Mutation(
        "override: train.epochs leaves the file's train.steps where it is",
        "trainer/config/reading/overrides.py",
        '    _Exclusion("train.epochs", ("train.steps",)),\n',
        "",
        ("tests/unit/config/test_config.py", "tests/unit/repository/test_examples.py"),
    ),
)


def main(words: list[str]) -> int:
    if words[:1] == ["--random"]:
        return of_random(*map(int, words[1:]))
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="capstan-mutations-") as folder:
        copy = copied(Path(folder, "copy"))
        for mutation in chosen:
            began, source = time.monotonic(), (copy / mutation.file).read_text(encoding="utf-8")
            assert source.count(mutation.old) == 1, (
                f"{mutation.old!r} is {source.count(mutation.old)} times in {mutation.file}"
            )
            control = passes(copy, mutation.tests)
            (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
            noticed = not passes(copy, mutation.tests)
            (copy / mutation.file).write_text(source, encoding="utf-8")
            verdict = "its tests fail without it" if not control else "noticed" if noticed else "NOT NOTICED"
            unnoticed += not (control and noticed)
            print(f"{mutation.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return min(unnoticed, 1)


def of_random(count: int, seed: int, stages: int = 3) -> int:
    """Nearest tests first, in up to `stages` stages; prints a line for each change, and how many were noticed."""
    noticed = 0
    with tempfile.TemporaryDirectory(prefix="capstan-mutations-") as folder:
        copy = copied(Path(folder, "copy"))
        for change in drawn(count, seed, copy):
            began, source = time.monotonic(), (copy / change.file).read_text(encoding="utf-8")
            (copy / change.file).write_text(change.applied(source), encoding="utf-8")
            by = next(
                (failed for tests in nearest(change.file, copy)[:stages] if (failed := first_failed(copy, tests))), ""
            )
            (copy / change.file).write_text(source, encoding="utf-8")
            noticed += bool(by)
            print(f"{change.name}: {by or 'NOT NOTICED'} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{noticed} of {count} noticed")
    return 0


def copied(copy: Path) -> Path:
    """The files of the checkout, in `copy`."""
    for file in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    return copy


def passes(copy: Path, tests: tuple[str, ...]) -> bool:
    return not first_failed(copy, tests)


def first_failed(copy: Path, tests: tuple[str, ...]) -> str:
    """The first quick test that fails in `copy`, or what ended pytest; empty where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode in (0, 5):  # 5: all of these are long
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return found[1] if found else f"pytest ended with {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
