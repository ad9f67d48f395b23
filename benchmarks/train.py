"""Training beside TRL's SFTTrainer with PEFT, bitsandbytes and DeepSpeed ZeRO-3, and beside the bare matrix products of
the same step.

    python benchmarks/train.py [--ranks 2] [--pairs 5] [--layers 4] [--hidden 512] [--length 512] [--cases fixed ...]

axolotl and LLaMA-Factory train by the same libraries as TRL. All sides have the same random Llama in NF4, the same
documents in the same order, LoRA of rank 16 on all linear layers, and as many ranks: a GPU each where there are GPUs,
else one core each. They take their steps in turns, so that what else the machine does meets all of them; figures are
means over the turns, as batches that are padded differ in length from step to step. The first two steps of each are not
measured. "products" are the products of our own step and nothing else, which no trainer on this machine can go below.

Fixed: documents as long as a row. Conversations: prompts and answers with the spread of lengths that chat data has,
packed by ours. TRL pads them to the longest of a batch; where it packs, documents see each other unless flash attention
is installed.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from load import resident
from ranks import rendezvous
from rich.console import Console
from rich.table import Table
from sides import SIDES, Case

WARM_UP = 2
SECONDS = 900.0
CASES = {
    "fixed": Case("fixed, recompute", "fixed", True),
    "fixed-kept": Case("fixed, no recompute", "fixed", False),
    "padded": Case("conversations, TRL pads, recompute", "conversations", True),
    "padded-kept": Case("conversations, TRL pads, no recompute", "conversations", False),
    "packed": Case("conversations, TRL packs, recompute", "conversations", True, packing=True),
    "defaults": Case("fixed, defaults of both", "fixed", None),
}


def llama(layers: int, hidden: int) -> dict[str, Any]:
    """The shape of a small Llama."""
    widths: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    return {**widths, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32_000}


def make_base(folder: Path, shape: dict[str, Any]) -> int:
    """A random Llama in bf16 with a tokenizer of whole words, w0, w1, ..., filled on a GPU where there is one; its
    parameters.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, tie_word_embeddings=False, max_position_embeddings=2**17)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tensors = {
        name: (torch.ones if weight.ndim == 1 else partial(torch.normal, 0.0, 0.02))(
            size=weight.shape, dtype=torch.bfloat16, device=device
        ).cpu()
        for name, weight in model.state_dict().items()
    }
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size="2GB")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    last = config.vocab_size - 1
    words = {f"w{number}": number for number in range(last - 1)} | {"</s>": last - 1, "<pad>": last}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return model.num_parameters()


def make_material(folder: Path, shape: dict[str, Any], length: int, ranks: int, steps: int) -> None:
    """The base, and for each kind of data our configuration and a file with what the other sides are given."""
    make_base(folder / "base", shape)
    draw = random.Random(0)
    rows = ranks * steps
    sizes = {"fixed": [length] * rows, "conversations": []}
    while sum(sizes["conversations"]) < 1.1 * rows * length:
        sizes["conversations"].append(max(16, min(length, round(draw.lognormvariate(math.log(length / 6), 0.9)))))
    for name, lengths in sizes.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for size in lengths:
                said = [
                    f"w{draw.randrange(shape['vocab_size'] - 2)}" for _ in range(size - 1)
                ]  # and the end of the text
                prompt = 1 if name == "fixed" else max(1, int(draw.uniform(0.2, 0.6) * size))
                row = {"prompt": " ".join(said[:prompt]) + " ", "completion": " ".join(said[prompt:])}
                file.write(json.dumps(row) + "\n")
        _compile(folder, name, length, ranks, steps, round(length / statistics.mean(lengths)))


def _compile(folder: Path, name: str, length: int, ranks: int, steps: int, documents_a_row: int) -> None:
    from trainer.base.find.locate import resolve_base
    from trainer.config import dump_config, parse_config
    from trainer.data.compile.prepare import prepare
    from trainer.data.dataset.chapters import open_chapters
    from trainer.data.order.settings import Position
    from trainer.data.order.stream import train_stream
    from trainer.model.micro_batch import Role
    from trainer.store.store import open_run_store

    tree = {
        "run": {"name": name, "store": str(folder / "store")},
        "model": {"base": str(folder / "base")},
        "data": {
            "train": [{"path": str(folder / f"{name}.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": length,
        },
        "train": {"steps": steps, "global_batch": ranks},
        "optim": {"schedule": "constant"},
        "checkpoint": {"every_steps": 0, "every_minutes": 0},
        "cluster": {"threads_per_worker": 1},
        "track": {"tensorboard": False, "print_steps": 0},
    }
    config = parse_config(json.dumps(tree))
    store = open_run_store(config)
    fingerprint = prepare(config, resolve_base(config.model), store).train
    chapters = open_chapters(store, fingerprint, store.sub(name))
    (folder / f"{name}.yaml").write_text(dump_config(config))
    of_ranks: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    documents, position = [], Position()
    stream = train_stream(config, chapters, 0, 1)
    for _ in range(steps):
        for rank, row in enumerate(stream.step(position)):
            borders, begun = row.input.segments.borders, row.input.segments.of(Role.DOCUMENT)
            of_ranks[rank].append({"lengths": [row.lengths[at] for at in begun], "targets": row.targets})
            for at in begun:
                part = slice(borders[at], borders[at + 1])
                labels = [-100, *row.labels[0, part].tolist()[:-1]]
                documents.append({"input_ids": row.input.input_ids[0, part].tolist(), "labels": labels})
        position = stream.advance(position)
    material = {"fingerprint": fingerprint, "length": length, "steps": steps, "documents_a_row": documents_a_row}
    material |= {"rows": documents, "ranks": of_ranks}
    (folder / f"{name}.json").write_text(json.dumps(material))


class Group:
    """The ranks of one side, which take a step when they are told to."""

    def __init__(self, side: str, case: Case, folder: Path, ranks: int, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.side = side
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            arguments = (rank, ranks, port, folder, case, theirs)
            self._processes.append(context.Process(target=SIDES[side], args=arguments, daemon=True))
            self._pipes.append(mine)
            self._processes[-1].start()
            theirs.close()
        self._hear()
        self._before = [resident(process.pid, "VmRSS") for process in self._processes]

    def _hear(self) -> list[Any]:
        if not all(pipe.poll(SECONDS) for pipe in self._pipes):
            raise TimeoutError(f"a rank of {self.side} did not answer within {SECONDS:.0f} s")
        return [pipe.recv() for pipe in self._pipes]

    def step(self) -> dict[str, float]:
        """Let all ranks go on to the end of their next step."""
        started = time.monotonic()
        for pipe in self._pipes:
            pipe.send(None)
        heard = self._hear()
        device_bytes = max(rank["device_bytes"] for rank in heard)
        return {**heard[0], "device_bytes": device_bytes, "seconds": time.monotonic() - started}

    @property
    def peak(self) -> int:
        """Bytes of the largest rank above those of its imports."""
        pids = [process.pid for process in self._processes]
        return max(resident(pid, "VmHWM") - before for pid, before in zip(pids, self._before, strict=True))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def measure(case: Case, folder: Path, ranks: int, pairs: int) -> dict[str, dict[str, Any]]:
    """For each side the steps that it took, in turns, and what it had of memory."""
    groups: list[Group] = []
    found: dict[str, dict[str, Any]] = {}
    try:
        for side in SIDES:
            with rendezvous() as port:
                groups.append(group := Group(side, case, folder, ranks, port))
                first = group.step()
            for _ in range(WARM_UP - 1):
                group.step()
            found[side] = {"first_step": first["seconds"], "steps": []}
        for _ in range(pairs):
            for group in groups:
                found[group.side]["steps"].append(group.step())
        for group in groups:
            last = found[group.side]["steps"][-1]
            found[group.side] |= {"peak": last["device_bytes"] or group.peak, "loss": last["loss"]}
    finally:
        for group in groups:
            group.close()
    return found


def counts(case: Case, side: str, folder: Path, pairs: int) -> tuple[float, float]:
    """Tokens and targets of documents that a measured step of a side has, on all ranks, on average."""
    material = json.loads((folder / f"{case.data}.json").read_text())
    if side != "TRL" or case.packing:  # TRL's packing fills rows by the same documents
        rows = [row for of in material["ranks"] for row in of[WARM_UP : WARM_UP + pairs]]
        return sum(sum(row["lengths"]) for row in rows) / pairs, sum(row["targets"] for row in rows) / pairs
    batch = material["documents_a_row"] * len(material["ranks"])
    documents = material["rows"][WARM_UP * batch : (WARM_UP + pairs) * batch]
    targets = sum(label != -100 for document in documents for label in document["labels"])
    return sum(len(document["input_ids"]) for document in documents) / pairs, targets / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    table = Table(
        "case", "side", "a step, s", "tokens/s", "targets/s", "x TRL, targets/s", "of the turns", "x products", "first step, s", "peak a rank, MB", "x TRL", "loss",
        title=f"{given.ranks} ranks, {given.layers} layers of width {given.hidden}, rows of {given.length} tokens, {given.pairs} turns",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            steps = WARM_UP + given.pairs + 1
            pool.apply(make_material, (folder, llama(given.layers, given.hidden), given.length, given.ranks, steps))
        for case in (CASES[name] for name in given.cases):
            found = measure(case, folder, given.ranks, given.pairs)
            print(f"{case.name}: {json.dumps(found)}", file=sys.stderr, flush=True)
            _add_rows(table, case, found, folder, given.pairs)
    Console(width=190).print(table)


def _add_rows(table: Table, case: Case, found: dict[str, dict[str, Any]], folder: Path, pairs: int) -> None:
    seconds = {side: [step["seconds"] for step in of["steps"]] for side, of in found.items()}
    of_side = {side: counts(case, side, folder, pairs) for side in found}
    for side, of in found.items():
        tokens, targets = of_side[side]
        mean = statistics.mean(seconds[side])
        row = [case.name, side, f"{mean:.2f}"]
        if side == "products":
            table.add_row(*row, *[""] * 9)
            continue
        scale = targets / of_side["TRL"][1]
        ratios = sorted(scale * theirs / mine for mine, theirs in zip(seconds[side], seconds["TRL"], strict=True))
        of_trl, of_products = (mean / statistics.mean(seconds[other]) for other in ("TRL", "products"))
        table.add_row(
            *row, f"{tokens / mean:.0f}", f"{targets / mean:.0f}", f"{scale / of_trl:.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}", f"{of_products:.2f}", f"{of['first_step']:.1f}",
            f"{of['peak'] / 1e6:.0f}", f"{of['peak'] / found['TRL']['peak']:.2f}", f"{of['loss']:.4f}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
