"""Reading pictures, videos and sounds while a run trains, side by side, and what `plan` says of them.

    python benchmarks/files.py [--rows 48] [--folder DIR]

A picture is a JPEG of 1240 x 1754 pixels. A video is H.264 of 640 x 360 pixels with 192 frames in 8 seconds, of which
the processor samples 16. A sound is a FLAC file of 10 seconds. Their contents are those with which `plan` measures
(`Modality.example`), and each row has one file. The processors are those of the tests' small Qwen3-VL and Qwen2-Audio
(which hears 30 seconds here), so that the figures are those of reading, checking and decoding.

"compiled" are the files that one process compiles in a second, for which it decodes each of them once. "read" are those
of which one process makes the class's inputs, and "read, by plan" is what `capstan plan` expects of it. A second is one
of a core: the time of the process, so that other work on the machine counts little.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the bases of the tests

from tests.hearing import hearing_base
from tests.seeing import seeing_base
from trainer.base.find.media.sound import Length
from trainer.base.find.media.still import Size
from trainer.base.find.media.video import Clip
from trainer.base.find.processor import read_processor
from trainer.base.find.tokenizer import read_tokenizer
from trainer.base.load.sight_cost import sight_costs
from trainer.config import parse_config
from trainer.data.compile.compile import compile_chapters
from trainer.data.compile.inputs import find
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import open_dataset
from trainer.data.order.pictures import PictureReader
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.store.store import open_store

KEY = "f" * 20


def _sees(folder: Path) -> Path:
    return seeing_base(folder, "qwen3_vl")


def _hears(folder: Path) -> Path:
    hearing_base(folder)
    for path in folder.glob("*processor*.json"):
        said = json.loads(path.read_text())
        part = said.get("feature_extractor", said)
        if "chunk_length" in part:
            part |= {"chunk_length": 30, "n_samples": 480_000, "nb_max_frames": 3000}
        path.write_text(json.dumps(said))
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], Any, str]] = {
    "picture": (_sees, Size(1754, 1240), "jpg"),
    "video": (_sees, Clip(360, 640, 16), "mp4"),
    "sound": (_hears, Length(160_000, 16_000), "flac"),
}


def measured(folder: Path, kind: str, rows: int) -> tuple[float, ...]:
    """Bytes of a file, files a second that are compiled, files a second that are read, and those that `plan` expects."""
    write_base, shape, ending = KINDS[kind]
    base, modality = write_base(folder / "base"), shape.modality
    content = modality.example(shape, read_processor(base, "it").made)
    for number in range(rows):  # bytes behind the end make each file another one
        (folder / f"{number}.{ending}").write_bytes(content + b"\0" * (ending == "jpg") * number)
    asked = [
        [{"type": modality.kind, "path": f"{number}.{ending}"}, {"type": "text", "text": "?"}] for number in range(rows)
    ]
    talks = [[{"role": "user", "content": one}, {"role": "assistant", "content": "Yes."}] for one in asked]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    tree = {
        "model": {"base": str(base)},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "format": "pictures", "sequence_length": 8192},
        "train": {"steps": 1},
        "run": {"name": "r", "store": str(folder / "store")},
    }
    config = parse_config(json.dumps(tree))
    files, part, data = find(config)["train"]
    store = open_store(config.run.store)
    compiling = 0.0
    for key in ("e" * 20, KEY):  # the base is tried once
        begun = time.process_time()
        for _ in compile_chapters(data, files, read_tokenizer(base, "base"), store, key, part):
            pass
        compiling = time.process_time() - begun
    found = open_dataset(store, KEY)
    reader = PictureReader(found.store, read_processor(base, "it"))
    stream = Stream(whole(found), Order((1.0,), 8192, packing=False, seed=0), 4, 1, 0, 1, pictures=reader)
    coming = stream.read_from(Position(), steps=rows // 4)
    begun = time.process_time()
    for _ in range(rows // 4):
        for row in next(coming):
            assert row.input.seen
    reading = time.process_time() - begun
    (cost,) = sight_costs(str(base), "it", [modality.numbers(shape)], None, modality.number)
    return len(content), rows / compiling, rows / reading, 1 / cost["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table = Table(
        "file",
        "kB",
        "compiled a second",
        "read a second",
        "by plan",
        title=f"one core of {platform.processor() or platform.machine()}",
    )
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            size, *figures = measured(Path(name), kind, given.rows)
        table.add_row(kind, f"{size / 1e3:.0f}", *(f"{figure:.1f}" for figure in figures))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
