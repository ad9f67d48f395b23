"""Verbs that use what a run has trained: measure it beside its base, and ask it."""

import json
from typing import Annotated

import typer

from launcher.cli.command import (
    BestOption,
    Command,
    DryRun,
    Json,
    Overrides,
    RunName,
    StepOption,
    StoreOption,
    TrustRun,
    emit,
    finite,
    log,
    open_run,
    say,
)
from launcher.view.terminal import put
from trainer.errors import ConfigError


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


def generate(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help=(
                "JSON or JSONL with prompt or messages, or a text file with one prompt a line; - is standard input, as"
                " such a text. Default: a chat on a terminal, otherwise standard input, or eval.prompts if that is"
                " empty."
            ),
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="A picture that each prompt, or a chat, begins with; it may be given several times.",
        ),
    ] = None,
    videos: Annotated[list[str] | None, typer.Option("--video", metavar="FILE", help="The same for a video.")] = None,
    sounds: Annotated[list[str] | None, typer.Option("--audio", metavar="FILE", help="The same for a sound.")] = None,
    step: StepOption = None,
    best: BestOption = False,
    base: Annotated[bool, typer.Option("--base", help="Show the base's answer, too, before the checkpoint's.")] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help=(
                "Ask a vLLM that serves the run's export instead of computing here. The model's name follows a #;"
                " default: the run's."
            ),
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help=("Temperature. 0 takes the most likely token, 1 draws from the model's probabilities."),
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            callback=finite,
            help=("Draw only from the likeliest tokens that together have this probability."),
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the draws.")] = 0,
    trust_run: TrustRun = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with a checkpoint, with the chat template of the training: prompts of a file, of a pipe, or of a
    chat.
    """
    from launcher.evaluate.answering import answer_prompts
    from launcher.policy.foreign import check_own, generated
    from launcher.start.group import is_silent_rank
    from trainer.evaluate.program import Ask
    from trainer.run.folder import run_config
    from trainer.state.checkpoint.manifest import chosen_step

    folder, settings = open_run(run, store), tuple(overrides or ())
    config = run_config(folder, settings, say=say)
    check_own(folder, config, generated, (*settings, *(["eval.prompts"] if prompts else [])), trust=trust_run)
    chosen = chosen_step(folder, step, best=best)
    if top_p < 1 and not temperature:
        raise ConfigError(
            "--top-p: has no effect without --temperature, as the most likely token is taken. Set --temperature, too."
        )
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    ask = Ask("generate", folder.uri, chosen, settings, base, sampling=sampling, server=server or "")
    files = {"image": images or (), "video": videos or (), "audio": sounds or ()}
    result = answer_prompts(ask, folder, config, prompts, files, log, shows=not as_json)
    if as_json and not is_silent_rank():
        print(json.dumps({"run": folder.uri, **result}))


VERBS = {
    "evaluate": Command(evaluate, "evaluate first --best", 110),
    "generate": Command(generate, "generate first --prompts prompts.jsonl", 120),
}
