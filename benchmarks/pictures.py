"""Compiling rows with page scans, and reading the pictures while a run trains.

    python benchmarks/pictures.py [--pages 10000] [--step 0.05] [--folder DIR]

A page is a JPEG of 1240 x 1754 pixels. Each row has one, and its bytes differ from those of all others. The processor
is that of a small Qwen3-VL of the tests, which makes pictures of at most 1,024 pixels, so the figures are those of
reading, checking and decoding. The peak of memory is that of the compiling process, from the kernel (VmHWM). Waits are
those of a loop that spends `--step` seconds on each step of 4 pages.
"""

import argparse
import io
import json
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the base of the tests

from tests.seeing import seeing_base
from trainer.base.find.processor import read_processor
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import parse_config
from trainer.data.compile.compile import compile_chapters
from trainer.data.compile.inputs import find
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import open_dataset
from trainer.data.order.pictures import PictureReader
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.run.layout import dataset
from trainer.store.store import open_store

KEY = "f" * 20


def make_pages(folder: Path, pages: int) -> Path:
    draw, made = np.random.default_rng(0), list[bytes]()
    for _ in range(8):
        page = np.full((1754, 1240), 255, np.uint8)
        for line in range(60, 1700, 30):
            page[line : line + 12, 80:1160] = np.where(draw.random((3, 270)) < 0.3, 0, 255).repeat(4, 0).repeat(4, 1)
        with io.BytesIO() as file:
            Image.fromarray(page).save(file, "JPEG", quality=30)
            made.append(file.getvalue())
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(pages):
            (folder / f"{number}.jpg").write_bytes(made[number % len(made)] + number.to_bytes(8, "big"))
            asked = [{"type": "image", "path": f"{number}.jpg"}, {"type": "text", "text": "What does the page say?"}]
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Nothing."}]
            rows.write(json.dumps({"messages": talk}) + "\n")
    return folder / "rows.jsonl"


def compiling(folder: str, copy: bool) -> None:
    """Compile the pages in a process of its own, and keep its figures."""
    place = Path(folder)
    tree = {
        "model": {"base": str(place / "base")},
        "data": {"train": [{"path": str(place / "rows.jsonl")}], "format": "pictures", "images": {"copy": copy}},
        "train": {"steps": 1},
        "run": {"name": "r", "store": str(place / f"store-{copy}")},
    }
    config = parse_config(json.dumps(tree))
    files, part, data = find(config)["train"]
    tokenizer = read_tokenizer(place / "base", "base")
    begun = time.monotonic()
    for _ in compile_chapters(data, files, tokenizer, open_store(config.run.store), KEY, part):
        pass
    seconds = time.monotonic() - begun
    (status,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    (place / f"{copy}.json").write_text(json.dumps({"seconds": seconds, "peak": int(status.split()[1]) / 1024}))


def reading(folder: Path, step: float, budget: int, processes: int, steps: int = 60) -> tuple[float, float]:
    """Pictures a second, and the share of the time that the loop waits for data."""
    data = open_dataset(open_store(str(folder / "store-False")), KEY)
    again = partial(read_processor, folder / "base", "base")
    reader = PictureReader(data.store, again(), budget, processes, again, before_processes=0)
    stream = Stream(whole(data), Order((1.0,), 2048, packing=False, seed=0), 4, 1, 0, 1, pictures=reader)
    rows, waited = stream.read_from(Position(), steps=steps + 20), 0.0
    list(islice(rows, 20))  # worker processes have started
    begun = time.monotonic()
    for _ in range(steps):
        asked = time.monotonic()
        next(rows)
        waited += time.monotonic() - asked
        time.sleep(step)
    seconds = time.monotonic() - begun
    rows.close()
    return 4 * steps / seconds, waited / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--step", type=float, default=0.05)
    parser.add_argument("--folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        seeing_base(folder / "base", "qwen3_vl")
        pages = make_pages(folder, given.pages)
        size = sum(file.stat().st_size for file in pages.parent.glob("*.jpg"))
        table = Table("pages", "copy", "seconds", "pages a second", "peak MB", "bytes a token", "bytes a picture")
        for copy in (False, True):
            process = multiprocessing.get_context("spawn").Process(target=compiling, args=(name, copy))
            process.start()
            process.join()
            found = json.loads((folder / f"{copy}.json").read_text())
            store = open_store(str(folder / f"store-{copy}")).sub(dataset(KEY))
            sizes = {entry.key: entry.size for entry in store.list()}
            tokens = open_dataset(open_store(str(folder / f"store-{copy}")), KEY).manifest.tokens
            index = sum(value for key, value in sizes.items() if key.startswith(("column-picture", "pictures/")))
            table.add_row(
                *(f"{given.pages:,}", str(copy), f"{found['seconds']:.0f}", f"{given.pages / found['seconds']:.0f}"),
                *(f"{found['peak']:.0f}", f"{sum(v for k, v in sizes.items() if k.startswith('tokens')) / tokens:.2f}"),
                f"{(index - (size if copy else 0)) / given.pages:.0f}",
            )
        Console().print(table)
        table = Table("read ahead", "worker processes", "pages a second", "waits for data")
        for budget, processes, step in ((0, 0, 0.0), (2**28, 1, 0.0), (0, 0, given.step), (2**28, 1, given.step)):
            speed, waited = reading(folder, step, budget, processes)
            what = f"{budget / 2**20:.0f} MiB" if budget else "no"
            table.add_row(f"{what}, {step:g} s a step", str(processes), f"{speed:.0f}", f"{waited:.0%}")
        Console().print(table)


if __name__ == "__main__":
    main()
