"""Chooses what fits: sequence length, storage of the base, micro-batch and number of GPUs.

The plan's own memory model decides.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from launcher.init.commented import yaml_text
from trainer.base.base import Description
from trainer.config import Config, parse_config
from trainer.errors import ConfigError, DoesNotFit, counted
from trainer.plan.longest import PlannedRanks, longest_rows
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan

GIB = 2**30
_LENGTHS = (4096, 2048, 1024, 512)
_LENGTH_STEP = 2048  # tokens; for rows that are longer than the longest of these
_MICRO_BATCHES = (8, 4, 2)
_MOST_GPUS = 64
# A plan may take this share of a GPU's memory. The rest is for what the plan estimates too low.
_SHARE = 0.9
# A base that takes no more than this in 16 bits stays in 16 bits, so no pass has to dequantize it.
_EASY = 0.6
_ON_CPU = 512

Setting = tuple[Any, str]
"""A setting's value and the reason for it."""


@dataclass(frozen=True)
class Machines:
    """The machines that a run is for.

    `gpus` is None if it has to be found out, and 0 is the CPU. `memory` is in bytes, of one GPU.
    `bf16` is whether the GPU has it.
    """

    gpus: int | None
    memory: int | None
    per_node: int
    gpu: str
    bf16: bool = True


@dataclass(frozen=True)
class Choice:
    """Settings that fit, with the reason for each, and their plan."""

    settings: dict[str, Setting]
    plan: Plan
    gpus: int


def choose(
    given: Mapping[str, Setting], base: Description, machine: Machines, *, trains_base: bool, tokens: int
) -> Choice:
    """Return settings that fit `machine` beside those that are `given`.

    The choice prefers to do without the host's memory, then the longest rows, then the fewest GPUs if their number is
    open, then the storage of the base that costs least time.

    Raises:
        ConfigError: the base cannot be trained so, on any machine.
        DoesNotFit: nothing fits; the sentence says how near it is.
    """
    nearest: tuple[int, int] | None = None
    wrong: list[str] = []
    for offloads, length, gpus in product((False, True), _lengths(base, machine), _counts(machine)):
        for storage in _storages(trains_base, offloads, base.in_4_bits):
            settings = {**given, **storage, **_rows(length, gpus, 1, tokens), **_ranks(machine, gpus)}
            plan = _least_plan(settings, base, machine, gpus)
            total = plan.memory_per_gpu.total
            wrong = plan.mismatches  # of the last candidate: what no candidate can have is in every plan
            if not wrong and _holds(machine, total, storage):
                found = _widened(Choice(settings, plan, gpus), length, base, machine, tokens)
                return replace(found, plan=_plan(found.settings, base, machine, gpus))
            nearest = min(nearest or (total, gpus), (total, gpus))
    if wrong:
        raise ConfigError("\n".join(wrong))
    total, gpus = nearest or (0, 1)
    have = (machine.memory or 0) / GIB
    raise DoesNotFit(
        f"memory: even rows of {_lengths(base, machine)[-1]} tokens on {counted(gpus, 'GPU')} take {total / GIB:.1f}"
        f" GiB each, of {have:.1f} GiB that are there. Give more GPUs (--gpus), larger ones (--gpu), or a smaller base."
    )


def lengthened(choice: Choice, base: Description, machine: Machines, tokens: int, longest: int) -> Choice:
    """Lengthen the rows of `choice` to a document of `longest` tokens, or to as many of them as fit.

    The first line of `capstan plan --longest` that has room decides. A step still has about so many `tokens`.
    """
    shorter, most = choice.settings["data.sequence_length"][0], base.architecture.positions or longest
    wanted = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, most)
    if machine.memory is None or wanted <= shorter:
        return choice
    ranks = PlannedRanks(choice.gpus, min(choice.gpus, machine.per_node), int(_SHARE * machine.memory), on_gpu=True)
    lines = longest_rows(parsed({**choice.settings, "train.micro_batch": (1, "")}), base, ranks)
    line = next((line for line in lines if line.tokens >= wanted), max(lines, key=lambda line: line.tokens))
    if (length := min(wanted, line.tokens)) <= shorter:
        return choice
    groups = choice.gpus // line.settings.get("sharding.sequence_parallel", 1)
    why = f"for rows of {length:,} tokens; `capstan plan --longest` has what each setting buys"
    about = f"tokens of a packed row: one of the first documents has about {longest:,}; longer ones are cut"
    settings = {
        **choice.settings,
        **_rows(length, groups, 1, tokens),
        **{name: (value, why) for name, value in line.settings.items() if name != "train.micro_batch"},
        "data.sequence_length": (length, about),
    }
    return Choice(settings, _plan(settings, base, machine, choice.gpus), choice.gpus)


def _holds(machine: Machines, total: int, storage: Mapping[str, Setting]) -> bool:
    """Return whether a GPU has room for `total` bytes, if a GPU is known.

    A base in 16 bits needs the room to be known, and ample.
    """
    in_16_bits = storage.get("quant.type", ("",))[0] == "none"
    if machine.memory is None:
        return not in_16_bits
    return total <= (_EASY if in_16_bits else _SHARE) * machine.memory


def _lengths(base: Description, machine: Machines) -> Sequence[int]:
    longest = base.architecture.positions or _LENGTHS[0]
    wanted = [_ON_CPU] if machine.gpus == 0 else _LENGTHS
    return [length for length in wanted if length <= longest] or [longest]


def _counts(machine: Machines) -> Sequence[int]:
    """Return numbers of GPUs to try: the given one, or powers of two."""
    if machine.gpus is not None:
        return [machine.gpus]
    return [2**power for power in range(_MOST_GPUS.bit_length())]


def _storages(trains_base: bool, offloads: bool, in_4_bits: bool) -> Iterator[dict[str, Setting]]:
    """Yield ways to store the base and what learns, the one that costs least time first.

    With `offloads` they are those that use the host's memory. A base that is published `in_4_bits` stays as it is.
    """
    short = "in the host's memory, as the GPUs' does not suffice"
    small = {"optim.name": ("adamw_8bit", "moments of one byte, as four do not fit")}
    nf4 = {"quant.type": ("nf4", "4 bits a weight (QLoRA)")}
    double = {**nf4, "quant.double": (True, "scales in 8 bits, as every bit counts here")}
    if trains_base and offloads:
        yield {**small, "sharding.deepspeed": ("zero3_offload_optimizer", f"masters and moments {short}")}
    elif trains_base:
        yield from ({}, small)
    elif in_4_bits:
        stored = {
            "quant.type": (
                "stored",
                "as its publisher has it: the weights that are served are those that are trained over",
            )
        }
        in_host = {"sharding.deepspeed": ("zero3_offload_cpu", f"the base waits {short}")}
        yield {**stored, **(in_host if offloads else {})}
    elif offloads:
        yield {**double, "sharding.deepspeed": ("zero3_offload_cpu", f"the base waits {short}")}
    else:
        yield {"quant.type": ("none", "16 bits, as there is room: nothing to dequantize. nf4 takes a quarter")}
        yield from (nf4, double)


def _rows(length: int, gpus: int, micro_batch: int, tokens: int) -> dict[str, Setting]:
    at_once = max(1, gpus) * micro_batch
    rows = max(at_once, round(tokens / length / at_once) * at_once)
    return {
        "data.sequence_length": (length, "tokens of a packed row; longer documents are cut"),
        "train.global_batch": (rows, f"rows in a step, about {rows * length:,} tokens, whatever the number of GPUs"),
        "train.micro_batch": (micro_batch, "rows on a GPU at once"),
    }


def _ranks(machine: Machines, gpus: int) -> dict[str, Setting]:
    if not gpus:
        return {
            "cluster.workers": (1, "one process"),
            "cluster.gpus_per_worker": (0, "no GPU is here: the CPU, for trying things"),
        }
    return {"cluster.workers": (gpus, "one for each GPU; `resume` takes another number")}


def _widened(choice: Choice, length: int, base: Description, machine: Machines, tokens: int) -> Choice:
    """Return the same choice with as many rows at once as fit, if a step has enough of them."""
    if machine.memory is None or choice.plan.memory_per_gpu.total > _EASY * machine.memory:
        return choice
    for micro_batch in _MICRO_BATCHES:
        if micro_batch * max(1, choice.gpus) * length > tokens:
            continue
        settings = {**choice.settings, **_rows(length, choice.gpus, micro_batch, tokens)}
        plan = _least_plan(settings, base, machine, choice.gpus)
        if plan.memory_per_gpu.total <= _SHARE * machine.memory:
            return Choice(settings, plan, choice.gpus)
    return choice


def _plan(settings: Mapping[str, Setting], base: Description, machine: Machines, gpus: int) -> Plan:
    world_size = max(1, gpus)
    return make_plan(parsed(settings), base, world_size, min(world_size, machine.per_node), machine.memory)


def _least_plan(settings: Mapping[str, Setting], base: Description, machine: Machines, gpus: int) -> Plan:
    """Return the plan with all layers computed again, as they are if memory is short.

    If memory is not short, `auto` takes what is left of it.
    """
    return _plan({**settings, "train.activation_checkpointing": ("all", "")}, base, machine, gpus)


def parsed(settings: Mapping[str, Setting]) -> Config:
    """Return the configuration with these settings."""
    return parse_config(yaml_text({name: value for name, (value, _) in settings.items()}, {}, ()))
