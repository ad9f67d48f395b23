"""Full fine-tuning is plain PyTorch's, on any number of ranks, and leaves as an ordinary model."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.smoke.local_s3 import S3Server
from tests.dist import curves, full, gradients, memory, proofs, runs, traffic
from tests.dist.launch import launch
from tests.dist.test_resume import losses
from tests.families import rows
from tests.material import Workshop, commit, make_base
from tests.stored import read_index
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, override
from trainer.errors import CapstanError, ConfigError
from trainer.export.figures import Proof
from trainer.export.format import find_format
from trainer.export.proof.verify import check_again
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.plan.plan import make_plan
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.state.checkpoint.identity import check_identity
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store

FULL = ("tuning.method=full", "tuning.rank=16", "tuning.alpha=32", "quant.type=none")
LORA = ("tuning.method=lora", "optim.lora_plus_ratio=2", "quant.type=nf4", "optim.lr=1e-2")
# The last layer and the norms: nothing before the first of them has a gradient to pass on.
SELECTED = ("model.layers.1.*", "model.norm.weight")


def config_of(workshop: Workshop, name: str, *overrides: str) -> Config:
    return workshop.config(name, *FULL, *overrides)


def set_policy(workshop: Workshop, **zero: int) -> None:
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"] |= zero
    workshop.policy.write_text(json.dumps(policy))


@pytest.fixture(
    scope="module",
    params=[
        ("llama", ()),
        ("qwen2", SELECTED),
        *(pytest.param((kind, ()), marks=pytest.mark.long) for kind in ("gemma2", "mixtral")),
    ],
    ids=lambda p: p[0],
)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind, and its first step, plain ("plain") or on so many ranks: (rank 0's record, its gradients). gemma2's
    head is tied, and its logits are capped."""
    kind, selected = request.param
    folder = tmp_path_factory.mktemp("full")
    workshop = Workshop(folder, kind)
    # So small that a pass has to release and gather again, the head before its backward pass too, as with a large base.
    set_policy(
        workshop, stage3_prefetch_bucket_size=25_000, stage3_max_live_parameters=60_000, stage3_max_reuse_distance=1_000
    )
    patterns = (f"tuning.train=[{', '.join(selected)}]",) if selected else ()
    config = config_of(workshop, "gradients", "model.dtype=fp32", *patterns)
    fingerprint, file = workshop.prepare(config).train, folder / "gradients.safetensors"

    @cache
    def step(ranks: int | str) -> Any:
        function = full.plain_first_step if ranks == "plain" else gradients.first_step
        count = ranks if isinstance(ranks, int) else 1
        return launch(count, function, dump_config(config), fingerprint, str(file))[0], load_file(file)

    return kind, step


@pytest.mark.parametrize("ranks", rows([1, 2, 3], [2]))
def test_loss_and_gradients_of_packed_rows_are_those_of_plain_pytorch_a_document_at_a_time(
    steps: Any, ranks: int
) -> None:
    _, step = steps
    (record, ours), (plain, expected) = step(ranks), step("plain")
    assert record["targets"] == plain["targets"]
    assert record["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert float((ours[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_what_learns_is_everything_or_what_is_named(steps: Any) -> None:
    kind, step = steps
    names = set(step("plain")[1])
    if kind == "qwen2":
        assert {name.split(".")[1] for name in names} == {"layers", "norm"}
        assert len(names) == 12 + 1  # a layer's seven matrices, three biases and two norms
    else:
        assert "model.embed_tokens.weight" in names
        assert ("lm_head.weight" in names) == (kind != "gemma2")


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("llama", "adamw"),
        pytest.param("llama-tied", "adamw", marks=pytest.mark.long),
        pytest.param("llama", "adamw_8bit", marks=pytest.mark.long),
        pytest.param("mixtral", "adafactor", marks=pytest.mark.long),
    ],
)
def test_twenty_steps_of_two_ranks_have_the_losses_of_transformers_and_the_stock_optimizer(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    workshop = Workshop(tmp_path, kind)
    set_policy(workshop, sub_group_size=20_000)  # so that a rank's share is updated in several portions
    overrides = ("model.dtype=fp32", "train.steps=20", "checkpoint.every_steps=0", "optim.weight_decay=0.1")
    config = config_of(workshop, "curve", *overrides, f"optim.name={optimizer}")
    fingerprint = workshop.prepare(config).train
    (stock,) = launch(1, full.plain_losses, dump_config(config), fingerprint)
    ours = launch(2, curves.losses, dump_config(config), fingerprint)[0]
    assert len(ours) == len(stock) == 20
    assert stock[0] - stock[-1] > 0.5  # it learns
    assert ours == pytest.approx(stock, abs=1e-3)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A bf16 base whose head is tied."""
    return Workshop(tmp_path_factory.mktemp("runs"), "llama-tied")


def train(
    workshop: Workshop, name: str, steps: int, ranks: int, how: str = "start", overrides: tuple[str, ...] = ()
) -> dict[int, float]:
    """The losses of the run `name` by step, once it has taken `steps`."""
    constant = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0.1", f"train.steps={steps}")
    config, run = config_of(workshop, name, *constant, *overrides), workshop.store.sub(name)
    run.put(layout.CONFIG, dump_config(config).encode())  # as the launcher does before any rank starts
    outcomes = launch(ranks, runs.run, dump_config(config), workshop.prepare(config).train, how)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> dict[int, float]:
    """Ten steps of two ranks."""
    return train(workshop, "whole", 10, ranks=2)


@pytest.fixture(scope="module")
def run(workshop: Workshop, whole: dict[int, float]) -> Store:
    return workshop.store.sub("whole")


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        pytest.param("adamw", (), marks=pytest.mark.long),
        ("adamw_8bit", ()),
        pytest.param("adafactor", (), marks=pytest.mark.long),
        pytest.param("adamw_8bit", LORA, marks=pytest.mark.long),
        pytest.param("adafactor", LORA, marks=pytest.mark.long),
    ],
    ids=["adamw", "adamw_8bit", "adafactor", "lora-adamw_8bit", "lora-adafactor"],
)
def test_ten_steps_are_five_a_resume_and_five_more(workshop: Workshop, optimizer: str, more: tuple[str, ...]) -> None:
    """In a checkpoint of the size that `plan` counts, which another optimizer does not go on from. In fp32 but for
    AdamW, as other numbers of ranks add 16-bit gradients up to other sums, and these steps are large."""
    name, stores = f"{optimizer}-{len(more)}", workshop.folder / "store"
    overrides = (*more, f"optim.name={optimizer}", *([] if optimizer == "adamw" else ["model.dtype=fp32"]))
    straight = train(workshop, f"{name}-straight", 10, ranks=2, overrides=overrides)
    assert straight[1] - straight[10] > 0.1
    train(workshop, f"{name}-same", 5, ranks=2, overrides=overrides)
    shutil.copytree(stores / f"{name}-same", stores / f"{name}-other")
    assert train(workshop, f"{name}-same", 10, ranks=2, how="resume", overrides=overrides) == straight
    resumed = train(workshop, f"{name}-other", 10, ranks=3, how="resume", overrides=overrides)
    assert resumed == pytest.approx(straight, abs=3e-3 if optimizer == "adamw" else 1e-3)
    runs = [workshop.store.sub(f"{name}-{how}") for how in ("same", "straight")]
    manifests = [read_manifest(run, 10) for run in runs]
    same, whole = (master_weights(run, manifest) for run, manifest in zip(runs, manifests, strict=True))
    assert all(torch.equal(same[name], values) for name, values in whole.items())

    config = config_of(workshop, f"{name}-same", *overrides)
    base = resolve_base(config.model)
    plan = make_plan(config, base.description, 2, 2, None)
    assert plan.checkpoint_bytes <= manifests[0].size < plan.checkpoint_bytes + 2 * 40_000
    another = resolve(override(config, "optim.name=adamw_8bit"), base).identity(manifests[0].dataset)
    if optimizer == "adamw_8bit":
        check_identity(manifests[0], another)
    else:
        with pytest.raises(ConfigError, match=f"optimizer name: '{optimizer}', the configuration gives 'adamw_8bit'"):
            check_identity(manifests[0], another)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_an_optimizer_on_the_host_trains_and_resumes_as_one_beside_the_weights(
    workshop: Workshop, optimizer: str
) -> None:
    """Without a GPU the states lie where they lay, but DeepSpeed goes its other way through gradients and step."""
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    offload = workshop.folder / "offload.json"
    offload.write_text(json.dumps(policy))
    name, overrides = f"offload-{optimizer}", (f"optim.name={optimizer}",)
    here = train(workshop, f"{name}-here", 6, ranks=2, overrides=overrides)
    away = (*overrides, f"sharding.deepspeed={offload}")
    train(workshop, name, 3, ranks=2, overrides=away)
    assert train(workshop, name, 6, ranks=2, how="resume", overrides=away) == pytest.approx(here, abs=1e-4)


def test_a_checkpoint_has_twelve_bytes_for_each_parameter_divided_over_the_ranks(
    workshop: Workshop, run: Store
) -> None:
    manifest = read_manifest(run, 10)
    base = resolve_base(config_of(workshop, "any").model)
    assert manifest.numels == {parameter.name: parameter.numel for parameter in base.architecture.parameters}
    assert manifest.adapter == {"method": "full"}
    plan = make_plan(config_of(workshop, "any"), base.description, 2, 2, None)
    headers = 2 * 25_000
    assert plan.checkpoint_bytes <= manifest.size < plan.checkpoint_bytes + headers
    sizes = [shard.size for shard in manifest.shards]
    assert max(sizes) - min(sizes) < 0.01 * manifest.size


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits


def test_an_export_is_a_model_that_transformers_loads_with_the_masters_bit_by_bit_and_so_is_a_merge(
    workshop: Workshop, run: Store, tmp_path: Path
) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "model")))
    assert manifest.step == 10
    masters = master_weights(run, manifest)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    base: Any = AutoModelForCausalLM.from_pretrained(workshop.base, dtype="auto")
    before = dict(base.named_parameters())
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dict.fromkeys(
        masters, torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].bfloat16()), name
        assert not torch.equal(parameter, before[name]), f"{name} has not learnt"
    base.load_state_dict({name: values.bfloat16() for name, values in masters.items()}, strict=False)
    assert torch.equal(logits(model), logits(base))

    tensors = [read_index(open_store(str(folder))) for folder in (workshop.base, tmp_path / "model")]
    places = [{name: (t.key, t.dtype, t.shape, t.offset) for name, t in found.items()} for found in tensors]
    assert places[0] == places[1]
    export_merged(run, open_store(str(tmp_path / "merged")))
    assert files(tmp_path / "merged") == files(tmp_path / "model")
    assert (
        b"its base's own weights were fine-tuned, so there is no adapter to merge"
        in files(tmp_path / "model")["README.md"]
    )


@pytest.mark.long
def test_from_a_bucket_to_a_bucket_are_the_files_of_a_folder(run: Store, tmp_path: Path, s3: S3Server) -> None:
    folder, bucket = open_store(str(tmp_path / "model")), open_store(f"{s3.uri('full')}/model")
    far = open_store(f"{s3.uri('full')}/runs/whole")
    for entry in run.list():
        far.put(entry.key, run.get(entry.key))
    export_adapter(run, folder)
    export_adapter(far, bucket)
    assert {entry.key: bucket.get(entry.key) for entry in bucket.list()} == files(tmp_path / "model")


def broken(model: Path, how: str, other: Store) -> Path:
    """`model` after something went wrong with it: one bit of a norm flipped, a file cut, a setting changed, another
    step.
    """
    weights = sorted(model.glob("*.safetensors"))[1]
    data = bytearray(weights.read_bytes())
    if how == "bit":
        data[-3] ^= 1
        weights.write_bytes(data)
    if how == "cut":
        weights.write_bytes(data[:-64])
    if how == "setting":
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    if how == "step":
        shutil.rmtree(model)
        export_adapter(other, open_store(str(model)), step=5)
    return model


def test_verify_holds_for_what_was_trained_and_catches_what_is_broken(run: Store, tmp_path: Path) -> None:
    export_adapter(run, open_store(str(tmp_path / "model")))
    (proof,) = launch(1, proofs.export_proof, run.uri, 10, str(tmp_path / "model"))
    assert Proof(**proof).holds
    assert (proof["computed_in"], proof["rows"]) == ("fp32", "8 rows of the training data")
    assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"]
    for how, sentence in (("bit", "differs from what was trained"), ("cut", "bytes instead of"), ("step", "differs")):
        copy = Path(shutil.copytree(tmp_path / "model", tmp_path / how))
        with pytest.raises(CapstanError, match=sentence):
            check_again(find_format("peft"), run, 10, open_store(str(broken(copy, how, run))))
    copy = Path(shutil.copytree(tmp_path / "model", tmp_path / "setting"))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 10, str(broken(copy, "setting", run)))
    assert not Proof(**proof).holds


@pytest.mark.long
def test_routers_that_a_family_keeps_in_fp32_learn_and_are_exported(workshop: Workshop, tmp_path: Path) -> None:
    """DeepSpeed takes what learns in one type, and DeepSeek-V3's routers are in another one than the rest of a model in
    bf16.
    """
    base = make_base(tmp_path / "base", "deepseek-v3")
    assert len(train(workshop, "routers", 2, ranks=2, overrides=(f"model.base={base}", "optim.lr=0.01"))) == 2
    run = workshop.store.sub("routers")
    manifest = export_adapter(run, open_store(str(tmp_path / "model")))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    before: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    router = "model.layers.1.mlp.gate.weight"
    now, then = (dict(one.named_parameters())[router] for one in (model, before))
    assert now.dtype == torch.float32, "transformers keeps it so"
    assert torch.equal(now, master_weights(run, manifest)[router].bfloat16().float())
    assert not torch.equal(now, then), "the control: it has learnt"


def test_a_mixtures_experts_and_a_tied_head_that_is_stored_twice_are_written_where_they_are_stored(
    workshop: Workshop, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "tied", "llama-tied", shard_size="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    mixture = make_base(tmp_path / "mixture", "mixtral", torch.float32)
    for folder in (base, mixture):
        run = workshop.store.sub(folder.name)
        commit(run, config_of(workshop, folder.name, f"model.base={folder}", "model.dtype=fp32"))
        manifest = export_adapter(run, open_store(str(tmp_path / f"{folder.name}-model")))
        options: Any = {"dtype": "auto", "experts_implementation": "eager"}
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"{folder.name}-model", **options)
        stored = dict(model.named_parameters())
        for name, values in master_weights(run, manifest).items():
            assert torch.equal(stored[name], values.to(stored[name].dtype)), name
    twice = load_file(tmp_path / "tied-model/model.safetensors")
    assert torch.equal(twice["lm_head.weight"], twice["model.embed_tokens.weight"])


@pytest.mark.long
def test_the_peak_of_an_export_is_a_few_pieces_and_parts(workshop: Workshop, tmp_path: Path) -> None:
    """With pieces of 256 KiB and parts of 1 MiB in the place of 4 and 32 MiB, which would want a base of some
    gigabytes.
    """
    sizes: dict[str, Any] = {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048}
    base = make_base(tmp_path / "base", shard_size="1GB", dtype=torch.float32, **sizes)
    run = workshop.store.sub("heavy")
    commit(run, config_of(workshop, "heavy", f"model.base={base}"))
    (grown,) = launch(1, memory.small_export_memory, run.uri, str(tmp_path / "model"))
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert grown < 0.5 * size, f"{grown} for a file of {size}"


def test_a_run_of_the_first_layers_has_no_model_to_export(workshop: Workshop, tmp_path: Path) -> None:
    run = workshop.store.sub("cut")
    commit(run, config_of(workshop, "cut", "model.layers=1"))
    for export in (export_adapter, export_merged):
        with pytest.raises(ConfigError, match=r"model\.layers: the run has the first 1 layers of its base only"):
            export(run, open_store(str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "optimizer"), [("bf16", "adamw"), ("bf16", "adamw_8bit"), ("bf16", "adafactor")])
def test_the_memory_of_a_rank_grows_with_the_base_as_plan_counts(tmp_path: Path, dtype: str, optimizer: str) -> None:
    """From one million to fifty million parameters, on two ranks: the process's own memory is in both."""
    found = list[tuple[int, int]]()
    for hidden, layers in ((64, 1), (768, 5)):
        sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": hidden, "intermediate_size": 2048}
        folder = tmp_path / str(hidden)
        folder.mkdir()
        workshop = Workshop(folder, shard_size="1GB", num_hidden_layers=layers, **sizes)
        here = (
            "sharding.deepspeed=cpu",
            "cluster.gpus_per_worker=0",
            "train.global_batch=2",
            f"optim.name={optimizer}",
        )
        config = config_of(workshop, "heavy", f"model.dtype={dtype}", *here)
        planned = make_plan(config, resolve_base(config.model).description, 2, 2, None).memory_per_gpu.total
        grown = launch(2, memory.training_memory, dump_config(config), workshop.prepare(config).train, timeout=300)
        found.append((planned, max(grown)))
    (small, small_grown), (large, large_grown) = found
    assert large - small > 5 * 2**26
    assert large_grown - small_grown == pytest.approx(large - small, rel=0.1)


def test_the_traffic_of_a_step_is_what_plan_counts(workshop: Workshop) -> None:
    config = config_of(workshop, "traffic", "train.global_batch=4")
    received = launch(2, traffic.step_traffic, dump_config(config), workshop.prepare(config).train, ranks_per_node=1)
    planned = make_plan(config, resolve_base(config.model).description, 2, 1, None).traffic_per_step
    assert planned.base_gathers == 0
    for rank in received:
        assert rank["frozen"] == []
        assert rank["across"]["torch.float32"] == planned.adapter_gradients
        # A weight that is still there from the forward pass is not gathered again.
        assert 0.5 * planned.adapter_gathers <= rank["across"]["torch.bfloat16"] <= planned.adapter_gathers
