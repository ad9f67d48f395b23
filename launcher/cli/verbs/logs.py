"""The verb that shows logs."""

import json
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import Json, RunName, StoreOption, open_run
from trainer.errors import ConfigError


def logs(
    run: RunName,
    store: StoreOption = "runs",
    rank: Annotated[int, typer.Option(help="The rank whose log is shown.")] = 0,
    generation: Annotated[int | None, typer.Option(help="The number of the start. Default: the newest.")] = None,
    driver: Annotated[bool, typer.Option("--driver", help="Show the driver's log instead of a rank's.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, as the log grows.")] = False,
    job: Annotated[
        bool, typer.Option("--job", help="Show the Slurm job's own output instead: Ray and the driver.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a rank's log, or the driver's."""
    from launcher.cluster.slurm.queue import job_output
    from launcher.view.logs import follow_log, read_driver_log, read_log
    from launcher.view.terminal import in_lines, put

    folder = open_run(run, store)
    if follow and (as_json or driver or job):
        raise ConfigError("--follow shows a rank's log as it grows. Leave out --json, --driver and --job, or --follow.")
    if follow:
        for text in follow_log(folder, rank, generation):
            put(in_lines(text), end="")
        return
    text = job_output(folder) if job else read_driver_log(folder) if driver else read_log(folder, rank, generation)
    if as_json:
        owner = {"job": True} if job else {"driver": True} if driver else {"rank": rank, "generation": generation}
        print(json.dumps({"run": folder.uri, **owner, "text": text}))
    else:
        put(in_lines(text), end="")


VERBS = {
    "logs": Command(logs, "logs first --follow", 90),
}
