"""Everything that needs a GPU, on one bare card in ten minutes; each figure is kept the moment it is there.

    python benchmarks/gpu.py [--to FOLDER] [--only kernels ...] [--layers 32] [--length 8192]
    python benchmarks/gpu.py --pretend             the same from start to end on a CPU, tiny: it shows that nothing is misspelt
    python benchmarks/gpu.py --carry FOLDER        the packages that a machine without internet needs beside torch
    python benchmarks/gpu.py --from FOLDER ...     with those, on that machine

Figures are lines of JSON in FOLDER/figures.jsonl, beside traces and snapshots. The parts come in the order of what they
tell: one that fails or takes too long does not take the others along, and what it has measured until then is kept. Each
is a process of its own with a limit; the seconds that it leaves are the next one's. Nothing but torch, this repository
and the packages of --carry is needed: where Liger or TRL are not there, a figure says so. It ends with exit code 1
where a figure is not as it must be, or a part came to no end.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from card import carry  # noqa: E402  # a module beside this file
from card.figures import Figure  # noqa: E402

TOTAL = 480.0
"""Seconds for all parts: ten minutes of a card, less what it takes to get it and to fetch the results."""


_SLOWER = 15.0
"""A CPU that other work shares may take so much longer over what is tiny."""


class Part(NamedTuple):
    """`does` completes a sentence that begins with "It". `where` is a generator of figures in the folder `card`."""

    does: str
    seconds: float
    where: str


PARTS = {
    "kernels": Part(
        "compares our kernels, attention's and Liger's with plain ones: values, gradients, share of the bandwidth",
        40,
        "kernels.kernels",
    ),
    "tiny": Part("trains tiny runs of every kind: losses and gradients beside those of a CPU", 70, "tiny.tiny"),
    "big": Part("trains a random base of 8B's shape: tokens/s, MFU, the device's peak beside the plan", 120, "big.big"),
    "rooflines": Part("times the seven products of a layer, attention and copies by themselves", 20, "big.rooflines"),
    "ways": Part("times products in FP8, and LoRA's by other ways than the one that is taken", 15, "ways.ways"),
    "trace": Part("traces a step, and counts how often the host waits in it", 30, "big.trace"),
    "life": Part("kills a run, resumes it, exports it, and verifies that whole and a layer at a time", 70, "life.life"),
    "longest": Part("trains the longest row that the plan has for 24 GiB, on no more", 70, "big.longest"),
    "trl": Part("trains the same base by TRL", 45, "big.trl"),
}


def _work(name: str, given: argparse.Namespace, pipe: Any) -> None:
    os.setsid()  # a group of its own, which ends with it
    module, function = PARTS[name].where.split(".")
    for figure in getattr(import_module(f"card.{module}"), function)(given):
        pipe.send(figure)
    pipe.send(None)


def limit(name: str, took: Mapping[str, float], slower: float = 1.0) -> float:
    """The seconds that a part may take: its own, and those that the parts before it have left, by what they `took`; on
    a machine that is so many times `slower`."""
    return slower * sum(PARTS[part].seconds for part in [*took, name]) - sum(took.values())


def run_part(name: str, given: argparse.Namespace, seconds: float) -> Iterator[Figure]:
    """The figures of a part as they come, and last how long it took or why it came to no end."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, given, theirs))  # no daemon: it starts processes itself
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        while mine.poll(max(0.0, seconds - (time.monotonic() - started))):
            figure = mine.recv()
            if figure is None:
                yield Figure(f"{name}: seconds", f"{time.monotonic() - started:.0f}")
                return
            yield figure
        yield Figure(name, "no end", f"within {seconds:.0f} s", False)
    except EOFError:
        yield Figure(name, "failed, see above", "figures", False)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


class Kept:
    """Figures in a file of lines: each is on the disk before the next one is measured."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "figures.jsonl").open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _record(given: argparse.Namespace) -> None:
    """Without a limit: nobody pays for a card."""
    from card.tiny import tiny

    for figure in tiny(given):
        print(f"{figure.what}: {figure.found}")


def _measure(given: argparse.Namespace) -> bool:
    """Run the parts and keep what they find; whether all of it is as it must be."""
    kept, all_right, took = Kept(given.to), True, dict[str, float]()
    kept.write(part="machine", **_machine(given))
    for name in given.only:
        began = time.monotonic()
        for figure in run_part(name, given, limit(name, took, _SLOWER if given.pretend else 1.0)):
            all_right &= figure.right is not False
            kept.write(part=name, **figure._asdict())
            mark = {None: "", True: "ok", False: "WRONG"}[figure.right]
            wanted = f" ({figure.wanted})" if figure.wanted else ""
            print(f"{name:10} {figure.what}: {figure.found}{wanted} {mark}".rstrip(), flush=True)
        took[name] = time.monotonic() - began
    return all_right


def _machine(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    card = "none" if given.pretend else torch.cuda.get_device_name(0)
    return {"card": card, "torch": torch.__version__, "python": sys.version.split()[0], "at": time.strftime("%F %T")}


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--to", type=Path, default=Path("gpu-figures"), help="the folder for what is measured")
    parser.add_argument("--layers", type=int, default=32, help="of the large base")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row of it")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, tiny")
    parser.add_argument(
        "--record", action="store_true", help="write the losses and gradients of this CPU that cards are held to"
    )
    parser.add_argument(
        "--carry", type=Path, metavar="FOLDER", help="write the packages that are needed beside torch there"
    )
    parser.add_argument("--python", default="3.12", help="the Python that they are for")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="take them from there")
    return parser.parse_args()


def main() -> None:
    given = _given()
    if given.carry:
        carry.write(given.carry, given.python)
        return
    if given.source:
        carry.use(given.source)
    from trainer.processes.devices import local_gpus, stay_on_cpu

    if given.pretend or given.record:
        given.pretend, given.layers, given.length = True, 2, 128
        stay_on_cpu()
    elif not local_gpus():
        print("There is no GPU on this machine. On one that has one, this would, within 10 minutes:")
        for name in given.only:
            print(f"- {name}, at most {PARTS[name].seconds:.0f} s: {PARTS[name].does}")
        return
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one card
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given.to = given.to.absolute()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as scratch:
        given.scratch = Path(scratch)  # what a part makes for others
        if given.record:
            _record(given)
            return
        right = _measure(given)
    raise SystemExit(int(not right))


if __name__ == "__main__":
    main()
