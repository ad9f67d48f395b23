"""A random base of 8B's shape: our steps, what they are made of, and TRL's."""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from card.figures import Figure, device, seconds_of, shape

if TYPE_CHECKING:
    from trainer.plan.needs import Plan

ACCUMULATION, STEPS = 4, 3  # steps after the first one, which finds out in which order units are used
SMALL = 24 * 2**30
"""Bytes of the card that the longest row is planned for."""
SEARCHED = 2**20
"""Events that the allocator's snapshot keeps."""


def _material(given: argparse.Namespace, layers: int) -> Path:
    """The base and rows for its steps, made once."""
    from train import make_material

    folder: Path = given.scratch / f"{layers}-layers"
    if not (folder / "fixed.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sizes: dict[str, Any] = shape(layers, pretend=given.pretend)
        with get_context("spawn").Pool(1) as pool:  # what it holds of the GPU ends with it
            pool.apply(make_material, (folder, sizes, given.length, ACCUMULATION, STEPS + 2))
    return folder


def big(given: argparse.Namespace) -> Iterator[Figure]:
    """Layers recomputed by `auto` and all, with Liger's kernels and without: tokens/s, MFU, the device's peak beside
    the plan, phases.
    """
    import torch

    from trainer.model.kernels.liger import missing

    folder = _material(given, given.layers)
    lacking = missing(torch.device(device()), "llama")
    if lacking:
        yield Figure("Liger", lacking)
    for kernels in ("none",) if lacking else ("liger", "none"):
        for recompute in ("auto", "all"):
            name = f"recompute {recompute}, kernels {kernels}"
            settings = [
                f"train.activation_checkpointing={recompute}",
                f"model.kernels={kernels}",
                f"run.name={recompute}-{kernels}",
            ]
            try:
                yield from _figures(given, folder, name, settings)
            except Exception as error:  # another way may fit
                yield Figure(name, f"{type(error).__name__}: {error}", "steps", False)


def _figures(given: argparse.Namespace, folder: Path, name: str, settings: list[str]) -> Iterator[Figure]:
    from trainer.base.find.locate import resolve_base
    from trainer.config import load_config, override
    from trainer.plan.plan import make_plan

    snapshot = given.to / f"{name.replace(', ', '-').replace(' ', '-')}.pickle"
    found = _in_a_process(_steps, folder, [*settings, f"train.steps={STEPS + 1}"], snapshot)
    steps: list[dict[str, float]] = found["steps"][1:]
    seconds = median(step["seconds"] for step in steps)
    yield Figure(f"{name}: tokens/s", f"{median(step['tokens'] for step in steps) / seconds:.0f}")
    mfu = median(step.get("mfu", 0.0) for step in steps)
    yield Figure(f"{name}: MFU", f"{mfu:.1%}" if mfu else "the peak of this device is not known")
    phases = {key.removesuffix("_seconds"): value for key, value in steps[-1].items() if key.endswith("_seconds")}
    yield Figure(f"{name}: phases", ", ".join(f"{key} {1e3 * value:.0f} ms" for key, value in phases.items() if value))
    if found["peak"]:
        config = override(load_config(folder / "fixed.yaml"), *settings)
        yield _peak(
            name, found["peak"], make_plan(config, resolve_base(config.model).description, 1, 1, found["memory"])
        )


def _peak(name: str, peak: int, plan: "Plan") -> Figure:
    """A measured peak beside the plan's."""
    memory = plan.memory_per_gpu
    planned = memory.total - memory.context - memory.communicators
    near = f"{planned / 2**30:.1f} GiB by the plan, -25 to +5 %"
    share = peak / planned
    return Figure(f"{name}: peak memory", f"{peak / 2**30:.1f} GiB, {share:.2f} x", near, 0.75 <= share <= 1.05)


def _in_a_process(work: Any, *arguments: Any) -> Any:
    """A process that ends holds nothing of the GPU."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _steps(folder: Path, settings: list[str], snapshot: Path | None, memory: int | None = None) -> dict[str, Any]:
    """The records of our steps, by the program of a rank, alone; on a GPU the allocator's history goes to `snapshot`,
    and no more than `memory` bytes are there."""
    import torch

    from trainer.base.find.locate import resolve_base
    from trainer.config import load_config, override
    from trainer.data.compile.prepare import prepare
    from trainer.rank import run_rank
    from trainer.store.store import open_run_store
    from trainer.train.start import Starter

    config = override(load_config(folder / "fixed.yaml"), *settings)
    datasets = prepare(config, resolve_base(config.model), open_run_store(config))
    steps = list[Mapping[str, float]]()
    on_gpu = torch.cuda.is_available()
    if on_gpu and memory:
        torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.get_device_properties(0).total_memory)
    if on_gpu and snapshot:
        torch.cuda.memory._record_memory_history(max_entries=SEARCHED, stacks="python")
    run_rank(config, datasets, resume=False, starter=Starter(observe=steps.append))
    if not on_gpu:
        return {"steps": [dict(step) for step in steps], "peak": 0, "memory": None}
    if snapshot:
        torch.cuda.memory._dump_snapshot(str(snapshot))
    peak, memory = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    return {"steps": [dict(step) for step in steps], "peak": peak, "memory": memory}


def longest(given: argparse.Namespace) -> Iterator[Figure]:
    """A step of the longest row that `plan --longest` has for a card of `SMALL` bytes, on no more than those; its
    documents are no longer than other rows, so that it takes seconds."""
    from trainer.base.find.locate import resolve_base
    from trainer.config import assignment, load_config, override
    from trainer.plan.longest import PlannedRanks, longest_rows
    from trainer.plan.plan import make_plan

    folder = _material(given, given.layers)
    config = load_config(folder / "fixed.yaml")
    base = resolve_base(config.model).description
    tiled = [row for row in longest_rows(config, base, PlannedRanks(1, 1, SMALL, on_gpu=True)) if row.settings][-2]
    tokens = min(tiled.tokens, given.length * ACCUMULATION * (STEPS + 1))  # there are no more
    changed = {
        **tiled.settings,
        "data.sequence_length": tokens,
        "run.name": "longest",
        "train.steps": 1,
        "train.global_batch": 1,
    }
    settings = [assignment(key, value) for key, value in changed.items()]
    found = _in_a_process(_steps, folder, settings, None, SMALL)
    name = f"longest row of {SMALL / 2**30:.0f} GiB"
    yield Figure(name, f"{tokens} tokens in {found['steps'][0]['seconds']:.1f} s", "fits", True)
    if found["peak"]:
        yield _peak(name, found["peak"], make_plan(override(config, *settings), base, 1, 1, SMALL))


def rooflines(given: argparse.Namespace) -> Iterator[Figure]:
    """The seven products of a layer and an attention kernel by themselves, forwards and backwards, and copies: what no
    step goes below.
    """
    import torch

    sizes = shape(given.layers, pretend=given.pretend)
    hidden, wide, tokens = sizes["hidden_size"], sizes["intermediate_size"], given.length
    size = hidden // sizes["num_attention_heads"]
    narrow = sizes["num_key_value_heads"] * size
    some = partial(torch.randn, dtype=torch.bfloat16, device=device())
    names = ("q", "k", "v", "o", "gate", "up", "down")
    shapes = [
        (hidden, hidden),
        (narrow, hidden),
        (narrow, hidden),
        (hidden, hidden),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    ]
    for name, (outputs, inputs) in zip(names, shapes, strict=True):
        rows, weight = some(tokens, inputs), some(outputs, inputs)
        seconds = seconds_of(lambda rows=rows, weight=weight: rows @ weight.T)
        yield Figure(
            f"product {name}", f"{1e3 * seconds:.2f} ms, {2 * tokens * outputs * inputs / seconds / 1e12:.0f} TFLOP/s"
        )
    query, key, value = (
        some(1, heads, tokens, size, requires_grad=True)
        for heads in (sizes["num_attention_heads"], *[sizes["num_key_value_heads"]] * 2)
    )

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    forward = 2 * tokens * tokens * hidden  # the half of two products that a causal attention has
    seconds = seconds_of(lambda: attend().detach())
    yield Figure("attention, forward", f"{1e3 * seconds:.2f} ms, {forward / seconds / 1e12:.0f} TFLOP/s")
    grad = torch.ones_like(attend())
    seconds = seconds_of(lambda: torch.autograd.grad(attend(), (query, key, value), grad))
    yield Figure("attention, both", f"{1e3 * seconds:.2f} ms, {3.5 * forward / seconds / 1e12:.0f} TFLOP/s")
    here = some(tokens, hidden)
    there = torch.empty_like(here, device="cpu", pin_memory=device() == "cuda")
    for what, to, of in (
        ("within the device", torch.empty_like(here), here),
        ("to the host", there, here),
        ("from the host", here, there),
    ):
        seconds = seconds_of(partial(to.copy_, of, non_blocking=True))
        yield Figure(f"copy {what}", f"{here.nbytes / seconds / 1e9:.1f} GB/s")


def trace(given: argparse.Namespace) -> Iterator[Figure]:
    """A step of four layers of 8B's width: its trace, which is kept, how often the host waits in it, and what takes
    longest on the device.
    """
    folder = _material(given, min(4, given.layers))
    command = [sys.executable, "-m", "launcher.cli", "train", str(folder / "fixed.yaml")]
    subprocess.run(
        [*command, "train.profile=[3, 3]", "run.name=traced", "train.steps=4"], check=True, stdout=sys.stderr
    )
    (path,) = (folder / "store" / "traced").glob("profiles/*.json.gz")
    shutil.copy(path, given.to / "trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    waits = Counter(
        event["name"] for event in events if event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]
    )
    yield Figure("waits of the host", ", ".join(f"{count} {name}" for name, count in waits.items()) or "none")
    launches = sum(event.get("cat") == "cuda_runtime" and "Launch" in event["name"] for event in events)
    yield Figure("launches", f"{launches}")
    on_device: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_device[event["name"][:60]] += event["dur"] / 1000
    for name, took in sorted(on_device.items(), key=lambda item: -item[1])[:12]:
        yield Figure(f"on the device: {name}", f"{took:.1f} ms")


def trl(given: argparse.Namespace) -> Iterator[Figure]:
    """TRL's steps of the same base, a row each, with all layers recomputed: tokens/s and the device's peak."""
    try:
        import trl  # noqa: F401
    except ModuleNotFoundError:
        yield Figure("TRL", "is not installed")
        return
    from ranks import rendezvous
    from sides import Case
    from train import Group

    folder = _material(given, given.layers)
    with rendezvous() as port:
        group = Group("TRL", Case("fixed", "fixed", True), folder, 1, port)
        try:
            steps = [group.step() for _ in range(STEPS + 2)][2:]
        finally:
            group.close()
    yield Figure("TRL: tokens/s", f"{given.length / median(step['seconds'] for step in steps):.0f}")
    yield Figure("TRL: peak memory", f"{steps[-1]['device_bytes'] / 2**30:.1f} GiB")
