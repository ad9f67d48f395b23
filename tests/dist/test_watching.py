"""A run over videos: the curve of plain transformers on any number of ranks, of which some have pictures or text alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.dist import curves, evaluating, runs, seeing
from tests.dist.assembled import chapters_of
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, override
from trainer.data.order.settings import Position
from trainer.data.order.stream import sees_pictures, train_stream
from trainer.evaluate.prompts import read_prompts
from trainer.run import layout

pytest.importorskip("torchvision")
pytest.importorskip("av")
from tests.dist.test_features import features, records
from tests.dist.test_seeing import answered, cut_inside
from tests.seeing import make_watched, seeing_base, trained_over

pytestmark = pytest.mark.timeout(300)


def _run(workshop: Workshop, folder: Path, name: str, *settings: str) -> Any:
    base, rows = folder / "base", folder / "rows" / "rows.jsonl"
    if not base.exists():
        seeing_base(base, "qwen3_vl")
        make_watched(folder / "rows")
    given = ("data.format=pictures", "data.sequence_length=192", "train.steps=4", "train.global_batch=6")
    return workshop.config(
        name,
        *(*trained_over(base, rows), *given, "train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=2"),
        *settings,
    )


@pytest.mark.parametrize("towers", ["null", pytest.param("lora", marks=pytest.mark.long)])
def test_the_curve_is_that_of_plain_transformers_on_one_and_two_ranks(
    towers: str, workshop: Workshop, tmp_path: Path
) -> None:
    config = _run(workshop, tmp_path, f"watching-{towers}", "checkpoint.every_steps=0", f"tuning.towers={towers}")
    fingerprint = workshop.prepare(config).train
    text = dump_config(config)
    (stock,) = launch(1, seeing.stock_losses, text, fingerprint)
    for ranks in (1, 2):
        named = dump_config(override(config, f"run.name=watching-{towers}-{ranks}"))
        assert launch(ranks, curves.losses, named, fingerprint)[0] == pytest.approx(stock, rel=1e-5), ranks
    assert stock[-1] < 0.95 * stock[0]


@pytest.mark.long
def test_two_ranks_share_a_row_and_its_videos(workshop: Workshop, tmp_path: Path) -> None:
    config = _run(workshop, tmp_path, "watching-alone", "checkpoint.every_steps=0", "train.steps=2")
    fingerprint = workshop.prepare(config).train
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    sees_pictures(stream, config, resolve_base(config.model), workshop.store.sub(layout.dataset(fingerprint)))
    assert any(cut_inside(row, 96) for row in stream.step(Position()))
    (alone,) = launch(1, curves.losses, dump_config(config), fingerprint)
    shared = override(config, "run.name=watching-shared", "sharding.sequence_parallel=2", "cluster.workers=2")
    assert launch(2, curves.losses, dump_config(shared), fingerprint)[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_on_other_ranks(workshop: Workshop, tmp_path: Path) -> None:
    whole, killed = (_run(workshop, tmp_path, name) for name in ("watching-whole", "watching-killed"))
    fingerprint = workshop.prepare(whole).train
    launch(1, runs.run, dump_config(whole), fingerprint)
    folder = workshop.store.sub("watching-killed")
    with running(1, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(2)))
        ranks.kill()
    launch(2, runs.run, dump_config(killed), fingerprint, "resume")
    assert losses(folder) == pytest.approx(losses(workshop.store.sub("watching-whole")), rel=1e-5)


@pytest.mark.long
def test_a_run_over_kept_features_of_videos_is_to_the_bit_the_run_that_computes_them(
    workshop: Workshop, tmp_path: Path
) -> None:
    found = list[Any]()
    for name, kept in (("plain", []), ("kept", ["sharding.tower_limit=0"])):
        config = _run(workshop, tmp_path, f"watching-{name}", *kept)
        fingerprint = workshop.prepare(config).train
        assert launch(1, runs.run, dump_config(config), fingerprint)[0]["outcome"] == "finished"
        found.append(records(workshop.store.sub(f"watching-{name}")))
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert len(features(workshop.store)) == 18  # of the documents with a video or a picture


@pytest.mark.long
def test_answers_about_videos_are_those_of_transformers(workshop: Workshop, tmp_path: Path) -> None:
    name = "watching-asked"
    config = _run(workshop, tmp_path, name)
    commit(workshop.store.sub(name), config)
    rows, prompts = tmp_path / "rows", tmp_path / "rows" / "prompts.jsonl"
    talks = [json.loads(line)["messages"][:1] for line in (rows / "rows.jsonl").read_text().splitlines()[1:3]]
    parts = [{"type": "text", "text": "the "}, {"type": "video", "path": "1.mp4"}, {"type": "text", "text": "?"}]
    talks.append([{"role": "user", "content": parts}])
    given = [*({"messages": talk} for talk in talks[:2]), {"prompt": "the <video>?", "videos": ["1.mp4"]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in given))
    asks = {"what": "generate", "run": workshop.store.sub(name).uri, "base": True, "sampling": {"max_tokens": 10}}
    (answers,) = launch(2, evaluating.answers, [{**asks, "prompts": [read_prompts(str(prompts), {})]}], timeout=200)[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    expected = [answered(model, processor, talk, rows, {processor.tokenizer.eos_token_id}) for talk in talks]
    assert [row["base"] for row in answers["answers"]] == expected
    assert answers["answers"][2]["prompt"] == "the <video>?"
