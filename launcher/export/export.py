"""`capstan export`: it writes a run's checkpoint in one of the formats of trainer/export/formats/.

On request it also proves that the export is the trained model. Both run in a process of their own, which may import
torch.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.progress import DownloadColumn, TransferSpeedColumn

from launcher.start.check import anchored
from launcher.view.console import progress_bars
from launcher.view.terminal import put
from trainer.base.find.locate import describe_base
from trainer.config import dump_config, load_config
from trainer.config.paths import local_path
from trainer.errors import CapstanError, ConfigError
from trainer.export.figures import Proof, ServedProof
from trainer.export.format import BytesWritten, ExportProgress, find_format
from trainer.export.trained import trained_config
from trainer.processes import children
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.store.store import Store
from trainer.tuning.method import method_of

_MUCH = 10**9
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Exported:
    """The export that was written, and with --verify its proof.

    `merged`: it is a whole model. `tuned_base`: the base itself was tuned, whatever the format. `facts` and `remarks`
    are what the format found out.
    """

    destination: str
    format: str
    step: int
    merged: bool
    bytes: int | None = None
    proof: Proof | ServedProof | None = None
    tuned_base: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dry_run": self.bytes is None}

    @property
    def what(self) -> str:
        """The export in a few words, to begin a sentence."""
        form = find_format(self.format)
        return form.what_if_tuned if self.tuned_base else form.what

    @property
    def headline(self) -> str:
        """The sentence that says what was written where, with its proof."""
        size = " (dry run: nothing written)" if self.bytes is None else f" ({decimal(self.bytes)})"
        proof = "" if self.proof is None else f"; {self.proof.sentence()}"
        return f"{self.what} of step {self.step} in {self.destination}{size}{proof}"

    def sentence(self) -> str:
        return "\n".join([self.headline, *self.remarks])


def export_run(
    folder: Store,
    destination: str,
    format: str,
    options: Sequence[str] = (),
    *,
    step: int | None = None,
    verify: bool = False,
    server: str | None = None,
    dry_run: bool = False,
) -> Exported:
    """Export a run's checkpoint.

    `destination` is a folder or an s3://, gs:// or az:// URI. `options` are those of the format, as `key=value`. `step`
    None is the newest whole checkpoint. `server` is the URL of a server that has the export; then its answers are
    compared instead of the files.

    Raises `CapstanError` when there is no checkpoint, the destination is taken, the run has no such export, or the
    written export does not verify.
    """
    if "://" not in destination:
        destination = str(local_path(destination, "DEST"))
    form = find_format(format, options)
    if dry_run:
        manifest = whole_checkpoint(folder, step, by_manifest=True)
        config = trained_config(folder, manifest)
        form.check(config, describe_base(config.model))
        tuned_base = method_of(config).exports_model
        return Exported(destination, format, manifest.step, form.whole_model or tuned_base, tuned_base=tuned_base)
    chosen = [*(["--step", str(step)] if step is not None else []), *(["--verify"] if verify else [])]
    chosen += ["--server", server] if server else []
    with bar("merging" if form.whole_model else "exporting") as progress:
        made = run_module(
            "trainer.export", folder.uri, destination, *options, "--format", format, *chosen, progress=progress
        )
    proof = (ServedProof if server else Proof)(**made.pop("proof")) if verify else None
    merged = form.whole_model or made["tuned_base"]
    result = Exported(destination, format, merged=merged, proof=proof, **made)
    if proof is not None and not proof.holds:
        raise CapstanError(f"{result.headline}. {proof.verdict}")
    return result


@contextmanager
def bar(title: str) -> Iterator[ExportProgress]:
    """Show a bar on the terminal, or a line of the log now and then.

    It begins with the first report of bytes done and bytes in all. Sentences go above it.
    """
    with progress_bars(DownloadColumn(), TransferSpeedColumn(), transient=True) as progress:
        task = progress.add_task(title, visible=False)
        console = progress.console

        def say(sentence: str) -> None:
            console.print(sentence, soft_wrap=True)

        def draw(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield ExportProgress(draw if console.is_terminal else lines(title, say), say)


def lines(title: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> BytesWritten:
    """Report the progress of long work: at once if there is much to do, and then now and then."""
    next_line, of = 0.0, 0

    def line(done: int, total: int) -> None:
        nonlocal next_line, of
        if total != of:  # the next part of the work
            of, next_line = total, clock() + (0.0 if total >= _MUCH else _LINE_SECONDS)
        if clock() >= next_line and done < total:
            say(f"{title}: {decimal(done)} of {decimal(total)}")
            next_line = clock() + _LINE_SECONDS

    return line


def run_module(name: str, *arguments: str, progress: ExportProgress) -> dict[str, Any]:
    """Run one of the trainer's modules that print a JSON object. Its error and exit code become ours.

    `progress` is told of its lines "progress DONE TOTAL" and "say SENTENCE".
    """
    command = [sys.executable, "-m", name, *arguments]
    last = ""
    with tempfile.TemporaryFile("w+") as errors:
        with children.start(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith("progress "):
                        progress.written(*map(int, line.split()[1:]))
                    elif line.startswith("say "):
                        progress.say(line.removeprefix("say ").rstrip())
                    last = line
            except BaseException:  # Ctrl-C, or nobody reads the bar any more
                process.kill()
                raise
        errors.seek(0)
        said = errors.read()
    if process.returncode:
        _, expected, sentence = said.rpartition("capstan: ")
        if not expected:
            put(said, file=sys.stderr)
            raise CapstanError(f"{name} ended with exit code {process.returncode}; its output is above.")
        error = CapstanError(sentence.strip())
        error.exit_code = process.returncode
        raise error
    return json.loads(last)


@dataclass(frozen=True)
class Dequantized:
    """The base that was written to `destination`. A dry run has no `bytes`."""

    base: str
    quantized: str
    destination: str
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dry_run": self.bytes is None}

    def sentence(self) -> str:
        size = " (dry run: nothing written)" if self.bytes is None else f" ({decimal(self.bytes)})"
        return f"{self.base}, {self.quantized} as the run computes with it, in {self.destination}{size}"


def dequantize(
    path: Path, destination: str, overrides: Sequence[str], *, dry_run: bool, log: Callable[[str], None]
) -> Dequantized:
    """Write the base of the run that `path` describes to a folder or an s3://, gs:// or az:// URI.

    Raises `ConfigError` if the run computes with the base as its files have it, or the destination is taken.
    """
    config = anchored(load_config(path, overrides, log))
    if "://" not in destination:
        destination = str(local_path(destination, "DEST"))
    stored = describe_base(config.model).stored
    if stored.unmergeable or not (config.quant.held.quantizes or stored.decoded):
        raise ConfigError(
            f"quant.type: {config.quant.type} computes with {config.model.base} as its files have it. Serve that"
            " itself."
        )
    if config.model.layers:
        raise ConfigError("model.layers: only the whole base can be written. Leave it out.")
    found = Dequantized(config.model.base, config.quant.held.in_words, destination)
    if dry_run:
        return found
    with bar("writing") as progress:
        made = run_module("trainer.export.write.as_quantized", dump_config(config), destination, progress=progress)
    return Dequantized(found.base, found.quantized, destination, made["bytes"])
