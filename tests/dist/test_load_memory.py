"""A rank's memory during a load is its share and a few read pieces, as the kernel counts it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist import memory
from tests.dist.launch import launch
from tests.material import Workshop, make_base
from tests.stored import store_in_fp8, store_in_mxfp4
from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT
from trainer.config import dump_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 100 million weights, so that a share is large beside what Python takes by itself."""
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    return make_base(tmp_path_factory.mktemp("large") / "base", shard_size="100MB", **sizes)


def test_a_step_without_checkpointing_holds_no_gathered_weight_until_its_backward(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, num_hidden_layers=8)
    policy = json.loads(workshop.policy.read_text())
    # By itself DeepSpeed keeps what it will use again within a billion parameters, which is all of so small a base.
    policy["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    config = workshop.config(
        "step", f"sharding.deepspeed={tmp_path}/policy.json", "train.activation_checkpointing=false"
    )
    for result in launch(2, memory.gathered_in_step, dump_config(config)):
        assert 0 < result["released"] < result["kept"] / 2


@pytest.fixture(scope="module")
def bases(base: Path) -> dict[str, Path]:
    """The same in FP8; and a gpt-oss in MXFP4 with a layer of experts of the real size, which are read whole."""
    folder = base.parent
    sizes: dict[str, Any] = {"hidden_size": 2880, "head_dim": 64, "intermediate_size": 2880, "num_hidden_layers": 1}
    gpt_oss = make_base(folder / "gpt-oss", "gpt-oss", shard_size="100MB", **sizes)
    return {
        "bf16": base,
        "fp8": store_in_fp8(base, folder / "fp8", (128, 128), shard_size="100MB"),
        "mxfp4": store_in_mxfp4(gpt_oss, folder / "mxfp4", shard_size="100MB"),
    }


@pytest.mark.parametrize(("stored", "world_size"), [("bf16", 1), ("bf16", 2), ("fp8", 2), ("mxfp4", 2)])
def test_the_peak_is_the_share_and_the_pieces_in_flight(
    workshop: Workshop, bases: dict[str, Path], stored: str, world_size: int
) -> None:
    base = bases[stored]
    config = dump_config(workshop.config("load", f"model.base={base}", "data.packing=false"))
    files = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    results = launch(world_size, memory.load_memory, config)
    assert sum(result["read_bytes"] for result in results) <= 1.1 * files
    # What is decoded is held as it is stored too: pieces of one byte a weight, or whole experts: two that are kept, and
    # one that is read, twice while it is handed over.
    beside = {"bf16": 0, "fp8": PIECE_BYTES // 2 * PIECES_IN_FLIGHT, "mxfp4": 4 * 2880 * 5760 * 17 // 32}
    for result in results:
        allowed = 1.3 * result["kept_bytes"] + 2 * PIECE_BYTES * PIECES_IN_FLIGHT
        assert result["grown_bytes"] <= allowed + beside[stored]
