"""The verb that measures how training has changed a run's base."""

import json
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import (
    BestOption,
    DryRun,
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
from launcher.view.terminal import put


def evaluate(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    step: StepOption = None,
    best: BestOption = False,
    base: Annotated[
        bool, typer.Option("--base", help="Measure the base alone, also for a run without a checkpoint.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help=(
                "Ask a vLLM that serves the run's export instead of computing here. The model's name follows a #;"
                " default: the run's. --step or --best says which checkpoint it serves."
            ),
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=PATH", help="One more set, read as the training data.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", help="A task of lm-evaluation-harness, a YAML file or a folder of them. May be repeated."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask tasks with the chat template.")] = False,
    bias: Annotated[
        str | None, typer.Option("--bias", metavar="FILE", help="Pairs of sentences, as eval.bias.")
    ] = None,
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Measure a checkpoint and its base: loss and perplexity on sets, tasks, pairs of sentences. The result is kept in
    the run's folder.
    """
    from launcher.evaluate.evaluating import evaluate_run, settings
    from launcher.start.group import is_silent_rank

    folder = open_run(run, store)
    given = settings(overrides or (), sets or (), tasks or (), bias)
    how = {"step": step, "best": best, "base": base, "chat": chat, "server": server, "trust": trust_run}
    found = evaluate_run(folder, given, **how, dry_run=dry_run, log=log)
    if isinstance(found, str):
        put(json.dumps({"run": folder.uri, "dry_run": True, "what": found}) if as_json else found)
    elif not is_silent_rank():
        emit(found, as_json, lambda evaluated: evaluated.tables())


VERBS = {
    "evaluate": Command(evaluate, "evaluate first --best", 110),
}
