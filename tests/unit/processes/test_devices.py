"""A run computes on the CPU where that was said, or where there is nothing else: never because torch sees no GPU. On
GPUs each rank has one of its own, however many its launcher shows it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.errors import ConfigError
from trainer.processes import devices
from trainer.processes.accelerator import own_device
from trainer.processes.devices import (
    ListedGpu,
    LocalGpu,
    check_device,
    count_visible,
    described_gpus,
    listed_gpus,
    local_gpus,
    pinned_bytes,
    place_bytes,
    places_in_blocks,
    visible_gpus,
)
from trainer.processes.ranks import add_in_one_order, bound_device, let_segments_grow, take_gpu

QUERY = "GPU-1, NVIDIA H100 80GB HBM3, 81559\nGPU-2, NVIDIA L40S, 46068\nGPU-3, NVIDIA Graphics Device, [N/A]\n"
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
def test_a_list_of_gpus_ends_at_the_first_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 7, 0")
    assert visible_gpus() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 0")
    assert visible_gpus() == ["1", "0"]


WHOLE = [ListedGpu("GPU-5d5ba0d6"), ListedGpu("GPU-5e11"), ListedGpu("GPU-c8f0")]


@pytest.mark.parametrize(
    "setting",
    ["0", "2,0", "1, 2", "0,7,1", "1,1", "-1", "1,-1,2", "x", "NoDevFiles", "GPU-5d5ba0d6,GPU-c8f0", "GPU-5d,GPU-c"],
)
def test_the_devices_that_are_left_are_those_that_torch_takes(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    taken: list[Any] = torch.cuda._parse_visible_devices()
    if taken and isinstance(taken[0], str):
        taken = torch.cuda._transform_uuid_to_ordinals(taken, [gpu.uuid for gpu in WHOLE])
    within = next((place for place, number in enumerate(taken) if number >= len(WHOLE)), len(taken))
    assert count_visible(WHOLE, setting) == within
    assert count_visible([ListedGpu()] * 3, setting) == within  # a machine without nvidia-smi, which has device files


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        (None, 1),
        ("0", 1),
        ("1", 1),
        ("2", 0),
        ("MIG-c7384736-a75d", 1),
        ("MIG-c7384736-a75d,MIG-a28ad590", 1),
        ("MIG-77", 0),
    ],
)
def test_a_process_has_one_mig_instance(driver: Path, setting: str | None, count: int) -> None:
    """As nvidia-smi lists them in NVIDIA's MIG user guide."""
    parts = [
        "  MIG 1g.5gb      Device  0: (UUID: MIG-c7384736-a75d)",
        "  MIG 3g.20gb     Device  1: (UUID: MIG-a28ad590)",
    ]
    gpu = ["GPU {0}: NVIDIA A100-SXM4-40GB (UUID: GPU-{0}ed)", *parts]
    driver.write_text("#!/bin/sh\ncat <<E\n" + "\n".join([*gpu, gpu[0]]).format(0) + "\nE\n")
    listed = listed_gpus()
    assert [gpu.instances for gpu in listed] == [["MIG-c7384736-a75d", "MIG-a28ad590"], []]
    listed = [listed[0], listed[0]] if setting == "1" else listed
    assert count_visible(listed, setting) == count


def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_number_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device(3) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for shown, taken in ((8, 3), (1, 0), (2, 1)):  # all of the node's; --gpus-per-task=1; --gpus-per-task=2
        monkeypatch.setattr(torch.accelerator, "device_count", lambda shown=shown: shown)
        assert own_device(3) == torch.device("cuda", taken)


def test_two_ranks_on_one_gpu_are_told_apart_from_two_that_see_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = iter([SimpleNamespace(uuid=uuid, name="NVIDIA H100") for uuid in ("a", "b", "a")])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: next(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    store, device = HashStore(), torch.device("cuda", 0)
    take_gpu(store, device, 0)
    take_gpu(store, device, 1)
    with pytest.raises(
        ConfigError, match=r"rank 2 would compute on the GPU of another rank: NVIDIA H100 .*each its own"
    ):
        take_gpu(store, device, 2)


def test_a_group_is_told_the_device_of_a_rank_that_has_others_alone() -> None:
    gpu = torch.device("cuda:0")
    assert bound_device(gpu, 2) == gpu
    assert bound_device(gpu, 1) is bound_device(torch.device("cpu"), 2) is None


def test_the_allocators_segments_grow_also_where_cuda_has_begun_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' import asks for the capability of GPUs, and torch reads the allocator's settings when CUDA
    begins.
    """
    read, before = torch._C._accelerator_getAllocatorSettings, "expandable_segments:False"
    torch._C._accelerator_setAllocatorSettings(before)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:512")
        let_segments_grow()
        assert read() == before, "the control: the environment is read once, and what it says is left"
        monkeypatch.delenv(name)
    let_segments_grow()
    assert read() == "expandable_segments:True"


def test_kernels_add_in_one_order_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASH_ATTENTION_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        add_in_one_order()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled(), "some kernels have no other mode"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"  # transformers reads it for each call
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "0", "a user's own stays"
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        add_in_one_order()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("driver")
def test_the_driver_tells_which_gpus_there_are_and_a_process_may_see_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = [LocalGpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), LocalGpu("NVIDIA L40S", 46068 * 2**20)]
    assert described_gpus() == every
    for shown in ("1", "1,2", "GPU-2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert described_gpus() == every[1:]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert described_gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert described_gpus() == []


def test_a_driver_that_fails_tells_nothing(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.write_text(f"{driver.read_text()}exit 9\n")
    monkeypatch.setattr(devices, "_opens", lambda path: False)
    assert (described_gpus(), local_gpus()) == ([], 0)


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


@pytest.mark.parametrize("controllers", ["", "memory"])
def test_the_memory_that_is_left_is_no_more_than_that_of_the_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controllers: str
) -> None:
    folder, limit, used = devices._MEMORY_FILES[controllers]
    mine = _groups()[0].split(":", 2)[2]
    root = tmp_path / "cgroups"
    monkeypatch.setattr(devices, "_CGROUPS", root)
    monkeypatch.setattr(devices, "_MEMORY_FILES", {line.split(":")[1]: (folder, limit, used) for line in _groups()})
    without = devices.host_memory_left()
    assert without > 2**28, "the control: there is no limit yet"
    group = root / folder / mine.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("1000000\n")
    (group / used).write_text("400000\n")
    (group / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
    assert devices.host_memory_left() == 650_000
    (group / limit).write_text("max\n")
    assert devices.host_memory_left() > 2**28
    for name, count in ((limit, "700000"), (used, "100000"), ("memory.stat", "inactive_file 0")):
        (group.parent / name).write_text(f"{count}\n")
    assert devices.host_memory_left() == 600_000, "the limit of a group around this one"


def _groups() -> list[str]:
    """The lines on this process's control groups, whatever their version."""
    return Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("size", "count", "bytes_"),
    # Blocks are rounded up to powers of two: three places of 96 in one block would take 512.
    [(96, 3, 384), (64, 4, 256), (64, 3, 192), (100, 1, 128), (100, 0, 0)],
)
def test_places_lie_in_the_blocks_that_rounding_makes_least_of(size: int, count: int, bytes_: int) -> None:
    blocks = places_in_blocks(size, count)
    assert (sum(blocks), sum(pinned_bytes(places * size) for places in blocks)) == (count, bytes_)
    assert 0 not in blocks
    assert [place_bytes(bytes_) for bytes_ in (1, 64, 65)] == [64, 64, 128]
