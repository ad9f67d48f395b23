"""The verb that says whether a run fits, and how long it takes."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, Json, Overrides, emit, say
from launcher.cli.shell import complete_gpu


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="GPU",
            autocompletion=complete_gpu,
            help=(
                "The GPU to plan for: its name (H100, A100-80GB, RTX 4090, ...) or its memory (80GiB, 24GB; a bare"
                " number is "
                "in GiB). Default: that of cluster.slurm.gpu_type, or this machine's."
            ),
        ),
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on one node. Default: all of them.")] = None,
    longest: Annotated[
        bool,
        typer.Option(
            "--longest", help=("Show the longest row that fits, and what each setting that saves memory gains.")
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show whether a run fits, how long it is, how long it takes and what it costs: memory, batch and traffic, without
    a GPU. Exit code 4 if it does not fit.
    """
    from launcher.plan.planning import plan_run
    from launcher.plan.summary import show_plan
    from trainer.config import load_config

    run = load_config(config, overrides or (), say)
    if longest:
        from launcher.plan.longest import find_longest, show_longest

        emit(find_longest(run, gpu, ranks_per_node), as_json, show_longest)
        return
    planned = plan_run(run, gpu, ranks_per_node)
    emit(planned, as_json, lambda found: show_plan(found, run))
    planned.check()


VERBS = {
    "plan": Command(plan, "plan run.yaml --gpu H100", 40, {"--gpu-memory": "--gpu 80GiB"}),
}
