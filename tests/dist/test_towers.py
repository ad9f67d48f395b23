"""The tower learns: the gradient is that of plain PEFT, on ranks with pictures and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.dist import curves, evaluating, proofs, runs, seeing
from tests.dist.launch import launch, running
from tests.dist.test_preference import distance
from tests.dist.test_resume import losses
from tests.material import Workshop, commit
from trainer.config import Config, dump_config, override
from trainer.errors import ConfigError
from trainer.evaluate.prompts import read_prompts
from trainer.export.destination import ExportProgress
from trainer.export.figures import Proof
from trainer.export.format import find_format
from trainer.export.refusals import refused_exports
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model.towers import SEEING
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.store.store import Store, open_store

pytest.importorskip("torchvision")
from tests.dist.test_seeing import _packed_and_alone, answered
from tests.seeing import BASES, make_pictured, seeing_base, trained_over

pytestmark = pytest.mark.timeout(300)
QUICK = "qwen3_vl"


def _config(workshop: Workshop, name: str, base: Path, rows: Path, *more: str) -> Config:
    return workshop.config(
        name,
        *trained_over(base, rows),
        *("data.format=pictures", "data.sequence_length=128", "train.steps=4", "train.global_batch=6"),
        *("train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=2", "tuning.towers=lora", *more),
    )


@pytest.mark.parametrize(
    ("kind", "worlds", "learns"),
    [
        *((QUICK, (2,), learns) for learns in ("lora", "projector")),
        *(
            pytest.param(kind, (1, 2, 3), learns, marks=pytest.mark.long)
            for kind in BASES
            for learns in ("lora", "projector")
        ),
    ],
)
def test_the_curve_is_that_of_plain_peft_on_one_and_more_ranks(
    kind: str, worlds: tuple[int, ...], learns: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Some ranks of a step have no picture, and some rows have none on any rank."""
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    settings = "checkpoint.every_steps=0", f"tuning.towers={learns}"
    config = _config(workshop, f"towers-{kind}-{len(worlds)}-{learns}", base, rows, *settings)
    text, fingerprint = dump_config(config), workshop.prepare(config).train
    (stock,) = launch(1, seeing.stock_losses, text, fingerprint, timeout=200)
    for ranks in worlds:
        named = dump_config(override(config, f"run.name={config.run.name}-{ranks}"))
        ours = launch(ranks, curves.losses, named, fingerprint)[0]
        assert ours == pytest.approx(stock, rel=1e-5), ranks
    if len(worlds) > 1:
        frozen = override(config, f"run.name={config.run.name}-frozen", "tuning.towers=null")
        (without,) = launch(1, curves.losses, dump_config(frozen), fingerprint)
        assert stock != pytest.approx(without, rel=1e-4)


LEARNS = pytest.mark.parametrize("learns", ["lora", "projector"])


@pytest.mark.parametrize("kind", [QUICK, *(pytest.param(one, marks=pytest.mark.long) for one in BASES if one != QUICK)])
def test_a_tower_that_is_computed_again_changes_no_bit(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    curves_of = list[list[float]]()
    for how in ("none", "all"):
        settings = "checkpoint.every_steps=0", f"train.activation_checkpointing={how}", "tuning.dropout=0.1"
        config = _config(workshop, f"towers-{kind}-{how}", base, rows, *settings)
        fingerprint = workshop.prepare(config).train
        (found,) = launch(1, curves.losses, dump_config(config), fingerprint)
        curves_of.append(found)
    assert curves_of[0] == curves_of[1]


@pytest.mark.long
@LEARNS
def test_a_run_that_was_killed_goes_on_on_other_ranks(learns: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK), make_pictured(tmp_path / "rows")
    names, setting = ("towers-whole", "towers-killed"), f"tuning.towers={learns}"
    whole, killed = (_config(workshop, f"{name}-{learns}", base, rows, setting) for name in names)
    fingerprint = workshop.prepare(whole).train
    assert launch(1, runs.run, dump_config(whole), fingerprint)[0]["outcome"] == "finished"
    folder = workshop.store.sub(killed.run.name)
    with running(3, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(2)))
        ranks.kill()
    assert launch(2, runs.run, dump_config(killed), fingerprint, "resume")[0]["outcome"] == "finished"
    assert losses(folder) == pytest.approx(losses(workshop.store.sub(whole.run.name)), rel=1e-5)


@pytest.mark.long
@LEARNS
@pytest.mark.parametrize("kind", BASES)
def test_an_export_has_what_was_learnt_under_the_names_of_peft(
    kind: str, learns: str, workshop: Workshop, tmp_path: Path
) -> None:
    base, run = _learnt("export", kind, learns, workshop, tmp_path)
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    written = find_format("peft", []).write(run, open_store(str(tmp_path / "adapter")), None, quiet)
    said = "vLLM ignores what the tower" if learns == "lora" else "vLLM would refuse it beside its base: it takes"
    assert any(remark.startswith(said) for remark in written.remarks)
    weights = load_file(file := tmp_path / "adapter" / "adapter_model.safetensors")
    tower = [key for key in weights if "language_model" not in key]
    assert tower
    assert all(("lora_" in key) == (learns == "lora") for key in tower)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = {key: value.clone() for key, value in plain.named_parameters()}
    if learns == "projector":  # one of Qwen3-VL's mergers is for a layer that this decoder lacks
        same = [key for key in tower if weights[key].equal(before[key.removeprefix("base_model.model.")])]
        assert len(same) < len(tower) / 2
    if learns == "lora":
        assert any("lora_B" in key and weights[key].abs().max() > 0 for key in tower)
    model: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    loaded = {key.replace(".modules_to_save", "").replace(".default", ""): v for key, v in model.named_parameters()}
    assert loaded.keys() >= weights.keys()
    assert {key for key in loaded if "lora_" in key} == {key for key in weights if "lora_" in key}
    assert all(loaded[key].equal(weights[key]) for key in weights)
    proof = proofs.proof_of(run, tmp_path / "adapter", 4)
    assert proof.holds
    assert proof.kl_allowed < 1e-3 * proof.kl_effect
    as_before = {key: torch.zeros_like(weights[key]) for key in tower}
    if learns == "projector":
        as_before = {key: before[key.removeprefix("base_model.model.")] for key in tower}
    save_file(weights | as_before, file)
    assert not proofs.proof_of(run, tmp_path / "adapter", 4).holds


def _learnt(name: str, kind: str, learns: str, workshop: Workshop, folder: Path, *more: str) -> tuple[Path, Store]:
    """A base, and a run over it that has ended."""
    base, rows = seeing_base(folder / "base", kind), make_pictured(folder / "rows")
    config = _config(workshop, f"towers-{kind}-{learns}-{name}", base, rows, f"tuning.towers={learns}", *more)
    assert launch(2, runs.run, dump_config(config), workshop.prepare(config).train)[0]["outcome"] == "finished"
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    return base, run


@pytest.mark.long
@LEARNS
@pytest.mark.parametrize("kind", BASES)
def test_a_merge_changes_what_has_learnt_and_nothing_else(
    kind: str, learns: str, workshop: Workshop, tmp_path: Path
) -> None:
    base, run = _learnt("merge", kind, learns, workshop, tmp_path)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    export_adapter(run, open_store(str(adapter)))
    export_merged(run, open_store(str(merged)))
    written, given = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (merged, base)
    )
    assert written.keys() == given.keys()
    changed = {name for name in given if not written[name].equal(given[name])}
    assert any("language_model" in name for name in changed)
    tower = {name for name in changed if "language_model" not in name}
    parts = ("projector", "merger") if learns == "projector" else ("vision", "visual", "projector")
    assert tower
    assert all(any(part in name for part in parts) for name in tower)
    assert (merged / "preprocessor_config.json").exists() or (merged / "processor_config.json").exists()
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(merged))
    assert Proof(**proof).holds
    asked = json.loads((tmp_path / "rows" / "rows.jsonl").read_text().splitlines()[2])["messages"]
    inputs = seeing.inputs(AutoProcessor.from_pretrained(merged), asked, tmp_path / "rows")
    named = getattr(transformers, json.loads((merged / "config.json").read_text())["architectures"][0])
    with torch.no_grad():
        found = named.from_pretrained(merged, dtype=torch.float32).eval()(**inputs).logits
        plain = named.from_pretrained(base, dtype=torch.float32).eval()
        untrained = plain(**inputs).logits
        expected = PeftModel.from_pretrained(plain, str(adapter)).eval()(**inputs).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (untrained - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.format=chat"], "tuning.towers: the rows have no pictures from which it could learn. Remove it."),
        (["sharding.tower_limit=0"], "tuning.towers: a tower that learns must be held by each rank"),
        (
            ["tuning.method=dora"],
            "tuning.towers: lora works only with tuning.method lora or rslora, and tuning.method is dora. Set"
            " tuning.towers: projector, which works with adapters of any kind.",
        ),
    ],
)
def test_what_has_no_tower_to_learn_is_refused(
    changes: list[str], said: str, workshop: Workshop, tmp_path: Path
) -> None:
    base = seeing_base(tmp_path / "base", "llava")
    with pytest.raises(ConfigError) as refused:
        resolve(_config(workshop, "towers-refused", base, make_pictured(tmp_path / "rows", 2), *changes))
    assert said in str(refused.value)


@LEARNS
def test_files_of_llama_cpp_would_lose_what_it_has_learnt(learns: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", "llava"), make_pictured(tmp_path / "rows", 2)
    config = _config(workshop, "towers-gguf", base, rows, f"tuning.towers={learns}")
    refused = refused_exports(config, {"gguf": (), "gguf-adapter": (), "merged": (), "peft": ()})
    assert refused.keys() == {"gguf", "gguf-adapter"}
    for name, other in (("gguf", "merged"), ("gguf-adapter", "peft")):
        assert refused[name] == (
            f"--format {name}: the file has the language model alone, and would lose what the tower has learnt"
            f" (tuning.towers: {learns}). Take --format {other}."
        )


@pytest.mark.long
@LEARNS
def test_two_ranks_that_share_a_row_learn_what_one_does(learns: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK), make_pictured(tmp_path / "rows")
    settings = "checkpoint.every_steps=0", f"tuning.towers={learns}"
    alone = _config(workshop, f"towers-alone-{learns}", base, rows, *settings)
    shared = override(alone, f"run.name=towers-shared-{learns}", "sharding.sequence_parallel=2", "cluster.workers=2")
    fingerprint = workshop.prepare(alone).train
    (expected,) = launch(1, curves.losses, dump_config(alone), fingerprint)
    assert launch(2, curves.losses, dump_config(shared), fingerprint)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@LEARNS
def test_a_reference_is_the_base_with_its_own_tower(learns: str, workshop: Workshop, tmp_path: Path) -> None:
    """Before the first update pairs have the loss log 2, and their gradient does not depend on ranks and packing."""
    (packed, gradients), (alone, others) = _packed_and_alone(
        workshop,
        tmp_path,
        f"towers-dpo-{learns}",
        seeing_base(tmp_path / "base", QUICK),
        "dpo",
        f"tuning.towers={learns}",
    )
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert any(name.startswith(SEEING) and values.abs().max() > 0 for name, values in gradients.items())
    assert distance(gradients, others) < 1e-5


@pytest.mark.long
@LEARNS
def test_answers_about_pictures_are_those_of_peft(learns: str, workshop: Workshop, tmp_path: Path) -> None:
    """One rank has a text with pictures, the other one has one without."""
    base, rows = seeing_base(tmp_path / "base", QUICK, seed=8), make_pictured(tmp_path / "rows", 5)
    config = _config(workshop, f"towers-asked-{learns}", base, rows, f"tuning.towers={learns}")
    commit(workshop.store.sub(config.run.name), config)
    talks = [json.loads(line)["messages"][:1] for line in rows.read_text().splitlines()[2::-1]]
    prompts = tmp_path / "rows" / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    uri = workshop.store.sub(config.run.name).uri
    ask = {"what": "generate", "run": uri, "base": True, "sampling": {"max_tokens": 10}}
    (answers,) = launch(2, evaluating.answers, [{**ask, "prompts": [read_prompts(str(prompts), {})]}], timeout=200)[0]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    ends = {processor.tokenizer.eos_token_id}
    expected = [answered(model, processor, talk, rows.parent, ends) for talk in talks]
    assert [row["base"] for row in answers["answers"]] == expected
    with evaluating.adapted(model, uri, tmp_path / "adapter") as tuned:
        expected = [answered(tuned, processor, talk, rows.parent, ends) for talk in talks]
    assert [row["adapter"] for row in answers["answers"]] == expected
