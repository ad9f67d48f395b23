"""Breaks the product, one line at a time, and tells whether the quick tests notice.

    python -m tests.mutations [WORD ...]                 twenty chosen lines over all packages, each with the tests that have to fail
    python -m tests.mutations --random N SEED [STAGES]   N random ones over all packages: tests/random_mutations.py

Each is a change of one line in a copy of the checkout, in which those quick tests run that have to fail. They pass in
the copy before, which is the control. A WORD picks the mutations whose names contain it.
"""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

import pytest

from tests.random_mutations import Change, drawn, nearest

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "torch numpy pyarrow pydantic transformers.models.llama.modeling_llama peft safetensors.torch hypothesis".split()
)
QUICKLY = ("-x", "-q", "-m", "not long", "-p", "no:cacheprovider", "--durations=0", "--timeout=300")


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
        "start = index * self._module.numel\n",
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
        "trainer/data/order/order.py",
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
        "trainer/state/checkpoint/shard.py",
        "range(begin // length, -(-end // length))",
        "range(begin // length, max(1, end // length))",
        ("tests/dist/test_checkpoint.py", "-k", "comes_back and lora-rank-3"),
    ),
    Mutation(
        "merge: the adapter's product is a fiftieth too large",
        "trainer/tuning/lora/__init__.py",
        'updates[f"{path}.weight"] = LowRankUpdate(up, down, self.scaling)',
        'updates[f"{path}.weight"] = LowRankUpdate(up, down, 1.02 * self.scaling)',
        ("tests/dist/test_merge.py", "-k", "what_peft_merges_bit_by_bit and llama"),
    ),
    Mutation(
        "plan: scales are counted with half of their bytes",
        "trainer/model/held/formats/blocks.py",
        '"absmax": 4 * blocks}',
        '"absmax": 2 * blocks}',
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
        "trainer/config/reading.py",
        '    _Exclusion("train.epochs", ("train.steps",)),\n',
        "",
        ("tests/unit/config/test_config.py", "tests/unit/repository/test_examples.py"),
    ),
    Mutation(
        "awq: a zero is read as one more, as GPTQ's is",
        "trainer/base/stored/gptq.py",
        "along_outputs=True, more=0",
        "along_outputs=True, more=1",
        ("tests/unit/base/test_stored_codes.py",),
    ),
    Mutation(
        "labelled: the mismatched answer is one to the same prompt",
        "trainer/data/render/answers.py",
        "if prompts[index] != prompts[place]",
        "if prompts[index] == prompts[place]",
        ("tests/unit/data/test_data_labelled.py",),
    ),
    Mutation(
        "stop: one evaluation more than stop_when.no_better has to be no better",
        "trainer/train/stop_rules.py",
        "since < self._rules.no_better",
        "since <= self._rules.no_better",
        ("tests/unit/train/test_stop_rules.py",),
    ),
    Mutation(
        "lion: the momentum decays by the first beta",
        "trainer/state/optimizer/lion.py",
        "momentum.mul_(decay).add_(gradient, alpha=1 - decay)",
        "momentum.mul_(mixed).add_(gradient, alpha=1 - mixed)",
        ("tests/unit/state/test_optimizer.py",),
    ),
    Mutation(
        "dpo: ipo wants twice its margin",
        "trainer/tuning/objective/pairs/dpo.py",
        "margin - 1 / (2 * given.beta)",
        "margin - 1 / given.beta",
        ("tests/dist/test_preference.py", "-k", "formulas and ipo"),
    ),
    Mutation(
        "head: logits without labels are not capped",
        "trainer/model/head.py",
        "return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)",
        "return logits",
        ("tests/unit/tuning/test_loss.py", "tests/unit/model/test_distillation.py"),
    ),
    Mutation(
        "gguf adapter: the rows of queries and keys keep their order",
        "trainer/export/gguf/lora.py",
        "up[part.rows].float()",
        "up.float()",
        ("tests/unit/export/test_gguf_lora.py",),
    ),
    Mutation(
        "interval: it promises half of what it says",
        "trainer/evaluate/measured.py",
        "_OUTSIDE * (len(ratios) + 1)",
        "2 * _OUTSIDE * (len(ratios) + 1)",
        ("tests/unit/evaluate/test_intervals.py",),
    ),
    Mutation(
        "squeue: a job that completes is said to run",
        "launcher/cluster/slurm/queue.py",
        "return states[-1] if states",
        "return states[0] if states",
        ("tests/unit/launcher/test_slurm_queue.py",),
    ),
    Mutation(
        "status: the last step that two starts took is on the curve twice",
        "launcher/view/status.py",
        "if point[0] < below]",
        "if point[0] <= below]",
        ("tests/unit/launcher/test_status.py",),
    ),
)


def main(words: list[str]) -> int:
    for library in LIBRARIES:
        import_module(library)
    gc.freeze()
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
            control = not first_failed(copy, mutation.tests)
            (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
            noticed = bool(first_failed(copy, mutation.tests))
            (copy / mutation.file).write_text(source, encoding="utf-8")
            verdict = "its tests fail without it" if not control else "noticed" if noticed else "NOT NOTICED"
            unnoticed += not (control and noticed)
            print(f"{mutation.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return min(unnoticed, 1)


def of_random(count: int, seed: int, stages: int = 4, at_once: int = 2) -> int:
    """Nearest tests first, in up to `stages` stages; prints a line for each change, and how many were noticed.

    `at_once` changes are tried beside each other, each in a copy of its own.
    """
    with tempfile.TemporaryDirectory(prefix="capstan-mutations-") as folder:
        copies = [copied(Path(folder, str(number))) for number in range(at_once)]
        changes = drawn(count, seed, copies[0])
        with ThreadPoolExecutor(at_once) as pool:
            free = SimpleQueue[Path]()
            for copy in copies:
                free.put(copy)
            verdicts = list(pool.map(lambda change: _try(change, free, stages), changes))
    print(f"{verdicts.count(True)} of {count} noticed, {verdicts.count(None)} undecided")
    return 0


def _try(change: Change, free: "SimpleQueue[Path]", stages: int) -> bool | None:
    """Whether `change` was noticed; None if that is undecided."""
    copy, began = free.get(), time.monotonic()
    try:
        noticed, verdict = _verdict(change, copy, nearest(change.file, change.line, copy)[:stages])
    finally:
        free.put(copy)
    print(f"{change.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return noticed


def _verdict(change: Change, copy: Path, stages: list[tuple[str, ...]]) -> tuple[bool | None, str]:
    """Whether the tests of `stages` notice `change` (None if that is undecided), and in words by which.

    A test notices it if it fails with the change, fails again when it runs alone, and passes without the change. A test
    that does not is set aside, and the others go on. A stage that ends without a test's name, or hangs, is compared as a
    whole.
    """
    file = copy / change.file
    source = file.read_text(encoding="utf-8")
    aside: list[str] = []
    try:
        for tests in filter(None, stages):
            file.write_text(change.applied(source), encoding="utf-8")
            while failed := first_failed(copy, (*tests, *(f"--deselect={name}" for name in aside))):
                name = failed.partition("[")[0]
                why = re.findall(r"^E +(.+)", copy.with_name(f"{copy.name}.out").read_text(errors="replace"), re.M)[:2]
                alone = (name,) if name.startswith(tests) else tests
                again = first_failed(copy, alone)
                file.write_text(source, encoding="utf-8")
                without = first_failed(copy, alone)
                file.write_text(change.applied(source), encoding="utf-8")
                if again and not without:
                    return True, failed
                said = f"{failed} {'fails without it, too' if without else 'passes when it runs again'} {why}"
                if "::" not in name or alone == tests:
                    return None, f"UNDECIDED: {said}"
                print(f"({change.name}: {said})", flush=True)
                aside.append(name)
    finally:
        file.write_text(source, encoding="utf-8")
    return False, "NOT NOTICED"


def first_failed(copy: Path, tests: tuple[str, ...]) -> str:
    """The first quick test that fails in `copy`, or what ended pytest; empty where all pass.

    They run in a process that is forked from this one, after it has imported the libraries, which takes longer than most
    tests. A process that has written nothing for half an hour hangs: each test's own limit is below that.
    """
    output = copy.with_name(f"{copy.name}.out")
    output.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        _become_pytest(copy, output, tests)
    written, since = 0, time.monotonic()
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < since + 1800:
        time.sleep(0.05)
        if output.exists() and (size := output.stat().st_size) > written:
            written, since = size, time.monotonic()
    with suppress(ProcessLookupError):  # and what tests have left, such as the server that forks their ranks
        os.killpg(process, signal.SIGKILL)
    if ended == (0, 0):
        os.waitpid(process, 0)
        return "no word for half an hour"
    return _failure(os.waitstatus_to_exitcode(ended[1]), output.read_text(encoding="utf-8", errors="replace"))


def _become_pytest(copy: Path, output: Path, tests: tuple[str, ...]) -> NoReturn:
    """In the forked process: pytest on the tests of `copy`, whose packages are imported and not those of this checkout."""
    code = 1
    try:
        os.setsid()
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(written, stream)
        # Tests that replace the file behind a stream's number expect Python's own streams to go there.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "trainer", "launcher")]:
            del sys.modules[name]
        os.chdir(copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        code = int(pytest.main([*QUICKLY, *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)  # nothing of the process that was forked ends here, and nobody waits for what tests have left


def copied(copy: Path) -> Path:
    """The files of the checkout, in `copy`."""
    for file in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    return copy


def _failure(code: int, output: str) -> str:
    if code in (0, 5):  # 5: all of these are long
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    return found[1] if found else f"pytest ended with {code}: {output.strip().splitlines()[-1:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
