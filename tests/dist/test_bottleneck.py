"""Bottleneck adapters over a sharded base are plain PyTorch's, and leave with a loader of their own."""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.dist import bottleneck, gradients, proofs, traffic
from tests.dist.launch import RankFailed, launch
from tests.dist.proofs import export_and_prove, one_start, proof_of
from tests.dist.test_gradients import distance
from tests.families import rows
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.errors import ConfigError
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.plan.plan import make_plan
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store
from trainer.tuning.method import find_method

ROOT = Path(__file__).parents[2]
# A base -> what differs from the defaults of its run. The experts of a mixture stay in 16 bits, where plain PyTorch has
# them.
RUNS = {
    "qwen2": ("tuning.activation=gelu",),
    "gemma2": ("tuning.placement=pfeiffer", "tuning.activation=silu"),
    "mixtral": ("quant.type=none",),
    "gpt-oss": ("quant.type=none", "tuning.activation=tanh"),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop_of(tmp_path_factory.mktemp("adapter"), "qwen2")


def workshop_of(folder: Path, kind: str) -> Workshop:
    """Every parameter in parts, and so little kept that passes release and gather again, as with a large base."""
    here = Workshop(folder, kind, **({} if kind in ("mixtral", "gpt-oss") else {"intermediate_size": 192}))
    policy = json.loads(here.policy.read_text())
    policy["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 25_000,
        "stage3_max_live_parameters": 60_000,
        "stage3_max_reuse_distance": 1_000,
    }
    here.policy.write_text(json.dumps(policy))
    return here


def adapting(workshop: Workshop, name: str, *overrides: str) -> Config:
    return workshop.config(
        name, "tuning.method=bottleneck", "tuning.rank=16", "tuning.alpha=32", "tuning.reduction=7", *overrides
    )


@pytest.fixture(scope="module", params=rows(RUNS, ["qwen2", "gpt-oss"]))
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """The first step by what it is of, "plain", plain with a mistake, or so many ranks: (rank 0's record, its
    gradients).
    """
    here = workshop_of(tmp_path_factory.mktemp(request.param), request.param)
    config = adapting(here, "gradients", "model.dtype=fp32", *RUNS[request.param])
    arguments, file = (dump_config(config), here.prepare(config).train), here.folder / "gradients.safetensors"

    @cache
    def step(way: Any) -> Any:
        if isinstance(way, int):
            return launch(way, gradients.first_step, *arguments, str(file))[0], load_file(file)
        slip = way.removeprefix("plain").strip()
        return launch(1, bottleneck.plain_first_step, *arguments, str(file), slip)[0], load_file(file)

    return step


@pytest.mark.parametrize("ranks", rows([1, 2, 3], [2]))
def test_loss_and_gradients_of_packed_rows_are_those_of_plain_pytorch_a_document_at_a_time(
    steps: Callable[[Any], Any], ranks: int
) -> None:
    (record, ours), (plain, expected) = steps(ranks), steps("plain")
    assert all(gradient.norm() > 0 for gradient in expected.values())
    assert record["targets"] == plain["targets"]
    assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
    assert distance(ours, expected) < 1e-5


def test_the_check_would_see_an_adapter_in_another_place_or_without_its_residual(steps: Callable[[Any], Any]) -> None:
    for slip in ("residual", "first"):
        assert distance(steps(f"plain {slip}")[1], steps("plain")[1]) > 1e-2


def test_packed_rows_have_the_gradients_of_rows_of_one_document(workshop: Workshop, tmp_path: Path) -> None:
    """All of twelve documents are in the step either way, and the rows that it has more than that are empty."""
    found = list[dict[str, Tensor]]()
    for packing in ("true", "false"):
        settings = ("model.dtype=fp32", f"data.train=[{{path: {few(workshop)}}}]", "train.global_batch=12")
        config = adapting(workshop, "packing", *settings, f"data.packing={packing}")
        arguments, file = (dump_config(config), workshop.prepare(config).train), tmp_path / "gradients.safetensors"
        record = launch(2, gradients.first_step, *arguments, str(file))[0]
        found.append({**load_file(file), "targets": torch.tensor([float(record["targets"])])})
    assert distance(*found) < 1e-5


def few(workshop: Workshop) -> Path:
    """Twelve of the documents."""
    path = workshop.folder / "few.jsonl"
    path.write_text("".join(workshop.data.read_text().splitlines(keepends=True)[:12]))
    return path


@pytest.mark.parametrize("placement", rows(["houlsby", "pfeiffer"], ["houlsby"]))
def test_the_start_is_the_base_and_the_same_at_any_world_size_and_in_any_scope(
    workshop: Workshop, tmp_path: Path, placement: str
) -> None:
    placed = f"tuning.placement={placement}"
    start = one_start(partial(adapting, workshop, "start", placed), ((1, 1), (2, 2), (4, 2)), tmp_path)
    config = adapting(workshop, "start", placed)
    shapes = find_method(config.tuning).shapes(resolve_base(config.model).architecture)
    assert {name: tuple(values.shape) for name, values in start.items()} == shapes
    assert all((values != 0).any() == name.endswith("down.weight") for name, values in start.items())


def test_a_step_sends_the_gradients_that_plan_counts_and_gathers_no_more_of_the_base_than_loras(
    workshop: Workshop,
) -> None:
    """Bottlenecks of eight units: parameters of an even number of elements are divided without padding."""
    packed = dict[str, float]()
    for config in (workshop.config("traffic-lora"), adapting(workshop, "traffic-bottleneck", "tuning.reduction=8")):
        results = launch(2, traffic.step_traffic, dump_config(config), workshop.prepare(config).train, ranks_per_node=1)
        packed[config.tuning.method] = results[0]["across"]["torch.uint8"]
    assert 0 < packed["bottleneck"] <= packed["lora"]
    planned = make_plan(config, resolve_base(config.model).description, 2, 1, None).traffic_per_step
    for rank in results:
        assert rank["across"]["torch.float32"] == planned.adapter_gradients


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Store:
    """A run with a committed step, over a base in 4 bits whose scales are quantized, too."""
    run = workshop.store.sub("done")
    commit(run, adapting(workshop, "done", "tuning.activation=gelu", "quant.double=true"))
    return run


def test_the_exported_model_has_the_logits_of_the_trained_one_and_a_broken_file_is_caught(
    run: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    export_and_prove(run, folder)

    file, settings = folder / "bottleneck.safetensors", folder / "bottleneck.json"
    weights = load_file(file)
    name = "model.layers.1.mlp.adapter.up.weight"
    save_file({**weights, name: weights[name].roll(1, 0)}, file, metadata={"format": "pt"})
    assert not proof_of(run, folder).holds

    save_file(weights, file, metadata={"format": "pt"})
    settings.write_text(settings.read_text().replace("gelu", "relu"))
    assert not proof_of(run, folder).holds

    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RankFailed, match="the method's own loader cannot read .*up.weight"):
        launch(1, proofs.export_proof, run.uri, 4, str(folder))


def test_the_code_of_the_page_loads_what_was_exported(run: Store, workshop: Workshop, tmp_path: Path) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    masters = master_weights(run, manifest)
    section = (ROOT / "docs/methods.md").read_text().partition("\n## bottleneck\n")[2].partition("\n## ")[0]
    loader, example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert (tmp_path / "adapter/load_bottleneck.py").read_text() == loader

    example = example.replace("meta-llama/Llama-3.1-8B-Instruct", str(workshop.base))
    example = example.replace('"adapter/"', f'"{tmp_path}/adapter/"')
    found: dict[str, Any] = {}
    exec(loader, found)
    exec(re.sub(r"from load_bottleneck.*\n", "", example), found)
    model, adapters = found["model"], found["adapters"]
    read = dict(model.named_parameters())
    for name, value in masters.items():
        assert torch.equal(read[name], value.bfloat16()), name
    base: Any = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.bfloat16)
    plain = logits(base)
    method = find_method(adapting(workshop, "done", "tuning.activation=gelu").tuning)
    method.attach(base, resolve_base(workshop.config("any").model).architecture, torch.bfloat16, seed=0)
    base.load_state_dict({name: value.bfloat16() for name, value in masters.items()}, strict=False)
    assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(model), plain)
    for adapter in adapters:
        adapter.active = False
    assert torch.equal(logits(model), plain)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits


def test_a_merge_is_refused_with_the_reason_and_a_checkpoint_is_what_plan_counts(
    run: Store, workshop: Workshop, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match="there is no merged model: a bottleneck adapter is not linear, so no weight of the base can hold",
    ):
        export_merged(run, open_store(str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    config = adapting(workshop, "done", "tuning.activation=gelu")
    planned = make_plan(config, resolve_base(config.model).description, 2, 2, None).checkpoint_bytes
    manifest = read_manifest(run, 4)
    assert planned == 12 * sum(manifest.numels.values())
    assert manifest.adapter == {"method": "bottleneck", "reduction": 7, "activation": "gelu", "placement": "houlsby"}


def test_a_half_export_is_taken_up_and_a_whole_one_stays(run: Store, tmp_path: Path) -> None:
    export_adapter(run, open_store(str(tmp_path)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="is not empty"):
        export_adapter(run, open_store(str(tmp_path)))
    (tmp_path / "bottleneck.json").unlink()
    export_adapter(run, open_store(str(tmp_path)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
