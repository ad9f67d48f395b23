"""From safetensors files to a sharded, quantized, adapted model: no rank ever holds more of the base than its share.

ZeRO-3 gives rank r the elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of a flat parameter, so the bytes this rank
needs of each tensor are known before any is read. It reads the range that covers its share, rounded out to whole
quantization blocks, quantizes it, and hands the slice to DeepSpeed as that parameter's partition. Bit-identical to
bitsandbytes quantizing the whole tensor, as blocks are independent.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.attention import Attention
from trainer.base import Base, check_tensor
from trainer.config import Config, Tuning
from trainer.engine import zero_init
from trainer.loss import LossHead
from trainer.nf4 import FrozenLinear4bit, Layout, quantize_absmax, quantize_blocks, share
from trainer.ranks import Ranks
from trainer.safetensors_index import TensorSource

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Tensors read ahead while one is quantized: bounds the memory of the load to so many shares.
_READ_AHEAD = 4


@dataclass
class LoadReport:
    """What the load did on this rank: bytes read from the store, bytes kept, seconds."""

    read_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0
    checksums: dict[str, int] = field(default_factory=dict)


def load_model(
    base: Base,
    config: Config,
    deepspeed_config: dict[str, Any],
    ranks: Ranks,
    attention: Attention,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PreTrainedModel, LoadReport]:
    """The base, sharded over the ranks, with fresh adapters on it. Collective.

    `progress` is called with (tensors done, tensors in all).

    Raises:
        ConfigError: a tensor is missing from the files, has another shape than the architecture, or a type that
            cannot be read.
    """
    started = time.monotonic()
    model = empty_model(base, config, attention)
    for name, parameter in model.named_parameters():  # a tied weight is listed once, under its first name
        check_tensor(base, name, tuple(parameter.shape))
    loader = _Loader(base, config, deepspeed_config, ranks)
    jobs = _jobs(model, base, config)
    for done, (job, data) in enumerate(_read_ahead(jobs, loader), start=1):
        loader.place(model, job, data)
        progress(done, len(jobs))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    add_adapters(model, config.tuning, DTYPES[config.model.dtype], config.run.seed)
    loader.report.checksums = checksums(model)
    loader.report.seconds = time.monotonic() - started
    return model, loader.report


def empty_model(base: Base, config: Config, attention: Attention) -> PreTrainedModel:
    """The architecture with parameters on `meta` and real buffers (rotary frequencies), its head a `LossHead`."""
    architecture = model_config(base.directory, config.model.layers)
    architecture.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[config.model.dtype], attn_implementation=attention.name
        )
    model.tie_weights()  # init_empty_weights gives every module its own parameter
    head = LossHead(model.lm_head.in_features, model.lm_head.out_features, bias=False, device="meta")
    head.weight = model.lm_head.weight
    model.lm_head = head
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def model_config(directory: Path, layers: int | None) -> PretrainedConfig:
    """transformers' configuration of the base, cut to its first `layers`."""
    config = AutoConfig.from_pretrained(directory)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


@dataclass(frozen=True)
class _Job:
    """One parameter to load; `quantize` is set for the weight of a layer that becomes 4-bit."""

    name: str
    source: TensorSource
    quantize: bool


def _jobs(model: PreTrainedModel, base: Base, config: Config) -> list[_Job]:
    quantized = set()
    if config.quant.type != "none":
        quantized = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    return [_Job(name, base.tensors[name], name in quantized) for name, _ in model.named_parameters()]


def _read_ahead(jobs: list[_Job], loader: "_Loader") -> Iterator[tuple[_Job, bytearray]]:
    """Jobs with their bytes, reads running ahead of the quantization."""
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        pending: list[tuple[_Job, Future[bytearray]]] = []
        for job in jobs:
            pending.append((job, pool.submit(loader.read, job)))
            if len(pending) > _READ_AHEAD:
                first, future = pending.pop(0)
                yield first, future.result()
        for job, future in pending:
            yield job, future.result()


class _Loader:
    """Reads this rank's share of a tensor and turns it into ZeRO-3 partitions."""

    def __init__(self, base: Base, config: Config, deepspeed_config: dict[str, Any], ranks: Ranks) -> None:
        self.quant, self.ranks, self.dtype = config.quant, ranks, DTYPES[config.model.dtype]
        self.group = _partition_group(config.sharding.scope, ranks)
        self.group_size, self.group_rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.zero = zero_init(deepspeed_config, self.dtype)
        self.report = LoadReport()

    def span(self, job: _Job) -> tuple[int, int]:
        """The elements of the source tensor that this rank reads."""
        numel = job.source.numel
        if not job.quantize:
            return share(numel, self.group_size, self.group_rank)
        begin, end = self._block_span(Layout(numel, self.quant.block_size))
        return min(numel, begin * self.quant.block_size), min(numel, end * self.quant.block_size)

    def _block_span(self, layout: Layout) -> tuple[int, int]:
        """The blocks whose packed bytes or scales fall into this rank's partitions: nearly the same range for both."""
        byte_begin, byte_end = share(layout.packed_bytes, self.group_size, self.group_rank)
        scale_begin, scale_end = self._scale_span(layout)
        spans = [(2 * byte_begin // layout.block_size, -(-2 * byte_end // layout.block_size), byte_end > byte_begin)]
        spans.append((scale_begin, scale_end, scale_end > scale_begin))
        used = [(begin, min(end, layout.blocks)) for begin, end, holds in spans if holds]
        return (min(begin for begin, _ in used), max(end for _, end in used)) if used else (0, 0)

    def _scale_span(self, layout: Layout) -> tuple[int, int]:
        """The blocks whose absmax this rank computes: a partition of the fp32 scales' bytes, or of the scales."""
        if self.quant.double:
            return share(layout.blocks, self.group_size, self.group_rank)
        begin, end = share(4 * layout.blocks, self.group_size, self.group_rank)
        return begin // 4, -(-end // 4)

    def read(self, job: _Job) -> bytearray:
        return job.source.read(*self.span(job))

    def place(self, model: nn.Module, job: _Job, data: bytearray) -> None:
        """Make the partitions of one parameter and put them into the model. Collective under double quantization."""
        self.report.read_bytes += len(data)
        weights = torch.frombuffer(data, dtype=_SOURCE_DTYPES[job.source.dtype]) if data else torch.empty(0)
        weights = weights.to(self.dtype)
        parent, _, leaf = job.name.rpartition(".")
        if job.quantize:
            old = model.get_submodule(parent)
            assert isinstance(old, nn.Linear)
            model.set_submodule(parent, self._quantized(old, job, weights))
            return
        begin, _ = self.span(job)
        parameter = self._partition(torch.Size(job.source.shape), self.dtype, begin, weights)
        owner = model.get_submodule(parent)
        shared = getattr(owner, leaf)
        # Every module that shares a tied weight gets the one new parameter.
        for module in model.modules():
            for name, candidate in list(module.named_parameters(recurse=False)):
                if candidate is shared:
                    setattr(module, name, parameter)

    def _quantized(self, old: nn.Linear, job: _Job, weights: Tensor) -> FrozenLinear4bit:
        quant, layout = self.quant, Layout(job.source.numel, self.quant.block_size)
        assert quant.type != "none"
        new = FrozenLinear4bit(
            old.in_features,
            old.out_features,
            quant_type=quant.type,
            block_size=quant.block_size,
            double=quant.double,
            dtype=self.dtype,
        )
        new.bias = old.bias  # still on meta; its own job fills it
        first_block, _ = self._block_span(layout)
        packed, absmax = self._quantize(weights)
        new.weight = self._bytes(layout.packed_bytes, first_block * quant.block_size // 2, packed)
        if not quant.double:
            new.absmax = self._bytes(4 * layout.blocks, 4 * first_block, absmax.view(torch.uint8))
            return new
        codes, nested, mean = quantize_absmax(self._whole_absmax(absmax, first_block, layout))
        new.absmax = self._bytes(layout.blocks, 0, codes)
        new.nested_absmax = self._bytes(4 * layout.nested_blocks, 0, nested.view(torch.uint8))
        new.absmax_mean.copy_(mean)
        return new

    def _quantize(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        if not len(weights):
            return torch.empty(0, dtype=torch.uint8), torch.empty(0)
        packed, absmax = quantize_blocks(weights.to(self.ranks.device), self.quant.type, self.quant.block_size)
        return packed.cpu(), absmax.cpu()

    def _whole_absmax(self, absmax: Tensor, first_block: int, layout: Layout) -> Tensor:
        """All scales of a tensor on every rank: their mean and their blocks of 256 span ranks. 1/32 of the weights' bytes."""
        begin, end = self._scale_span(layout)
        mine = torch.zeros(-(-layout.blocks // self.group_size))
        mine[: end - begin] = absmax[begin - first_block : end - first_block]
        mine = mine.to(self.ranks.device)
        every = torch.empty(len(mine) * self.group_size, device=mine.device)
        dist.all_gather_into_tensor(every, mine, group=self.group)
        return every[: layout.blocks].cpu()

    def _bytes(self, numel: int, offset: int, data: Tensor) -> nn.Parameter:
        return self._partition(torch.Size((numel,)), torch.uint8, offset, data)

    def _partition(self, shape: torch.Size, dtype: torch.dtype, offset: int, data: Tensor) -> nn.Parameter:
        """A frozen ZeRO-3 parameter of `shape`; `data` are its elements from `offset` on and cover this rank's share.

        Only this rank's slice is written: the rest of the `torch.empty` is never touched, so never resident.
        """
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        begin, end = share(shape.numel(), self.group_size, self.group_rank)
        parameter.data.view(-1)[begin:end] = data[begin - offset : end - offset]
        if self.group is not None:
            parameter.ds_zero_partition_process_group = self.group  # type: ignore[attr-defined]  # read by the next call
        # What deepspeed.zero.Init does to each parameter, less its broadcast of rank 0's data.
        self.zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(self.ranks.device)  # empty by now; DeepSpeed's own are on the device too
        self.report.kept_bytes += (end - begin) * dtype.itemsize
        return parameter


def _partition_group(scope: str, ranks: Ranks) -> dist.ProcessGroup | None:
    """The ranks that share one copy of the base; None is all of them. Collective."""
    if scope == "world" or ranks.ranks_per_node == ranks.world_size:
        return None
    mine = None
    for first in range(0, ranks.world_size, ranks.ranks_per_node):
        members = list(range(first, first + ranks.ranks_per_node))
        group = dist.new_group(members)
        mine = group if ranks.rank in members else mine
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def checksums(model: nn.Module) -> dict[str, int]:
    """The sum of this rank's bytes of each packed parameter, to show that nothing cast or moved them."""
    return {
        name: int(parameter.ds_tensor.sum(dtype=torch.int64))  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }


def lora_config(tuning: Tuning, targets: str | Iterable[str]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=tuning.dropout,
        use_rslora=tuning.method == "rslora",
        target_modules=targets if isinstance(targets, str) else sorted(targets),
    )


def add_adapters(model: PreTrainedModel, tuning: Tuning, dtype: torch.dtype, seed: int) -> None:
    """Put PEFT's LoRA layers around the targets, the same random start on every rank and world size."""
    torch.manual_seed(seed)
    inject_adapter_in_model(lora_config(tuning, tuning.targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
