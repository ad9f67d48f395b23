"""The verb that uploads a run's result to the Hugging Face Hub."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import (
    MERGED,
    BestOption,
    DryRun,
    FormatOption,
    FormatOptions,
    Json,
    RunName,
    StepOption,
    StoreOption,
    TrustRun,
    emit,
    log,
    open_run,
)


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
    from launcher.export.push import push_run
    from launcher.policy.foreign import check_own, exported
    from trainer.run.folder import run_config
    from trainer.state.checkpoint.manifest import chosen_step

    folder = open_run(run, store)
    check_own(folder, run_config(folder), exported, (), trust=trust_run)
    result = push_run(
        folder,
        target,
        form,
        options or (),
        step=chosen_step(folder, step, best=best),
        revision=revision,
        public=public,
        dry_run=dry_run,
        log=log,
    )
    emit(result, as_json, lambda pushed: pushed.sentence())


VERBS = {
    "push": Command(push, "push first hf://me/first --format merged", 160, MERGED),
}
