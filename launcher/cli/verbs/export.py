"""Verbs that take a run's result out of its folder, for other programs."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import BestOption, DryRun, Json, RunName, StepOption, StoreOption, emit, log, open_run
from trainer.errors import ConfigError

FormatOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Options of the format, such as 'types=[f16,q8_0]' for gguf."),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="peft (the adapter, the default), merged, nf4, fp8, gguf or gguf-adapter; see docs/export.md."
    ),
]


def export(
    run: RunName,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new folder, or an s3://, gs:// or az:// URI.")],
    options: FormatOptions = None,
    store: StoreOption = "runs",
    form: FormatOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="The same as --format merged.")] = False,
    step: StepOption = None,
    best: BestOption = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare its predictions, in the program that reads it, with the trained model's. One that is in DEST already is proven as it is.",
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL[#MODEL]",
            help="With --verify: compare what this vLLM serves with the export in transformers + PEFT, instead of the files.",
        ),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a committed checkpoint in the format that another program reads, to a folder or a bucket: as a PEFT adapter, merged
    with its base, in 4 or 8 bits, or for llama.cpp. A run that tuned the base itself (tuning.method: full) is always the whole model."""
    from launcher.export.export import export_run
    from trainer.state.checkpoint.choice import chosen_step

    if server and not verify:
        raise ConfigError("--server is what --verify compares with, so it has no effect alone. Add --verify.")
    folder = open_run(run, store)
    result = export_run(
        folder,
        destination,
        _format(form, "--merge" if merge else None),
        options or (),
        step=chosen_step(folder, step, best=best),
        verify=verify,
        server=server,
        dry_run=dry_run,
    )
    emit(result, as_json, lambda exported: exported.sentence())


def push(
    run: RunName,
    target: Annotated[str, typer.Argument(metavar="hf://OWNER/NAME", help="A repository of the Hub, made if need be.")],
    options: FormatOptions = None,
    store: StoreOption = "runs",
    form: FormatOption = None,
    merged: Annotated[bool, typer.Option("--merge", "--merged", help="The same as --format merged.")] = False,
    step: StepOption = None,
    best: BestOption = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if need be. Default: main.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Export a committed checkpoint and upload it to the Hugging Face Hub, with a model card. The token is that of the environment
    variable HF_TOKEN. A push that was killed goes on when it is called again."""
    from launcher.export.push import push_run
    from trainer.state.checkpoint.choice import chosen_step

    folder = open_run(run, store)
    result = push_run(
        folder,
        target,
        _format(form, "--merged" if merged else None),
        options or (),
        step=chosen_step(folder, step, best=best),
        revision=revision,
        public=public,
        dry_run=dry_run,
        log=log,
    )
    emit(result, as_json, lambda pushed: pushed.sentence())


def _format(given: str | None, merged: str | None) -> str:
    """The format of `--format`, or of the option that stands for merged."""
    if merged and given not in (None, "merged"):
        raise ConfigError(
            f"{merged} is the same as --format merged, and --format {given} was given. Leave out one of them."
        )
    return given or ("merged" if merged else "peft")


VERBS = {
    "export": Command(export, "export first gguf/ --format gguf 'types=[f16,q8_0]' --verify", 150),
    "push": Command(push, "push first hf://me/first --merge", 160),
}
