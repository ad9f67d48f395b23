"""The doctor names what is missing and how to get it, and only what every run needs makes it fail."""

import io
import json

import psutil
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from launcher.doctor import doctor
from launcher.doctor.doctor import (
    Check,
    Diagnosis,
    Imports,
    check_model,
    check_package,
    check_store,
    diagnose,
    diagnosis_table,
    imports,
)
from launcher.doctor.nccl import Network
from tests.material import Workshop, commit
from tests.unit.base.test_same_base import one_weight
from tests.unit.run.made_records import CONFIG
from trainer.config import parse_config
from trainer.model.kernels.attention import release_wheel
from trainer.processes.devices import ListedGpu
from trainer.store.store import Store


@pytest.fixture(autouse=True)
def quick_imports(monkeypatch):
    monkeypatch.setattr(doctor, "imports", lambda: Imports(2.5, 3000, 400 * 2**20, "ext4"))


def test_this_machine_can_run(tmp_path):
    report = diagnose(str(tmp_path))
    assert report.ok, [check for check in report.checks if check.state == "missing"]
    names = [check.name for check in report.checks]
    assert {"python", "GPUs", "attention kernels", "machine", f"store {tmp_path}"} <= set(names)
    assert {"torch", "deepspeed", "ray", "wandb", "mlflow-skinny", "trackio"} <= set(names)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_without_a_store_none_is_tried():
    report = diagnose(None)
    assert not any(check.name.startswith("store") for check in report.checks)


def test_an_absent_package_is_told_with_its_install_command():
    check = check_package(Requirement("no-such-package>=1"), "optional", "pip install it")
    assert (check.state, check.found, check.fix) == ("optional", "not installed", "pip install it")


def test_a_package_out_of_its_range_fails_even_when_optional():
    check = check_package(Requirement("pydantic<1"), "optional", "pip install it")
    assert check.state == "missing"
    assert "<1 is needed" in check.found


def test_a_release_before_the_first_counts_as_one_of_its_range(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.1.0rc1")
    assert check_package(Requirement("torch>=2"), "missing", "").state == "ok"


def test_a_store_is_left_as_it_was_found(tmp_path):
    assert check_store(str(tmp_path)).state == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["ftp://host/x", "/proc/no-such-place"])
def test_a_store_that_cannot_be_written_fails(uri: str):
    check = check_store(uri)
    assert check.state == "missing"
    assert uri in check.found


def test_a_store_that_returns_other_bytes_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "get", lambda store, key: b"other bytes")
    check = check_store(str(tmp_path))
    assert (check.state, check.fix) == ("missing", "Do not use this store.")


def test_a_machine_has_so_many_gibibytes(monkeypatch):
    monkeypatch.setattr(doctor, "ask_torch", lambda: "not asked")
    (found,) = (check.found for check in diagnose(None).checks if check.name == "machine")
    memory = int(found.partition(" cores, ")[2].removesuffix(" GiB memory"))
    assert memory == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.6)


@pytest.mark.parametrize("allocation", ["17", None])
def test_the_network_of_an_allocation_is_looked_at_on_machines_without_gpus_too(monkeypatch, allocation):
    monkeypatch.setattr(doctor, "ask_torch", lambda: "not asked")
    monkeypatch.setattr(doctor, "listed_gpus", list)
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if allocation:
        monkeypatch.setenv("SLURM_JOB_ID", allocation)
    assert any(check.name == "NCCL" for check in diagnose(None).checks) == bool(allocation)


def test_a_torch_that_does_not_import_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    report = diagnose(None)
    (check,) = (check for check in report.checks if check.name == "torch import")
    assert check.state == "missing"
    assert "libcudart" in check.found
    assert not any(check.name == "imports of a rank" for check in report.checks), "its ranks would import nothing"


GPU = {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bytes": 5 * 2**30}


@pytest.mark.parametrize(
    ("setting", "build", "gpus", "state", "found"),
    [
        (None, "13.0", [GPU, GPU], "ok", "NVIDIA A100-SXM4-40GB MIG 1g.5gb 5 GiB, NVIDIA"),
        ("1", "13.0", [GPU], "ok", "1g.5gb 5 GiB (of 2: CUDA_VISIBLE_DEVICES=1)"),
        ("0,1", "13.0", [GPU, GPU], "ok", "1g.5gb 5 GiB, NVIDIA A100-SXM4-40GB MIG 1g.5gb 5 GiB"),
        ("", "13.0", [], "optional", "2, of which CUDA_VISIBLE_DEVICES= leaves none"),
        ("1", None, [], "missing", "1, but this torch is a CPU build"),
        (None, "13.0", [], "missing", "2, but this torch (built for 13.0) finds none"),
    ],
)
def test_gpus_are_told_as_a_run_would_use_them(monkeypatch, setting, build, gpus, state, found):
    monkeypatch.setattr(doctor, "listed_gpus", lambda: [ListedGpu("GPU-1"), ListedGpu("GPU-2")])
    packages = ["flash_attention_2", "flash_attention_4"] if gpus else []
    kernels = {"kernels": ["varlen", "sdpa"], "packages": packages, "wheel": "https://a.org/b.whl" if build else None}
    monkeypatch.setattr(doctor, "ask_torch", lambda: {"build": build, "gpus": gpus, "bf16": bool(gpus), **kernels})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    report = diagnose(None)
    fixes = {check.name: check.fix for check in report.checks}
    assert ("flash-attn" in fixes) == bool(gpus)
    if gpus:
        assert fixes["flash-attn"].startswith("pip install https://a.org/b.whl, or where that is not found")
        assert fixes["flash-attn-4"] == "pip install 'flash-attn-4>=4.0.0b36'", (
            "pip takes no beta that is not asked for"
        )
    (check,) = (check for check in report.checks if check.name == "GPUs")
    assert check.state == state
    assert found in check.found
    assert ("CUDA_VISIBLE_DEVICES" in check.found) == ("CUDA_VISIBLE_DEVICES" in found)
    assert check.fix or state == "ok"


@pytest.mark.parametrize(
    ("torch", "cuda", "abi", "python", "machine", "build"),
    [
        (
            "2.13.0+cu130",
            "13.0",
            True,
            ("3", "12", "1"),
            "x86_64",
            "cu13torch2.13cxx11abiTRUE-cp312-cp312-linux_x86_64",
        ),
        ("2.11.1", "12.8", True, ("3", "11", "9"), "aarch64", "cu12torch2.11cxx11abiTRUE-cp311-cp311-linux_aarch64"),
        (
            "2.14.0.dev20261101+cu132",
            "13.2",
            False,
            ("3", "13", "0"),
            "x86_64",
            "cu13torch2.14cxx11abiFALSE-cp313-cp313-linux_x86_64",
        ),
    ],
)
def test_the_wheel_of_flash_attns_release_is_named_as_its_own_setup_looks_for_it(
    monkeypatch, torch, cuda, abi, python, machine, build
):
    monkeypatch.setattr("platform.python_version_tuple", lambda: python)
    monkeypatch.setattr("platform.machine", lambda: machine)
    release = "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3.post2"
    assert release_wheel(torch, cuda, cxx11_abi=abi) == f"{release}/flash_attn-2.8.3.post2+{build}.whl"


def test_the_verdict_comes_before_the_table():
    report = Diagnosis(
        (
            Check("GPUs", "optional", "none"),
            Check("python", "ok", "3.12"),
            Check("ray", "missing", "not installed", "pip install 'ray[train]'"),
        )
    )
    screen = Console(file=io.StringIO(), width=100)
    screen.print(diagnosis_table(report))
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    assert "pip install 'ray[train]'" in text
    assert text.startswith("Missing: ray.")
    assert text.rindex(" ray ") < text.index(" python ") < text.index(" GPUs "), "what is to be done comes first"


@pytest.mark.parametrize(("version", "told"), [([2, 25, 1], True), ([2, 26, 0], False), (None, False)])
def test_an_nccl_that_keeps_no_order_of_collectives_is_told(
    monkeypatch: pytest.MonkeyPatch, version: list[int] | None, told: bool
) -> None:
    facts = {"build": "13.0", "gpus": [GPU], "bf16": True, "kernels": ["sdpa"], "packages": [], "wheel": None}
    monkeypatch.setattr(doctor, "listed_gpus", lambda: [ListedGpu("GPU-1")])
    monkeypatch.setattr(doctor, "ask_torch", lambda: {**facts, "nccl": version})
    found = [check.found for check in diagnose(None).checks if check.name == "NCCL version"]
    assert found == ["2.25.1, which does not order the collectives of several communicators"] * told


@pytest.mark.parametrize(
    ("gpus", "slow", "state", "words"),
    [
        ([GPU], None, "optional", "not supported by these GPUs"),
        ([], None, "ok", "a product takes 12 times as long as in fp32; runs compute in bf16"),
        ([], "it has no AMX", "optional", "times as long as in fp32; it has no AMX, so runs compute in fp32"),
    ],
)
def test_where_bf16_is_slow_runs_are_said_to_compute_in_fp32(
    monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, object]], slow: str | None, state: str, words: str
) -> None:
    facts = {"build": "13.0", "gpus": gpus, "bf16": False, "kernels": ["sdpa"], "packages": [], "wheel": None}
    monkeypatch.setattr(doctor, "listed_gpus", lambda: [ListedGpu("GPU-1")] * len(gpus))
    monkeypatch.setattr(doctor, "ask_torch", lambda: {**facts, "bf16_slowdown": 12.3})
    monkeypatch.setattr(doctor, "why_processor_is_slow", lambda: slow)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = (check for check in doctor._accelerator() if check.name == "bf16")
    assert (found.state, words in found.found) == (state, True)
    assert found.fix == ("" if state == "ok" else doctor._FP32)


@pytest.mark.parametrize("idle", [[], ["mlx5_1:1"]])
def test_ports_of_infiniband_that_nobody_has_made_active_are_told(
    monkeypatch: pytest.MonkeyPatch, idle: list[str]
) -> None:
    network = Network("node-1", {"eth0": "10.0.0.1"}, ["eth0"], ["mlx5_0:1"], idle)
    monkeypatch.setattr(doctor, "networks", lambda environment: [network])
    monkeypatch.setattr(doctor, "troubles", lambda found, environment: [])
    found = {check.name: check.found for check in doctor.check_network({})}
    assert found.pop("NCCL").startswith("node-1: ")
    assert found == ({"InfiniBand": "not active: node-1 mlx5_1:1"} if idle else {})


@pytest.mark.parametrize(
    ("probe", "why"),
    [("import sys; sys.exit('first line\\nlast line')", "last line"), ("raise SystemExit(3)", "exit code 3")],
)
def test_why_imports_fail_is_their_last_words_or_their_exit_code(monkeypatch, probe: str, why: str):
    monkeypatch.setattr(doctor, "_PROBE", probe)
    assert imports() == why


def test_what_imports_cost_is_told_with_advice_where_the_environment_is_on_a_network(monkeypatch):
    (found,) = (check for check in diagnose(None).checks if check.name == "imports of a rank")
    assert (found.state, "2.5 s for 3,000 files of 400 MiB" in found.found) == ("ok", True)
    monkeypatch.setattr(doctor, "imports", lambda: Imports(95.0, 3000, 400 * 2**20, "nfs4"))
    (found,) = (check for check in diagnose(None).checks if check.name == "imports of a rank")
    assert found.state == "optional"
    assert "nfs4" in found.found
    assert "own disk" in found.fix


def test_the_network_is_looked_at_with_the_variables_of_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "ask_torch", lambda: "it is not asked here")
    monkeypatch.setattr(doctor, "listed_gpus", list)
    monkeypatch.setattr(doctor, "networks", lambda environment: asked.append(environment) or "nobody answers")
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
    config = parse_config(CONFIG, ["cluster.nccl={NCCL_SOCKET_IFNAME: ib7}"])
    found = [check for check in diagnose(None, config).checks if check.name == "NCCL"]
    assert [(check.state, check.found) for check in found] == [("missing", "nobody answers")]
    assert asked[0]["NCCL_SOCKET_IFNAME"] == "ib7"


@pytest.mark.parametrize(
    ("file_system", "network"),
    [("nfs4", True), ("lustre", True), ("fuse.s3fs", True), ("ext4", False), ("xfs", False), ("overlay", False)],
)
def test_environments_on_a_network_are_told_from_those_on_a_disk(file_system: str, network: bool):
    assert Imports(1.0, 1, 1, file_system).over_network is network


def test_what_imports_cost_is_kept_for_the_next_plan(monkeypatch):
    kept = []
    monkeypatch.setattr(doctor, "_PROBE", """print('{"seconds": 7.5, "files": 3, "bytes": 9}')""")
    monkeypatch.setattr(doctor, "keep_import_seconds", kept.append)
    found = imports()
    assert isinstance(found, Imports)
    assert (found.seconds, found.files, found.bytes, kept) == (7.5, 3, 9, [7.5])


def test_the_base_of_a_run_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ask_torch", lambda: "it is not asked here")
    workshop = Workshop(tmp_path, "speck", shard_size="4KB")
    config = workshop.config("one")
    (found,) = (check for check in diagnose(None, config, reads_base=True).checks if check.name.startswith("base "))
    assert (found.state, found.found.endswith("GB: every byte was read")) == ("ok", True)
    assert not [check for check in diagnose(None, config).checks if check.name.startswith("base ")]
    commit(workshop.store.sub("one"), config)
    assert "for the first time" in check_model(config).found
    one_weight(workshop.base)
    changed = check_model(config)
    assert (changed.state, changed.fix) == ("missing", "Give the base that the run began with.")
    assert "is not what it was" in changed.found
