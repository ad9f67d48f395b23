"""Modules of the base that learn beside an adapter are PEFT's modules to save: in gradients, exported and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dist import gradients, proofs
from tests.dist.launch import launch
from tests.dist.test_gradients import distance
from tests.dist.test_merge import merged_by_peft
from tests.families import rows
from tests.material import Workshop, commit, make_base
from trainer.config import Config, dump_config
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.store.store import Store, open_store

# Name -> base, method, and the modules that learn.
CASES = {
    "norms": ("llama", "lora", ["model.norm", "input_layernorm"]),
    "vocabulary": ("llama", "dora", ["embed_tokens", "lm_head"]),
    "tied": ("llama-tied", "rslora", ["embed_tokens", "model.norm"]),
    "ia3": ("llama", "ia3", ["model.norm", "lm_head"]),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("modules"))
    policy = here.policy.read_text()
    here.policy.write_text(policy.replace(": 600", ": 0"))  # every parameter in parts
    return here


def saving(workshop: Workshop, case: str, name: str, *overrides: str) -> Config:
    kind, method, modules = CASES[case]
    folder = workshop.folder / kind
    if not folder.exists():
        make_base(folder, kind, intermediate_size=192)
    tuning = {"method": method, "modules_to_save": modules} | ({} if method == "ia3" else {"rank": 8, "alpha": 16})
    settings = f"model.base={folder}", f"tuning={json.dumps(tuning)}"
    return workshop.config(name, *settings, *overrides)


@pytest.mark.parametrize(
    ("case", "quant"),
    rows(
        [("norms", "nf4"), ("vocabulary", "none"), ("tied", "nf4"), ("ia3", "none")],
        [("norms", "nf4"), ("vocabulary", "none")],
    ),
)
def test_gradients_are_those_of_pefts_modules_to_save(
    workshop: Workshop, tmp_path: Path, case: str, quant: str
) -> None:
    config = saving(workshop, case, "gradients", "model.dtype=fp32", f"quant.type={quant}")
    arguments = dump_config(config), workshop.prepare(config).train
    expected = tmp_path / "plain.safetensors"
    (plain,) = launch(1, gradients.plain_first_step, *arguments, str(expected))
    theirs = load_file(expected)
    whole = [name for name in theirs if "lora" not in name and "ia3" not in name]
    assert len(whole) == (3 if case == "norms" else 2)
    for ranks in (1, 2, 3) if case == "tied" else (2,):
        file = tmp_path / f"{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, *arguments, str(file))[0]
        assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
        assert distance(load_file(file), theirs) < 1e-5, ranks
    turned = {name: values.roll(1, 0) if name in whole else values for name, values in theirs.items()}
    assert distance(turned, theirs) > 0.1


@pytest.fixture(scope="module", params=rows(CASES, ["tied"]))
def run(request: pytest.FixtureRequest, workshop: Workshop) -> tuple[Store, Config]:
    """A run with a committed step, over a base in 4 bits."""
    config = saving(workshop, request.param, f"done-{request.param}")
    run = workshop.store.sub(config.run.name)
    commit(run, config, dataset=workshop.prepare(config).train)
    return run, config


def test_peft_reads_the_modules_and_has_the_logits_of_the_trained_model(
    run: tuple[Store, Config], tmp_path: Path
) -> None:
    store, config = run
    folder = tmp_path / "adapter"
    masters = master_weights(store, export_adapter(store, open_store(str(folder))))
    plain: Any = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(plain, str(folder))
    read = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): values
        for name, values in model.named_parameters()
        if "modules_to_save" in name
    }
    whole = {name for name in masters if "lora_" not in name and "ia3_" not in name}
    tied = {"lm_head.weight"} if "tied" in config.run.name else set[str]()
    assert read.keys() == whole | tied
    for name, values in read.items():
        learnt = masters["model.embed_tokens.weight" if name in tied else name]
        assert torch.equal(values, learnt.bfloat16()), name

    (proof,) = launch(1, proofs.export_proof, store.uri, 4, str(folder))
    assert Proof(**proof).holds
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_" not in name and "ia3_" not in name)
    weights[name] = weights[name].roll(1, -1)
    save_file(weights, file, metadata={"format": "pt"})
    (proof,) = launch(1, proofs.export_proof, store.uri, 4, str(folder))
    assert not Proof(**proof).holds


def test_a_merged_model_has_the_modules_and_is_what_peft_merges(run: tuple[Store, Config], tmp_path: Path) -> None:
    store, config = run
    merged = tmp_path / "merged"
    export_merged(store, open_store(str(merged)))
    expected = merged_by_peft(store, Path(config.model.base), tmp_path / "adapter").bfloat16().state_dict()
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.state_dict().keys() == expected.keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, expected[name]), name
    manifest = whole_checkpoint(store, 4)
    for name, values in master_weights(store, manifest).items():
        if "lora_" not in name and "ia3_" not in name:
            assert torch.equal(model.state_dict()[name], values.bfloat16()), name
    (proof,) = launch(1, proofs.merge_proof, store.uri, 4, str(merged))
    assert Proof(**proof).holds
