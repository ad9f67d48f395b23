"""A merge as stored of a base of many gigabytes, and the memory that it takes.

    python benchmarks/large_merge.py [--gigabytes 64] [--adapted 1]

The base is a Llama of width 8,192 in INT4 in groups of 32, whose files are sparse: they hold headers, and zeros that
take no room on the disk. The first layers, as many as `--adapted` says, have an adapter of rank 16. With 0 all have
one; moving all codes of 64 GB takes an hour of a processor. The merge is streamed to a store that counts bytes and
keeps none. The script fails if its process has ever held 2 GB, imports included, or if bytes are missing.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))  # for what makes a run's commit in the tests

from tests.material import Workshop, commit, make_base
from trainer.base.find.locate import resolve_base
from trainer.export.destination import ExportProgress
from trainer.export.format import find_format
from trainer.export.write.foreseen import Foreseen
from trainer.model.held import NewTensor
from trainer.store.safetensors_index import header_of
from trainer.store.store import Store, open_store

HIDDEN, INNER, KEYS, BOUND = 8192, 28_672, 1024, 2e9
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def tensors_of(layer: int) -> list[NewTensor]:
    """The tensors of a decoder layer in INT4."""
    found = list[NewTensor]()
    for name, (rows, columns) in LAYER.items():
        path = f"model.layers.{layer}.{name}.weight"
        found.append(NewTensor(f"{path}_packed", "I32", (rows, columns // 8)))
        found.append(NewTensor(f"{path}_scale", "BF16", (rows, columns // 32)))
        found.append(NewTensor(f"{path}_shape", "I64", (2,)))
    norms = ("input_layernorm", "post_attention_layernorm")
    return found + [NewTensor(f"model.layers.{layer}.{norm}.weight", "BF16", (HIDDEN,)) for norm in norms]


def make_sparse_base(folder: Path, plain: Path, layers: int) -> int:
    """Write the files of the base, and return their bytes."""
    vocabulary = json.loads((plain / "config.json").read_text())["vocab_size"]
    ends = [NewTensor("model.embed_tokens.weight", "BF16", (vocabulary, HIDDEN))]
    ends += [
        NewTensor("model.norm.weight", "BF16", (HIDDEN,)),
        NewTensor("lm_head.weight", "BF16", (vocabulary, HIDDEN)),
    ]
    files = {f"layer-{layer:03d}.safetensors": tensors_of(layer) for layer in range(layers)} | {
        "ends.safetensors": ends
    }
    folder.mkdir()
    for file in plain.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    total, places = 0, dict[str, str]()
    for name, tensors in files.items():
        header, size = header_of(tensors), sum(tensor.size for tensor in tensors)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        total, places = total + size, places | {tensor.name: name for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


class Counting(Store):
    """A store that keeps small files, and counts the bytes of large ones."""

    taken = 0

    def put_chunks(self, key: str, chunks: Iterable[Any], size: int) -> None:
        for chunk in chunks:
            self.taken += len(chunk)


def resident(what: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return 1024 * float(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=64)
    parser.add_argument("--adapted", type=int, default=1, help="layers that have an adapter; 0 for all")
    given = parser.parse_args()
    each = sum(tensor.size for tensor in tensors_of(0))
    layers = max(1, round(given.gigabytes * 1e9 / each))
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        workshop, plain = Workshop(folder / "workshop"), make_base(folder / "plain", **sizes)
        wide = {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_attention_heads": HIDDEN // 128,
            "num_key_value_heads": KEYS // 128,
            "head_dim": 128,
        }
        config_file = plain / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | wide))
        total = make_sparse_base(folder / "base", plain, layers)
        some = [f"tuning.layers=[0,{given.adapted}]"] if given.adapted else []
        settings = [f"model.base={folder / 'base'}", "quant.type=none", "tuning.rank=16", "tuning.targets=all-linear"]
        config = workshop.config("large", *settings, *some, "model.dtype=bf16")
        run = workshop.store.sub("large")
        commit(run, config)
        form = find_format("merged", ["as=stored"])
        form.check_files(Foreseen(config, resolve_base(config.model)))
        print(f"planned: {total / 1e9:.1f} GB in {layers} layers", flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, begun = resident("VmRSS"), time.monotonic()
        store = open_store(str(folder / "merged"))
        destination = Counting(store.uri, store._backend, store._prefix)
        written = form.write(run, destination, None, ExportProgress(lambda done, total: None, lambda sentence: None))
        seconds, peak = time.monotonic() - begun, resident("VmHWM")
    print(
        f"{platform.machine()}: {destination.taken / 1e9:.1f} GB streamed in {seconds:.0f} s, of which"
        f" {time.process_time():.0f} s of a processor in all; at most {peak / 1e9:.2f} GB resident,"
        f" {before / 1e9:.2f} before it; {written.facts}"
    )
    if peak >= BOUND:
        sys.exit(f"{peak / 1e9:.2f} GB were resident, allowed {BOUND / 1e9:.0f}")
    if destination.taken < total:
        sys.exit(f"{total - destination.taken:,} bytes are missing")


if __name__ == "__main__":
    main()
