"""Run in a copy of the packages: commands of `capstan`, a JSON list of their arguments, one after the other. Each is a
process forked from this one, which has imported what a rank imports; it trains in its own process, as torchrun's ranks
do."""

import json
import os
import socket
import sys
from multiprocessing import get_context

import trainer.rank  # noqa: F401  # once for all commands
from launcher.cli.__main__ import main
from trainer.processes.children import end_with_parent

GROUP = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def run(arguments: list[str]) -> None:
    """In the new process: the command in the place of this program."""
    end_with_parent()
    if arguments[0] == "train":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(GROUP, MASTER_PORT=str(probe.getsockname()[1]))
    sys.argv = ["capstan", *arguments]
    main()


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        process = get_context("fork").Process(target=run, args=(given,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
