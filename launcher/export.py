"""`capstan export`: the adapter, base and adapter merged, or the tuned base; and on request the proof that it is the trained model.

Both run in a process of their own, which may import torch.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from trainer.base.locate import check_mergeable, describe_base
from trainer.checkpoint.listing import committed_steps
from trainer.checkpoint.manifest import readable_manifests
from trainer.config.paths import local_path
from trainer.errors import CapstanError, NothingToResume, StorageError
from trainer.export.proof import Proof
from trainer.export.trained import trained_config
from trainer.store import Store
from trainer.tuning.method import method_of


@dataclass(frozen=True)
class Exported:
    """The export that was written, and with --verify its proof. `merged`: it is a whole model; `tuned_base`: as the base
    itself was tuned, with --merge or without."""

    destination: str
    step: int
    merged: bool
    bytes: int | None = None
    proof: Proof | None = None
    tuned_base: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        what = "base and adapter, merged," if self.merged else "adapter"
        if self.tuned_base:
            what = "the whole model (its base was tuned, so an export and a merge are the same)"
        size = "" if self.bytes is None else f" ({decimal(self.bytes)})"
        proof = "" if self.proof is None else f"; {self.proof.sentence()}"
        return f"{what} of step {self.step} in {self.destination}{size}{proof}"


def export_run(run: Store, destination: str, *, merge: bool, step: int | None, verify: bool, dry_run: bool) -> Exported:
    """`destination` is a folder or an s3://, gs:// or az:// URI; `step` None is the newest whole checkpoint.

    Raises `CapstanError` when there is none, the destination is taken, the base cannot be merged into, or what was written
    does not verify.
    """
    if "://" not in destination:
        destination = str(local_path(destination, "DEST"))
    if dry_run:
        step, tuned_base = _planned(run, step, merge=merge)
        where = f"{destination} (dry run: nothing written)"
        return Exported(where, step, merge or tuned_base, tuned_base=tuned_base)
    options = [*(["--step", str(step)] if step is not None else []), *(["--verify"] if verify else [])]
    with _bar("merging" if merge else "exporting") as watch:
        made = _module(
            "trainer.export.merged" if merge else "trainer.export.adapter", run.uri, destination, *options, watch=watch
        )
    proof = Proof(**made["proof"]) if verify else None
    tuned_base: bool = made["tuned_base"]
    result = Exported(destination, made["step"], merge or tuned_base, made["bytes"], proof, tuned_base)
    if proof is not None and not proof.holds:
        raise CapstanError(f"{result.sentence()}. {proof.verdict}")
    return result


def _planned(run: Store, step: int | None, *, merge: bool) -> tuple[int, bool]:
    """The step that would be exported, and whether the base itself was tuned."""
    steps, damaged = committed_steps(run), list[str]()
    if not steps or step not in (None, *steps):
        which = "" if step is None else f" of step {step}"
        raise NothingToResume(f"{run.uri} has no committed checkpoint{which}.")
    manifest = next(readable_manifests(run, damaged, steps if step is None else [step]), None)
    if manifest is None:
        raise StorageError(damaged[0])
    config = trained_config(run, manifest)
    tuned_base = method_of(config).exports_model
    if merge and not tuned_base:
        check_mergeable(config.model, describe_base(config.model))
    return manifest.step, tuned_base


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, drawn from the first time that it is told of bytes done and bytes in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _module(name: str, *arguments: str, watch: Callable[[int, int], None]) -> dict[str, Any]:
    """Run one of the trainer's modules that print a JSON object; its error and exit code become ours.

    `watch` is told of its lines "progress DONE TOTAL".
    """
    command = [sys.executable, "-m", name, *arguments]
    last = ""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith("progress "):
                        watch(*map(int, line.split()[1:]))
                    last = line
            except BaseException:  # Ctrl-C, or nobody reads the bar any more
                process.kill()
                raise
        errors.seek(0)
        said = errors.read()
    if process.returncode:
        _, expected, sentence = said.rpartition("capstan: ")
        if not expected:
            print(said, file=sys.stderr)
            raise CapstanError(f"{name} ended with exit code {process.returncode}; its output is above.")
        error = CapstanError(sentence.strip())
        error.exit_code = process.returncode
        raise error
    return json.loads(last)
