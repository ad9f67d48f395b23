"""Runs over rows with sounds, alone and beside pictures and video, against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")
from tests import every_hearing, every_seeing
from tests.dist import curves, runs, seeing
from tests.dist.launch import launch, running
from tests.dist.test_features import records
from tests.dist.test_resume import losses
from tests.hearing import hearing_base, make_sounding, noise, wave_file
from tests.material import Workshop
from tests.seeing import content, picture, trained_over, video
from trainer.config import Config, dump_config, override
from trainer.errors import ConfigError
from trainer.plan.resolve import resolve
from trainer.run import layout

pytestmark = pytest.mark.timeout(300)
_SETTINGS = (
    *("data.format=pictures", "train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=0"),
    *("train.steps=4", "train.global_batch=4"),
)
_KEPT = "sharding.tower_limit=0"


def test_the_curve_of_a_base_that_hears_is_that_of_plain_transformers(workshop: Workshop, tmp_path: Path) -> None:
    """Rows are of several documents: some have sounds, some have none, and so have the ranks of a step."""
    base, rows = hearing_base(tmp_path / "base"), make_sounding(tmp_path / "rows", 32)
    config = workshop.config("hearing", *trained_over(base, rows), *_SETTINGS, "data.sequence_length=160")
    fingerprint = workshop.prepare(config).train
    (stock,) = launch(1, seeing.stock_losses, dump_config(config), fingerprint)
    ours = launch(2, curves.losses, dump_config(override(config, "run.name=hearing-2")), fingerprint)[0]
    assert ours == pytest.approx(stock, rel=1e-5)
    assert stock[-1] < 0.95 * stock[0]


def _mixed(folder: Path) -> Path:
    """Conversations with a picture, a sound, a video, all of them, or none."""
    folder.mkdir()
    kinds = (("image",), ("audio",), (), ("video",), ("audio", "image", "video", "audio"))
    lines = list[str]()
    for row in range(20):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"row {row % 7}"}]
        for number, kind in enumerate(kinds[row % len(kinds)]):
            made, ending = {
                "image": lambda seed: (content(picture(64, 56, seed)), "png"),
                "audio": lambda seed: (wave_file(noise(0.2 + 0.05 * (seed % 7), seed)), "wav"),
                "video": lambda seed: (video(6, 56, 56, seed), "mp4"),
            }[kind](10 * row + number)
            (folder / f"{row}-{number}.{ending}").write_bytes(made)
            parts += [{"type": kind, "path": f"{row}-{number}.{ending}"}, {"type": "text", "text": f"word {number}"}]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes" if row % 2 else "no, none"}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def _omni(tmp_path: Path) -> Path:
    kind = "qwen2_5_omni_thinker"
    every_seeing.write_base(kind, tmp_path / "base", every_hearing.case_of(kind))
    return tmp_path / "base"


def _of_mixed(workshop: Workshop, base: Path, rows: Path, name: str) -> Config:
    return workshop.config(name, *trained_over(base, rows), *_SETTINGS, "data.sequence_length=512")


@pytest.mark.long
def test_text_pictures_sounds_and_videos_have_one_curve_on_one_and_two_ranks(
    workshop: Workshop, tmp_path: Path
) -> None:
    config = _of_mixed(workshop, _omni(tmp_path), _mixed(tmp_path / "rows"), "mixed")
    fingerprint = workshop.prepare(config).train
    (stock,) = launch(1, seeing.stock_losses, dump_config(config), fingerprint, timeout=250)
    for ranks in (1, 2):
        named = dump_config(override(config, f"run.name=mixed-{ranks}"))
        assert launch(ranks, curves.losses, named, fingerprint)[0] == pytest.approx(stock, rel=1e-5), ranks


@pytest.mark.long
def test_a_run_over_sounds_that_was_killed_goes_on_on_other_ranks(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = _omni(tmp_path), _mixed(tmp_path / "rows")
    whole, killed = (
        override(_of_mixed(workshop, base, rows, name), "checkpoint.every_steps=2")
        for name in ("mixed-whole", "mixed-killed")
    )
    fingerprint = workshop.prepare(whole).train
    (every,) = launch(1, seeing.decoded, dump_config(whole), fingerprint, "start")
    expected = losses(workshop.store.sub("mixed-whole"))
    folder = workshop.store.sub("mixed-killed")
    with running(1, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(2)))
        ranks.kill()
    again = launch(2, seeing.decoded, dump_config(killed), fingerprint, "resume")
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    begun = override(whole, "run.name=mixed-begun", "train.steps=2")
    (before,) = launch(1, seeing.decoded, dump_config(begun), fingerprint, "start")
    assert sum(again) == every - before > 0  # of pictures, of which none is decoded twice


@pytest.mark.long
def test_two_ranks_share_a_row_and_its_sounds(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = hearing_base(tmp_path / "base"), make_sounding(tmp_path / "rows", 24)
    settings = (*trained_over(base, rows), *_SETTINGS, "data.sequence_length=128", "train.steps=2")
    config = workshop.config("hearing-alone", *settings)
    fingerprint = workshop.prepare(config).train
    (alone,) = launch(1, curves.losses, dump_config(config), fingerprint)
    shared = override(config, "run.name=hearing-shared", "sharding.sequence_parallel=2", "cluster.workers=2")
    assert launch(2, curves.losses, dump_config(shared), fingerprint)[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.long
def test_a_class_that_takes_no_features_of_sounds_keeps_none(workshop: Workshop, tmp_path: Path) -> None:
    """That of Qwen2-Audio makes none by a method, and that of Qwen2.5-Omni takes those of pictures and videos alone."""
    heard, mixed = make_sounding(tmp_path / "heard", 8), _mixed(tmp_path / "mixed")
    config = override(_of_mixed(workshop, hearing_base(tmp_path / "hears"), heard, "kept-sounds"), _KEPT)
    with pytest.raises(ConfigError, match="as its class has no method for features that could be kept, such as"):
        resolve(override(config, "data.sequence_length=160"))
    config = override(_of_mixed(workshop, _omni(tmp_path), mixed, "kept-mixed"), _KEPT)
    (refused,) = launch(1, runs.run, dump_config(config), workshop.prepare(config).train)
    assert refused["outcome"] == "ConfigError"
    assert refused["message"].startswith("sharding.tower_limit: features cannot be kept with this base, as its class")
    assert "makes something else of kept features than of input_features" in refused["message"]


@pytest.mark.long
def test_pictures_and_videos_of_a_base_that_hears_are_kept_to_the_bit(workshop: Workshop, tmp_path: Path) -> None:
    rows, found = _mixed(tmp_path / "rows"), list[Any]()
    base = _omni(tmp_path)
    lines = [line for line in rows.read_text().splitlines() if ".wav" not in line]
    rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for name, kept in (("plain", []), ("kept", [_KEPT])):
        config = override(_of_mixed(workshop, base, rows, f"omni-{name}"), *kept)
        (ended,) = launch(1, runs.run, dump_config(config), workshop.prepare(config).train)
        assert ended["outcome"] == "finished", ended
        found.append(records(workshop.store.sub(config.run.name)))
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize("learns", ["lora", pytest.param("projector", marks=pytest.mark.long)])
def test_a_tower_that_learns_from_sounds_has_the_curve_of_plain_peft(
    learns: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Some ranks of a step have no sound."""
    base, rows = hearing_base(tmp_path / "base"), make_sounding(tmp_path / "rows", 24, heard=(0, 1, 0, 0, 2, 0))
    settings = ("data.sequence_length=96", "train.global_batch=2", f"tuning.towers={learns}")
    config = workshop.config(f"hearing-{learns}", *trained_over(base, rows), *_SETTINGS, *settings)
    fingerprint = workshop.prepare(config).train
    kinds = seeing.kinds_of_rows(dump_config(config), fingerprint, 2)
    assert any("text" in step and len(set(step)) > 1 for step in kinds), kinds
    (stock,) = launch(1, seeing.stock_losses, dump_config(config), fingerprint, timeout=200)
    for ranks in (1, 2) if learns == "projector" else (2,):
        named = dump_config(override(config, f"run.name=hearing-{learns}-{ranks}"))
        assert launch(ranks, curves.losses, named, fingerprint)[0] == pytest.approx(stock, rel=1e-5), ranks
    frozen = override(config, f"run.name=hearing-{learns}-frozen", "tuning.towers=null")
    (without,) = launch(1, curves.losses, dump_config(frozen), fingerprint)
    assert stock != pytest.approx(without, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gemma4", "qwen3_omni_moe_thinker"])
def test_a_class_that_hears_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    from tests.every_model import PROVEN

    (found,) = launch(1, every_hearing.tried, kind, str(tmp_path), timeout=280)
    assert found["status"] == PROVEN, found
