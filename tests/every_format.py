"""Exports an adapter and a merged model over a base in every stored format, and proves both: a release script.

    python -m tests.every_format [FORMAT ...]      one JSON line a format; exit 1 when one does not hold

The projections of a small base, or its experts, have random weights in the format of that name (tests/codes.py). The
merged model must be, bit for bit, that of the base in 16 bits which plain torch makes of the format's specification,
and `--verify` must prove it and the adapter.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.codes import FORMATS
from tests.dist.proofs import export_proof, merge_proof
from tests.material import Workshop, commit, make_base
from tests.stored import read_files, store_as, store_in_fp8, store_in_mxfp4
from trainer.errors import CapstanError
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.store.store import Store, open_store

# The widest groups of a format are 128 columns, and AWQ packs eight rows.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 16}
EXPERTS = ("int4-32 experts", "nvfp4 experts", "fp4-scale experts")
WITH_MAKERS: dict[str, dict[str, Any]] = {
    "fp8 tiles": {"kind": "llama", **SIZES},
    "mxfp4 gpt-oss": {"kind": "gpt-oss", "hidden_size": 96, "intermediate_size": 64},
}
"""Formats that are no matter of one matrix, and the kind of base that they are for."""

NOT_ALONE = ("llm-int8", "fp4-scale")
"""bitsandbytes' own is refused, as its adapter is served beside it; FP4 is of experts alone."""


def stored_base(name: str, plain: Path, folder: Path) -> Path:
    """A base in the format `name`, with the same in 16 bits in its folder "decoded"."""
    if name in WITH_MAKERS:
        base = make_base(plain, **WITH_MAKERS[name])
        return store_in_mxfp4(base, folder) if "gpt-oss" in name else store_in_fp8(base, folder, (128, 128))
    if name in EXPERTS:
        base = make_base(plain, "qwen3-moe", hidden_size=128, moe_intermediate_size=128)
        return store_as(base, folder, name.partition(" ")[0], only="experts")
    return store_as(make_base(plain, "qwen3", **SIZES), folder, name)


def merged(workshop: Workshop, name: str, base: Path, quant: list[str]) -> Store:
    """A run over `base` with adapters of random numbers, and beside it the model that they are merged into."""
    config = workshop.config(name, f"model.base={base}", "data.packing=false", *quant)
    run = workshop.store.sub(name)
    commit(run, config, dataset=workshop.prepare(config).train)
    export_merged(run, open_store(f"{run.uri}/merged"))
    return run


def tried(name: str, folder: Path) -> dict[str, Any]:
    workshop = Workshop(folder / "workshop", "speck", shard_size="4KB")
    base = stored_base(name, folder / "plain", folder / "base")
    run = merged(workshop, "stored", base, [])
    plain = merged(workshop, "plain", base / "decoded", ["quant.type=nf4"])
    found, expected, before = (
        read_files(place)
        for place in (*(Path(one.uri.removeprefix("file://"), "merged") for one in (run, plain)), base / "decoded")
    )
    alike = all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected)
    changed = sum(not torch.equal(found[key], before[key]) for key in before)
    of_merge: dict[str, Any] = merge_proof(run.uri, 4, f"{run.uri}/merged")
    export_adapter(run, open_store(f"{run.uri}/adapter"))
    of_adapter: dict[str, Any] = export_proof(run.uri, 4, f"{run.uri}/adapter")
    proof, adapter = Proof(**of_merge), Proof(**of_adapter)
    return {
        "bits": alike and found.keys() == expected.keys(),
        "changed": changed,
        "merge": {"holds": proof.holds, "kl": proof.kl, "allowed": proof.kl_allowed, "effect": proof.kl_effect},
        "adapter": {"holds": adapter.holds, "kl": adapter.kl, "allowed": adapter.kl_allowed},
    }


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    failed = 0
    for name in names or [*(name for name in FORMATS if name not in NOT_ALONE), *EXPERTS, *WITH_MAKERS]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="capstan-format-") as folder:
            try:
                found = tried(name, Path(folder))
                good = found["bits"] and found["changed"] and found["merge"]["holds"] and found["adapter"]["holds"]
            except CapstanError as refused:
                found, good = {"refused": str(refused)}, False
        failed += not good
        print(
            json.dumps({"format": name, "good": bool(good), **found, "seconds": round(time.monotonic() - started)}),
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
