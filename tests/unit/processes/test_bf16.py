"""A run computes in bf16 where the machine multiplies it fast, and otherwise in fp32 unless it says bf16."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import export
from launcher.plan.planning import plan_run
from launcher.start.check import about_type, check, typed_elsewhere, with_found
from tests.material import Workshop
from trainer.config import Config, dump_config, override, parse_config
from trainer.plan.gpus import find_gpu
from trainer.plan.resolve import typed
from trainer.processes import bf16, bf16_time
from trainer.processes.bf16 import measured_slowdown, why_processor_is_slow, why_slow

LAPTOP = "flags\t\t: fpu sse4_2 avx avx2 fma avx_vnni\n"
SERVER = "flags\t\t: fpu avx avx2 avx512f avx512dq avx512bw avx512vl\n"
GRAVITON2, GRAVITON3 = "Features\t: fp asimd atomics\n", "Features\t: fp asimd atomics sve bf16 i8mm\n"
SMALL = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1, global_batch: 1}\n"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "environment", "slow"),
    [
        ("x86_64", LAPTOP, {}, "lacks AVX-512"),
        ("x86_64", SERVER, {}, None),
        ("x86_64", SERVER.replace(" avx512vl", ""), {}, "lacks AVX-512"),
        ("x86_64", SERVER.replace(" avx512dq", ""), {}, "lacks AVX-512"),
        ("x86_64", SERVER, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "ONEDNN_MAX_CPU_ISA=AVX2"),
        ("x86_64", SERVER, {"ATEN_CPU_CAPABILITY": "avx2"}, "ATEN_CPU_CAPABILITY=avx2"),
        ("x86_64", SERVER, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, None),
        ("aarch64", GRAVITON2, {}, "lacks ARM's extension bf16"),
        ("aarch64", GRAVITON3, {}, None),
        ("riscv64", "", {}, None),
    ],
)
def test_the_processors_flags_say_whether_bf16_is_fast(
    machine: str, cpuinfo: str, environment: dict[str, str], slow: str | None
) -> None:
    found = why_processor_is_slow(cpuinfo, machine, environment)
    assert found is None if slow is None else slow in (found or "")


@pytest.mark.long
def test_how_much_slower_it_is_is_measured_where_the_instructions_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    factor = measured_slowdown()
    assert factor is not None
    assert factor > 1.5


def test_the_first_product_of_each_type_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.1, 0.6, 0.8, 0.7, 9.0, 0.3, 0.2, 0.4])
    clock = [0.0, 0.0]

    def tell() -> float:
        clock[0] += 1
        clock[1] += next(seconds) if clock[0] % 2 == 0 else 0.0
        return clock[1]

    monkeypatch.setattr(bf16_time, "time", SimpleNamespace(perf_counter=tell))
    assert bf16_time.slowdown() == pytest.approx(0.6 / 0.2)
    monkeypatch.setattr(bf16_time, "_seconds", {bf16_time.torch.bfloat16: 6.0, bf16_time.torch.float32: 2.0}.get)
    assert bf16_time.slowdown() == 3.0


@pytest.mark.parametrize(("printed", "factor"), [("said\n7.6\n", 7.6), ("0.2", 0.2), ("", None), ("none", None)])
def test_what_was_measured_is_the_last_word_that_was_printed(
    printed: str, factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(
        bf16.children, "run", lambda command, **given: asked.append(given) or SimpleNamespace(stdout=printed)
    )
    assert bf16.measured_slowdown() == factor
    assert asked[0]["check"]
    assert asked[0]["timeout"] == 60
    assert bf16.slowdown_words() == f"{'many' if factor is None else max(1, round(factor))} times as long as in fp32"


def test_gpus_below_8_0_have_no_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    listing = "GPU 0: Tesla T4 (UUID: GPU-1)\\nGPU 1: NVIDIA A100 (UUID: GPU-2)\\n"
    program.write_text(
        f"#!/bin/sh\ncase $1 in --list*) printf '{listing}';; *cap*) printf 'GPU-1, 7.5\\nGPU-2, 8.0\\nGPU-3, [N/A]\\n';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    here = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    assert "7.5" in (why_slow(None, here) or "")
    assert why_slow(None, {**here, "CUDA_VISIBLE_DEVICES": "1"}) is None
    assert "7.5" not in (why_slow(0, here) or ""), "the processor computes"
    assert {name: gpu.bf16 for name in ("T4", "V100-32GB", "A100") if (gpu := find_gpu(name))} == {
        "T4": False,
        "V100-32GB": False,
        "A100": True,
    }


def test_what_is_left_out_stays_open_until_it_is_decided() -> None:
    config = parse_config(SMALL)
    assert override(config, "train.steps=2").leaves_type_open
    assert typed(override(config, "train.steps=2"), slow=True).model.dtype == "fp32"
    assert typed(config, slow=False).model.dtype == "bf16"
    assert typed(override(config, "model.dtype=bf16"), slow=True).model.dtype == "bf16"
    kept = parse_config(dump_config(typed(config, slow=True)))
    assert typed(kept, slow=False).model.dtype == "fp32", "a resume on another processor keeps it"
    only_bf16 = override(config, "train.products=fp8", "quant.type=nf4")
    assert typed(only_bf16, slow=True).model.dtype == "bf16"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("bf16"))


_ON_CPU = ("cluster.gpus_per_worker=0",)


def _open(workshop: Workshop, *overrides: str) -> Config:
    config = workshop.config("open", "cluster.gpus_per_worker=0", *overrides)
    text = dump_config(config).replace("  dtype: bf16\n", "")
    return parse_config(text)


def test_a_start_decides_and_says_so_and_keeps_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _open(workshop)
    monkeypatch.setattr(bf16, "why_processor_is_slow", lambda **_given: "it is old")
    resolved = check(asked, resume=False)
    assert resolved.config.model.dtype == with_found(asked, resolved).model.dtype == "fp32"
    assert "model.dtype: fp32, as it is old" in (about_type(asked, resolved.config) or "")
    given = override(asked, "model.dtype=fp32")
    assert about_type(given, given) is None


def test_who_asks_for_bf16_is_told_what_it_costs(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = workshop.config("asked", "cluster.gpus_per_worker=0")
    assert about_type(asked, asked) is None or why_slow(0)
    monkeypatch.setattr(bf16, "why_processor_is_slow", lambda **_given: "it is old")
    monkeypatch.setattr(bf16, "measured_slowdown", lambda: 42.0)
    assert "a product takes 42 times as long as in fp32" in (about_type(asked, asked) or "")


def test_a_plan_counts_the_type_that_the_run_would_take(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(bf16, "measured_slowdown", lambda: 42.0)
    open_, asked = (plan_run(config, None, None) for config in (_open(workshop), workshop.config("b", *_ON_CPU)))
    plain = plan_run(workshop.config("c", "model.dtype=fp32", *_ON_CPU), None, None)
    assert open_.plan.memory_per_gpu == plain.plan.memory_per_gpu != asked.plan.memory_per_gpu
    assert any("model.dtype: fp32, as ONEDNN_MAX_CPU_ISA" in note for note in open_.plan.notes)
    assert any("a product in bf16 takes" in note for note in asked.plan.notes)
    old = plan_run(_open(workshop, "cluster.gpus_per_worker=1"), "T4", None)
    assert "model.dtype: fp32, as T4 has no bf16" in old.plan.notes


def test_a_cluster_is_judged_by_what_is_known_of_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    said = list[str]()
    assert typed_elsewhere(_open(workshop), said.append).model.dtype == "fp32"
    assert said
    with_gpus = override(_open(workshop), "cluster.gpus_per_worker=1", "cluster.slurm.gpus_per_node=8")
    assert typed_elsewhere(with_gpus, said.append).model.dtype == "bf16"
    assert typed_elsewhere(override(with_gpus, "cluster.slurm.gpu_type=a100"), said.append).model.dtype == "bf16"
    assert typed_elsewhere(override(with_gpus, "cluster.slurm.gpu_type=v100"), said.append).model.dtype == "fp32"


def test_a_base_in_bits_that_were_made_of_bf16_keeps_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    of_bitsandbytes = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = workshop.base.with_name("in-4-bits")
    shutil.copytree(workshop.base, base)
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"quantization_config": of_bitsandbytes}))
    said = list[str]()
    assert typed_elsewhere(_open(workshop, f"model.base={base}"), said.append).model.dtype == "bf16"
    assert not said


def test_what_is_dequantized_has_the_type_that_a_run_would_take(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Config]()

    def run_module(_name: str, text: str, *_more: str, progress: object) -> dict[str, int]:
        asked.append(parse_config(text))
        return {"bytes": 0}

    monkeypatch.setattr(export, "run_module", run_module)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(_open(workshop, "quant.type=nf4")).replace("  dtype: bf16\n", ""))
    said = list[str]()
    for limit in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(limit, raising=False)
    for isa in ("AVX2", "ALL"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        export.dequantize(path, str(tmp_path / "made"), (), dry_run=False, log=said.append)
    slow = why_slow(0, {})  # as this machine is
    assert [config.model.dtype for config in asked] == ["fp32", "fp32" if slow else "bf16"]
    assert "model.dtype: fp32" in said[0]
