"""LoRA on a mixture's experts over a sharded base is PEFT's: in gradients, exported and merged."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.view.status import read_generation
from tests.dist import experts, gradients, proofs, runs
from tests.dist.launch import launch
from tests.dist.proofs import export_and_prove, one_start, proof_of
from tests.dist.test_gradients import distance
from tests.dist.test_linear_adapters import committed
from tests.dist.test_merge import merged_by_peft
from tests.material import Workshop, make_base
from trainer.config import Config, dump_config
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.store.store import Store, open_store

# A base -> sizes that torch's grouped products take; transformers' default experts take no others.
SIZES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"moe_intermediate_size": 48, "num_experts": 6},
    "gpt-oss": {"hidden_size": 64, "intermediate_size": 48, "head_dim": 16},  # transposed stacks, biases
}
# gpt-oss' masks have no borders of documents.
SETTINGS = {"gpt-oss": ("data.packing=false",)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("experts"), "qwen3-moe", **SIZES["qwen3-moe"])
    policy = here.policy.read_text()
    here.policy.write_text(policy.replace(": 600", ": 0"))  # every parameter in parts
    return here


def adapting(workshop: Workshop, kind: str, name: str, *overrides: str) -> Config:
    """Experts have adapters of rank 3, which is no whole 16 bytes, linear layers of rank 8."""
    folder = workshop.folder / kind
    if not folder.exists():
        make_base(folder, kind, **SIZES.get(kind, {}))
    settings = (f"model.base={folder}", "tuning.experts=true", "tuning.experts_rank=3", *SETTINGS.get(kind, ()))
    return workshop.config(name, *settings, *overrides)


@pytest.mark.parametrize(
    ("kind", "quant", "worlds"),
    [
        ("qwen3-moe", "nf4", (1, 2)),
        pytest.param("qwen3-moe", "nf4", (1, 3), marks=pytest.mark.long),
        pytest.param("gpt-oss", "none", (1, 2), marks=pytest.mark.long),
        pytest.param("mixtral", "nf4", (1, 2), marks=pytest.mark.long),  # widths of 35 and 43
    ],
)
def test_gradients_are_pefts_and_those_of_one_rank_at_any_world_size(
    workshop: Workshop, tmp_path: Path, kind: str, quant: str, worlds: tuple[int, ...]
) -> None:
    config = adapting(workshop, kind, "gradients", "model.dtype=fp32", f"quant.type={quant}")
    arguments = dump_config(config), workshop.prepare(config).train
    expected = tmp_path / "plain.safetensors"
    (plain,) = launch(1, gradients.plain_first_step, *arguments, str(expected))
    theirs = load_file(expected)
    stacked = [name for name in theirs if ".adapters." in name]
    assert len(stacked) == 2 * 2 * 2  # layers, stacks, A and B
    assert all(gradient.norm() > 0 for gradient in theirs.values())
    ours: dict[int, dict[str, torch.Tensor]] = {}
    for ranks in worlds:
        file = tmp_path / f"{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, *arguments, str(file))[0]
        assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
        ours[ranks] = load_file(file)
        assert distance(ours[ranks], theirs) < 1e-5, ranks
        assert distance(ours[ranks], ours[1]) < 1e-6, ranks
    turned = {name: values.roll(1, 0) if name in stacked else values for name, values in theirs.items()}
    assert distance(turned, theirs) > 0.1, "the control: the experts' gradients are not alike"


def test_the_routers_balancing_loss_is_that_of_each_row_at_any_world_size(workshop: Workshop, tmp_path: Path) -> None:
    found: dict[tuple[str, int], tuple[float, dict[str, torch.Tensor]]] = {}
    for weight, ranks in (("0", 1), ("0.5", 1), ("0.5", 2)):
        settings = (f"objective.router_loss={weight}", "objective.router_loss_of=layers")[: 1 if weight == "0" else 2]
        config = adapting(workshop, "qwen3-moe", "balance", "model.dtype=fp32", "quant.type=none", *settings)
        file = tmp_path / f"{weight}-{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, dump_config(config), workshop.prepare(config).train, str(file))[0]
        found[weight, ranks] = record["loss"], load_file(file)
    (loss, without), (one, at_one), (two, at_two) = found.values()
    assert two == pytest.approx(one, rel=1e-6)
    assert 1.0 < (one - loss) / 0.5 / 2 < 1.5, "about 1 for each of two layers"
    assert distance(at_two, at_one) < 1e-6
    assert distance(without, at_one) > 1e-3


# Stacks beside shared experts and dense layers, without a gate, transposed and of a class without an interface, beside
# a dense MLP.
OTHERS = ("deepseek-v3", "nemotron-h", "llama4", "gemma4-moe")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_gradients_of_other_families_are_those_of_one_rank_at_two_and_three(workshop: Workshop, tmp_path: Path) -> None:
    """In fp32; one start of the ranks goes over all families."""
    loads = list[tuple[str, str]]()
    for kind in OTHERS:
        make_base(tmp_path / kind, kind, torch.float32)
        settings = ("tuning.experts=true", "tuning.experts_rank=3", "model.dtype=fp32", "quant.type=none")
        config = workshop.config("gradients", f"model.base={tmp_path / kind}", *settings)
        loads.append((dump_config(config), workshop.prepare(config).train))
    ours: dict[int, list[dict[str, torch.Tensor]]] = {}
    losses: dict[int, list[float]] = {}
    for ranks in (1, 2, 3):
        files = [tmp_path / f"{kind}-{ranks}.safetensors" for kind in OTHERS]
        given = [(*load, str(file)) for load, file in zip(loads, files, strict=True)]
        losses[ranks] = launch(ranks, gradients.first_steps, given, timeout=500)[0]
        ours[ranks] = [load_file(file) for file in files]
    for index, kind in enumerate(OTHERS):
        one, *several = (ours[ranks][index] for ranks in (1, 2, 3))
        assert any(".adapters." in name and values.norm() > 0 for name, values in one.items()), kind
        for found in several:
            assert distance(found, one) < 1e-6, kind
        assert losses[2][index] == pytest.approx(losses[1][index], rel=1e-6), kind
    turned = {name: values.roll(1, 0) if ".adapters." in name else values for name, values in ours[1][0].items()}
    assert distance(turned, ours[1][0]) > 0.1, "the control: the experts' gradients are not alike"


def test_the_metrics_say_which_experts_the_tokens_go_to_at_any_world_size(workshop: Workshop) -> None:
    """Of the first step's training and of the evaluation after a step that changes next to nothing."""
    found: list[dict[str, Any]] = []
    for ranks in (1, 2):
        few = ("train.steps=1", "data.held_out=0.2", "optim.lr=1e-12", "model.dtype=fp32")
        config = adapting(workshop, "qwen3-moe", f"routed-{ranks}", *few)
        run, data = workshop.store.sub(config.run.name), workshop.prepare(config)
        run.put(layout.CONFIG, dump_config(config).encode())
        (message,) = {
            o["message"] for o in launch(ranks, runs.run, dump_config(config), data.train, "start", data.eval)
        }
        assert message == ""
        found.append(read_generation(run, 1))
    one, two = ({record["of"]: record["shares"] for record in records["experts"]} for records in found)
    assert one.keys() == two.keys() == {"train", "eval"}
    for of in one:
        assert one[of].keys() == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
        for path, shares in one[of].items():
            assert len(shares) == 6
            assert sum(shares) == pytest.approx(2, abs=1e-3)  # experts that a token visits
            assert len(set(shares)) > 3
            # Padding of the rows that are there for the second rank alone is counted too.
            assert two[of][path] == pytest.approx(shares, abs=0.1 if of == "eval" else 1e-9)
    (step,), (evaluated,) = found[0]["step"], found[0]["eval"]
    for record, of in ((step, "train"), (evaluated, "eval")):
        loads = [max(shares) * 6 / 2 for shares in one[of].values()]
        assert record["expert_load"] == pytest.approx(max(loads), abs=1e-3)
        assert record["experts_unused"] == sum(shares.count(0) for shares in one[of].values())


def test_the_start_is_the_bases_at_any_world_size_and_in_any_scope(workshop: Workshop, tmp_path: Path) -> None:
    start = one_start(partial(adapting, workshop, "qwen3-moe", "start"), ((1, 1), (3, 3), (4, 2)), tmp_path)
    a = start["model.layers.0.mlp.experts.adapters.gate_up_proj.lora_A"]
    assert a.shape == (6, 3, 64)
    assert 0.9 / 8 < a.abs().max() <= 1 / 8  # uniform within 1 / sqrt(64), as in PEFT
    assert not start["model.layers.0.mlp.experts.adapters.gate_up_proj.lora_B"].any()


@pytest.fixture(scope="module", params=["qwen3-moe", "gpt-oss"])
def run(request: pytest.FixtureRequest, workshop: Workshop) -> Store:
    """A run with a committed step, over a base in 4 bits."""
    kind = request.param
    return committed(workshop, adapting(workshop, kind, f"{kind}-done", "tuning.method=rslora"))


def test_peft_has_the_logits_of_the_trained_model_and_a_broken_file_is_caught(run: Store, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export_and_prove(run, folder)

    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("experts.base_layer.lora_B.weight"))
    weights[name] = weights[name].roll(1, 1)
    save_file(weights, file, metadata={"format": "pt"})
    assert not proof_of(run, folder).holds


def test_peft_reads_every_parameter_without_a_warning(
    run: Store, workshop: Workshop, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    base: Any = AutoModelForCausalLM.from_pretrained(
        workshop.folder / run.uri.rpartition("/")[2].removesuffix("-done"), dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert [str(warning.message) for warning in recwarn if "rank_pattern" in str(warning.message)] == []
    read = {name: value for name, value in model.named_parameters() if "lora_" in name}
    masters = master_weights(run, manifest)
    assert len(read) == len(masters)
    assert sum(value.numel() for value in read.values()) == sum(value.numel() for value in masters.values())
    ours = "model.layers.1.mlp.experts.adapters.down_proj"
    theirs = "base_model.model.model.layers.1.mlp.experts"
    a, b = read[f"{theirs}.lora_A.default.weight"].float(), read[f"{theirs}.lora_B.default.weight"].float()
    count = len(masters[f"{ours}.lora_A"])
    for expert in range(count):
        assert torch.equal(a[3 * expert : 3 * expert + 3], masters[f"{ours}.lora_A"][expert].bfloat16().float())
        assert torch.equal(b[:, expert::count], masters[f"{ours}.lora_B"][expert].bfloat16().float())


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3-moe",
        "gpt-oss",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("mixtral", "deepseek-v3", "llama4", "nemotron-h")),
    ],
)
def test_a_merged_model_is_what_peft_merges(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    run = committed(workshop, adapting(workshop, kind, f"{kind}-merged"))
    export_merged(run, open_store(str(tmp_path / "merged")))

    base = workshop.folder / kind
    expected = merged_by_peft(run, base, tmp_path / "adapter").to(torch.bfloat16).state_dict()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert expected.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16(), expected[name]), name
        if value.ndim == 3 and "experts" in name:
            assert not torch.equal(value, plain.state_dict()[name]), name
        elif "norm" in name or "bias" in name:
            assert torch.equal(value.float(), plain.state_dict()[name].float()), name


def test_a_merge_is_proven_and_a_broken_file_is_caught(run: Store, tmp_path: Path) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))
    assert Proof(**proof).holds
    for file in (tmp_path / "merged").glob("*.safetensors"):
        weights = load_file(file)
        for name in [name for name in weights if "experts" in name and "down_proj" in name]:
            weights[name] = weights[name].roll(1, 0)
        save_file(weights, file, metadata={"format": "pt"})
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(tmp_path / "merged"))
    assert not Proof(**proof).holds


def test_the_host_waits_for_no_layers_experts_where_the_plan_has_room_for_all_of_them(workshop: Workshop) -> None:
    for found in launch(2, experts.waits, dump_config(adapting(workshop, "qwen3-moe", "waits")), [2**20, 2**40]):
        assert found == [2, 0], "one for each layer, and none"
