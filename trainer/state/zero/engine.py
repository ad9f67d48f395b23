"""The training engine: DeepSpeed behind the few calls that the loop and the checkpoints need.

Private names of DeepSpeed 0.19 are touched in `_Wrapped`, `_read_norms_once`, `_time_reductions`, `_part`, `_learnt`,
`partitions` and `refresh`; tests/dist/test_engine.py and tests/dist/test_gather.py fail when upstream changes them.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.processes.accelerator import kind

if kind() is None:
    # Set before the import, because DeepSpeed then chooses its accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.partition_parameters import Init

from trainer.config import Optim
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.model.rows.row import Peers
from trainer.processes.ranks import Team
from trainer.state.checkpoint.checkpoints import TrainablePartition
from trainer.state.optimizer import MASTER, Flat, FlatPart, Optimizer, State, find_optimizer
from trainer.state.zero.clock import Clock
from trainer.state.zero.gather import Gathers, without_hooks
from trainer.state.zero.looks import Learnt, Looks

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_REDUCTIONS = (
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
    "independent_gradient_partition_epilogue",
)
"""DeepSpeed's methods that reduce gradients. The last one waits until all of them are reduced."""
_DTYPES = {"F32": torch.float32, "U8": torch.uint8}
# DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, once a gather. The warnings would fill the log.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


@contextmanager
def _own_device(device: torch.device) -> Iterator[None]:
    """Inside, LOCAL_RANK is the number of `device`. DeepSpeed chooses its device by it, even if each rank sees only one
    GPU.
    """
    local_rank = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = local_rank


def zero_init(deepspeed_config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Init:
    """DeepSpeed's `Init`, which turns plain parameters into ZeRO-3 ones, over the process group of `ranks.join`."""
    # Tell DeepSpeed that no op can be compiled: it would build one for inference collectives (a minute of g++), and a
    # rank killed meanwhile leaves a lock file on which every later start on this machine waits for ever.
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    deepspeed.init_distributed(verbose=False)  # first: Init takes the world size from it
    with _own_device(device):
        return Init(config_dict_or_path=deepspeed_config, dtype=dtype)


def divide_now(module: nn.Module, beside: nn.Module) -> None:
    """Divide the parameters of `module`, which every rank holds whole and equal, over the ranks, like those of
    `beside`. The engine would do this when it is made; until then each rank would hold all of them. Collective.
    """
    divided: Any = next(beside.parameters())
    divided.convert_to_zero_parameters(list(module.parameters()))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the sharded parameters of `module` are whole, for reading only. Collective; before the engine is made."""
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


@contextmanager
def gathered_in_turn(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The sharded parameters of each of `modules` are whole while it computes, for reading only. Collective; before the
    engine is made.
    """
    held = ExitStack()

    def gather(module: nn.Module, _arguments: Any) -> None:
        held.enter_context(gathered(module))

    def release(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        held.close()

    with ExitStack() as hooks:
        hooks.callback(held.close)  # left by a failed pass
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(gather))
            hooks.enter_context(module.register_forward_hook(release))
        yield


class DeviceRow(Protocol):
    """A packed row, or a growing text, in the form that a pass takes."""

    def to(self, device: torch.device) -> Self: ...


class _Wrapped(nn.Module):
    """The module for DeepSpeed. One call takes a packed row and returns its sums, or what another function than the
    loss computes from the row, so that ZeRO-3's hooks can follow.
    """

    def __init__(self, packed: PackedModel, loss: Callable[[PackedModel, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.packed, self._loss = packed.model, packed, loss

    def forward(self, row: Any, look: Callable[[PackedModel, Any], Tensor] | None = None) -> Tensor:
        # DeepSpeed would gather what is read outside of its module's own call (an embedding's dtype or device), and
        # rely on its hooks.
        for module in self.modules():
            module._parameters._in_forward = False  # type: ignore[attr-defined]
        return (look or self._loss)(self.packed, row)


class Engine:
    """A model under ZeRO-3 with an optimizer for what learns: a `trainer.state.checkpoint.checkpoints.Learner`. Every
    method except `partitions` is collective.

    `loss` maps the model and a row to sums over the row, of which the first is the loss; `groups` are the optimizer's,
    each with its name, its parameters and `lr_ratio`, its factor on the learning rate.
    """

    def __init__(
        self,
        packed: PackedModel,
        loss: Callable[[PackedModel, Any], Tensor],
        groups: list[dict[str, Any]],
        optim: Optim,
        deepspeed_config: dict[str, Any],
        ranks: Team,
    ) -> None:
        self.ranks = ranks
        self.model = packed.model
        self.clock = Clock(ranks.device)
        if packed.peers is not None:
            packed = replace(packed, peers=_TimedPeers(packed.peers, self.clock))
        trainable = sum(parameter.requires_grad for parameter in self.model.parameters())
        assert sum(len(group["params"]) for group in groups) == trainable, "something learns that is in no group"
        self._optimizer = DividedOptimizer(groups, optim, ranks)
        # Typed as Any, because by DeepSpeed's annotations every attribute would be a tensor or a module.
        with without_hooks(), _own_device(ranks.device):
            self._engine: Any = deepspeed.initialize(
                model=_Wrapped(packed, loss), optimizer=self._optimizer, config=deepspeed_config
            )[0]
        ranks.world.begin_groups()
        zero = self._engine.optimizer
        _read_norms_once(zero)
        _time_reductions(zero, self.clock)
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            self._optimizer.divide(flat, [_part(zero, parameter) for parameter in parameters])
        self._gathers = Gathers(self.model, zero, deepspeed_config["zero_optimization"], self.clock)
        beside = [] if packed.front is None else [packed.front.whole]
        self.looks = Looks(self.model, beside, self._learnt, ranks.device)

    def loss(self, row: MicroBatch) -> Tensor:
        """The sums that the loss function computes from the row, fp32, with their graph."""
        self._gathers.begin("loss")
        return self._engine(row.to(self.ranks.device))

    def look(self, look: Callable[[PackedModel, Any], Tensor], row: DeviceRow) -> Tensor:
        """The values that `look` computes from the model and the row, without a graph."""
        self._gathers.begin(look)
        with torch.no_grad():
            return self._engine(row.to(self.ranks.device), look)

    def gradients(self, row: MicroBatch, limit: int) -> dict[str, Tensor]:
        """This rank's gradient of the row's loss by the names of what learns, beside those of the step.

        The first parameters of the model that have a gradient of at most `limit` bytes together, or at least one: the
        gradient of the first one depends on all of the pass.
        """
        chosen, size = dict[str, nn.Parameter](), 0
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                size += parameter.ds_numel * parameter.element_size()  # type: ignore[attr-defined]
                if chosen and size > limit:
                    break
                chosen[name] = parameter
        self._gathers.begin("loss")
        # Not through DeepSpeed's engine, whose hooks on what it returns prepare a reduction.
        loss = self._engine.module(row.to(self.ranks.device)).reshape(-1)[0]
        found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        self._gathers.finish()
        return {name: one for name, one in zip(chosen, found, strict=True) if one is not None}

    @property
    def seeing_operations(self) -> int:
        """The operations that this rank's tower has asked for so far, with those of its backward passes."""
        front = self._engine.module.packed.front
        return 0 if front is None else front.operations.all

    @property
    def turns(self) -> int:
        """How many passes it takes to look at each gathered parameter once."""
        return self._gathers.turns

    def look_at(self, turn: int) -> None:
        """Look at the gathered parameters of this turn in the next pass."""
        self._gathers.look_at(turn, self.looks.layer)

    def gather_again(self) -> None:
        """Gather the parameters that stay whole on each rank anew from their partitions."""
        self._gathers.gather_again()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, summed over ranks and calls, to the step's; `last` marks the step's last call.

        DeepSpeed averages over ranks; multiplying by the world size makes that the sum which token-normalised loss
        means.
        """
        self.clock.enter("backward")
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        self._gathers.finish()

    def step(self, lr: float) -> float:
        """Clip, update, and return the gradient's global norm before clipping. The host waits for the norm and not for
        the update.
        """
        self.clock.enter("optimizer")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self._engine.step()
        self._gathers.gather_whole()
        return float(self._engine.get_global_grad_norm())

    def logits(self, tokens: Tensor) -> Tensor:
        """Plain logits of one unpacked row, without dropout: (1, T) int64 -> (1, T, V)."""
        self._gathers.begin("logits")
        with self.evaluating(), torch.no_grad():
            return self._engine.module.packed.logits(tokens)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, dropout is off."""
        self._engine.train(False)
        try:
            yield
        finally:
            self._engine.train(True)

    def partitions(self) -> list[TrainablePartition]:
        zero, found = self._engine.optimizer, []
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for parameter, part in zip(parameters, self._optimizer.parts(flat), strict=True):
                name = self._engine.param_names[parameter].removeprefix("model.")
                states = {MASTER.name: part.of(flat.data), **part.states}
                found.append(TrainablePartition(name, part.shape, part.begin, part.end, states))
        return found

    def _learnt(self) -> Iterator[Learnt]:
        """Yield this rank's part of what learns: the weights in the model's type, the masters and the states."""
        zero = self._engine.optimizer
        flats = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, zero.fp16_groups, strict=True)
        for flat, half, parameters in flats:
            parts, whole = self._optimizer.parts(flat), self._optimizer.whole(flat)
            names = [self._engine.param_names[parameter].removeprefix("model.") for parameter in parameters]
            places = dict(zip((part.offset for part in parts), names, strict=True))
            yield from (Learnt(what, values, places) for what, values in {"weights": half, **whole}.items())
            yield Learnt(MASTER.name, flat.data, places)
            for name, part in zip(names, parts, strict=True):
                own = part.states.keys() - whole.keys()
                yield from (Learnt(state, part.states[state], {0: name}) for state in sorted(own))

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        names = ("lr_ratio", "weight_decay", *self._optimizer.kind.settings)
        return {group["name"]: {name: group[name] for name in names} for group in self._engine.optimizer.param_groups}

    @property
    def updates(self) -> int:
        zero = self._engine.optimizer
        return int(zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]]["step"])

    def refresh(self, updates: int) -> None:
        """After writing into `partitions`: set the optimizer's step count and derive the 16-bit weights from the
        masters.
        """
        self._gathers.finish()  # DeepSpeed partitions every parameter again. None may be in flight then.
        zero = self._engine.optimizer
        zero.checkpoint_event_prologue()
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.optimizer.state[flat]["step"] = torch.tensor(float(updates))
            half = zero.fp16_partitioned_groups_flat[group]
            half.data.copy_(flat.data)
            views = zero.unflatten(half, zero.fp16_partitioned_groups[group])
            for partition, view in zip(zero.fp16_partitioned_groups[group], views, strict=True):
                partition.data = view.data
        zero.checkpoint_event_epilogue()


def _read_norms_once(zero: Any) -> None:
    """Make the host read the gradient's norm once, before the update. DeepSpeed asks the device twice in an update:
    whether the norm is a number, and which one.
    """
    norms = zero._get_norm_groups
    zero._get_norm_groups = lambda: list(torch.stack(norms()).cpu())


def _time_reductions(zero: Any, clock: Clock) -> None:
    """Tell the clock of the reductions of gradients in a backward pass, in which a rank waits for slower ones."""
    for name in _REDUCTIONS:
        setattr(zero, name, clock.timed("reduce", getattr(zero, name)))


class _TimedPeers:
    """Peers whose exchanges the clock is told of."""

    def __init__(self, peers: Peers, clock: Clock) -> None:
        self.size, self.part = peers.size, peers.part
        self.swap, self.total = clock.timed("swap", peers.swap), clock.timed("swap", peers.total)


def _part(zero: Any, parameter: Any) -> FlatPart:
    """This rank's part of a parameter in its flat tensor."""
    _, offset, share = zero.grad_position[zero.get_param_id(parameter)]
    begin = min(parameter.ds_numel, zero._get_param_partition_rank(parameter) * share)
    end = min(parameter.ds_numel, begin + share)
    return FlatPart(tuple(parameter.ds_shape), share, begin, end, offset)


class DividedOptimizer(torch.optim.Optimizer):
    """Updates flat tensors, each with the parts of parameters that `divide` has named. Its step is collective."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optim, ranks: Team) -> None:
        self.kind, self.ranks = find_optimizer(settings), ranks
        read = {name: getattr(settings, name) for name in ("lr", "weight_decay", *self.kind.settings)}
        self._flats: dict[Tensor, Flat] = {}
        super().__init__(groups, read)

    def divide(self, values: Tensor, parts: Sequence[FlatPart]) -> None:
        """Begin with the flat tensor `values` that consists of `parts`, before any update."""
        flat = self._flats[values] = begun(self.kind, values.data, parts)
        self.state[values] = {"step": torch.zeros(()), **flat.whole}

    def parts(self, values: Tensor) -> Sequence[FlatPart]:
        """The parts of a flat tensor, with their states as live views."""
        return self._flats[values].parts

    def whole(self, values: Tensor) -> dict[str, Tensor]:
        """The states of a flat tensor that are as long as it is, by name."""
        return self._flats[values].whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the tensors of all groups that have a gradient."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self.state[values]["step"] += 1
                    flat, step = self._flats[values], int(self.state[values]["step"])
                    flat.values = values.data  # DeepSpeed may have moved it
                    self.kind.update(flat, values.grad, group, step, self._reduce)

    def _reduce(self, values: Tensor, how: Literal["sum", "max"]) -> None:
        # Offloaded states lie on the host, where NCCL reduces nothing.
        there = values.to(self.ranks.device)
        dist.all_reduce(there, _OPERATIONS[how], group=self.ranks.group)
        values.copy_(there)


def begun(kind: Optimizer, values: Tensor, parts: Sequence[FlatPart]) -> Flat:
    """The flat tensor `values` before its first step, with all states of its `parts` as zeros on the same device.

    A state that has an fp32 value for each element of every part is one tensor, of which the parts have views, so that
    an optimizer may update all parts at once.
    """
    kept = [kind.states(part.shape) for part in parts]
    of_all = [state for state in kept[0] if state == State(state.name) and all(state in states for states in kept)]
    flat = Flat(values, parts, {state.name: torch.zeros_like(values) for state in of_all})
    for part, states in zip(parts, kept, strict=True):
        for state in states:
            begin, end = state.held(part.begin, part.end)
            part.states[state.name] = (
                part.of(flat.whole[state.name])
                if state in of_all
                else torch.zeros(end - begin, dtype=_DTYPES[state.dtype], device=values.device)
            )
    return flat
