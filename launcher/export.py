"""`capstan export` and `capstan push`: a run's checkpoint in one of the formats of trainer/export/formats/.

On request `export` also proves that the export is the trained model. Both run in a process of their own, which may
import torch.

`push` uploads the export to the Hugging Face Hub in one commit. The files are exported to a temporary folder, byte for
byte the same at every call. The Hub keeps large files by their hashes, and makes them visible with the commit at the
end. After a push that was killed the repository is unchanged, and the same command uploads only what is not there yet.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal
from rich.progress import DownloadColumn, TransferSpeedColumn

from launcher.start.check import about_type, anchored
from launcher.view.console import progress_bars
from launcher.view.terminal import put
from trainer.base.find.locate import describe_base
from trainer.base.find.small_files import TOKENIZER_PATTERNS
from trainer.config import dump_config, load_config
from trainer.config.paths import local_path
from trainer.errors import CapstanError, ConfigError, StorageError, Unreachable
from trainer.export.card import PLACE, cut_sentence
from trainer.export.destination import CARD, BytesWritten, ExportProgress, check_destination
from trainer.export.figures import AnyProof, proof_of
from trainer.export.format import find_format
from trainer.export.refusals import refused_exports
from trainer.export.trained import trained_config
from trainer.plan.resolve import typed
from trainer.processes import children
from trainer.run.folder import name_of
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store
from trainer.store.tokenizer_files import NAMED_TEMPLATES
from trainer.tuning.method import method_of

_MUCH = 10**9
_LINE_SECONDS = 10.0
_TARGET = re.compile(r"hf://([\w.-]+/[\w.-]+)")
_TOKEN = "HF_TOKEN"
_TOKENS_PAGE = "huggingface.co/settings/tokens"
# A program would load these files of an earlier export beside the new ones, or in place of them.
_LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "adapter_config.json",
    "adapter_model.bin",
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
)


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
    proof: AnyProof | None = None
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
        form.check_here()
        for sentence in refused_exports(config, {format: options}).values():
            raise ConfigError(sentence)
        remarks = [] if verify else _about_taken(destination)
        tuned_base = method_of(config).exports_model
        merged, cut = form.whole_model or tuned_base, cut_sentence(config)
        return Exported(
            destination,
            format,
            manifest.step,
            merged,
            tuned_base=tuned_base,
            remarks=[*([cut] if cut else []), *remarks],
        )
    chosen = [*(["--step", str(step)] if step is not None else []), *(["--verify"] if verify else [])]
    chosen += ["--server", server] if server else []
    with bar("merging" if form.whole_model else "exporting") as progress:
        made = run_module(
            "trainer.export", folder.uri, destination, *options, "--format", format, *chosen, progress=progress
        )
    proof = proof_of(made.pop("proof")) if verify else None
    merged = form.whole_model or made["tuned_base"]
    result = Exported(destination, format, merged=merged, proof=proof, **made)
    if proof is not None and not proof.holds:
        raise CapstanError(f"{result.headline}. {proof.verdict}")
    return result


def _about_taken(destination: str) -> list[str]:
    """Return a sentence if a dry run's destination holds an export. Raises `ConfigError` if it holds other things."""
    there = open_store(destination, setting="DEST")
    check_destination(there, "*")
    return [f"{there.uri} holds an export: a half one would be continued, a whole one refused"] if there.list() else []


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
    base = describe_base(config.model)
    stored, asked = base.stored, config
    config = typed(config.decided(base.in_4_bits), base)
    if config.model.dtype == "fp32" and (sentence := about_type(asked, config)):
        log(sentence)
    if stored.unmergeable or not (config.quant.held.quantizes or stored.decoded):
        raise ConfigError(
            f"quant.type: {config.quant.type} computes with the weights that the files of {config.model.base} have."
            " Serve this base itself."
        )
    if config.model.layers:
        raise ConfigError("model.layers: only the whole base can be written. Leave it out.")
    found = Dequantized(config.model.base, config.quant.held.in_words, destination)
    if dry_run:
        _about_taken(destination)
        return found
    with bar("writing") as progress:
        made = run_module("trainer.export.write.as_quantized", dump_config(config), destination, progress=progress)
    return Dequantized(found.base, found.quantized, destination, made["bytes"])


@dataclass(frozen=True)
class Pushed:
    """The commit that was made. A dry run has none, and `private` is what the repository would be made as."""

    repository: str
    revision: str
    private: bool
    exported: Exported
    url: str | None = None
    commit: str | None = None

    def sentence(self) -> str:
        what = self.exported.what
        if self.url is None:
            kind = "private" if self.private else "public"
            said = (
                f"would push {what} of step {self.exported.step} to hf://{self.repository}@{self.revision}, a {kind}"
                " repository unless it is there already (dry run: nothing was sent)"
            )
        else:
            said = f"{what} of step {self.exported.step} is in {self.url}"
        return "\n".join([said, *self.exported.remarks])


def push_run(
    folder: Store,
    target: str,
    format: str,
    options: Sequence[str] = (),
    *,
    step: int | None,
    revision: str | None,
    public: bool,
    dry_run: bool,
    log: Callable[[str], None],
) -> Pushed:
    """Export `step`, or the newest whole checkpoint, and upload it to `target`, hf://owner/name.

    Raises:
        ConfigError: `target` is no repository, or a public one without `public`; there is no token in HF_TOKEN, or it
            may not write there; or `export_run` raises it.
        StorageError: the Hub cannot be reached, or fails.
    """
    repository, branch = _repository(target), revision or constants.DEFAULT_REVISION
    with scratch_folder("push") as scratch:
        directory = Path(scratch, "export")
        if dry_run:
            exported = export_run(folder, str(directory), format, options, step=step, dry_run=True)
            return Pushed(repository, branch, not public, exported)
        api = HfApi(token=_token())
        with _explained(repository):  # before the export, which may take an hour
            api.create_repo(repository, private=not public, exist_ok=True)
            private = bool(api.repo_info(repository).private)
            if not (private or public):
                raise ConfigError(
                    f"hf://{repository} is there already, and everybody can read it. Give --public if that is meant, or"
                    " name another repository."
                )
            if revision:
                api.create_branch(repository, branch=revision, exist_ok=True)
        exported = export_run(folder, str(directory), format, options, step=step)
        card = (directory / CARD).read_text(encoding="utf-8")
        (directory / CARD).write_text(card.replace(f'"{PLACE}"', f'"{repository}"'), encoding="utf-8")
        size = sum(path.stat().st_size for path in directory.iterdir())
        log(
            f"uploading {size / 1e6:,.1f} MB to hf://{repository}; a push that is killed goes on when it is called"
            " again"
        )
        with _explained(repository):
            message = f"Step {exported.step} of the run {name_of(folder)}, by Capstan"
            # `upload_folder` is not used: it makes several commits if hf_xet is installed.
            operations = _operations(directory, api.list_repo_files(repository, revision=revision))
            made = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return Pushed(repository, branch, private, exported, f"{api.endpoint}/{repository}", made.oid)


def _repository(target: str) -> str:
    match = _TARGET.fullmatch(target.rstrip("/"))
    if match is None:
        raise ConfigError(f"{target!r} is no repository of the Hub. Give hf://OWNER/NAME; --revision names a branch.")
    try:
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise ConfigError(f"{target!r} is no repository of the Hub: {error} Give another name.") from error
    return match[1]


def _operations(folder: Path, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Replace those files of an earlier export that are `there` with the files of `folder`. All other files stay."""
    new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [name for name in there if name not in new and any(fnmatch(name, pattern) for pattern in _LOADED)]
    return [
        *(CommitOperationAdd(name, path) for name, path in new.items()),
        *(CommitOperationDelete(name) for name in old if "/" not in name or name.startswith(f"{NAMED_TEMPLATES}/")),
    ]


def _token() -> str:
    token = os.environ.get(_TOKEN, "").strip()
    if not token:
        raise ConfigError(
            f"capstan push needs a token that may write to the Hub, in {_TOKEN}. Make one: {_TOKENS_PAGE}."
        )
    return token


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Wrap calls of the Hub, whose errors become ours."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError("capstan push needs the network, and HF_HUB_OFFLINE is set. Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        if status in (401, 403, 404):
            raise ConfigError(
                f"the token in {_TOKEN} may not write to hf://{repository}: {said} ({status}). Give it that right, or"
                f" take another: {_TOKENS_PAGE}."
            ) from error
        raise StorageError(f"the Hub did not take hf://{repository}: {said} ({status}). Call push again.") from error
    except (OSError, httpx2.TransportError) as error:
        raise Unreachable(f"the Hub cannot be reached: {error}. Call push again; what is uploaded stays.") from error
    except ValueError as error:  # the Hub's rules do not allow the model card's metadata
        raise ConfigError(f"hf://{repository} does not take the export: {error}.") from error
