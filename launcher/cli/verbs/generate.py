"""The verb that asks a run's model."""

import json
import sys
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import (
    BestOption,
    Json,
    Overrides,
    RunName,
    StepOption,
    StoreOption,
    TrustRun,
    finite,
    log,
    open_run,
    say,
)
from trainer.errors import ConfigError


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
                "JSONL with prompt or messages, or a text file with one prompt a line; - is standard input. Default: a"
                " chat on a terminal, otherwise standard input, or eval.prompts if that is empty."
            ),
        ),
    ] = None,
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
    from launcher.evaluate.answering import Screen, generate_answers, given_prompts, in_turns
    from launcher.policy.foreign import check_own, generated
    from launcher.start.group import is_rank, is_silent_rank
    from trainer.evaluate.program import Ask
    from trainer.run.folder import run_config
    from trainer.state.checkpoint.manifest import chosen_step

    folder = open_run(run, store)
    config = run_config(folder, overrides or (), say=say)
    named = (*(overrides or ()), *(["eval.prompts"] if prompts else []))
    check_own(folder, config, generated, named, trust=trust_run)
    chosen = chosen_step(folder, step, best=best)
    if top_p < 1 and not temperature:
        raise ConfigError(
            "--top-p: has no effect without --temperature, as the most likely token is taken. Set that too."
        )
    chats = prompts is None and not (as_json or is_rank()) and sys.stdin.isatty()
    given = [] if chats or is_silent_rank() else given_prompts(config, prompts)
    if not (chats or given or is_silent_rank()):
        raise ConfigError(
            "there is no prompt: give --prompts FILE, set eval.prompts, or write lines to standard input."
        )
    turns = in_turns(given, config)
    screen = Screen(sys.stdout, both=base, streams=chats or all(len(turn) == 1 for turn in turns))
    asked = screen.conversation() if chats else turns if as_json else screen.shown(turns)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    settings = tuple(overrides or ())
    ask = Ask("generate", folder.uri, chosen, settings, base, sampling=sampling, server=server or "")
    result = generate_answers(ask, folder, config, asked, log, None if as_json else screen)
    if as_json and not is_silent_rank():
        print(json.dumps({"run": folder.uri, **result}))


VERBS = {
    "generate": Command(generate, "generate first --prompts prompts.jsonl", 120),
}
