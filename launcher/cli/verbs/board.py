"""The verb that shows runs on a page."""

from typing import Annotated

import typer

from launcher.cli.command import Command, log


def board(
    stores: Annotated[
        list[str] | None, typer.Argument(metavar="[STORE ...]", help="Folders or buckets with runs. Default: --store.")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", envvar="CAPSTAN_STORE", help="A folder or bucket with runs.")
    ] = "runs",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The port. Default: the first free one from 8899 on.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Show no buttons, and start nothing.")] = False,
) -> None:
    """Show the runs of stores on a page in the browser, on this machine alone. It prints the address with a token."""
    from importlib.util import find_spec

    from trainer.errors import ConfigError
    from trainer.store.store import open_store

    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise ConfigError("the board needs Starlette and uvicorn: pip install 'capstan-llm[board]'.")
    from launcher.board.server import serve

    serve([open_store(place) for place in stores or [store]], port=port, read_only=read_only, log=log)


VERBS = {"board": Command(board, "board s3://bucket/runs --read-only", 135)}
