"""The `capstan` command: its verbs, in the order that --help shows them.

Nothing heavy is imported here: what a verb needs is imported when the verb runs.
"""

import sys
import traceback
from typing import Annotated

import typer

from launcher.cli.command import commands
from launcher.cli.options import log
from launcher.cli.shell import Verb, Verbs, answer_shells, completion
from trainer.errors import CapstanError

# What each verb's help ends with: one call as it is made most often.
_EXAMPLES = {
    "doctor": "doctor --store s3://bucket/runs",
    "init": "init run.yaml --base /models/Llama-3.1-8B --data data/train.jsonl --gpu 24GB",
    "import": "import axolotl.yml -o run.yaml",
    "plan": "plan run.yaml --gpu H100",
    "train": "train run.yaml train.epochs=0.5",
    "resume": "resume first cluster.workers=1",
    "ls": "ls --store s3://bucket/runs",
    "status": "status first --watch",
    "logs": "logs first --follow",
    "stop": "stop first",
    "evaluate": "evaluate first --best",
    "generate": "generate first --prompts prompts.jsonl",
    "report": "report first second -o both.html",
    "sweep": "sweep sweep.yaml",
    "export": "export first gguf/ --format gguf 'types=[f16,q8_0]' --verify",
    "push": "push first hf://me/first --merge",
    "smoke": "smoke run.yaml --layers 2",
    "completion": "completion bash",
    "data build": "data build run.yaml",
    "data check": "data check run.yaml",
    "data show": "data show run.yaml --row 7",
    "submit ray": "submit ray run.yaml --dry-run",
    "submit slurm": "submit slurm run.yaml --dry-run",
    "config schema": "config schema",
    "checkpoints ls": "checkpoints ls first",
    "checkpoints verify": "checkpoints verify first --best",
    "checkpoints prune": "checkpoints prune first --keep-last 1 --dry-run",
}
answer_shells()
app = typer.Typer(
    cls=Verbs,
    help="Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"capstan {version('capstan-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error."""


_GROUPS = {
    "data": "Compile and inspect training data.",
    "submit": "Hand a run over to a cluster and return.",
    "config": "The configuration's schema.",
    "checkpoints": "A run's committed checkpoints.",
}


def _add_verbs() -> None:
    groups = dict[str, typer.Typer]()
    for name, command in commands():
        group, _, verb = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(cls=Verbs, help=_GROUPS.get(group), no_args_is_help=True)
            app.add_typer(groups[group], name=group)
        groups.get(group, app).command(verb, cls=Verb)(command.function)
    app.command(cls=Verb)(completion)


_add_verbs()


def main() -> None:
    """Entry point: a user's mistake is one sentence and its exit code; `--debug` anywhere shows the traceback too."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except CapstanError as error:
        if debug:
            traceback.print_exc()
        log(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
