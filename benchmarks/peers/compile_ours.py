"""Our side of the compiling that benchmarks/data.py compares: as `capstan data build` does it, in a process that knows
no torch.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from trainer.config import Data
from trainer.data.compile.compile import compile_chapters
from trainer.data.compile.pool import map_batches
from trainer.data.dataset.dataset import open_dataset
from trainer.data.source.files import expand
from trainer.store.store import open_store


def main(folder: Path) -> None:
    """Tokens/s from the file to tokens on disk, with targets and hashes."""
    # Not above: each worker process imports this file again, as it does what `capstan` imports.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = Data.model_validate({"train": [{"path": str(folder / "talks.jsonl")}], "sequence_length": 8192})
    with tempfile.TemporaryDirectory(dir=folder) as store:
        began = time.perf_counter()
        cores = len(os.sched_getaffinity(0))
        files = expand(data.train, "data.train")
        opened, mapper = open_store(store), partial(map_batches, processes=cores)
        for _ in compile_chapters(data, files, tokenizer, opened, "compiled", mapper=mapper):
            pass
        done = open_dataset(opened, "compiled")
        print(json.dumps({"tokens_per_second": done.manifest.tokens / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
