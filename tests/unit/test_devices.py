"""A run computes on the CPU where that was said, or where there is nothing else: never because torch sees no GPU."""

from pathlib import Path

import pytest

from trainer.devices import LocalGpu, check_device, described_gpus, local_gpus
from trainer.errors import ConfigError

QUERY = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA L40S, 46068\nNVIDIA Graphics Device, [N/A]\n"
LISTING = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two GPUs, as far as NVIDIA's own program tells."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase $1 in --query*) printf '%s' '{QUERY}';; *) printf '%s' '{LISTING}';; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_the_driver_tells_how_many_gpus_there_are(driver: Path) -> None:
    assert local_gpus() == 2


@pytest.mark.usefixtures("driver")
def test_the_driver_tells_which_gpus_there_are_and_a_process_may_see_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = [LocalGpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), LocalGpu("NVIDIA L40S", 46068 * 2**20)]
    assert described_gpus() == every
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert described_gpus() == every[1:]
    monkeypatch.setenv("PATH", "/nowhere")
    assert described_gpus() == []


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_from_the_process_are_not_there(
    driver: Path, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert local_gpus() == 0
    assert described_gpus() == []
    check_device(None, torch_gpus=0, torch_build=None)


@pytest.mark.parametrize("setting", [None, 1])
def test_a_cpu_build_of_torch_beside_gpus_is_refused_with_the_way_to_another(driver: Path, setting: int | None) -> None:
    with pytest.raises(
        ConfigError, match=r"has 2 GPUs, but this torch is a CPU build\. Install .*, or set it to 0 to comp"
    ):
        check_device(setting, torch_gpus=0, torch_build=None)


def test_a_torch_that_does_not_fit_the_driver_is_refused(driver: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 GPUs, but this torch \(built for 13\.0\) finds none\. Compare"):
        check_device(None, torch_gpus=0, torch_build="13.0")


def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per_worker: 1, but .* shows no GPU to this process\. Start"):
        check_device(1, torch_gpus=0, torch_build="13.0")


def test_the_cpu_is_used_where_it_is_meant_and_a_gpu_where_torch_sees_one(driver: Path) -> None:
    check_device(0, torch_gpus=0, torch_build=None)
    check_device(1, torch_gpus=1, torch_build="13.0")
    check_device(None, torch_gpus=2, torch_build="13.0")
