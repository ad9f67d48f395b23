"""Reading, resuming and compiling training data: ours beside MosaicML Streaming, LitData, HF datasets and Grain.

    python benchmarks/data.py [--documents 400000] [--peers PYTHON] [--folder DIR]

All read documents of the same log-normal lengths (median 250 tokens) from this machine's disk, in one process on one
core: ours an epoch of all of them, the others up to 15 seconds of the first 100,000, as some would take an hour. The
others hand over documents one by one; ours plans, packs into rows of 8,192 tokens with labels and positions, and checks
every byte's hash. The peers live in an environment of their own, as one pins an older transformers: PYTHON names it,
else it is made in DIR. Every figure is the better of two runs.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.data.compile.compile import Place, ShardWriter
from trainer.data.compile.encode import Encoded
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import TARGET_BIT, open_dataset
from trainer.data.dataset.manifest import FORMAT, MANIFEST, DatasetManifest, SourceRecord
from trainer.data.order.order import EpochPlan
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.run.layout import dataset as dataset_key
from trainer.store.store import Store, open_store

SEQUENCE_LENGTH = 8192
PEERS = ("mosaicml-streaming==0.13.0", "litdata==0.2.76", "datasets==5.0.1", "grain==0.2.18")
PEER_DOCUMENTS = 100_000
READERS = Path(__file__).parent / "peers" / "readers.py"
COMPILE_OURS = Path(__file__).parent / "peers" / "compile_ours.py"
# Whether another number of ranks reads on in the same global order, after each library's documentation.
LIBRARIES = {"mosaicml": "yes", "litdata": "no", "hf_datasets": "no", "grain": "by hand", "grain_packed": "no"}
WORDS = "the a data run model token batch step store rank node memory loss train row file block hash order plan".split()


def lengths_of(count: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return np.clip(draw.lognormal(np.log(250), 0.9, count).astype(np.int64), 8, SEQUENCE_LENGTH)


def write_tokens(folder: Path, lengths: np.ndarray) -> None:
    """The documents, and where each of the first ones begins, which are those that the peers get."""
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths[:PEER_DOCUMENTS])]))
    np.random.default_rng(1).integers(0, 128_000, lengths.sum(), dtype=np.uint32).tofile(folder / "tokens.bin")


def write_dataset(store: Store, fingerprint: str, lengths: np.ndarray, tokens: np.ndarray) -> None:
    """Documents in our compiled format, without a tokenizer."""
    folder = store.sub(dataset_key(fingerprint))
    writer = ShardWriter(folder, sources=1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for first in range(0, len(lengths), 10_000):
        part = slice(first, first + 10_000)
        stored = tokens[offsets[first] : offsets[min(first + 10_000, len(lengths))]] | TARGET_BIT
        stored[offsets[:-1][part] - offsets[first]] &= ~TARGET_BIT
        writer.add(0, Encoded(stored, lengths[part]), Place())
    writer.close()
    writer.forget()
    totals: Any = {"documents": len(lengths), "tokens": int(offsets[-1]), "targets": int(offsets[-1]) - len(lengths)}
    manifest = DatasetManifest(
        format=FORMAT,
        fingerprint=fingerprint,
        chapters=1,
        sources=[SourceRecord(**totals)],
        shards=writer.shards,
        counters=writer.counters,
        bad_rows=[],
        **totals,
    )
    folder.put(MANIFEST, manifest.model_dump_json().encode())


def stream(store: Store, fingerprint: str, sequence_length: int = SEQUENCE_LENGTH) -> Stream:
    order = Order((1.0,), sequence_length, packing=True, seed=7)
    return Stream(whole(open_dataset(store, fingerprint)), order, global_batch=8, micro_batch=1, rank=0, world_size=1)


def read_ours(store: Store, fingerprint: str) -> dict[str, float]:
    """An epoch, always shuffled and packed; and the time from nothing to the first step after 75 % of it."""
    source = stream(store, fingerprint)
    began, tokens, rows = time.perf_counter(), 0, 0
    for step in source.epoch(0):
        tokens += sum(batch.tokens for batch in step)
        rows += sum(bool(batch.bins) for batch in step)
    seconds = time.perf_counter() - began
    windows = EpochPlan(*_planned(source), epoch=0).num_windows
    return {
        "shuffled": tokens / seconds,
        "fill": tokens / rows / SEQUENCE_LENGTH,
        "resume": first_step(store, fingerprint, 3 * windows // 4, SEQUENCE_LENGTH),
    }


def _planned(source: Stream) -> tuple[Any, ...]:
    data = source.chapters.get(0)
    return data.offsets, data.blocks, data.block_sources, Order((1.0,), SEQUENCE_LENGTH, packing=True, seed=7)


def first_step(store: Store, fingerprint: str, window: int, sequence_length: int) -> float:
    began = time.perf_counter()
    next(stream(store, fingerprint, sequence_length).read_from(Position(0, window, 0)))
    return time.perf_counter() - began


def resume_of_many(folder: Path, documents: int) -> dict[str, float]:
    """Seconds from nothing to the first step at 1 % and at 99 % of an epoch of many short documents."""
    store, fingerprint = open_store(str(folder)), "many"
    if not store.sub(dataset_key(fingerprint)).exists(MANIFEST):
        lengths = np.random.default_rng(2).integers(4, 13, documents)
        write_dataset(store, fingerprint, lengths, np.arange(lengths.sum(), dtype=np.uint32) % 128_000)
    windows = -(-documents // (64 * 256))
    places = {"1 %": windows // 100, "99 %": windows * 99 // 100}
    return {name: min(first_step(store, fingerprint, place, 512) for _ in range(3)) for name, place in places.items()}


def write_talks(folder: Path, count: int) -> None:
    """Conversations, and a tokenizer with a chat template: a byte-pair encoding of 8,000 tokens, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(3)
    vocabulary = [*WORDS, *("".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20_000))]

    def text(words: int) -> str:
        return " ".join(draw.choices(vocabulary, k=words))

    with (folder / "talks.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, answer = text(draw.randint(5, 60)), text(draw.randint(20, 250))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text(200) for _ in range(2000)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def peers_python(folder: Path) -> Path:
    """The Python of an environment with the peers, made once."""
    python = folder / "peers" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "peers", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS, "transformers<5", "torch"], check=True)
    return python


def read_peer(python: Path, library: str, folder: Path) -> dict[str, float]:
    return measured(python, READERS, library, folder)


def measured(*command: str | Path) -> dict[str, float]:
    """The JSON object that a program prints in its last line."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def on_one_core(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The better of two runs, pinned to one core, as are the processes it starts."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        first, second = measure(), measure()
    finally:
        os.sched_setaffinity(0, cores)
    return {key: (min if key == "resume" else max)(value, second[key]) for key, value in first.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=400_000)
    parser.add_argument(
        "--many", type=int, default=10_000_000, help="documents of the epoch that is resumed early and late"
    )
    parser.add_argument("--talks", type=int, default=60_000, help="conversations to compile")
    parser.add_argument("--peers", type=Path, help="a Python with the peers installed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "capstan-benchmark-data")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    python = given.peers or peers_python(folder)

    lengths = lengths_of(given.documents)
    if not (folder / "tokens.bin").exists():
        write_tokens(folder, lengths)
    store = open_store(str(folder))
    fingerprint = hashlib.sha256(lengths.tobytes()).hexdigest()[:20]
    if not store.sub(dataset_key(fingerprint)).exists(MANIFEST):
        write_dataset(store, fingerprint, lengths, np.fromfile(folder / "tokens.bin", np.uint32))
    ours = on_one_core(lambda: read_ours(store, fingerprint))

    table = Table(
        "one core", "in file order, Mtok/s", "shuffled, Mtok/s", "resume at 75 %, s", "order at another world size"
    )
    table.add_row(
        f"ours, packed (fill {ours['fill']:.4f})",
        "",
        f"{ours['shuffled'] / 1e6:.1f}",
        f"{ours['resume']:.3f}",
        "the same",
    )
    for library, keeps in LIBRARIES.items():
        peer = on_one_core(lambda library=library: read_peer(python, library, folder))
        speeds = (f"{peer[key] / 1e6:.1f}" for key in ("sequential", "shuffled"))
        table.add_row(library, *speeds, f"{peer['resume']:.3f}", keeps)
    Console(width=120).print(table)

    resumed = resume_of_many(folder, given.many)
    print(f"resume of {given.many:,} documents: " + ", ".join(f"{s:.3f} s at {name}" for name, s in resumed.items()))

    if not (folder / "talks.jsonl").exists():
        write_talks(folder, given.talks)
    speeds = {"ours": list[float](), "datasets.map": list[float]()}
    for _ in range(3):  # in turns, as the machine's speed drifts
        speeds["ours"].append(measured(sys.executable, COMPILE_OURS, folder)["tokens_per_second"])
        speeds["datasets.map"].append(read_peer(python, "datasets_map", folder)["tokens_per_second"])
    ratios = sorted(ours / peer for ours, peer in zip(*speeds.values(), strict=True))
    print(
        f"compiling on {len(os.sched_getaffinity(0))} cores: "
        + ", ".join(f"{side} {statistics.median(each) / 1e6:.3f} Mtok/s" for side, each in speeds.items())
        + f"; ratio, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )


if __name__ == "__main__":
    sys.exit(main())
