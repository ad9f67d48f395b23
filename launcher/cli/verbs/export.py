"""The verb that exports a run's result from its folder, for other programs."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import (
    MERGED,
    BestOption,
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
    from launcher.export.export import export_run
    from launcher.policy.foreign import check_own, exported
    from trainer.run.folder import run_config
    from trainer.state.checkpoint.manifest import chosen_step

    if server and not verify:
        raise ConfigError("--server is what --verify compares with, so it has no effect alone. Add --verify.")
    folder = open_run(run, store)
    check_own(folder, run_config(folder), exported, (), trust=trust_run)
    result = export_run(
        folder,
        destination,
        form,
        options or (),
        step=chosen_step(folder, step, best=best),
        verify=verify,
        server=server,
        dry_run=dry_run,
    )
    emit(result, as_json, lambda exported: exported.sentence())


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
    from launcher.export.export import dequantize as dequantized

    found = dequantized(config, destination, overrides or (), dry_run=dry_run, log=log)
    emit(found, as_json, lambda result: result.sentence())


VERBS = {
    "export": Command(export, "export first gguf/ --format gguf 'types=[f16,q8_0]' --verify", 150, MERGED),
    "dequantize": Command(dequantize, "dequantize sums.yaml as-quantized/", 155),
}
