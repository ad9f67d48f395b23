"""The process that `capstan export` starts. It exports, may import torch, and reports its progress in lines.

A line is "progress", bytes done, bytes in all; or "say" and a sentence. The last line is one JSON object: the step, the
bytes written, whether the base itself was tuned, what the format found out, and with --verify the proof.
"""

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal

from trainer.base.find.check import check_whole
from trainer.errors import CapstanError, StorageError
from trainer.export.card import cut_sentence, with_proof
from trainer.export.destination import (
    CARD,
    DestinationTaken,
    ExportProgress,
    Written,
    nothing_left_by_a_refusal,
    print_bytes,
    print_sentence,
)
from trainer.export.figures import AnyProof, KeptProof, ServedProof
from trainer.export.format import ExportFormat, find_format
from trainer.export.proof.sides import get_ready, getting_ready
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.processes.helper_thread import patiently
from trainer.state.checkpoint.manifest import newest_commit, read_doubt, whole_checkpoint
from trainer.store.store import Store, open_store
from trainer.tuning.method import method_of

_SAY_SECONDS = 30.0


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write and prove the export.

    An export that is at the destination already is proven as it is, so a proof can be made later.
    """
    run, destination = open_store(arguments.run), open_store(arguments.destination, setting="DEST")
    form = find_format(arguments.format, arguments.options)
    progress = ExportProgress(print_bytes, print_sentence)
    newest = newest_commit(run) if arguments.step is None else None
    try:
        with nothing_left_by_a_refusal(destination):
            written = form.write(run, destination, arguments.step, progress)
    except DestinationTaken:
        if not arguments.verify:
            raise
        written = Written(whole_checkpoint(run, arguments.step))
        progress.say(
            f"--verify: {destination.uri} is there already, so it is compared with the checkpoint"
            f" of step {written.manifest.step}"
        )
    step = written.manifest.step
    if newest is not None and step < newest.step:
        progress.say(f"the checkpoint of step {newest.step} is damaged, so that of step {step} is exported")
    result: dict[str, Any] = {"step": step, "bytes": sum(entry.size for entry in destination.list())}
    result["tuned_base"] = method_of(trained_config(run, written.manifest)).exports_model
    cut = cut_sentence(trained_config(run, written.manifest))
    doubt = read_doubt(run, written.manifest)
    doubts = [f"the checkpoint of step {step} is in doubt: {doubt}"] if doubt else []
    result |= {"facts": written.facts, "remarks": [*doubts, *([cut] if cut else []), *written.remarks]}
    if arguments.verify:
        base = resolve_trained_base(run, trained_config(run, written.manifest).model, written.manifest)
        size = decimal(sum(header.size for header in base.headers.values()))
        progress.say(f"--verify: reads every byte of the base's files, {size}")
        with getting_ready():
            get_ready("trainer.export.proof.models")
            progress.say(f"--verify: the base's files: {check_whole(base, run, progress.written)}")
            progress.say(
                "--verify: compares the export's predictions with the trained model's, both of which are loaded for"
                " that"
            )
            _say_in_card(destination, None)
            with patiently("--verify", progress.say, _SAY_SECONDS):
                proof = _prove(arguments, form, run, step, destination)
            if proof.holds and not isinstance(proof, ServedProof):
                _say_in_card(destination, proof.sentence())
            result["proof"] = asdict(proof)
    return result


def _say_in_card(destination: Store, proof: str | None) -> None:
    """Record in the export's card that it was proven, and how; None records that it was not.

    If the card cannot be written, it keeps its words.
    """
    with suppress(StorageError):
        card = destination.get(CARD)
        if (changed := with_proof(card, proof)) != card:
            destination.put(CARD, changed)


def _prove(arguments: argparse.Namespace, form: ExportFormat, run: Store, step: int, destination: Store) -> AnyProof:
    if arguments.server is None:
        from trainer.export.proof.verify import check_again

        again = check_again(form, run, step, destination)
        proof = form.prove(run, step, destination)
        return proof.told(again.facts) if isinstance(proof, KeptProof) else proof
    from trainer.export.proof.verify import prove_served

    return prove_served(run, step, destination, arguments.server, whole_model=form.whole_model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("destination")
    parser.add_argument("options", nargs="*")
    parser.add_argument("--format", required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--server")
    try:
        result = _export(parser.parse_args())
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
