"""Everything that needs a GPU, on one card in under ten minutes; without one it says what it would do.

    python benchmarks/gpu.py [--only kernels ...] [--layers 32] [--length 8192]

Each part is a process of its own with a limit, so that one that fails does not take the others along; the seconds that it leaves are the
next one's. It ends with a line for each figure, and with exit code 1 where one is not as it must be, or a part came to no end.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rich.console import Console
from rich.table import Table

EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
"""The shape of Llama 3.1 8B."""
PAIRS = 4
DEVICE = "cuda"


class Figure(NamedTuple):
    """Something measured, and what it must be; `right` is None for what is only told."""

    what: str
    found: str
    wanted: str = ""
    right: bool | None = None


class Part(NamedTuple):
    """`does` completes a sentence that begins with "It"."""

    does: str
    seconds: float
    run: Callable[[argparse.Namespace], list[Figure]]


def kernels(_given: argparse.Namespace) -> list[Figure]:
    """Loss and gradients of a packed row in bf16 by each attention kernel and by Liger's kernels, and dequantized weights, beside plain
    ones in fp32; and how long Liger's take."""
    import torch
    from train import llama, make_base

    from trainer.base.find.locate import resolve_base
    from trainer.errors import ConfigError
    from trainer.model.attention import choose_attention
    from trainer.model.kernels.liger import missing

    device, found = torch.device(DEVICE), list[Figure]()
    lacking = missing(device, "llama")
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        make_base(Path(folder, "base"), {**llama(2, 1024), "num_attention_heads": 8, "num_key_value_heads": 2})
        settings = _config(Path(folder, "base")).model
        base = resolve_base(settings)
        exact, exact_gradient = _loss_and_gradient(base, "eager", torch.float32)

        def beside(what: str, *options: Any) -> Figure:
            loss, gradient = _loss_and_gradient(base, *options)
            off = abs(loss - exact) / exact
            apart = float((gradient - exact_gradient).norm() / exact_gradient.norm())
            right = off < 2e-3 and apart < 5e-2
            return Figure(what, f"loss {off:.1e} off, gradient {apart:.1e}", "below 2e-3 and 5e-2", right)

        known = get_args(type(settings).model_fields["attention"].annotation)
        for name in (name for name in known if name != "auto"):
            try:
                choose_attention(name, device, torch.bfloat16, base.architecture)
            except ConfigError as error:
                found.append(Figure(f"attention: {name}", str(error)))
                continue
            found.append(beside(f"attention: {name}", name, torch.bfloat16))
        if lacking is None:
            found.append(beside("liger", "sdpa", torch.bfloat16, "liger"))
    return [*found, *(_fused() if lacking is None else [Figure("liger", lacking)]), *_dequantized()]


def _config(base: Path, *overrides: str) -> Any:
    from trainer.config import parse_config

    tree = {"run": {"name": "bench"}, "model": {"base": str(base)}, "train": {"steps": 1}}
    return parse_config(json.dumps({**tree, "data": {"train": [{"path": "none.jsonl"}]}}), overrides)


def _loss_and_gradient(base: Any, kernel: str, dtype: Any, fused: str = "none") -> tuple[float, Any]:
    """The loss of a row of three documents, and its gradient by the embedding, fp32; `fused` is model.kernels."""
    import torch
    from safetensors.torch import load_file

    from trainer.base.load.load import empty_model
    from trainer.data.order.micro_batch import MicroBatch
    from trainer.model.attention import choose_attention
    from trainer.model.kernels.liger import Kernels
    from trainer.model.packed import PackedModel
    from trainer.objective.objective import find_objective

    device = torch.device(DEVICE)
    config = _config(base.directory, f"model.dtype={'fp32' if dtype == torch.float32 else 'bf16'}")
    attention = choose_attention(kernel, device, dtype, base.architecture)
    model: Any = empty_model(base, config, attention, Kernels(fused, device))
    weights: dict[str, Any] = {}
    for path in Path(base.directory).glob("*.safetensors"):
        weights |= load_file(path)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True, strict=False)
    model = model.to(device).eval()
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    lengths = (700, 1, 323)
    tokens = torch.randint(0, 1000, (1, sum(lengths)), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])
    borders = torch.tensor([0, 700, 701, 1024], dtype=torch.int32)
    labels = torch.where((places + 1 == 700) | (places == 0), -100, tokens)
    row = MicroBatch(tokens, labels.int(), places.int()[None], borders, 700, 1024, int((labels != -100).sum()), (), ())
    loss = find_objective(config).loss(PackedModel(model, attention), row.to(device)).sum()
    loss.backward()
    return float(loss.detach()), embedding.grad.float()


def _fused() -> list[Figure]:
    """How long the parts of an 8B layer that Liger computes take, forwards and backwards over 8192 tokens, with it and without."""
    import torch
    from liger_kernel.ops import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import silu
    from transformers.models.llama import modeling_llama as llama

    def values(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)

    def passes(forward: Any, inputs: list[Any]) -> Callable[[], object]:
        def both() -> object:
            results = forward(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            return torch.autograd.grad(results, inputs, [torch.ones_like(result) for result in results])

        return both

    hidden, inner, tokens = EIGHT_B["hidden_size"], EIGHT_B["intermediate_size"], 8192
    heads, kv_heads = EIGHT_B["num_attention_heads"], EIGHT_B["num_key_value_heads"]
    norms = [of(hidden).to(DEVICE, torch.bfloat16).requires_grad_(False) for of in (llama.LlamaRMSNorm, LigerRMSNorm)]
    cos, sin = torch.randn(2, 1, tokens, hidden // heads, dtype=torch.bfloat16, device=DEVICE)
    rotaries = [
        lambda q, k, of=of: of(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        for of in (llama.apply_rotary_pos_emb, liger_rotary_pos_emb)
    ]
    parts = {
        "norm": (*norms, [values(1, tokens, hidden)]),
        "rotary": (*rotaries, [values(1, tokens, count, hidden // heads) for count in (heads, kv_heads)]),
        "gated product": (
            lambda gate, up: silu(gate) * up,
            LigerSiLUMulFunction.apply,
            [values(1, tokens, inner) for _ in range(2)],
        ),
    }
    found = []
    for name, (plain, fused, inputs) in parts.items():
        before, after = (1e3 * _seconds(passes(forward, inputs)) for forward in (plain, fused))
        said = f"{after:.2f} ms, plain {before:.2f} ms"
        found.append(Figure(f"liger: {name}", said, "faster", after < before))
    return found


def _dequantized() -> list[Figure]:
    """Weights in 4 bits, as the GPU and as the CPU dequantizes them, and the time for those of an 8B layer."""
    import torch

    from trainer.model.nf4 import Format, FrozenLinear4bit, quantize_absmax, quantize_blocks

    found = []
    for double in (False, True):
        linear = FrozenLinear4bit(4096, 14336, Format("nf4", 64, double, torch.bfloat16))
        packed, absmax = quantize_blocks(torch.randn(linear.layout.numel, dtype=torch.bfloat16), "nf4", 64)
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)
        if double:
            codes, nested, mean = quantize_absmax(absmax)
            linear.absmax_mean.fill_(mean)
            linear.nested_absmax = torch.nn.Parameter(nested.view(torch.uint8), requires_grad=False)
            linear.absmax = torch.nn.Parameter(codes, requires_grad=False)
        else:
            linear.absmax = torch.nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
        host, there = linear.dequantize(), linear.to(DEVICE)
        same = torch.equal(host, there.dequantize().cpu())
        seconds = _seconds(there.dequantize)
        rate = host.nbytes * 1.28 / seconds / 1e12  # the weights written, and 4.5 bits of each read
        what = f"dequantizing 4096 x 14336{', double' if double else ''}"
        found.append(Figure(what, f"{1e3 * seconds:.2f} ms, {rate:.2f} TB/s", "the CPU's bits", same))
    return found


def _seconds(action: Callable[[], object], times: int = 20) -> float:
    import torch

    action()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def training(given: argparse.Namespace) -> list[Figure]:
    """A base of 8B's shape: tokens/s, MFU and peak memory, beside TRL and beside the plan; and the phases of our steps."""
    from train import CASES, WARM_UP, counts, make_material, measure

    from trainer.base.find.locate import resolve_base
    from trainer.config import load_config
    from trainer.plan.plan import make_plan

    case = CASES["fixed"]
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        shape = {**EIGHT_B, "num_hidden_layers": given.layers}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_material, (folder, shape, given.length, 1, WARM_UP + PAIRS + 1))
        found = measure(case, folder, 1, PAIRS)
        tokens, _ = counts(case, "ours", folder, PAIRS)
        config = load_config(folder / "fixed.yaml")
        plan = make_plan(config, resolve_base(config.model).description, 1, 1, None).memory_per_gpu
    seconds = {side: sorted(step["seconds"] for step in of["steps"])[PAIRS // 2] for side, of in found.items()}
    figures = [Figure(f"{side}: tokens/s", f"{tokens / seconds[side]:.0f}") for side in ("ours", "TRL")]
    faster, bare = seconds["TRL"] / seconds["ours"], seconds["ours"] / seconds["products"]
    figures.append(Figure("ours x TRL", f"{faster:.2f}", "at least 1", faster >= 1))
    figures.append(Figure("ours x bare products", f"{bare:.2f}", "at most 1.5", bare <= 1.5))
    mfu = sum(step["mfu"] for step in found["ours"]["steps"]) / PAIRS
    figures.append(Figure("MFU", f"{mfu:.1%}" if mfu else "the peak of this GPU is not known"))
    peak, planned = found["ours"]["peak"], plan.total - plan.context - plan.communicators
    figures.append(Figure("peak memory", f"{peak / 2**30:.1f} GiB, TRL {found['TRL']['peak'] / 2**30:.1f} GiB"))
    near = f"{planned / 2**30:.1f} GiB by the plan, -25 to +5 %"
    figures.append(Figure("peak memory x plan", f"{peak / planned:.2f}", near, 0.75 <= peak / planned <= 1.05))
    off = abs(found["ours"]["loss"] - found["TRL"]["loss"]) / found["TRL"]["loss"]
    return [*figures, Figure("loss beside TRL's", f"{off:.2%} off", "within 1 %", off < 0.01)]


def profile(given: argparse.Namespace) -> list[Figure]:
    """The phases of steps of a shorter base of 8B's width, and from the trace of one what took longest on the device; with the kernels
    of model.kernels: auto, and tokens/s and memory beside those without."""
    import gzip

    from train import make_material

    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        shape = {**EIGHT_B, "num_hidden_layers": min(4, given.layers)}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_material, (folder, shape, given.length, 1, 8))
        command = [sys.executable, "-m", "launcher.cli", "train", str(folder / "fixed.yaml")]
        steps = {}
        for kernels in ("none", "auto"):
            options = ("train.profile=[6, 6]", f"run.name={kernels}", f"model.kernels={kernels}")
            subprocess.run([*command, *options], check=True, stdout=sys.stderr)
            records = (folder / "store" / kernels / "metrics/000001.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in records]
            (steps[kernels],) = (record for record in found if record["kind"] == "step" and record["step"] == 5)
            (start,) = (record for record in found if record["kind"] == "start")
        (path,) = (folder / "store" / "auto").glob("profiles/*.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    step = steps["auto"]
    phases = {name.removesuffix("_seconds"): value for name, value in step.items() if name.endswith("_seconds")}
    names = {"none": "none", "auto": f"auto, {start['kernels']}"}
    figures = [
        Figure(
            f"model.kernels: {names[kernels]}",
            f"{record['tokens'] / record['seconds']:.0f} tokens/s, {record['device_peak_bytes'] / 2**30:.1f} GiB, "
            f"loss {record['loss']:.4f}",
        )
        for kernels, record in steps.items()
    ]
    figures += [Figure(f"phase: {name}", f"{1e3 * value:.1f} ms") for name, value in phases.items()]
    within = sum(value for name, value in phases.items() if name not in ("save", "evaluate")) / step["seconds"]
    figures.append(Figure("phases / step", f"{within:.3f}", "0.97 to 1.03", abs(within - 1) <= 0.03))
    on_device: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_device[event["name"][:60]] += event["dur"] / 1000
    longest = sorted(on_device.items(), key=lambda item: -item[1])[:12]
    return [*figures, *(Figure(f"on the device: {name}", f"{took:.1f} ms") for name, took in longest)]


def smoke(_given: argparse.Namespace) -> list[Figure]:
    """The whole life of a run on this GPU: train, kill, resume, export, verify."""
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        command = [sys.executable, "-m", "launcher.cli", "smoke", "--dir", folder]
        code = subprocess.run(command, stdout=sys.stderr).returncode
    return [Figure("capstan smoke", f"exit code {code}", "0", code == 0)]


PARTS = {
    "kernels": Part(
        "compares attention kernels, Liger's and dequantizing with plain ones: values, gradients, time", 90, kernels
    ),
    "profile": Part(
        "traces a step of four layers of 8B's shape: its phases and kernels, tokens/s with Liger's and without",
        90,
        profile,
    ),
    "training": Part(
        "trains a random base of 8B's shape beside TRL: tokens/s, MFU, peak memory beside the plan", 270, training
    ),
    "smoke": Part("takes a small run through its whole life", 150, smoke),
}


def _work(name: str, given: argparse.Namespace, pipe: Any) -> None:
    os.setsid()  # a group of its own, which ends with it
    pipe.send(PARTS[name].run(given))


def limit(name: str, took: Mapping[str, float]) -> float:
    """The seconds that a part may take: its own, and those that the parts before it have left, by what they `took`."""
    return sum(PARTS[part].seconds for part in [*took, name]) - sum(took.values())


def run_part(name: str, given: argparse.Namespace, seconds: float) -> list[Figure]:
    """The figures of a part, or that it came to none within so many seconds."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, given, theirs))  # no daemon: it starts processes itself
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        if mine.poll(seconds):
            return [*mine.recv(), Figure(f"{name}: seconds", f"{time.monotonic() - started:.0f}")]
        return [Figure(name, "no end", f"within {seconds:.0f} s", False)]
    except EOFError:
        return [Figure(name, "failed, see above", "figures", False)]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def main() -> None:
    from trainer.processes.devices import local_gpus

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--layers", type=int, default=EIGHT_B["num_hidden_layers"])
    parser.add_argument("--length", type=int, default=8192)
    given = parser.parse_args()
    if not local_gpus():
        print("There is no GPU on this machine. On one that has one, this would, within 10 minutes:")
        for name in given.only:
            print(f"- {name}, at most {PARTS[name].seconds:.0f} s: {PARTS[name].does}")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one card
    table = Table("part", "what", "found", "wanted", "")
    wrong, took = False, dict[str, float]()
    for name in given.only:
        began = time.monotonic()
        figures = run_part(name, given, limit(name, took))
        took[name] = time.monotonic() - began
        for figure in figures:
            wrong |= figure.right is False
            table.add_row(
                name, figure.what, figure.found, figure.wanted, {None: "", True: "ok", False: "WRONG"}[figure.right]
            )
    Console(width=160).print(table)
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    main()
