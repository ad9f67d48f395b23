"""The part that sees learns: the gradient is that of plain PEFT, on ranks with pictures and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
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
from trainer.export.write.adapter import export_adapter
from trainer.model.towers import SEEING
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.store.store import open_store

pytest.importorskip("torchvision")
from tests.dist.test_seeing import _answered, _packed_and_alone
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
    ("kind", "worlds"), [(QUICK, (2,)), *(pytest.param(kind, (1, 2, 3), marks=pytest.mark.long) for kind in BASES)]
)
def test_the_curve_is_that_of_plain_peft_on_one_and_more_ranks(
    kind: str, worlds: tuple[int, ...], workshop: Workshop, tmp_path: Path
) -> None:
    """Some ranks of a step have no picture, and some rows have none on any rank."""
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    config = _config(workshop, f"towers-{kind}-{len(worlds)}", base, rows, "checkpoint.every_steps=0")
    text, fingerprint = dump_config(config), workshop.prepare(config).train
    (stock,) = launch(1, seeing.stock_losses, text, fingerprint, timeout=200)
    for ranks in worlds:
        named = dump_config(override(config, f"run.name=towers-{kind}-{len(worlds)}-{ranks}"))
        ours = launch(ranks, curves.losses, named, fingerprint)[0]
        assert ours == pytest.approx(stock, rel=1e-5), ranks
    if len(worlds) > 1:
        frozen = override(config, f"run.name=towers-frozen-{kind}", "tuning.towers=null")
        (without,) = launch(1, curves.losses, dump_config(frozen), fingerprint)
        assert stock != pytest.approx(without, rel=1e-4)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_on_other_ranks(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK), make_pictured(tmp_path / "rows")
    whole, killed = (_config(workshop, name, base, rows) for name in ("towers-whole", "towers-killed"))
    fingerprint = workshop.prepare(whole).train
    assert launch(1, runs.run, dump_config(whole), fingerprint)[0]["outcome"] == "finished"
    folder = workshop.store.sub("towers-killed")
    with running(3, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(2)))
        ranks.kill()
    assert launch(2, runs.run, dump_config(killed), fingerprint, "resume")[0]["outcome"] == "finished"
    assert losses(folder) == pytest.approx(losses(workshop.store.sub("towers-whole")), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_an_export_has_what_the_tower_learnt_under_the_names_of_peft(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    from peft import PeftModel

    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    name = f"towers-{kind}-export"
    config = _config(workshop, name, base, rows)
    assert launch(2, runs.run, dump_config(config), workshop.prepare(config).train)[0]["outcome"] == "finished"
    run = workshop.store.sub(name)
    run.put(layout.CONFIG, dump_config(config).encode())
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    weights = load_file(file := tmp_path / "adapter" / "adapter_model.safetensors")
    tower = [key for key in weights if "language_model" not in key]
    assert tower
    assert any("lora_B" in key and weights[key].abs().max() > 0 for key in tower)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    loaded = {key.replace(".default", ""): value for key, value in model.named_parameters() if "lora_" in key}
    assert loaded.keys() == weights.keys()
    assert all(loaded[key].equal(weights[key]) for key in weights)
    proof = proofs.proof_of(run, tmp_path / "adapter", 4)
    assert proof.holds
    assert proof.kl_allowed < 1e-3 * proof.kl_effect
    save_file({key: torch.zeros_like(value) if key in tower else value for key, value in weights.items()}, file)
    assert not proofs.proof_of(run, tmp_path / "adapter", 4).holds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.format=chat"], "tuning.towers: the rows have no pictures from which it could learn. Remove it."),
        (["sharding.tower_limit=0"], "tuning.towers: features of pictures cannot be kept of a part that learns"),
        (["tuning.method=dora"], "tuning.towers: has no effect with tuning.method: dora. Remove it."),
        (["tuning.towers=projector"], "tuning.towers: 'projector' is not allowed. Input should be 'lora'."),
    ],
)
def test_what_has_no_tower_to_learn_is_refused(
    changes: list[str], said: str, workshop: Workshop, tmp_path: Path
) -> None:
    base = seeing_base(tmp_path / "base", "llava")
    with pytest.raises(ConfigError) as refused:
        resolve(_config(workshop, "towers-refused", base, make_pictured(tmp_path / "rows", 2), *changes))
    assert said in str(refused.value)


@pytest.mark.long
def test_two_ranks_that_share_a_row_learn_what_one_does(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", QUICK), make_pictured(tmp_path / "rows")
    alone = _config(workshop, "towers-alone", base, rows, "checkpoint.every_steps=0")
    shared = override(alone, "run.name=towers-shared", "sharding.sequence_parallel=2", "cluster.workers=2")
    fingerprint = workshop.prepare(alone).train
    (expected,) = launch(1, curves.losses, dump_config(alone), fingerprint)
    assert launch(2, curves.losses, dump_config(shared), fingerprint)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_reference_is_the_base_with_its_own_tower(workshop: Workshop, tmp_path: Path) -> None:
    """Before the first update pairs have the loss log 2, and their gradient does not depend on ranks and packing."""
    (packed, gradients), (alone, others) = _packed_and_alone(
        workshop, tmp_path, "towers-dpo", seeing_base(tmp_path / "base", QUICK), "dpo", "tuning.towers=lora"
    )
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert any(name.startswith(SEEING) and values.abs().max() > 0 for name, values in gradients.items())
    assert distance(gradients, others) < 1e-5


@pytest.mark.long
def test_answers_about_pictures_are_those_of_peft(workshop: Workshop, tmp_path: Path) -> None:
    """One rank has a text with pictures, the other one has one without."""
    base, rows = seeing_base(tmp_path / "base", QUICK, seed=8), make_pictured(tmp_path / "rows", 5)
    config = _config(workshop, "towers-asked", base, rows)
    commit(workshop.store.sub("towers-asked"), config)
    talks = [json.loads(line)["messages"][:1] for line in rows.read_text().splitlines()[2::-1]]
    prompts = tmp_path / "rows" / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    uri = workshop.store.sub("towers-asked").uri
    ask = {"what": "generate", "run": uri, "base": True, "sampling": {"max_tokens": 10}}
    (answers,) = launch(2, evaluating.answers, [{**ask, "prompts": [read_prompts(str(prompts))]}], timeout=200)[0]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    ends = {processor.tokenizer.eos_token_id}
    expected = [_answered(model, processor, talk, rows.parent, ends) for talk in talks]
    assert [row["base"] for row in answers["answers"]] == expected
    with evaluating.adapted(model, uri, tmp_path / "adapter") as tuned:
        expected = [_answered(tuned, processor, talk, rows.parent, ends) for talk in talks]
    assert [row["adapter"] for row in answers["answers"]] == expected
