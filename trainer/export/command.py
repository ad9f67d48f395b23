"""The command line of a module that exports, which `capstan export` runs in a process of its own."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trainer.checkpoint.manifest import CheckpointManifest
from trainer.errors import CapstanError
from trainer.export.proof import Proof
from trainer.export.trained import trained_config
from trainer.store import Store, open_store
from trainer.tuning.method import method_of

# Told how many bytes are written, and how many there are in all.
BytesWritten = Callable[[int, int], None]


def print_progress() -> BytesWritten:
    """Lines for whoever started this process: "progress", bytes done, bytes in all."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or done == total:
            last = time.monotonic()
            print("progress", done, total, flush=True)

    return report


def command(
    export: Callable[[Store, Store, int | None], CheckpointManifest], prove: Callable[[Store, int, Store], Proof]
) -> None:
    """Prints one JSON object: the step, the bytes written, whether the base itself was tuned, and with --verify the proof."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("destination")
    parser.add_argument("--step", type=int)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    try:
        run, destination = open_store(arguments.run), open_store(arguments.destination, setting="DEST")
        manifest = export(run, destination, arguments.step)
        result: dict[str, Any] = {"step": manifest.step, "bytes": sum(entry.size for entry in destination.list())}
        result["tuned_base"] = method_of(trained_config(run, manifest)).exports_model
        if arguments.verify:
            result["proof"] = asdict(prove(run, manifest.step, destination))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))
