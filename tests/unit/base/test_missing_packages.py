"""Whoever reads pictures or video without the packages for it is told which one is missing, before anything else."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.smoke.life import run_smoke
from launcher.smoke.pictures import make_pictures
from trainer.base.find import processor
from trainer.base.find.media import ffmpeg, sound, video
from trainer.config.data import Sounds, Videos
from trainer.data.format.formats import ROW_KINDS
from trainer.errors import ConfigError

_SEEING = [name for name, kind in ROW_KINDS.items() if kind.sees]


def _processor(folder: Path) -> Any:
    (folder / processor.PROCESSOR_FILES[0]).write_text("{}")
    return processor.read_processor(folder, "base")


_READERS: dict[str, Callable[[Path], Any]] = {
    "smoke": lambda folder: run_smoke(
        None, (), layers=None, online=False, images=True, directory=folder / "smoke", show=False
    ),
    "its pictures": lambda folder: make_pictures(folder / "smoke"),
    "processor": _processor,
    **{kind: lambda folder, kind=kind: ROW_KINDS[kind].renderer(None, None) for kind in _SEEING},
}


@pytest.mark.parametrize("missing", ["PIL", "torchvision"])
@pytest.mark.parametrize("reader", _READERS)
def test_pictures_need_two_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: str, missing: str) -> None:
    monkeypatch.setattr(processor, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(
        ConfigError, match=rf"needs the package {missing}. Install it: pip install 'capstan-llm\[images"
    ):
        _READERS[reader](tmp_path)
    assert not (tmp_path / "smoke").exists()


def test_videos_and_sounds_need_a_package_when_they_are_measured_and_when_they_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ffmpeg, "find_spec", lambda name: None)
    data: Any = SimpleNamespace(videos=Videos(), sounds=Sounds())
    for read in (
        lambda: video.VIDEO.shape_of(b"", data, None),
        lambda: video.VIDEO.shown(b"", video.Clip(8, 8, 1), None),
        lambda: sound.SOUND.shape_of(b"", data, None),
        lambda: sound.SOUND.shown(b"", sound.Length(8, 8000), None),
    ):
        with pytest.raises(ConfigError, match="needs the package av"):
            read()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "<none>"), "No such file"),
        (ValueError("it is none\nat all"), "it is none"),
    ],
)
def test_why_a_file_of_sound_cannot_be_read_has_no_number_and_no_name(error: Exception, said: str) -> None:
    assert ffmpeg.reason(error) == said
