"""Answers, classes and mixtures with videos or sounds: loss and gradient are those of plain transformers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist import curves, judged, seeing
from tests.dist.assembled import chapters_of
from tests.dist.gradients import first_step
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, override
from trainer.data.order.settings import Position
from trainer.data.order.stream import sees_pictures, train_stream
from trainer.run import layout

pytest.importorskip("torchvision")
pytest.importorskip("av")
from tests.dist.test_seeing import JUDGED, judged_rows
from tests.hearing import hearing_base, make_sounding
from tests.seeing import make_pictured, make_watched, seeing_base, trained_over

pytestmark = pytest.mark.timeout(300)


def _watching(folder: Path) -> Path:
    return seeing_base(folder, "qwen3_vl")


OVER: dict[str, tuple[Callable[[Path], Path], Callable[..., Path]]] = {
    "videos": (_watching, make_watched),
    "sounds": (hearing_base, make_sounding),
}
QUICK = ("videos", "dpo"), ("sounds", "kto")


@pytest.mark.parametrize(
    ("files", "objective"),
    [
        (files, objective) if (files, objective) in QUICK else pytest.param(files, objective, marks=pytest.mark.long)
        for files in OVER
        for objective in JUDGED
    ],
)
def test_the_first_step_is_that_of_plain_transformers(
    files: str, objective: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Some of the packed rows have files, some have none, and so have both ranks."""
    write_base, make_rows = OVER[files]
    base, rows = write_base(tmp_path / "base"), judged_rows(tmp_path / "rows", objective, make_rows)
    config = workshop.config(
        f"{files}-{objective}",
        *trained_over(base, rows),
        *(f"data.format={JUDGED[objective]}", f"objective.name={objective}", "data.sequence_length=384"),
        *("train.steps=1", "train.global_batch=8", "train.micro_batch=1"),
        *(["data.labels=[odd, even]"] if "class" in objective else []),
        *(["objective.beta=0.4"] if objective in ("dpo", "kto") else []),
    )
    text, gradients = dump_config(config), str(tmp_path / "gradients.safetensors")
    fingerprint = workshop.prepare(config).train
    (expected,) = launch(1, judged.plain_first_step, text, str(rows), timeout=200)
    for ranks in (2,) if (files, objective) in QUICK else (1, 2):
        step = launch(ranks, first_step, text, fingerprint, gradients, timeout=200)[0]
        assert (step["loss"], step["grad_norm"]) == pytest.approx(expected, rel=1e-5), ranks
        assert step["accumulation"] == 8 // ranks


@pytest.mark.long
@pytest.mark.parametrize("files", OVER)
def test_a_mixture_with_replayed_text_has_the_curve_of_plain_transformers(
    files: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Of three sources one is visited twice, one is visited by half, and one is text alone, of which a share of the
    tokens is."""
    write_base, make_rows = OVER[files]
    base, twice, half, text = write_base(tmp_path / "base"), *(tmp_path / name for name in ("twice", "half", "text"))
    sources = [
        f"{{path: {make_rows(twice, 12)}, weight: 2}}",
        f"{{path: {make_rows(half, 8, seed=6)}, weight: 0.5}}",
        f"{{path: {make_pictured(text, 16, seed=7, seen=(0,))}, fraction: 0.2}}",
    ]
    config = workshop.config(
        f"{files}-mixed",
        *trained_over(base, tmp_path),
        *(f"data.train=[{', '.join(sources)}]", "data.format=pictures", "data.sequence_length=192", "train.steps=4"),
        *("train.global_batch=6", "train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=0"),
    )
    fingerprint = workshop.prepare(config).train
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    sees_pictures(stream, config, resolve_base(config.model), workshop.store.sub(layout.dataset(fingerprint)))
    position, visited = Position(), Counter[int]()
    for _ in range(4):
        visited.update(number for batch in stream.step(position) for number in batch.documents)
        position = stream.advance(position)
    assert {0, 1, 2} == {(number >= 12) + (number >= 20) for number in visited}
    assert max(visited.values()) > 1
    (stock,) = launch(1, seeing.stock_losses, dump_config(config), fingerprint)
    ours = launch(2, curves.losses, dump_config(override(config, f"run.name={files}-mixed-2")), fingerprint)[0]
    assert ours == pytest.approx(stock, rel=1e-5)
