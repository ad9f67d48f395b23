"""The `capstan` command: its verbs, in the order that --help shows them.

Nothing heavy is imported here: what a verb needs is imported when the verb runs.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from launcher.cli.arrive import import_, init
from launcher.cli.before import config_schema, data_build, data_check, data_show, doctor, plan, smoke
from launcher.cli.leave import export, push
from launcher.cli.options import log
from launcher.cli.report import report
from launcher.cli.results import evaluate, generate
from launcher.cli.run import checkpoints_ls, checkpoints_prune, checkpoints_verify, logs, ls, status, stop
from launcher.cli.shell import Verb, Verbs, answer_shells, completion
from launcher.cli.start import resume, submit_ray, submit_slurm, train
from launcher.cli.sweep import sweep
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


def _add_group(name: str, help: str, **verbs: Callable[..., None]) -> None:
    group = typer.Typer(cls=Verbs, help=help, no_args_is_help=True)
    for verb, function in verbs.items():
        group.command(verb, cls=Verb, epilog=_example(f"{name} {verb}"))(function)
    app.add_typer(group, name=name)


def _example(name: str) -> str:
    return f"Example: capstan {_EXAMPLES[name]}".replace("[", r"\[")


for _verb in (doctor, init):
    app.command(cls=Verb, epilog=_example(_verb.__name__))(_verb)
app.command("import", cls=Verb, epilog=_example("import"))(import_)
for _verb in (
    plan,
    train,
    resume,
    ls,
    status,
    logs,
    stop,
    evaluate,
    generate,
    report,
    sweep,
    export,
    push,
    smoke,
    completion,
):
    app.command(cls=Verb, epilog=_example(_verb.__name__))(_verb)
_add_group("data", "Compile and inspect training data.", build=data_build, check=data_check, show=data_show)
_add_group("submit", "Hand a run over to a cluster and return.", ray=submit_ray, slurm=submit_slurm)
_add_group("config", "The configuration's schema.", schema=config_schema)
_add_group(
    "checkpoints",
    "A run's committed checkpoints.",
    ls=checkpoints_ls,
    verify=checkpoints_verify,
    prune=checkpoints_prune,
)


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
