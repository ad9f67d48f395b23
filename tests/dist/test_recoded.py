"""A merged model in fewer bits is what bitsandbytes makes of the merged one, and what our own decoders read, in files
of its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.export import export_run
from tests.dist import proofs
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_base
from trainer.base.find.locate import resolve_base
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.export.destination import ExportProgress, Written
from trainer.export.figures import Proof
from trainer.export.format import find_format
from trainer.export.write.merged import export_merged
from trainer.store.safetensors_index import numel
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Its matrices are 128 and 192 wide, and some have 64 rows: not all are whole tiles of FP8."""
    return Workshop(tmp_path_factory.mktemp("recoded"), hidden_size=128, head_dim=32, intermediate_size=192)


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Store:
    run = workshop.store.sub("done")
    commit(run, workshop.config("done", "quant.block_size=64"))
    return run


def exported(run: Store, destination: Store, form: str, *options: str) -> Written:
    return find_format(form, options).write(run, destination, None, ExportProgress(lambda done, total: None, print))


def relative_error(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The root of the mean square, in units of that of `other`."""
    difference = sum(float((one[name].float() - other[name].float()).square().sum()) for name in other)
    return (difference / sum(float(value.float().square().sum()) for value in other.values())) ** 0.5


@pytest.mark.parametrize("double", [False, True])
def test_in_4_bits_it_is_what_transformers_and_bitsandbytes_make_of_the_merged_model(
    run: Store, tmp_path: Path, double: bool
) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")))
    written = exported(run, open_store(str(tmp_path / "nf4")), "nf4", f"double={double}")
    assert written.facts["untouched"] == ["lm_head"]

    settings: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, quantization_config=settings
    )
    ours: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if ".quant_state." not in name:  # the JSON of ours is filled up with spaces
            assert torch.equal(value, expected[name]), name
    layers = [module for module in ours.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == written.facts["matrices"] == 14
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    assert 0.05 < written.facts["weight_error"] < 0.15
    if not double:
        decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16).dequantize().state_dict()  # pyright: ignore[reportAttributeAccessIssue]
        quantized = {name: value for name, value in merged.items() if name.endswith("_proj.weight")}
        assert abs(relative_error(decoded, quantized) - written.facts["weight_error"]) < 1e-3


def test_in_fp8_transformers_and_our_own_decoder_read_the_same_weights(run: Store, tmp_path: Path) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")))
    written = exported(run, open_store(str(tmp_path / "fp8")), "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    # 64 rows or 192 are no whole tiles. Servers compute q_proj as one matrix with k_proj, so it stays too.
    uneven = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert {name.rpartition(".")[2] for name in written.facts["untouched"]} == uneven
    assert written.facts["matrices"] == 2
    assert "o_proj" not in written.remarks[0]
    assert "model.layers.0.self_attn.k_proj" in written.remarks[0]

    config["quantization_config"]["dequantize"] = True
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    base = resolve_base(Model(base=str(tmp_path / "fp8")))
    for name, source in base.weights.items():
        ours = torch.frombuffer(source.read(0, numel(source)), dtype=torch.bfloat16).view(source.shape)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        assert torch.equal(ours, theirs[name]), name
        assert torch.equal(ours, merged[name]) == (not name.endswith("o_proj.weight")), name
    quantized = {name: merged[name] for name in merged if name.endswith("o_proj.weight")}
    assert 0.01 < written.facts["weight_error"] < 0.04
    assert abs(relative_error(theirs, quantized) - written.facts["weight_error"]) < 1e-3


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_the_files_are_streamed_and_the_same_in_a_bucket(run: Store, tmp_path: Path, form: str, s3: Any) -> None:
    folder, bucket = open_store(str(tmp_path / form)), open_store(f"{s3.uri('recoded')}/{form}")
    exported(run, folder, form)
    exported(run, bucket, form)
    names = [entry.key for entry in folder.list()]
    assert [entry.key for entry in bucket.list()] == names
    assert [bucket.get(name) for name in names] == [folder.get(name) for name in names]
    index = json.loads(folder.get("model.safetensors.index.json"))
    files = {name: load_file(tmp_path / form / name) for name in set(index["weight_map"].values())}
    assert len(files) > 1
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    with pytest.raises(ConfigError, match="is not empty"):
        exported(run, folder, form)


def test_verify_tells_how_far_the_predictions_are_from_those_of_the_training(run: Store, tmp_path: Path) -> None:
    far = tmp_path / "coarse"
    exported(run, open_store(str(tmp_path / "fp8")), "fp8")
    exported(run, open_store(str(far)), "nf4", "block_size=64")
    good, coarse = launch(1, proofs.recoded_proofs, run.uri, 4, [str(tmp_path / "fp8"), str(far)], timeout=300)[0]
    assert Proof(**good).holds
    assert 0 < good["kl"] < good["kl_allowed"] < good["kl_effect"]
    assert coarse["kl"] > 0


def test_experts_are_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral")
    run = workshop.store.sub("mixture")
    commit(run, workshop.config("mixture", f"model.base={base}"))
    for form in ("nf4", "fp8"):
        with pytest.raises(
            ConfigError, match="transformers cannot load the experts of this base in this form. Take --format merged"
        ):
            exported(run, open_store(str(tmp_path / form)), form)
        assert not (tmp_path / form).exists()
        with pytest.raises(ConfigError, match="the experts of this base in this form"):
            export_run(run, str(tmp_path / form), form, dry_run=True)
