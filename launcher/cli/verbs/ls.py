"""The verb that lists the runs of a store."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import Json, emit


def ls(
    place: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="A folder or bucket with runs; the same as --store.")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", envvar="CAPSTAN_STORE", help="A folder or bucket with runs.")
    ] = "runs",
    as_json: Json = False,
) -> None:
    """List the runs of a store: state, progress, loss, and when each was heard of last."""
    from launcher.view.listing import list_runs
    from trainer.store.store import open_store

    emit(list_runs(open_store(place or store)), as_json, lambda found: found.table())


VERBS = {
    "ls": Command(ls, "ls --store s3://bucket/runs", 70),
}
