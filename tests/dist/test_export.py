"""An exported adapter is an ordinary PEFT directory that holds what the run learnt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.smoke.local_s3 import S3Server
from tests.dist import proofs, runs
from tests.dist.launch import launch
from tests.material import Workshop, commit, quantize_base
from trainer.config import dump_config
from trainer.errors import ConfigError, NothingToResume, StorageError
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import Store, open_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished run of two ranks, committed after steps 1, 2 and 4."""
    # bitsandbytes' fused CPU kernel, which plain transformers uses where it can, wants widths that divide by 32.
    workshop = Workshop(tmp_path_factory.mktemp("export"), intermediate_size=192)
    config = workshop.config(
        "done", "train.steps=4", "checkpoint.every_steps=2", "optim.lr=0.01", "tuning.rank=5", "quant.block_size=128"
    )
    run = workshop.store.sub("done")
    run.put(layout.CONFIG, dump_config(config).encode())
    outcomes = launch(2, runs.run, dump_config(config), workshop.prepare(config).train)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}
    assert committed_steps(run) == [4, 2, 1]
    return run


def copy(run: Store, to: Path) -> Store:
    source = Path(run.uri.removeprefix("file://"))
    shutil.copytree(source, to / "store" / source.name)
    return open_store(str(to / "store")).sub(source.name)


def flip_a_byte(run: Store, key: str) -> None:
    data = run.get(key)
    run.put(key, data[:-1] + bytes([data[-1] ^ 0x10]))


def test_peft_loads_the_adapter_and_finds_the_master_weights(run: Store, tmp_path: Path) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    assert manifest.step == 4
    base: Any = AutoModelForCausalLM.from_pretrained(manifest.base["path"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    masters = master_weights(run, manifest)
    adapters = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(adapters) == len(masters) == 2 * 7 * 2
    for name, value in masters.items():
        assert torch.equal(adapters[f"base_model.model.{name}"], value.bfloat16()), name
    assert all(value.any() for value in masters.values()), "something was never trained"


def test_transformers_and_peft_predict_what_the_trained_model_predicts(run: Store, tmp_path: Path) -> None:
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    (proof,) = launch(1, proofs.export_proof, run.uri, 4, str(tmp_path / "adapter"))

    assert Proof(**proof).holds
    assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"]
    assert (proof["computed_in"], proof["rows"]) == ("fp32", "8 rows of the training data")


@pytest.mark.long
def test_a_right_export_of_a_deep_base_with_large_logits_is_proven_where_its_single_logits_differ(
    tmp_path: Path,
) -> None:
    """As real models have them: logits of 70, sliding windows, and twenty-four layers that add up what rounding
    does.
    """
    workshop = Workshop(tmp_path, "gemma3", intermediate_size=192, num_hidden_layers=24)
    for file in workshop.base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = 20 * (1 + tensors["model.norm.weight"].float()).bfloat16() - 1
            save_file(tensors, file, metadata={"format": "pt"})
    config = workshop.config("loud")
    run = workshop.store.sub("loud")
    commit(run, config, dataset=workshop.prepare(config).train)
    export_adapter(run, open_store(str(tmp_path / "adapter")))

    (found,) = launch(1, proofs.proof_in_bf16, run.uri, 4, str(tmp_path / "adapter"), timeout=300)
    assert found["largest_logit"] > 50
    assert found["largest_difference"] > 0.02 * found["largest_logit"], "a rule for single logits would have held"
    assert Proof(**found["proof"]).holds
    assert found["proof"]["computed_in"] == "bf16"
    (proof,) = launch(1, proofs.export_proof, run.uri, 4, str(tmp_path / "adapter"), timeout=300)
    assert Proof(**proof).holds
    assert (proof["computed_in"], proof["kl_allowed"] < 1e-6) == ("fp32", True)


def test_constants_that_are_rounded_to_the_type_of_the_model_are_those_of_the_training(tmp_path: Path) -> None:
    """Gemma multiplies embeddings by sqrt(48), which is 6.9375 in bf16 and 6.9282 in fp32."""
    workshop = Workshop(tmp_path, "gemma3", intermediate_size=192, hidden_size=48)
    config, run = workshop.config("scaled"), workshop.store.sub("scaled")
    commit(run, config, dataset=workshop.prepare(config).train)
    export_adapter(run, open_store(str(tmp_path / "adapter")))

    (proof,) = launch(1, proofs.export_proof, run.uri, 4, str(tmp_path / "adapter"), timeout=300)
    assert Proof(**proof).holds
    assert (proof["computed_in"], proof["kl_allowed"] < 1e-6) == ("fp32", True)


def test_an_export_over_a_base_that_is_stored_in_4_bits_is_proven_against_the_rounding_of_bf16(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, intermediate_size=192)
    base = quantize_base(workshop.base, tmp_path / "4bit", bnb_4bit_quant_type="nf4")
    config, run = workshop.config("packed", f"model.base={base}"), workshop.store.sub("packed")
    commit(run, config, dataset=workshop.prepare(config).train)
    export_adapter(run, open_store(str(tmp_path / "adapter")))

    (proof,) = launch(1, proofs.export_proof, run.uri, 4, str(tmp_path / "adapter"), timeout=200)
    assert Proof(**proof).holds
    assert (proof["computed_in"], proof["rows"]) == ("bf16", "8 rows of the training data")
    assert 0 < proof["kl"] < proof["kl_allowed"] < 0.01 * proof["kl_effect"]


def test_a_merged_model_in_plain_transformers_is_base_and_adapter_and_close_to_what_was_trained(
    run: Store, tmp_path: Path
) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))

    assert Proof(**proof).holds
    # Rounding the sums costs something; the error of quantizing the base, which is not merged into, more.
    assert proof["kl_allowed"] < proof["rounding_kl"] < proof["trained_kl"]


def test_the_directory_has_the_tokenizer_the_settings_and_the_runs_facts(run: Store, tmp_path: Path) -> None:
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (5, 16, "LORA")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == 259
    card = (tmp_path / "adapter/README.md").read_text()
    assert "| step | 4 |" in card
    assert "library_name: peft" in card
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_destination_that_holds_something_is_refused(run: Store, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="is not empty"):
        export_adapter(run, open_store(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_a_whole_export_is_no_half_one_and_stays_as_it_is(run: Store, tmp_path: Path, export: Any) -> None:
    export(run, open_store(str(tmp_path)), 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="is not empty"):
        export(run, open_store(str(tmp_path)), 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_step_can_be_chosen(run: Store, tmp_path: Path) -> None:
    assert export_adapter(run, open_store(str(tmp_path / "two")), step=2).step == 2
    with pytest.raises(ConfigError, match="of step 3. Its steps are: 1, 2, 4"):
        export_adapter(run, open_store(str(tmp_path / "three")), step=3)
    assert not (tmp_path / "three").exists()


def test_a_bucket_gets_the_files_that_a_folder_gets(run: Store, tmp_path: Path, s3: S3Server) -> None:
    folder, bucket = open_store(str(tmp_path / "adapter")), open_store(f"{s3.uri('exports')}/adapter")
    export_adapter(run, folder)
    export_adapter(run, bucket)
    names = [entry.key for entry in folder.list()]
    assert [entry.key for entry in bucket.list()] == names
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(names)
    assert [bucket.get(name) for name in names] == [folder.get(name) for name in names]


def test_without_the_weights_of_the_base_there_is_an_export_but_not_without_its_folder(
    run: Store, tmp_path: Path
) -> None:
    base = Path(read_manifest(run, 4).base["path"])
    away = base.with_name("away")
    away.mkdir()
    for file in base.glob("*.safetensors"):
        file.rename(away / file.name)
    try:
        export_adapter(run, open_store(str(tmp_path / "adapter")))
    finally:
        for file in away.iterdir():
            file.rename(base / file.name)
    base.rename(tmp_path / "moved")
    try:
        with pytest.raises(ConfigError, match="model.base: the directory .* does not exist"):
            export_adapter(run, open_store(str(tmp_path / "none")))
    finally:
        (tmp_path / "moved").rename(base)


def test_a_damaged_checkpoint_is_passed_over_and_none_at_all_is_an_error(run: Store, tmp_path: Path) -> None:
    ours, destination = copy(run, tmp_path), open_store(str(tmp_path / "adapter"))
    flip_a_byte(ours, read_manifest(ours, 4).shards[0].key)
    assert export_adapter(ours, open_store(str(tmp_path / "older"))).step == 2
    flip_a_byte(ours, read_manifest(ours, 2).shards[0].key)
    with pytest.raises(StorageError, match="step 4 .* is not whole: .* does not match its sha256"):
        export_adapter(ours, destination, step=4)
    ours.delete(read_manifest(ours, 1).shards[1].key)
    with pytest.raises(StorageError, match="no checkpoint of .* is whole"):
        export_adapter(ours, destination)
    for step in committed_steps(ours):
        ours.delete(layout.manifest(step))
    with pytest.raises(NothingToResume, match="has no committed checkpoint"):
        export_adapter(ours, destination)
    assert not (tmp_path / "adapter").exists()
