"""A plan counts videos and sounds as it counts pictures: a file of each is made, read and measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMultimodalLM

from launcher.plan import planning
from launcher.plan.notes import _of_reading
from launcher.plan.planning import plan_run
from launcher.plan.summary import plan_lines
from tests.hearing import RATE, hearing_base
from tests.material import Workshop
from tests.seeing import make_watched, seeing_base
from trainer.base.find.check import PictureCost
from trainer.base.find.media import Modality
from trainer.base.find.media.sound import SOUND, Length
from trainer.base.find.media.still import STILL
from trainer.base.find.media.video import VIDEO, Clip, _opened
from trainer.base.find.processor import read_processor
from trainer.base.load.sight_cost import sight_costs
from trainer.plan import seeing
from trainer.plan.forecast import PictureWork, Rate, together

_HEARS = "audio_tower", "multi_modal_projector"
CLIPS = Clip(32, 48, 4), Clip(33, 31, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("bases") / "qwen3_vl", "qwen3_vl")


@pytest.mark.parametrize("clip", CLIPS)
def test_an_example_of_a_video_has_more_frames_than_are_sampled(clip: Clip, base: Path) -> None:
    made = read_processor(base, "it").made
    content = VIDEO.example(clip, made)
    with _opened(content) as video:
        stored = video.stored()
    assert (stored.total, stored.fps) == (12 * clip.frames, 24)
    shown = VIDEO.shown(content, clip, made)
    assert shown.content[0].shape == (clip.frames, clip.height, clip.width, 3)
    assert shown.content[0].std() > 10
    made.video_processor.fps = 100  # it would take more frames than any example has at 24 a second
    made.video_processor.num_frames = None
    assert VIDEO.shown(VIDEO.example(clip, made), clip, made).shape.frames == clip.frames


def test_an_example_of_a_sound_has_its_length() -> None:
    shape = Length(12_345, RATE)
    shown = SOUND.shown(SOUND.example(shape, None), shape, None)
    assert shown.shape == shape
    assert shown.content.std() > 0.1


def test_the_operations_of_a_video_are_those_that_pytorch_counts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[Any]()
    plain = VIDEO.shown
    monkeypatch.setattr(VIDEO, "shown", lambda *given: read.append(given[1]) or plain(*given), raising=False)
    costs = sight_costs(str(base), "it", [VIDEO.numbers(clip) for clip in CLIPS], None, VIDEO.number)
    assert set(read) == set(CLIPS)  # what is timed decodes a file
    processor = read_processor(base, "it")
    whole: Any = AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for cost, clip in zip(costs, CLIPS, strict=True):
        ids = processor.encode(processor.replacements((clip,))[0])
        made = processor.inputs([VIDEO.blank(clip)], ids)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            whole.get_video_features(**{name: made[name] for name in ("pixel_values_videos", "video_grid_thw")})
        assert cost["operations"] == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert cost["tokens"] == len(ids)
        assert cost["of"] == VIDEO.title(clip)
        assert 0 < cost["seconds"] < 60


def test_the_operations_of_a_sound_are_those_that_pytorch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, plain = list[Any](), SOUND.shown
    monkeypatch.setattr(SOUND, "shown", lambda *given: read.append(given[1]) or plain(*given), raising=False)
    base, heard = hearing_base(tmp_path), Length(8000, RATE)
    (cost,) = sight_costs(str(base), "it", [SOUND.numbers(heard)], None, SOUND.number)
    assert set(read) == {heard}
    assert cost["of"] == "sound of 0.5 seconds"
    processor = read_processor(base, "it")
    ids = processor.encode(processor.replacements((heard,))[0])
    whole: Any = AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole(input_ids=torch.tensor([ids]), **processor.inputs([SOUND.blank(heard)], ids))
    parts = [counter.get_flop_counts()[f"{type(whole).__name__}.model.{name}"] for name in _HEARS]
    assert cost["operations"] == sum(sum(part.values()) for part in parts)


def test_a_plan_counts_pictures_and_videos_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    rows = make_watched(tmp_path / "rows", 8)
    config = workshop.config(
        "watched",
        *(f"model.base={base}", "quant.type=none", f"data.train=[{{path: {rows}}}]"),
        *("data.format=pictures", "data.sequence_length=256"),
    )
    of = {0: (2e9, 1e-3, "picture of"), 1: (8e9, 4e-3, "video of")}

    def costs(base: Any, sizes: Any, learning: Any = None, modality: int = 0) -> list[PictureCost]:
        operations, seconds, name = of[modality]
        return [PictureCost(10, round(10 * operations), 10 * seconds, name) for _ in sizes]

    monkeypatch.setattr(seeing, "picture_costs", costs)
    monkeypatch.setattr(planning, "check_sight_at_hand", lambda config, **_: None)  # its trial takes seconds
    workshop.prepare(config)
    found = plan_run(config, "H100", None)
    work = found.pictures
    assert work
    assert work.share
    assert work.operations
    videos = (work.operations - 2e9) / 6e9  # the share of these tokens that stand for videos
    assert 0.2 < videos < 0.99
    assert work.seconds == pytest.approx(1e-3 + 3e-3 * videos)
    assert "files a row" in str(dict(plan_lines(found, config))["pictures"])
    json.dumps(found.to_json()["pictures"])


@pytest.mark.parametrize(
    ("kinds", "noun", "lowered"),
    [
        ([STILL], "pictures", ", or lower data.images.max_pixels."),
        ([VIDEO], "videos", ", or lower data.videos.max_frames or data.videos.max_pixels."),
        ([SOUND], "sounds", "."),  # no setting shortens a sound
        ([STILL, SOUND], "files", ", or lower data.images.max_pixels."),
    ],
)
def test_files_that_are_read_too_slowly_are_made_smaller_by_settings_of_their_own(
    kinds: list[Modality], noun: str, lowered: str
) -> None:
    works = [PictureWork(((8, 8),), 0.5, 8, None, 1.0, 2, one.title(one.usual), one.smaller_by) for one in kinds]
    config: Any = SimpleNamespace(data=SimpleNamespace(sequence_length=64))
    taken = 64 * 0.5 * len(works) / 2  # seconds in which two cores make the tokens of a row
    assert _of_reading(config, together(works), Rate(taken / 0.94, 1.0, "measured", None)) is None
    note = _of_reading(config, together(works), Rate(taken / 0.96, 1.0, "measured", None)) or ""
    assert note.startswith(f"{noun}: the host's cores are the limit. 2 cores of each rank need ")
    assert f" ms for the {noun} of a row" in note
    assert note.endswith(f"Give each rank more cores (cluster.slurm.cpus_per_node){lowered}")


def test_costs_that_cannot_be_counted_stay_unknown() -> None:
    known = PictureWork(((8, 8),), 0.2, 10, 1e9, 1e-3, 2, "picture of 8 x 8 pixels")
    unknown = PictureWork(((8, 9),), 0.1, 40, None, 4e-3, 2, "video of 9 frames")
    assert together([known]) is known
    both = together([known, unknown])
    assert (both.operations, both.of, both.sizes) == (None, "file", ((8, 8), (8, 9)))
    assert both.share == pytest.approx(0.3)
    assert both.tokens == pytest.approx(0.3 / (0.2 / 10 + 0.1 / 40))
    assert both.seconds == pytest.approx((0.2 * 1e-3 + 0.1 * 4e-3) / 0.3)
