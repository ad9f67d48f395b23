"""Verbs that hand out what a run has trained: as files for other programs, or on the Hugging Face Hub."""

from typing import Annotated

import typer

from launcher.cli.command import (
    MERGED,
    BestOption,
    Command,
    ConfigFile,
    DryRun,
    FormatOption,
    FormatOptions,
    Json,
    Overrides,
    RunName,
    StepOption,
    StoreOption,
    TrustRun,
    emit,
    log,
    open_run,
)
from trainer.errors import ConfigError
from trainer.store.store import Store

Destination = Annotated[str, typer.Argument(metavar="DEST", help="A new folder, or an s3://, gs:// or az:// URI.")]


def export(
    run: RunName,
    destination: Destination,
    options: FormatOptions = None,
    store: StoreOption = "runs",
    form: FormatOption = "peft",
    step: StepOption = None,
    best: BestOption = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help=(
                "Compare the export's predictions, in the program that reads it, with the trained model's. An export"
                " that is already in DEST is proven without writing."
            ),
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL[#MODEL]",
            help=(
                "With --verify: compare what this vLLM serves with the export in transformers + PEFT, instead of the"
                " files."
            ),
        ),
    ] = None,
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a committed checkpoint in the format of another program, to a folder or a bucket: as a PEFT adapter, merged
    with its base, in 4 or 8 bits, or for llama.cpp. A run that tuned the base itself (tuning.method: full) is always
    exported as the whole model.
    """
    from launcher.export import export_run

    if server and not verify:
        raise ConfigError("--server is what --verify compares with, so it has no effect alone. Add --verify.")
    folder, chosen = _exported_run(run, store, step, best=best, trust=trust_run)
    result = export_run(
        folder,
        destination,
        form,
        options or (),
        step=chosen,
        verify=verify,
        server=server,
        dry_run=dry_run,
    )
    emit(result, as_json, lambda exported: exported.sentence())


def _exported_run(run: str, store: str, step: int | None, *, best: bool, trust: bool) -> tuple[Store, int | None]:
    """Return the folder of a run that the reader may export, and the step that was asked for; None is the newest.

    Raises as `check_own` and `chosen_step`.
    """
    from launcher.policy.foreign import check_own, exported
    from trainer.run.folder import run_config
    from trainer.state.checkpoint.manifest import chosen_step

    folder = open_run(run, store)
    check_own(folder, run_config(folder), exported, (), trust=trust)
    return folder, chosen_step(folder, step, best=best)


def dequantize(
    config: ConfigFile,
    destination: Destination,
    overrides: Overrides = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write the base as a run in 4 or 8 bits computes with it, as an ordinary model, for the servers that sample for
    the run.
    """
    from launcher.export import dequantize as dequantized

    found = dequantized(config, destination, overrides or (), dry_run=dry_run, log=log)
    emit(found, as_json, lambda result: result.sentence())


def push(
    run: RunName,
    target: Annotated[
        str,
        typer.Argument(metavar="hf://OWNER/NAME", help=("A repository of the Hub. It is made if it does not exist.")),
    ],
    options: FormatOptions = None,
    store: StoreOption = "runs",
    form: FormatOption = "peft",
    step: StepOption = None,
    best: BestOption = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, which is made if it does not exist. Default: main.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Export a committed checkpoint and upload it to the Hugging Face Hub, with a model card. The token comes from the
    environment variable HF_TOKEN. Call it again to continue a push that was killed.
    """
    from launcher.export import push_run

    folder, chosen = _exported_run(run, store, step, best=best, trust=trust_run)
    result = push_run(
        folder,
        target,
        form,
        options or (),
        step=chosen,
        revision=revision,
        public=public,
        dry_run=dry_run,
        log=log,
    )
    emit(result, as_json, lambda pushed: pushed.sentence())


VERBS = {
    "export": Command(export, "export first gguf/ --format gguf 'types=[f16,q8_0]' --verify", 150, MERGED),
    "dequantize": Command(dequantize, "dequantize sums.yaml as-quantized/", 155),
    "push": Command(push, "push first hf://me/first --format merged", 160, MERGED),
}
