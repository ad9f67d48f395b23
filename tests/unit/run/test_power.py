"""The power of a GPU, by a stand-in of nvidia-smi that answers for one GPU alone."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.run import metrics
from trainer.run.metrics import metered

CUDA = torch.device("cuda", 0)


@pytest.fixture
def watts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with what nvidia-smi prints."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7f3a"))
    monkeypatch.setattr(metrics, "_POWER_SECONDS", 0.01)
    query = "--id=GPU-7f3a --query-gpu=power.draw --format=csv,noheader,nounits"
    command = tmp_path / "nvidia-smi"
    command.write_text(
        f'#!/bin/sh\n[ "$*" = "{query}" ] || exit 6\n/bin/cat {tmp_path}/watts\necho >> {tmp_path}/asked\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "watts"


def wait_for(times: int, watts: Path) -> None:
    """Return when nvidia-smi has been asked so often."""
    asked, deadline = watts.with_name("asked"), time.monotonic() + 60
    while not asked.exists() or len(asked.read_text()) < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_mean_power_since_the_last_step_is_told(watts: Path) -> None:
    watts.write_text("412.5\n")
    with metered(CUDA, reads=True) as measured:
        wait_for(2, watts)
        assert measured() == {"device_watts": 412.5}
        watts.write_text("100.0\n")
        wait_for(len(watts.with_name("asked").read_text()) + 2, watts)
        measured()
        wait_for(len(watts.with_name("asked").read_text()) + 2, watts)
        assert measured() == {"device_watts": 100.0}
    asked = len(watts.with_name("asked").read_text())
    time.sleep(0.5)
    assert (
        len(watts.with_name("asked").read_text()) <= asked + 1
    )  # but the question that was on its way, nobody asks any more


def test_power_is_the_mean_of_all_readings_since(monkeypatch: pytest.MonkeyPatch, watts: Path) -> None:
    """Nobody reads it for a rank that does not ask."""

    class Twice:
        def __init__(self, seconds: float, action: Callable[[], None], what: str) -> None:
            self.now, self.stop = (lambda: (action(), action())), lambda wait: None

    told = iter(["100.0", "412.5"])
    monkeypatch.setattr(metrics, "Every", Twice)
    monkeypatch.setattr(metrics.children, "run", lambda *_, **__: SimpleNamespace(stdout=next(told)))
    for reads, found in ((True, {"device_watts": 256.2}), (False, {})):
        with metered(CUDA, reads=reads) as measured:
            assert measured() == found


def test_a_gpu_that_does_not_tell_and_a_rank_that_does_not_ask_have_none(
    watts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watts.write_text("[N/A]\n")
    with metered(CUDA, reads=True) as measured:
        wait_for(2, watts)
        assert measured() == {}
    assert capsys.readouterr().err == ""
    watts.write_text("1\n")
    for device, reads in ((CUDA, False), (torch.device("cpu"), True)):
        with metered(device, reads=reads) as measured:
            assert measured() == {}
    monkeypatch.setenv("PATH", "")
    with metered(CUDA, reads=True) as measured:
        assert measured() == {}


def test_an_nvidia_smi_that_fails_ends_nothing_and_is_said_once(
    watts: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="another"))
    said = ""
    with metered(CUDA, reads=True) as measured:
        deadline = time.monotonic() + 60
        while not said:
            assert time.monotonic() < deadline
            said += capfd.readouterr().err
            time.sleep(0.05)
        assert measured() == {}
    assert (said + capfd.readouterr().err).count("reading the GPU's power failed, which does not end the run") == 1
