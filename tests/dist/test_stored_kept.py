"""`quant.type: stored`: the bytes of the publisher are the shards, and what is trained is the decoded base in 16
bits.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.dist import curves, kept
from tests.dist.launch import launch
from tests.dist.proofs import export_and_prove
from tests.material import Workshop, commit, make_base
from tests.stored import read_files, store_as, store_in_fp8, store_in_mxfp4
from trainer.config import dump_config
from trainer.processes.bf16 import why_processor_is_slow

UNPACKED = ("data.packing=false",)  # gpt-oss


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    plain = folder / "plain"
    groups = make_base(plain / "groups", "qwen3-moe", moe_intermediate_size=96)
    gpt_oss = make_base(plain / "gpt-oss", "gpt-oss", hidden_size=96, intermediate_size=64, num_local_experts=4)
    sizes: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 576, "num_hidden_layers": 1}
    return {
        "int4": store_as(groups, folder / "int4", "int4-32", only="experts"),
        "mxfp4": store_in_mxfp4(gpt_oss, folder / "mxfp4"),
        "fp8": store_in_fp8(make_base(plain / "awkward", "qwen3", **sizes), folder / "fp8", (128, 128)),
        "fp4": store_as(groups, folder / "fp4", "fp4-scale", only="experts"),
        "nvfp4": store_as(groups, folder / "nvfp4", "nvfp4-modelopt", only="experts"),
        "zeros": store_as(groups, folder / "zeros", "int4-zeros", only="experts"),
    }


def kept_bytes(base: Path) -> int:
    """The bytes of a whole base in which codes and scales stay as they are, and all else is in bf16."""
    plain, stored = read_files(base / "decoded"), read_files(base)

    def held(name: str, tensor: Tensor) -> int:
        if name.endswith("weight_scale_2"):  # one number, which is held for each row
            return 4 * len(stored[name.removesuffix("_scale_2")])
        if name.endswith("weight_zero_point"):  # two codes a byte, which are held one by one
            return 2 * tensor.nbytes
        return 2 * tensor.numel() if name in plain and plain[name].dtype == tensor.dtype else tensor.nbytes

    left_out = ("weight_shape", "input_scale")
    return sum(held(name, tensor) for name, tensor in stored.items() if not name.endswith(left_out))


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["int4", "nvfp4"]),
        *(
            pytest.param(count, ["int4", "mxfp4", "fp8", "fp4", "nvfp4", "zeros"], marks=pytest.mark.long)
            for count in (1, 2, 3)
        ),
    ],
)
def test_logits_are_those_of_the_decoded_base_and_ranks_keep_the_stored_bytes(
    workshop: Workshop, bases: dict[str, Path], ranks: int, names: list[str]
) -> None:
    config = dump_config(workshop.config("kept", *UNPACKED))
    results = launch(ranks, kept.kept_and_decoded, config, [str(bases[name]) for name in names], timeout=200)
    for index, name in enumerate(names):
        base = bases[name]
        every: list[dict[str, Any]] = [rank[index] for rank in results]
        assert {facts["modules"] for facts in every} == {7 if name == "fp8" else 4}
        for facts in every:
            assert facts["difference"] <= 1e-5 * facts["largest"], name
            assert facts["kept_bytes"] == pytest.approx(kept_bytes(base) / ranks, rel=0.02)
        files = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        assert sum(facts["read_bytes"] for facts in every) <= 1.08 * files


@pytest.mark.long
def test_adapters_learn_on_experts_as_over_the_decoded_base(workshop: Workshop, bases: dict[str, Path]) -> None:
    configs = [
        workshop.config(f"{name}-{quant}", f"model.base={base}", f"quant.type={quant}", *UNPACKED, "model.dtype=bf16")
        for name, where in bases.items()
        for base, quant in ((where, "stored"), (where / "decoded", "none"))
    ]
    texts = [
        dump_config(
            config.model_copy(update={"tuning": config.tuning.model_copy(update={"experts": "fp8" not in name})})
        )
        for name, config in zip([name for name in bases for _ in range(2)], configs, strict=True)
    ]
    found: Any = launch(2, curves.losses_of_each, texts, workshop.prepare(configs[0]).train, timeout=400)
    for index in range(0, len(texts), 2):
        ours, theirs = found[0][index : index + 2]
        assert len(set(ours)) == 10
        # Without AVX-512 the order of the sums of a product in bf16 depends on its shape.
        assert ours == pytest.approx(theirs, rel=1e-5 if why_processor_is_slow() is None else 3e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_an_export_is_proven_over_the_stored_weights(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = workshop.config(f"export-{name}", f"model.base={bases[name]}", "quant.type=stored", *UNPACKED)
    run = workshop.store.sub(config.run.name)
    commit(run, config, dataset=workshop.prepare(config).train)
    export_and_prove(run, tmp_path / "adapter")
