"""`tuning.through: stored`: what is trained is what an export as stored holds, code by code."""

from pathlib import Path

import pytest
import torch

from tests.dist import runs, through
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_base
from tests.stored import store_as, store_in_fp8, store_in_mxfp4
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config
from trainer.errors import ConfigError
from trainer.export.destination import ExportProgress
from trainer.export.format import find_format
from trainer.plan.beginning import find_beginning
from trainer.plan.resolve import Resolved, mismatches
from trainer.run import layout
from trainer.run.records import read_records
from trainer.store.store import open_store

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
        "nvfp4": store_as(plain, folder / "nvfp4", "nvfp4-modelopt"),
        "zeros": store_as(plain, folder / "zeros", "int4-zeros"),
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
            for name in ("int4", "experts", "fp8", "nvfp4", "zeros", "gpt-oss")
            for ranks in (1, 2, 3)
            if (name, ranks) not in (("int4", 2), ("experts", 2))
        ),
    ],
)
def test_the_exported_codes_are_those_of_the_last_forward_pass(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, name: str, ranks: int
) -> None:
    experts = () if name not in ("experts", "gpt-oss") else ("tuning.experts=true", "tuning.targets=[q_proj]")
    config = workshop.config(f"{name}-{ranks}", f"model.base={bases[name]}", *THROUGH, *experts)
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    data = workshop.prepare(config).train
    assert {done["outcome"] for done in launch(ranks, runs.run, dump_config(config), data, timeout=300)} == {"finished"}
    losses = [record["loss"] for record in read_records(run, 1) if "loss" in record]
    assert losses[-1] < losses[0]

    (found,) = launch(1, through.exported_beside_trained, run.uri, 10, str(tmp_path / "merged"), timeout=200)
    assert found["weights"] == {"experts": 2, "gpt-oss": 4}.get(name, 14)
    assert found["differing"] == 0
    assert found["moved"] == pytest.approx(found["counted"], rel=0.1)  # some codes stand for a number twice
    assert found["moved"] > 100
    assert found["difference"] <= 1e-5 * found["largest"]
    assert found["kl"] <= 1e-10


def wrong(workshop: Workshop, base: Path, *overrides: str) -> str:
    config = workshop.config("wrong", f"model.base={base}", *overrides)
    resolved = Resolved.of(config, resolve_base(config.model))
    return "\n".join(mismatches(config, resolved.base.description, resolved.method, resolved.objective))


def test_a_run_that_cannot_compute_by_codes_is_refused_before_its_first_step(
    workshop: Workshop, bases: dict[str, Path]
) -> None:
    assert wrong(workshop, bases["int4"], *THROUGH) == ""
    for base, quant in ((bases["int4"], "nf4"), (workshop.base, "none")):
        said = wrong(workshop, base, *THROUGH, f"quant.type={quant}")
        assert f"in the codes of the base's files, and with quant.type: {quant} this base has none" in said
    assert "tuning.dropout: 0.1 drops inputs" in wrong(workshop, bases["int4"], *THROUGH, "tuning.dropout=0.1")
    with pytest.raises(ConfigError, match="tuning.through: has no effect with tuning.method: dora"):
        wrong(workshop, bases["int4"], *THROUGH, "tuning.method=dora")
    sampled = ("objective.name=grpo", "rollout.engine=serve", "rollout.reward=length")
    assert "rollout.engine: servers put the adapter beside the base" in wrong(
        workshop, bases["int4"], *THROUGH, *sampled
    )


def test_an_ordinary_adapter_goes_on_through_the_codes_and_not_to_the_nearest_ones(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path
) -> None:
    before = workshop.config("ordinary", f"model.base={bases['int4']}", "quant.type=stored", "model.dtype=fp32")
    commit(workshop.store.sub("ordinary"), before, dataset=workshop.prepare(before).train)
    config = workshop.config("on", f"model.base={bases['int4']}", *THROUGH, "tuning.start=ordinary", "train.steps=1")
    resolved = Resolved.of(config, resolve_base(config.model))
    beginning = find_beginning(config, resolved.method)
    assert beginning is not None
    assert beginning.differences(config, resolved.method, resolved.base) == []

    run = workshop.store.sub("through")
    commit(run, workshop.config("through", f"model.base={bases['int4']}", *THROUGH))
    form = find_format("merged", ["as=stored", "rounding=nearest"])
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    with pytest.raises(
        ConfigError, match="rounding: nearest gives other codes than those that the run was trained through"
    ):
        form.write(run, open_store(str(tmp_path / "merged")), None, quiet)
