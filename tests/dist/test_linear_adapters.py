"""Adapters of linear layers over a sharded base are PEFT's: in gradients, exported and merged. LoRA's have tests of
their own."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.view.status import read_generation
from tests.dist import gradients, linear_adapters, proofs, runs, traffic
from tests.dist.launch import launch
from tests.dist.proofs import export_and_prove, one_start, proof_of
from tests.dist.test_gradients import distance
from tests.dist.test_merge import logits, merged_by_peft
from tests.families import rows
from tests.material import Workshop, commit, make_base
from tests.methods import methods_of
from trainer.base.find.locate import resolve_base
from trainer.config import Config, Tuning, dump_config, load_config
from trainer.export.figures import Proof
from trainer.export.trained import trained_checkpoint
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import LearntWeights, master_weights
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store
from trainer.tuning.linear_adapters import LinearAdapters
from trainer.tuning.lora import METHODS as LORA

METHODS = [method for method in methods_of(LinearAdapters) if method not in LORA]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base with biases in q, k and v; bitsandbytes' CPU kernels want rows of whole blocks."""
    here = Workshop(tmp_path_factory.mktemp("adapters"), "qwen2", intermediate_size=192)
    policy = here.policy.read_text()
    assert '"stage3_param_persistence_threshold": 600' in policy
    # Every parameter in parts, vectors too, so that a gather which is missing is seen.
    here.policy.write_text(policy.replace(": 600", ": 0"))
    return here


def adapting(workshop: Workshop, method: str, name: str, *overrides: str) -> Config:
    """A run of the workshop with the `tuning` of the method's own example, where it has one."""
    example = EXAMPLES / f"8b-{method}.yaml"
    tuning = load_config(example).tuning if example.exists() else Tuning(method=method)
    return workshop.config(name, *overrides).model_copy(update={"tuning": tuning})


def run_ranks(workshop: Workshop, config: Config, ranks: int, how: str = "start") -> list[float]:
    """The losses of this start's steps."""
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    outcomes = launch(ranks, runs.run, dump_config(config), workshop.prepare(config).train, how)
    assert [outcome["message"] for outcome in outcomes] == [""] * ranks
    return [record["loss"] for record in read_generation(run, 1 if how == "start" else 2)["step"]]


def committed(workshop: Workshop, config: Config) -> Store:
    """A run with a checkpoint of random numbers."""
    run = workshop.store.sub(config.run.name)
    commit(run, config)
    return run


@pytest.mark.parametrize(("quant", "worlds"), rows([("nf4", (2,)), ("nf4", (1, 3)), ("none", (2,))], [("nf4", (2,))]))
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_pefts_own_modules_on_documents_by_themselves(
    workshop: Workshop, tmp_path: Path, method: str, quant: str, worlds: tuple[int, ...]
) -> None:
    config = adapting(workshop, method, "gradients", "model.dtype=fp32", f"quant.type={quant}")
    arguments = dump_config(config), workshop.prepare(config).train
    expected = tmp_path / "plain.safetensors"
    (plain,) = launch(1, gradients.plain_first_step, *arguments, str(expected))
    theirs = load_file(expected)
    assert all(gradient.norm() > 0 for gradient in theirs.values())
    for ranks in worlds:
        file = tmp_path / f"{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, *arguments, str(file))[0]
        assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
        assert distance(load_file(file), theirs) < 1e-5, ranks


def test_doras_magnitudes_start_as_the_bases_row_norms_at_any_world_size_and_in_any_scope(
    workshop: Workshop, tmp_path: Path
) -> None:
    """And the model starts as its base, to the bit where no layer has a bias."""
    base = make_base(tmp_path / "base", "llama", intermediate_size=192)
    config_in = partial(adapting, workshop, "dora", "start", f"model.base={base}")
    start = one_start(config_in, ((1, 1), (3, 3), (4, 2)), tmp_path)
    expected = linear_adapters.row_norms(base)
    assert len(expected) == 14
    for path, norms in expected.items():
        assert torch.equal(start[f"{path}.lora_magnitude_vector"], norms), path


def test_dora_gathers_no_more_of_the_base_than_lora(workshop: Workshop, tmp_path: Path) -> None:
    """In a policy that keeps nothing for the next use: a weight that a layer's norm lost would be gathered again."""
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    packed: dict[str, list[float]] = {}
    for method in ("lora", "dora"):
        settings = (f"tuning.method={method}", f"sharding.deepspeed={tmp_path}/policy.json", "tuning.dropout=0.1")
        config = workshop.config(f"traffic-{method}", *settings)
        results = launch(2, traffic.step_traffic, dump_config(config), workshop.prepare(config).train)
        packed[method] = [received["inside"]["torch.uint8"] for received in results]
    assert all(0 < dora <= lora for dora, lora in zip(packed["dora"], packed["lora"], strict=True))


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, workshop: Workshop) -> Store:
    """A run with a committed step of a method, over a base in 4 bits."""
    return committed(workshop, adapting(workshop, request.param, f"{request.param}-done"))


def test_peft_has_the_logits_of_the_trained_model_and_a_broken_file_is_caught(run: Store, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export_and_prove(run, folder)

    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name] = weights[name].roll(1, 0 if weights[name].shape[0] > 1 else 1)
    save_file(weights, file, metadata={"format": "pt"})
    assert not proof_of(run, folder).holds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen2", torch.bfloat16), pytest.param("llama-tied", torch.float32, marks=pytest.mark.long)]
)
def test_a_merged_model_is_what_peft_merges(
    workshop: Workshop, tmp_path: Path, method: str, kind: str, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", kind, dtype, intermediate_size=192)  # which blocks divide
    run = committed(workshop, adapting(workshop, method, f"{method}-{kind}", f"model.base={base}"))
    export_merged(run, open_store(str(tmp_path / "merged")))

    expected = merged_by_peft(run, base, tmp_path / "adapter").to(dtype).state_dict()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert expected.keys() == model.state_dict().keys()
    changed = set[str]()
    # A product of matrices rounds its last bit by its number of rows: PEFT rotates all at once, a merge a part.
    apart = 2e-7 if method == "oft" and dtype == torch.float32 else 0.0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=apart, atol=apart, msg=lambda text, name=name: f"{name}: {text}"
        )
        if not torch.equal(value, plain.state_dict()[name]):
            changed.add(name)
    _, config, trained = trained_checkpoint(run, 4)
    updates = trained.updates(
        LearntWeights(run, read_manifest(run, 4), torch.bfloat16), resolve_base(config.model).architecture
    )
    assert changed == updates.keys()
    assert any(name.endswith(".bias") for name in changed) == ((method, kind) == ("ia3", "qwen2"))
    plain.load_state_dict(expected)
    torch.testing.assert_close(logits(model), logits(plain), rtol=50 * apart, atol=50 * apart)


def test_a_merge_is_proven_and_a_broken_file_is_caught(run: Store, tmp_path: Path) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))
    assert Proof(**proof).holds
    file = next(
        path for path in (tmp_path / "merged").glob("*.safetensors") if any("down_proj" in n for n in load_file(path))
    )
    weights = load_file(file)
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name].roll(1, 0)
    save_file(weights, file, metadata={"format": "pt"})
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))
    assert not Proof(**proof).holds


def test_peft_reads_every_parameter_of_an_export(run: Store, workshop: Workshop, tmp_path: Path) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    base: Any = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    read = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    masters = {name.removesuffix(".weight"): value for name, value in master_weights(run, manifest).items()}
    assert read.keys() == masters.keys()
    assert all(torch.equal(read[name].float(), value.bfloat16().float()) for name, value in masters.items())
