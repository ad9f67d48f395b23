"""The command line of a module that exports, which `capstan export` runs in a process of its own."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trainer.checkpoint.manifest import CheckpointManifest
from trainer.errors import CapstanError
from trainer.export.proof import Proof
from trainer.store import Store, open_store


def command(
    export: Callable[[Store, Store, int | None], CheckpointManifest], prove: Callable[[Store, int, Store], Proof]
) -> None:
    """Prints one JSON object: the step, the bytes written, and with --verify the proof."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("destination")
    parser.add_argument("--step", type=int)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    try:
        run, destination = open_store(arguments.run), open_store(arguments.destination, setting="DEST")
        step = export(run, destination, arguments.step).step
        result: dict[str, Any] = {"step": step, "bytes": sum(entry.size for entry in destination.list())}
        if arguments.verify:
            result["proof"] = asdict(prove(run, step, destination))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))
