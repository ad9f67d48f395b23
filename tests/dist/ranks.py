"""What the ranks of a test run: each function is collective, takes and returns JSON. Tensors go through files."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor

from tests import material
from trainer.model import nf4
from trainer.run import layout
from trainer.model.attention import Attention, choose_attention
from trainer.base.description import describe
from trainer.base.locate import resolve_base
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.identity import Identity
from trainer.config import Config, override, parse_config
from trainer.data.chapters import Chapters, open_chapters
from trainer.data.prepare import Datasets
from trainer.data.stream import MicroBatch, Position, Stream, train_stream
from trainer.zero.policy import build_deepspeed_config
from trainer.zero.engine import Engine
from trainer.errors import CapstanError, StorageError
from trainer.base.filling import as_tensor
from trainer.base.load import DTYPES, LoadReport, load_model
from trainer.train.loop import Training, train
from trainer.export.merged import export_merged
from trainer.run.metrics import Metrics
from trainer.run.requests import StopSignal
from trainer.model.nf4 import FrozenLinear4bit
from trainer.objective.sft import NextTokens
from trainer.plan import choose_scope
from trainer.rank import run_rank
from trainer.train.assemble import assemble, checksums
from trainer.tuning.method import find_method
from trainer.ranks import Ranks, join
from trainer.safetensors_index import numel
from trainer.train.schedule import learning_rate
from trainer.store import Store, open_store
from trainer.export.verify import prove_adapter, prove_merged

STATES = ("master", "exp_avg", "exp_avg_sq")


# Whole runs, through the one function that every launcher calls.


def run(
    config_text: str, fingerprint: str, how: str = "start", eval_fingerprint: str | None = None
) -> dict[str, Any]:
    """`run_rank`, and how it ended. `how`: start, resume, or something that goes wrong on the way.

    hold: after the commit of step 5 showed up, no rank finishes another step.
    terminate: rank 1 alone gets SIGTERM in its third step.
    poison: the loss of bin 26 of the first epoch, which is in step 7, is not a number.
    stuck: rank 1 never comes out of its third step. freeze: rank 0 gets SIGSTOP in its third step.
    """
    config = parse_config(config_text)
    if how == "hold":
        _hold_after(open_store(config.run.store).sub(config.run.name), step=5)
    if how == "terminate" and os.environ["RANK"] == "1":
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if how == "poison":
        _poison(26)
    if how == "stuck" and os.environ["RANK"] == "1":
        _in_step(3, lambda: threading.Event().wait())
    if how == "freeze" and os.environ["RANK"] == "0":
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    datasets = Datasets(fingerprint, eval_fingerprint) if os.environ["RANK"] == "0" else None
    return _outcome_of(lambda: run_rank(config, datasets, resume=how == "resume"))


def meet(seconds: float, absent: list[int]) -> str:
    """What a rank says that joins the others within `seconds`, where the `absent` never come."""
    if int(os.environ["RANK"]) in absent:
        return "absent"
    try:
        return f"{join(meeting=timedelta(seconds=seconds)).world_size} together"
    except CapstanError as error:
        return str(error)


def _outcome_of(action: Any) -> dict[str, Any]:
    try:
        action()
    except CapstanError as error:
        return {"outcome": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    return {"outcome": "finished", "exit_code": 0, "message": ""}


def _hold_after(run: Store, step: int) -> None:
    plain = Engine.step

    def held(self: Engine, lr: float) -> float:
        if run.exists(layout.manifest(step)):
            threading.Event().wait()  # until SIGKILL
        return plain(self, lr)

    Engine.step = held


def _in_step(number: int, strike: Callable[[], object]) -> None:
    plain, steps = Engine.step, []

    def struck(self: Engine, lr: float) -> float:
        steps.append(lr)
        if len(steps) == number:
            strike()
        return plain(self, lr)

    Engine.step = struck


def _poison(number: int) -> None:
    plain = Engine.loss

    def poisoned(self: Engine, row: Any) -> Tensor:
        return plain(self, row) * (float("nan") if Position(0, 0, number) in row.bins else 1.0)

    Engine.loss = poisoned


# A rank assembled piece by piece, for what lies between two steps.


@dataclass
class Assembled:
    config: Config
    ranks: Ranks
    engine: Engine
    stream: Stream
    attention: Attention
    report: LoadReport
    run: Store
    log: list[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    def checkpoints(self, generation: int = 1, base: str = "ours") -> Checkpoints:
        identity = Identity("data", {"fingerprint": base}, find_method(self.config.tuning).identity)
        rules = self.config.checkpoint
        return Checkpoints(self.run, self.ranks, generation, identity, rules, {"capstan-llm": "0"}, self.note)

    def note(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})

    def training(self, generation: int = 1) -> Training:
        metrics = Metrics(self.run, 1, writes=False, flush_seconds=60, tensorboard=False)
        stop = StopSignal(self.run, watches=False, seconds=60)
        total = self.config.train.steps
        assert total
        return Training(
            self.config, self.ranks, self.engine, NextTokens(), self.stream, None, self.checkpoints(generation), metrics, stop, total
        )

    def states(self) -> dict[str, Tensor]:
        """This rank's intervals of what learns: `name|state|begin` -> values."""
        return {
            f"{part.name}|{key}|{part.begin}": part.states[key].clone()
            for part in self.engine.partitions()
            for key in STATES
        }

    def set_masters(self) -> None:
        """Adapters that are not zero, the same whatever the ranks: with B = 0 the gradient of A would be 0."""
        for part in self.engine.partitions():
            part.states["master"].copy_(_adapter_value(part.name, part.shape).view(-1)[part.begin : part.end])
        self.engine.refresh(0)


def _adapter_value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    # Values that bf16 holds exactly, so that masters and 16-bit weights agree.
    return (0.1 * torch.randn(shape, generator=generator)).bfloat16().float()


def _chapters(config: Config, fingerprint: str) -> Chapters:
    store = open_store(config.run.store)
    return open_chapters(store, fingerprint, store.sub(config.run.name))


def _assemble(config: Config, fingerprint: str | None = None) -> Assembled:
    ranks = join()
    torch.set_num_threads(1)
    store = open_store(config.run.store)
    stream: Any = None
    accumulation = 1
    if fingerprint:
        stream = train_stream(config, _chapters(config, fingerprint), ranks.rank, ranks.world_size)
        accumulation = stream.accumulation
    settings = build_deepspeed_config(config, ranks.world_size, accumulation, on_gpu=False)
    base = resolve_base(config.model)
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype], base.architecture)
    log: list[str] = []
    scope = choose_scope(config, base.architecture, ranks.world_size, ranks.ranks_per_node, None)
    engine, report = assemble(base, config, settings, ranks, attention, scope, NextTokens(), log.append)
    return Assembled(config, ranks, engine, stream, attention, report, store.sub(config.run.name), log)


# Gradients.


def first_step(config_text: str, fingerprint: str, destination: str) -> dict[str, Any]:
    """One step of the loop from `_adapter_value`; rank 0 writes the gradients that the optimizer got. -> the record."""
    here = _assemble(parse_config(config_text), fingerprint)
    here.set_masters()
    gradients: dict[str, Tensor] = {}
    step = here.engine.step

    def observed(lr: float) -> float:
        for name, parameter in here.engine.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None
                gradients[name] = gradient.float().clone()
        return step(lr)

    here.engine.step = observed  # type: ignore[method-assign]
    record = next(train(here.training(), 0, Position()))
    if here.ranks.rank == 0:
        save_file(gradients, destination)
    return {
        "loss": record["loss"],
        "grad_norm": record["grad_norm"],
        "targets": record["targets"],
        "accumulation": here.stream.accumulation,
    }


def plain_first_step(config_text: str, fingerprint: str, destination: str) -> dict[str, Any]:
    """The same by transformers and PEFT alone: one process, each document by itself, one mean over all targets."""
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    from trainer.tuning.lora import METHODS

    config = parse_config(config_text)
    dtype = DTYPES[config.model.dtype]
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=dtype, attn_implementation="eager")
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = bnb.dequantize_4bit(*bnb.quantize_4bit(module.weight.data, quant_type="nf4")).to(dtype)
    inject_adapter_in_model(METHODS[config.tuning.method](config.tuning).peft_config("all-linear"), model)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in adapters.items():
        parameter.data = _adapter_value(name, tuple(parameter.shape)).to(dtype)
    stream = train_stream(config, _chapters(config, fingerprint), rank=0, world_size=1)
    batches = [batch.to(torch.device("cpu")) for batch in stream.step(Position())]
    targets = sum(batch.targets for batch in batches)
    nats = 0.0
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for begin, end in zip(borders, borders[1:], strict=False):
            labels = batch.labels[0, begin:end]
            if (labels == -100).all():
                continue
            logits = model(input_ids=batch.input_ids[:, begin:end]).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / targets
            loss.backward()
            nats += float(loss.detach())
    gradients = {name: parameter.grad.float() for name, parameter in adapters.items()}
    save_file(gradients, destination)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    rows = [batch.targets for batch in batches]
    return {"loss": nats, "grad_norm": float(norm), "targets": targets, "row_targets": rows}


# Loss curves.


def losses(config_text: str, fingerprint: str) -> list[float]:
    """The loss of every step, in nats a target."""
    here = _assemble(parse_config(config_text), fingerprint)
    return [record["loss"] for record in train(here.training(), 0, Position())]


def stock_losses(config_text: str, fingerprint: str) -> list[float]:
    """The same by transformers, bitsandbytes and PEFT alone: one process, a 4-bit model, torch's AdamW, one mean a step."""
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trainer.tuning.lora import METHODS

    config = parse_config(config_text)
    torch.set_num_threads(1)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.base, dtype=torch.bfloat16, quantization_config=quantization, attn_implementation="sdpa"
    )
    model.requires_grad_(False).train()
    torch.manual_seed(config.run.seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(METHODS[config.tuning.method](config.tuning).peft_config(names), model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optim = config.optim
    optimizer = torch.optim.AdamW(adapters, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    stream = train_stream(config, _chapters(config, fingerprint), rank=0, world_size=1)
    curve, position, steps = [], Position(), config.train.steps
    assert steps
    for step in range(1, steps + 1):
        batches = [batch.to(torch.device("cpu")) for batch in stream.step(position)]
        targets, nats = sum(batch.targets for batch in batches), 0.0
        for batch in batches:
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[0], reduction="sum") / targets
            loss.backward()
            nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(adapters, optim.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(nats)
        position = stream.advance(position)
    return curve


# Traffic.

# Method of a process group -> bytes that a rank of n receives, of the bytes of the largest tensor given.
_COLLECTIVES: dict[str, Any] = {
    "all_gather_single": lambda size, n: size * (n - 1) / n,
    "all_gather_single_coalesced": lambda size, n: size * (n - 1) / n,
    "allgather": lambda size, n: size * (n - 1) / n,
    "allgather_coalesced": lambda size, n: size * (n - 1) / n,
    "allreduce": lambda size, n: 2 * size * (n - 1) / n,
    "allreduce_coalesced": lambda size, n: 2 * size * (n - 1) / n,
    "broadcast": lambda size, _: size,
    "reduce": lambda size, _: size,
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_single": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_single_coalesced": lambda size, n: size * (n - 1) / n,
    "all_to_all_single": lambda size, n: size * (n - 1) / n,
    "alltoall": lambda size, n: size * (n - 1) / n,
    "gather": lambda size, _: size,
    "scatter": lambda size, _: size,
    "send": lambda size, _: size,
}


def step_traffic(config_text: str, fingerprint: str) -> dict[str, Any]:
    """What this rank receives in the second step, by the extent of the group (its own node or not) and the dtype.

    -> {"inside": {dtype: bytes}, "across": {dtype: bytes}, both without pickled objects, "frozen": the ranks that frozen parameters are gathered from}
    """
    here = _assemble(parse_config(config_text), fingerprint)
    steps = train(here.training(), 0, Position())
    next(steps)
    received: dict[str, dict[str, float]] = {"inside": {}, "across": {}}
    ranks = here.ranks

    def count(group: Any, name: str, tensors: list[Tensor]) -> None:
        nodes = {rank // ranks.ranks_per_node for rank in torch.distributed.get_process_group_ranks(group)}
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        by_dtype = received["across" if len(nodes) > 1 else "inside"]
        size = _COLLECTIVES[name](largest.nbytes, group.size())
        by_dtype[str(largest.dtype)] = by_dtype.get(str(largest.dtype), 0) + size

    _watch_collectives(count)
    next(steps)
    frozen: list[Any] = [p for p in here.engine.model.parameters() if not p.requires_grad]
    groups = {tuple(torch.distributed.get_process_group_ranks(p.ds_process_group)) for p in frozen}
    return {**received, "frozen": sorted(groups)}


def _watch_collectives(count: Any) -> None:
    def watch(name: str) -> None:
        plain = getattr(torch.distributed.ProcessGroup, name)

        def watched(group: Any, *arguments: Any, **options: Any) -> Any:
            count(group, name, list(_tensors([*arguments, *options.values()])))
            return plain(group, *arguments, **options)

        setattr(torch.distributed.ProcessGroup, name, watched)

    for name in _COLLECTIVES:
        watch(name)
    # What ranks tell each other as objects travels as uint8 too, but is none of the model's.
    plain_objects, plain_count = torch.distributed.all_gather_object, count

    def objects(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count = lambda *_: None  # noqa: E731
        plain_objects(*arguments, **options)
        count = plain_count

    torch.distributed.all_gather_object = objects


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# Loading.


def quantized_bytes(config_text: str, bases: list[str], quants: list[list[str]]) -> dict[str, Any]:
    """Load every base with every quantization; names what differs from bitsandbytes quantizing the whole tensor."""
    ranks = join()
    torch.set_num_threads(1)
    differing, compared = [], 0
    for base in bases:
        for overrides in quants:
            config = override(parse_config(config_text), f"model.base={base}", *overrides)
            settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
            found = resolve_base(config.model)
            model, _ = load_model(found, config, settings, ranks, Attention("sdpa", ""), "world")
            for name, module in model.named_modules():
                if isinstance(module, FrozenLinear4bit):
                    source = found.tensors[f"{name.removesuffix('.base_layer')}.weight"]
                    whole = as_tensor(source.read(0, numel(source)), source).view(source.shape).bfloat16()
                    problems = _differences(module, whole, config)
                    compared += 1
                    differing += [f"{Path(base).name} {' '.join(overrides)} {name}: {problem}" for problem in problems]
    return {"compared": compared, "differing": differing}


def _differences(module: FrozenLinear4bit, whole: Tensor, config: Config) -> list[str]:
    quant = config.quant
    packed, state = bnb.quantize_4bit(
        whole, blocksize=quant.block_size, quant_type=quant.type, compress_statistics=quant.double
    )
    with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
        ours: dict[str, Any] = {"weight": module.weight.data, "dequantized": module.dequantize()}
        theirs: dict[str, Any] = {"weight": packed.view(-1), "dequantized": bnb.dequantize_4bit(packed, state)}
        if quant.double:
            ours |= {"absmax": module.absmax.data, "nested": module.nested_absmax.data.view(torch.float32)}
            ours |= {"mean": module.absmax_mean[0]}
            assert state.state2 is not None
            theirs |= {"absmax": state.absmax, "nested": state.state2.absmax, "mean": state.offset}
        else:
            ours |= {"absmax": module.absmax.data.view(torch.float32)}
            theirs |= {"absmax": state.absmax}
        return [
            f"{key}: {tuple(ours[key].shape)} and {tuple(theirs[key].shape)}, "
            f"{int((ours[key] != theirs[key]).sum()) if ours[key].shape == theirs[key].shape else 'all'} differ"
            for key in ours
            if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
        ]


def loaded_logits(config_text: str, bases: list[str], overrides: list[str], destination: str) -> list[dict[str, Any]]:
    """Through loader and engine: rank 0 writes each base's logits as `<base's name>.safetensors` under `destination`."""
    facts = []
    for base in bases:
        config = override(parse_config(config_text), f"model.base={base}", *overrides)
        here = _assemble(config)
        logits = here.engine.logits(_probe())
        if here.ranks.rank == 0:
            save_file({"logits": logits.contiguous()}, f"{destination}/{Path(base).name}.safetensors")
        model = here.engine.model
        facts.append(
            {
                "packed": len(checksums(model)),
                "read_bytes": here.report.read_bytes,
                "kept_bytes": here.report.kept_bytes,
                "buffers": {
                    name: [str(buffer.dtype), buffer.double().sum().item()] for name, buffer in model.named_buffers()
                },
                "digest": logits.double().sum().item(),
                "log": here.log,
            }
        )
    return facts


def load_memory(config_text: str) -> dict[str, Any]:
    """How far this process's resident memory rises above what it was before the load, in bytes."""
    config, ranks = parse_config(config_text), join()
    torch.set_num_threads(1)
    base = resolve_base(config.model)
    settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _memory("VmRSS")
    _, report = load_model(base, config, settings, ranks, Attention("sdpa", ""), "world")
    grown = _memory("VmHWM") - before
    return {"grown_bytes": grown, "kept_bytes": report.kept_bytes, "read_bytes": report.read_bytes}


def step_memory(config_text: str) -> dict[str, int]:
    """Bytes by which a step raises this process's resident memory: as it is, and with every gathered weight kept to its end.

    -> {"released", "kept", "packed": bytes of the packed weights, whole}
    """
    here = _assemble(parse_config(config_text))
    _step_growth(here.engine)  # the first step finds out in which order parameters are used
    released, plain = _step_growth(here.engine), nf4.FrozenLinear4bit.dequantize
    held: list[Tensor] = []

    def keeping(self: FrozenLinear4bit, index: int = 0) -> Tensor:
        held.append(self.weight.data)
        return plain(self, index)

    nf4.FrozenLinear4bit.dequantize = keeping
    kept = _step_growth(here.engine)
    packed: list[Any] = [p for p in here.engine.model.parameters() if p.dtype == torch.uint8]
    return {"released": released, "kept": kept, "packed": sum(parameter.ds_numel for parameter in packed)}


def _step_growth(engine: Engine) -> int:
    tokens, borders = torch.arange(16)[None], torch.tensor([0, 16], dtype=torch.int32)
    batch = MicroBatch(tokens, tokens, tokens, borders, 16, 16, 16, (), ())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _memory("VmRSS")
    engine.backward(engine.loss(batch), last=True)
    engine.step(1e-4)
    return _memory("VmHWM") - before


def _memory(what: str) -> int:
    """Bytes, as /proc/self/status has them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def load_that_fails_on(rank: int, config_text: str, reads: int) -> dict[str, Any]:
    """Load the base; `rank` alone cannot read any more after so many reads. -> how the load ended on this rank."""
    config = parse_config(config_text)
    plain, done = Store.get_range, []

    def get_range(self: Store, key: str, start: int, end: int) -> bytearray:
        done.append(key)
        if os.environ["RANK"] == str(rank) and key.endswith(".safetensors") and len(done) > reads:
            raise StorageError(f"cannot read {key}: the test took it away.")
        return plain(self, key, start, end)

    Store.get_range = get_range
    return _outcome_of(lambda: _assemble(config))


def stock_logits(bases: list[str], quant_type: str, double: bool, destination: str) -> list[dict[str, Any]]:
    """The same through transformers and bitsandbytes alone, as one process."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    facts = []
    for base in bases:
        quantization: dict[str, Any] = {}  # with None given, transformers forgets that a base came quantized
        if quant_type != "none":
            quantization["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        needs = describe(json.loads(Path(base, "config.json").read_text())).architecture
        model: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            **quantization,
            attn_implementation=choose_attention("auto", torch.device("cpu"), torch.bfloat16, needs).name,
            experts_implementation="eager",
        )
        if quantization:
            _quantize_experts(model, quant_type, double)
        # Some CPUs have a fused 4-bit product that rounds differently; bitsandbytes does not use it in training mode.
        model.train()
        with torch.no_grad():
            logits = model(input_ids=_probe(), use_cache=False).logits
        save_file({"logits": logits.contiguous()}, f"{destination}/{Path(base).name}.safetensors")
        buffers = {n: [str(b.dtype), b.double().sum().item()] for n, b in model.named_buffers() if "rotary" in n}
        facts.append({"buffers": buffers})
    return facts


def _quantize_experts(model: Any, quant_type: str, double: bool) -> None:
    """bitsandbytes on each matrix of a mixture of experts, which transformers leaves in 16 bits."""
    for parameter in model.parameters():
        if parameter.ndim == 3:
            for matrix in parameter.data:
                packed, state = bnb.quantize_4bit(
                    matrix, blocksize=64, quant_type=quant_type, compress_statistics=double
                )
                matrix.copy_(bnb.dequantize_4bit(packed, state))


def _probe() -> Tensor:
    """One row that is longer than the sliding windows, (1, 48)."""
    return torch.arange(48).mul(37).remainder(material.SIZES["vocab_size"])[None]


# Checkpoints.


def train_and_save(config_text: str, fingerprint: str, saves: list[int], destination: str) -> int:
    """Train, save after each step of `saves`, the last being the end; writes this rank's states. -> AdamW's count."""
    here = _assemble(parse_config(config_text), fingerprint)
    checkpoints = here.checkpoints()
    for record in train(here.training(), 0, Position()):
        if record["step"] in saves:
            checkpoints.save(here.engine, record["step"], Position(0, 0, 4 * record["step"]).to_json())
            checkpoints.finish()
        if record["step"] == saves[-1]:
            break
    save_file(here.states(), f"{destination}/{here.ranks.rank}.safetensors")
    return here.engine.updates


def restore(config_text: str, fingerprint: str, destination: str, base: str = "ours") -> dict[str, Any]:
    """Restore into a fresh engine; writes this rank's states. `half`: whether the 16-bit weights are the masters'."""
    here = _assemble(parse_config(config_text), fingerprint)
    log: list[str] = []
    manifest = None

    def restored() -> None:
        nonlocal manifest
        manifest = here.checkpoints(base=base).restore(here.engine, required=True, log=log.append)

    outcome = _outcome_of(restored)
    if manifest is None:
        return {**outcome, "log": log}
    save_file(here.states(), f"{destination}/{here.ranks.rank}.safetensors")
    half = True
    trainable = [(n, p) for n, p in here.engine.model.named_parameters() if p.requires_grad]
    parts = {part.name: part for part in here.engine.partitions()}
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in trainable]):
        for name, parameter in trainable:
            part = parts[name]
            mine = parameter.data.view(-1)[part.begin : part.end]
            half &= torch.equal(mine, part.states["master"].to(parameter.dtype))
    return {**outcome, "log": log, "step": manifest.step, "updates": here.engine.updates, "half": half}


def restore_and_train(config_text: str, fingerprint: str, last: int) -> dict[str, Any]:
    """Restore what there is, as a restarted rank does, and train past step `last`, the first that is new and so committed."""
    here = _assemble(parse_config(config_text), fingerprint)

    def action() -> None:
        training = here.training(generation=2)
        manifest = training.checkpoints.restore(here.engine, required=False, log=print)
        assert manifest is not None, "training started over"
        for record in train(training, manifest.step, Position.from_json(manifest.position)):
            if record["step"] > last:
                break

    return _outcome_of(action)


def save_as_generation(config_text: str, fingerprint: str, generation: int) -> dict[str, Any]:
    here = _assemble(parse_config(config_text), fingerprint)
    checkpoints = here.checkpoints(generation)
    checkpoints.save(here.engine, 1, Position(0, 0, 4).to_json())
    return _outcome_of(checkpoints.finish)


def export_proof(run_uri: str, step: int, adapter: str) -> dict[str, float]:
    """What `capstan export --verify` measures."""
    torch.set_num_threads(1)
    return asdict(prove_adapter(open_store(run_uri), step, open_store(adapter)))


def merge_proof(run_uri: str, step: int, merged: str) -> dict[str, float]:
    """What `capstan export --merge --verify` measures."""
    torch.set_num_threads(1)
    return asdict(prove_merged(open_store(run_uri), step, open_store(merged)))


def merge_memory(run_uri: str, merged: str) -> int:
    """How far this process's resident memory rises above what it was before the merge, in bytes."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _memory("VmRSS")
    export_merged(open_store(run_uri), open_store(merged))
    return _memory("VmHWM") - before


# DeepSpeed's private names.


def engine_internals(config_text: str, fingerprint: str) -> dict[str, Any]:
    """What trainer/zero/engine.py takes from DeepSpeed, looked at from the public side."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    here = _assemble(parse_config(config_text), fingerprint)
    here.set_masters()
    record = next(train(here.training(), 0, Position()))
    wrapped: Any = here.engine._engine
    zero = wrapped.optimizer
    wrong = []
    parts = {part.name: part for part in here.engine.partitions()}
    for name, parameter in here.engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.pop(name)
        public = {"master": safe_get_full_fp32_param(parameter)}
        public |= {key: safe_get_full_optimizer_state(parameter, key) for key in STATES[1:]}
        for key, whole in public.items():
            assert whole is not None
            if not torch.equal(whole.reshape(-1)[part.begin : part.end], part.states[key]):
                wrong.append(f"{name} {key}")
    frozen: list[Any] = [p for p in here.engine.model.parameters() if not p.requires_grad]
    return {
        "wrong": wrong,
        "left_over": list(parts),
        "intervals": {part.name: [part.begin, part.end, *part.shape] for part in here.engine.partitions()},
        "updates": here.engine.updates,
        "grad_norm": record["grad_norm"],
        "compiled": deepspeed.comm.comm.cdb.shm_comm_op is not None,
        "persistent": len(zero.persistent_parameters),
        "whole_after_step": [p.ds_shape for p in frozen if p.ds_status.name == "AVAILABLE" and not p.ds_persist],
        "partitioned": sum(not p.ds_persist for p in frozen),
        "held": sum(p.ds_tensor.numel() for p in frozen if not p.ds_persist),
        "numel": sum(p.ds_numel for p in frozen if not p.ds_persist),
    }
