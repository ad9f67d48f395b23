"""A base in FP8 or MXFP4 is, at any number of ranks, the one that it is in 16 bits, for about the bytes of its
files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import curves, loading, proofs
from tests.dist.launch import launch
from tests.dist.proofs import export_and_prove
from tests.material import Workshop, commit, make_base
from tests.stored import edit_config, read_files, store_as, store_in_4_bits, store_in_fp8, store_in_mxfp4
from trainer.config import dump_config
from trainer.export.figures import Proof
from trainer.export.write import decoded
from trainer.export.write.merged import export_merged
from trainer.store.store import Store, open_store

UNPACKED = ("data.packing=false",)  # gpt-oss
# Packed matrices of each: linear layers, and stacks of experts.
MATRICES = {
    "llama": 2 * 7,
    "latent": 18,
    "awkward": 7,
    "whole": 2 * 7,
    **dict.fromkeys(("gptq", "awq"), 7),
    **dict.fromkeys(("experts", "gpt-oss", "int4"), 2 * (4 + 2)),
}
GPTQ: dict[str, Any] = {"num_key_value_heads": 1, "intermediate_size": 80, "num_hidden_layers": 1}
AWQ: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}
WRONG = "wrong"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases as their makers store them; tiles that divide no side of an MLP, and scales of every type."""
    folder = tmp_path_factory.mktemp("stored")
    plain = folder / "plain"
    llama, experts = make_base(plain / "llama"), make_base(plain / "experts", "qwen3-moe")
    # A dense layer, and one of experts that are stored singly beside a shared one and a buffer of the router's.
    latent = make_base(plain / "latent", "deepseek-v3")
    # Matrices of 192 and 576 rows in tiles of 128, as DeepSeek and Qwen have them.
    sizes: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 576, "num_hidden_layers": 1}
    awkward = make_base(plain / "awkward", "qwen3", **sizes)
    # As many experts as ranks share well, so that few are read twice.
    gpt_oss = make_base(plain / "gpt-oss", "gpt-oss", hidden_size=96, intermediate_size=64, num_local_experts=12)
    # Experts of whole groups of 32 columns.
    groups = make_base(plain / "groups", "qwen3-moe", moe_intermediate_size=96)
    return {
        "llama": store_in_fp8(llama, folder / "llama", (16, 32)),
        "latent": store_in_fp8(latent, folder / "latent", (16, 32)),
        "awkward": store_in_fp8(awkward, folder / "awkward", (128, 128), torch.bfloat16),
        "whole": store_in_fp8(llama, folder / "whole", None, torch.bfloat16, ("activation_scale",)),
        "experts": store_in_fp8(experts, folder / "experts", (16, 32), torch.float8_e8m0fnu),
        "gpt-oss": store_in_mxfp4(gpt_oss, folder / "gpt-oss"),
        "int4": store_as(groups, folder / "int4", "int4-32", only="experts"),
        "gptq": store_as(make_base(plain / "gptq", **GPTQ), folder / "gptq", "gptq-4-16"),
        "awq": store_as(make_base(plain / "awq", **AWQ), folder / "awq", "awq"),
    }


def as_stored(base: Path) -> Path:
    """A base that is the one in 16 bits itself."""
    shutil.copytree(base, base.parent / "decoded")
    (base.parent / "decoded").rename(base / "decoded")
    return base


@pytest.fixture(scope="module")
def stock(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    """The logits of transformers and bitsandbytes over the same bases in 16 bits, by base and quantization."""
    found = {}
    for quant, (quant_type, double) in {
        "nf4": ("nf4", False),
        "double": ("nf4", True),
        "none": ("none", False),
    }.items():
        folder = tmp_path_factory.mktemp(quant)
        for name, base in bases.items():
            (folder / name).symlink_to(base / "decoded")
        launch(1, loading.stock_logits, [str(folder / name) for name in bases], quant_type, double, str(folder))
        found |= {(name, quant): load_file(folder / f"{name}.safetensors")["logits"] for name in bases}
    return found


@pytest.mark.parametrize(
    ("world_size", "quants"),
    [(3, ["double"]), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, ["nf4"]), (2, ["nf4", "none"])))],
)
def test_packed_bytes_and_logits_are_those_of_the_same_base_in_16_bits(
    workshop: Workshop,
    bases: dict[str, Path],
    stock: dict[tuple[str, str], torch.Tensor],
    tmp_path: Path,
    world_size: int,
    quants: list[str],
) -> None:
    settings = {"nf4": [], "none": ["quant.type=none"], "double": ["quant.double=true"]}
    cases = [(name, quant) for name in bases for quant in quants]
    loads = [(f"{name}-{quant}", str(bases[name]), settings[quant]) for name, quant in cases]
    config = dump_config(workshop.config("load", *UNPACKED))
    results = launch(world_size, loading.stored_bases, config, loads, str(tmp_path), timeout=200)
    for index, (name, quant) in enumerate(cases):
        facts = [rank[index] for rank in results]
        assert [fact["differing"] for fact in facts] == [[]] * world_size
        assert {fact["compared"] for fact in facts} == {0 if quant == "none" else MATRICES[name]}
        assert torch.equal(load_file(tmp_path / f"{name}-{quant}.safetensors")["logits"], stock[name, quant]), name
        files = sum(path.stat().st_size for path in bases[name].glob("*.safetensors"))
        assert sum(fact["read_bytes"] for fact in facts) <= 1.25 * files, name


@pytest.mark.long
def test_ranks_read_a_matrix_together_whose_files_have_its_transpose(workshop: Workshop, tmp_path: Path) -> None:
    """Of whole groups of 16 inputs, and of widths that no number of ranks divides."""
    bases = {
        "gptq": store_as(make_base(tmp_path / "plain", **GPTQ), tmp_path / "gptq", "gptq-4-16"),
        "gpt2": as_stored(make_base(tmp_path / "gpt2", model_type="gpt2", hidden_size=60)),
    }
    quants = {"double": ["quant.double=true"], "none": ["quant.type=none"]}
    loads = [(f"{name}-{quant}", str(base), how) for name, base in bases.items() for quant, how in quants.items()]
    results = launch(3, loading.stored_bases, dump_config(workshop.config("load")), loads, str(tmp_path))
    for index, (name, base, _) in enumerate(loads):
        facts, packed = [rank[index] for rank in results], 7 if "gptq" in name else 2 * 4
        assert [fact["differing"] for fact in facts] == [[]] * 3
        assert {fact["compared"] for fact in facts} == {packed if "double" in name else 0}
        files = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
        assert sum(fact["read_bytes"] for fact in facts) <= 1.08 * files, name


def test_experts_that_were_quantized_singly_stay_as_they_are_where_their_blocks_are_the_stacks(
    workshop: Workshop, tmp_path: Path
) -> None:
    """The first matrix of each expert is 43 whole blocks of one base, and 24 and a part of another; scales in 8 bits
    have blocks and a mean for each matrix, so what is fused must be quantized anew with them."""
    plain = {kind: make_base(tmp_path / "plain" / kind, kind) for kind in ("qwen3-moe", "mixtral")}
    loads = list[tuple[str, str, list[str]]]()
    for name, kind, double, experts in (
        ("whole", "qwen3-moe", False, True),
        ("parts", "mixtral", False, True),
        ("double", "qwen3-moe", True, True),
        ("in-16-bits", "qwen3-moe", False, False),
    ):
        base = store_in_4_bits(plain[kind], tmp_path / name, double=double, experts=experts)
        loads.append((name, str(base), [f"quant.double={str(double).lower()}"]))
    results = launch(3, loading.stored_bases, dump_config(workshop.config("load")), loads, str(tmp_path))
    stacks = {f"model.layers.{layer}.mlp.experts.{part}_proj" for layer in (0, 1) for part in ("gate_up", "down")}
    fused = {name for name in stacks if "gate_up" in name}
    for whole, parts, double, in_16_bits in results:
        assert {facts["compared"] for facts in (whole, parts, double, in_16_bits)} == {2 * (4 + 2)}
        assert (whole["other"], whole["differing"]) == ([], [])
        assert (set(parts["other"]) <= fused, parts["differing"]) == (True, [])
        assert parts["other"], "the control: other blocks are other weights"
        # Scales that were rounded to 8 bits once are other ones when they are again.
        assert set(double["other"]) == fused
        assert not any(name in line for line in double["differing"] for name in fused)
        assert (set(in_16_bits["other"]), in_16_bits["differing"]) == (stacks, [])
    for of_ranks, (_, base, _) in zip(zip(*results, strict=True), loads, strict=True):
        files = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
        assert sum(facts["read_bytes"] for facts in of_ranks) < 1.5 * files


@pytest.mark.long
def test_a_cached_base_is_the_same_and_a_wrong_tile_shows(
    workshop: Workshop, bases: dict[str, Path], stock: dict[tuple[str, str], torch.Tensor], tmp_path: Path
) -> None:
    wrong = store_in_fp8(bases["llama"].parent / "plain" / "llama", tmp_path / WRONG, (16, 32))
    # As many tiles as those of 16 x 32 are.
    edit_config(wrong, quantization_config={"quant_method": "fp8", "weight_block_size": [17, 33]})
    cache = ["quant.cache=true"]
    loads = [
        (f"{name}-{when}", str(bases[name]), cache) for name in ("llama", "gpt-oss") for when in ("first", "later")
    ]
    config = dump_config(workshop.config("load", *UNPACKED))
    results = launch(2, loading.stored_bases, config, [*loads, (WRONG, str(wrong), [])], str(tmp_path))
    for index, name in ((0, "llama"), (2, "gpt-oss")):
        for when in ("first", "later"):
            assert torch.equal(load_file(tmp_path / f"{name}-{when}.safetensors")["logits"], stock[name, "nf4"])
        first, later = ([rank[number] for rank in results] for number in (index, index + 1))
        assert sum("the quantized base is cached in" in line for line in first[0]["log"]) == 1
        assert not any("cached in" in line for line in later[0]["log"])
        assert sum(fact["read_bytes"] for fact in later) < sum(fact["read_bytes"] for fact in first)
        assert [fact["differing"] for fact in later] == [[], []]
    assert len(results[0][-1]["differing"]) == 3 * MATRICES["llama"]  # weights, dequantized weights and scales of each


@pytest.mark.long
def test_ten_steps_have_the_losses_of_the_same_base_in_16_bits(workshop: Workshop, bases: dict[str, Path]) -> None:
    runs = [bases["experts"], bases["experts"] / "decoded", bases["gpt-oss"], bases["gpt-oss"] / "decoded"]
    configs = [
        workshop.config(f"run-{index}", f"model.base={base}", *UNPACKED, "checkpoint.every_steps=0")
        for index, base in enumerate(runs)
    ]
    fingerprint = workshop.prepare(configs[0]).train
    found: Any = launch(2, curves.losses_of_each, [dump_config(config) for config in configs], fingerprint, timeout=200)
    experts, experts_decoded, gpt_oss, gpt_oss_decoded = found[0]
    assert len(set(experts)) == len(set(gpt_oss)) == 10
    assert experts == experts_decoded != gpt_oss == gpt_oss_decoded


def committed(workshop: Workshop, name: str, base: Path) -> Store:
    config = workshop.config(name, f"model.base={base}", *UNPACKED)
    run = workshop.store.sub(config.run.name)
    commit(run, config, dataset=workshop.prepare(config).train)
    return run


@pytest.mark.parametrize("name", ["awkward", "gpt-oss"])
def test_an_export_is_proven_by_transformers_own_decoding(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    export_and_prove(committed(workshop, f"export-{name}", bases[name]), tmp_path / "adapter")


@pytest.mark.parametrize(
    "name", ["int4", "gptq", "awq", *(pytest.param(name, marks=pytest.mark.long) for name in ("awkward", "gpt-oss"))]
)
def test_a_merged_model_is_that_of_the_same_base_in_16_bits(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(decoded, "_FILE_BYTES", 50_000)  # several files
    for folder, base in (("merged", bases[name]), ("expected", bases[name] / "decoded")):
        run = committed(workshop, f"{folder}-{name}", base)
        export_merged(run, open_store(str(tmp_path / folder)))
    found, expected = (read_files(tmp_path / folder) for folder in ("merged", "expected"))
    before = read_files(bases[name] / "decoded")
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if name in ("gptq", "awq"):  # what is decoded has the type of the scales, as in transformers
        assert {found[key].dtype for key in found if "proj" in key} == {torch.float16}
        assert {found[key].dtype for key in found if "proj" not in key} == {torch.bfloat16}
    assert any(not torch.equal(found[key], before[key]) for key in before)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    settings = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("merged", "expected")]
    assert settings[0] == settings[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["awkward", "gpt-oss", "int4"])
def test_a_merge_into_decoded_weights_is_proven(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run = committed(workshop, f"proven-{name}", bases[name])
    export_merged(run, open_store(str(tmp_path / "merged")))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))
    assert Proof(**proof).holds
    assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"]
