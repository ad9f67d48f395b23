"""`tuning.through: stored`: what is trained is what an export as stored holds, code by code."""

from pathlib import Path

import pytest
import torch

from tests.dist import runs, through
from tests.dist.launch import launch
from tests.material import Workshop, make_base
from tests.stored import store_as, store_in_fp8, store_in_mxfp4
from trainer.config import dump_config
from trainer.run import layout
from trainer.run.records import read_records

THROUGH = ("quant.type=stored", "tuning.through=stored", "data.packing=false", "model.dtype=fp32", "optim.lr=0.01")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("through")
    plain = make_base(folder / "plain", hidden_size=64, intermediate_size=128, head_dim=16)
    experts = make_base(
        folder / "experts", "qwen3-moe", torch.float32, moe_intermediate_size=64, hidden_size=64, num_hidden_layers=1
    )
    gpt_oss = make_base(
        folder / "oss", "gpt-oss", torch.float32, hidden_size=64, intermediate_size=64, num_local_experts=4
    )
    return {
        "int4": store_as(plain, folder / "int4", "int4-32"),
        "fp8": store_in_fp8(plain, folder / "fp8", (48, 80)),
        "experts": store_as(experts, folder / "experts-int4", "int4-32", only="experts"),
        "gpt-oss": store_in_mxfp4(gpt_oss, folder / "mxfp4"),
    }


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("int4", 2),
        ("experts", 2),
        *(
            pytest.param(name, ranks, marks=pytest.mark.long)
            for name in ("int4", "experts", "fp8", "gpt-oss")
            for ranks in (1, 2, 3)
            if (name, ranks) not in (("int4", 2), ("experts", 2))
        ),
    ],
)
def test_the_exported_codes_are_those_of_the_last_forward_pass(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, name: str, ranks: int
) -> None:
    experts = () if name in ("int4", "fp8") else ("tuning.experts=true", "tuning.targets=[q_proj]")
    config = workshop.config(f"{name}-{ranks}", f"model.base={bases[name]}", *THROUGH, *experts)
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    data = workshop.prepare(config).train
    assert {done["outcome"] for done in launch(ranks, runs.run, dump_config(config), data, timeout=300)} == {"finished"}
    losses = [record["loss"] for record in read_records(run, 1) if "loss" in record]
    assert losses[-1] < losses[0]

    (found,) = launch(1, through.exported_beside_trained, run.uri, 10, str(tmp_path / "merged"), timeout=200)
    assert found["weights"] == {"int4": 14, "fp8": 14, "experts": 2, "gpt-oss": 4}[name]
    assert found["differing"] == 0
    assert found["moved"] == pytest.approx(found["counted"], rel=0.1)  # some codes stand for a number twice
    assert found["moved"] > 100
    assert found["difference"] <= 1e-5 * found["largest"]
