"""The field's readers over the same documents, one a process; run by benchmarks/data.py in an environment of their own.

    python readers.py LIBRARY FOLDER    prints one JSON object: tokens/s in file order and shuffled, seconds to resume

Speeds are those of an epoch, or of its first 15 seconds. FOLDER holds tokens.bin (uint32) and offsets.npy; a library's
own files are written beside them once.
"""

# pyright: reportMissingImports=false
# The libraries are in an environment of their own.

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

SEED, RESUME_AT, LONGEST_SECONDS = 7, 0.75, 15.0


def documents(folder: Path) -> Iterator[np.ndarray]:
    offsets = np.load(folder / "offsets.npy")
    tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
    return (np.array(tokens[begin:end]) for begin, end in zip(offsets[:-1], offsets[1:], strict=True))


def count(folder: Path) -> int:
    return len(np.load(folder / "offsets.npy")) - 1


def tokens_per_second(samples: Iterable[np.ndarray]) -> float:
    began, tokens = time.perf_counter(), 0
    for sample in samples:
        tokens += len(sample)
        if time.perf_counter() - began > LONGEST_SECONDS:
            break
    return tokens / (time.perf_counter() - began)


def seconds_to_resume(reader: Callable[[], Any], samples: int) -> float:
    """From the state of a reader that has given so many samples to the first one of another reader."""
    before = reader()
    for _ in islice(before, samples):
        pass
    state = before.state_dict()
    began = time.perf_counter()
    resumed = reader()
    resumed.load_state_dict(state)
    next(iter(resumed))
    return time.perf_counter() - began


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, written now if it is not there; a half written one never is."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(path)
    return path


def mosaicml(folder: Path) -> dict[str, float]:
    from streaming import MDSWriter, StreamingDataset

    def write(path: Path) -> None:
        with MDSWriter(out=str(path), columns={"tokens": "ndarray:uint32"}) as out:
            for document in documents(folder):
                out.write({"tokens": document})

    local = once(folder / "mds", write)

    def dataset(shuffle: bool) -> Any:
        return StreamingDataset(local=str(local), shuffle=shuffle, batch_size=1, shuffle_seed=SEED)

    def tokens(samples: Iterable[Any]) -> Iterator[np.ndarray]:
        return (sample["tokens"] for sample in samples)

    result = {shuffle: tokens_per_second(tokens(dataset(shuffle))) for shuffle in (False, True)}
    began = time.perf_counter()
    resumed = dataset(True)
    state = {"epoch": 0, "sample_in_epoch": int(RESUME_AT * count(folder)), "num_canonical_nodes": 64}
    resumed.load_state_dict({**state, "shuffle_seed": SEED, "initial_physical_nodes": 1})
    next(iter(resumed))
    return {"sequential": result[False], "shuffled": result[True], "resume": time.perf_counter() - began}


def litdata(folder: Path) -> dict[str, float]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    def write(path: Path) -> None:
        cache = Cache(str(path), chunk_bytes=64 * 2**20)
        for number, document in enumerate(documents(folder)):
            cache[number] = document
        cache.done()
        cache.merge()

    local = once(folder / "litdata", write)

    def loader(shuffle: bool) -> Any:
        dataset = StreamingDataset(str(local), shuffle=shuffle, seed=SEED)
        return StreamingDataLoader(dataset, batch_size=1, num_workers=0, collate_fn=lambda batch: batch[0])

    result = {shuffle: tokens_per_second(loader(shuffle)) for shuffle in (False, True)}
    resume = seconds_to_resume(lambda: loader(True), int(RESUME_AT * count(folder)))
    return {"sequential": result[False], "shuffled": result[True], "resume": resume}


def hf_datasets(folder: Path) -> dict[str, float]:
    import pyarrow
    import pyarrow.parquet
    from datasets import load_dataset

    def write(path: Path) -> None:
        path.mkdir()
        all_documents = documents(folder)
        part = 0
        while rows := list(islice(all_documents, 20_000)):
            table = pyarrow.table({"tokens": pyarrow.array(rows, pyarrow.list_(pyarrow.uint32()))})
            pyarrow.parquet.write_table(table, path / f"{part:05d}.parquet", row_group_size=1000)
            part += 1

    local = once(folder / "parquet", write)

    def dataset(shuffle: bool) -> Any:
        streamed = load_dataset("parquet", data_files=str(local / "*.parquet"), split="train", streaming=True)
        return (streamed.shuffle(SEED, buffer_size=1000) if shuffle else streamed).with_format("numpy")

    def tokens(samples: Iterable[Any]) -> Iterator[np.ndarray]:
        return (sample["tokens"] for sample in samples)

    result = {shuffle: tokens_per_second(tokens(dataset(shuffle))) for shuffle in (False, True)}
    resume = seconds_to_resume(lambda: dataset(True), int(RESUME_AT * count(folder)))
    return {"sequential": result[False], "shuffled": result[True], "resume": resume}


class _Documents:
    """A random-access source for Grain: slices of a memory map, the fastest there can be."""

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / "offsets.npy").tolist()
        self._tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return np.array(self._tokens[self._offsets[number] : self._offsets[number + 1]])


def grain(folder: Path, packed: bool = False) -> dict[str, float]:
    import grain

    def dataset(shuffle: bool) -> Any:
        documents = grain.MapDataset.source(_Documents(folder))
        streamed = (documents.shuffle(SEED) if shuffle else documents).to_iter_dataset()
        if packed:
            rows = streamed.map(lambda document: {"tokens": document})
            return grain.experimental.FirstFitPackIterDataset(rows, length_struct={"tokens": 8192}, num_packing_bins=64)
        return streamed

    def tokens(samples: Iterable[Any]) -> Iterator[np.ndarray]:
        if not packed:
            yield from samples
            return
        for sample in samples:
            used = sample["tokens_segment_ids"] if "tokens_segment_ids" in sample else sample[0]["tokens_segment_ids"]
            yield used[used > 0]

    result = {shuffle: tokens_per_second(tokens(dataset(shuffle))) for shuffle in (False, True)}
    before = iter(dataset(True))
    rows = int(RESUME_AT * count(folder) / (20 if packed else 1))
    for _ in islice(before, rows):
        pass
    state = before.get_state()
    began = time.perf_counter()
    resumed = iter(dataset(True))
    resumed.set_state(state)
    next(resumed)
    return {"sequential": result[False], "shuffled": result[True], "resume": time.perf_counter() - began}


def grain_packed(folder: Path) -> dict[str, float]:
    return grain(folder, packed=True)


def datasets_map(folder: Path) -> dict[str, float]:
    """Compiling: from a file of conversations, through the chat template and the tokenizer, on a process for each
    core.
    """
    import os
    import tempfile

    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    # The tokenizer_config.json is of a newer transformers than the peers have.
    saved = folder / "tokenizer"
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    tokenizer.chat_template = (saved / "chat_template.jinja").read_text(encoding="utf-8")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        rows = load_dataset("json", data_files=str(folder / "talks.jsonl"), split="train", cache_dir=cache)
        columns, cores = rows.column_names, len(os.sched_getaffinity(0))
        done: Any = rows.map(encode, batched=True, remove_columns=columns, num_proc=cores, load_from_cache_file=False)
        seconds = time.perf_counter() - began
        return {"tokens_per_second": sum(len(row) for row in done.with_format("numpy")["input_ids"]) / seconds}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
