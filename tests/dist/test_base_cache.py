"""A quantized base in the store gives the same model at any number of ranks, for a quarter of the bytes, or is made
again.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import loading
from tests.dist.launch import launch
from tests.material import Workshop, make_base
from trainer.base.load.cache import parse_manifest
from trainer.config import dump_config
from trainer.store.store import open_store

KINDS = ("llama", "mixtral")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bases")
    return [str(make_base(folder / kind, kind)) for kind in KINDS]


def test_a_rank_that_has_lost_its_share_reads_while_the_other_keeps_its_own(
    workshop: Workshop, bases: list[str], tmp_path: Path
) -> None:
    """With scales that are quantized once more it needs the cache for that; else all read again, to the same bits."""
    config = dump_config(workshop.config("load", f"run.store={tmp_path}"))
    apart = [["quant.type=none"], ["quant.double=false"], ["quant.double=true", "quant.cache=true"]]
    cases = [[*case, f"model.base={base}"] for base in bases for case in [*apart, ["quant.double=true"]]]
    for first, second, case in zip(*launch(2, loading.loaded_apart, config, cases), cases, strict=True):
        assert first["same"], case
        assert second["same"], case
        assert second["read"] > 0, case
        assert (first["read"] == 0) == (case[:-1] in apart), case


def test_the_cache_is_written_once_and_read_at_another_world_size_and_scope(
    workshop: Workshop, bases: list[str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    config = dump_config(workshop.config("load", f"run.store={store}", "quant.cache=true", "quant.double=true"))

    def load(world_size: int, *overrides: str, per_node: int | None = None) -> tuple[int, list[str]]:
        """Writes logits; -> bytes read by all ranks, and rank 0's log."""
        results = launch(
            world_size, loading.loaded_logits, config, bases, list(overrides), str(tmp_path), ranks_per_node=per_node
        )
        return sum(fact["read_bytes"] for rank in results for fact in rank), [
            line for fact in results[0] for line in fact["log"]
        ]

    def logits() -> list[torch.Tensor]:
        return [load_file(tmp_path / f"{kind}.safetensors")["logits"] for kind in KINDS]

    from_source, log = load(2)
    expected = logits()
    assert sum("the quantized base is cached in" in line for line in log) == len(KINDS)
    manifests = sorted((store / "bases").glob("*/manifest.json"))
    assert len(manifests) == len(KINDS)
    written = [path.read_bytes() for path in manifests]

    from_cache, log = load(3)
    assert all(torch.equal(one, other) for one, other in zip(logits(), expected, strict=True))
    assert (
        from_cache < 0.7 * from_source
    )  # what is not quantized is read from the source, and whole chunks of the cache
    assert not any("cached" in line for line in log)
    assert [path.read_bytes() for path in manifests] == written

    for path in (store / "bases").glob("*/*/00001-00000.bin"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again, log = load(4, "sharding.scope=node", per_node=2)
    assert all(torch.equal(one, other) for one, other in zip(logits(), expected, strict=True))
    assert again >= from_source
    assert sum("is damaged between bytes" in line for line in log) == len(KINDS)
    assert [path.read_bytes() for path in manifests] != written
    for manifest in manifests:  # of the damaged attempt nothing is left
        folder = open_store(str(manifest.parent))
        kept = parse_manifest(folder, manifest.read_bytes()).attempt
        assert {entry.key.partition("/")[0] for entry in folder.list()} == {manifest.name, kept}

    healed, _ = load(1)
    assert all(torch.equal(one, other) for one, other in zip(logits(), expected, strict=True))
    assert healed < 0.6 * from_source
