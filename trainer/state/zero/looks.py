"""Looks at what a rank holds, for bytes that have changed although nobody wrote to them.

    share      this rank's partitions of what does not learn: their sums are known since the load, and a part of them is
               added up again after each step
    layer      what a rank computes with: one unit of gathered parameters a step, whose sum is that of its owners' parts
    learnt     what learns, with its optimizer's states, from the end of an update to the beginning of the next one

Nothing here waits for the device: a result is a number on it, which travels with the exchange of the step. Sums are of
words (trainer/state/kept.py), so two wrong bits may cancel each other, and one never does. Private names of DeepSpeed's
parameters are touched here; tests/dist/test_looks.py fails when upstream changes them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import few
from trainer.model.held.layers import HeldWeights
from trainer.processes.accelerator import is_accelerator
from trainer.state.kept import BLOCK, block_sums, placed_sum
from trainer.state.zero.division import share

_CHUNK_BYTES = {True: 2**26, False: 2**20}
"""The bytes that one call adds up, on an accelerator and on a CPU."""
_CALL_BYTES = {True: 2**22, False: 2**17}
"""A call takes about as long as adding up so much."""
_HALF = 2**32


class Held(NamedTuple):
    """Something that this rank holds and that does not learn: its part of a parameter, or a whole buffer."""

    name: str
    owner: Tensor
    part: Tensor
    begin: int  # bytes of the whole before the part


class Learnt(NamedTuple):
    """Values of what learns. `names` has the parameters that they belong to, by the place of the first value of each,
    in the order of the places.
    """

    what: str
    values: Tensor
    names: Mapping[int, str]

    def name_at(self, byte: int) -> str:
        """The name of what has this byte, and of the values that follow in the same block."""
        place, block = byte // self.values.element_size(), BLOCK // self.values.element_size()
        first = max(start for start in self.names if start <= place)
        names = [name for start, name in self.names.items() if first <= start < place + block]
        return f"{self.what} of {'one of ' if len(names) > 1 else ''}{few(names)}"


class Told(NamedTuple):
    """The findings of a rank's looks in a step, as it tells them to the others.

    The first three fields are numbers of tensors, counted from 1, and 0 if nothing is wrong: `share` of one that is
    wrong in this rank's share, `layer` of one that is wrong in the layer that the rank computes with, and `learnt` of
    one that learns. `owned` and `computed` are sums over what learns in the unit that was looked at. `owned` is over
    this rank's parts, `computed` over the whole that it computes with. Each sum is in two halves.
    """

    share: int
    layer: int
    learnt: int
    owned_low: int
    owned_high: int
    computed_low: int
    computed_high: int

    @property
    def owned(self) -> int:
        return self.owned_low + _HALF * self.owned_high

    @property
    def computed(self) -> int:
        return self.computed_low + _HALF * self.computed_high


class _Span(NamedTuple):
    """Bytes of the values with this number among all that learns."""

    number: int
    begin: int
    end: int


@dataclass
class _Watched:
    """Sums of some of what learns, since the end of the last update."""

    spans: list["_Span"]
    sums: Tensor


@dataclass
class _Layer:
    """A look at the unit of the current step: what is wrong with what is frozen, and sums of what learns."""

    wrong: Tensor
    owned: Tensor
    computed: Tensor


P = ParamSpec("P")
T = TypeVar("T")


def _timed(method: Callable[Concatenate["Looks", P], T]) -> Callable[Concatenate["Looks", P], T]:
    """The method, whose time is added to `Looks.seconds`."""

    @wraps(method)
    def timed(looks: "Looks", *arguments: P.args, **given: P.kwargs) -> T:
        began = time.perf_counter()
        try:
            return method(looks, *arguments, **given)
        finally:
            looks.seconds += time.perf_counter() - began

    return timed


class Looks:
    """The looks of one rank. All ranks make and use it alike; the making is collective.

    Args:
        model: with its parameters under ZeRO-3.
        beside: other modules that are whole on this rank and do not learn.
        learnt: gives what learns and its states, with the same sizes and in the same order whenever it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        beside: Iterable[nn.Module],
        learnt: Callable[[], Iterator[Learnt]],
        device: torch.device,
    ) -> None:
        self._device, self._learnt = device, learnt
        fast = is_accelerator(device)
        self._chunk, self._call = _CHUNK_BYTES[fast], _CALL_BYTES[fast]
        # The decoder of the tower's class stays on meta: the model that learns has its weights.
        self.held = [one for one in (*_frozen(model), *_whole(model, beside)) if not one.part.is_meta]
        self._number = {id(one.owner): number for number, one in enumerate(self.held, start=1)}
        began = time.perf_counter()
        own = [self._placed(one) for one in self.held]
        self._own = torch.stack(own) if own else torch.zeros(0, dtype=torch.int64, device=device)
        self._next = (0, 0)
        """The number of what learns, and the byte of it, from which on it is watched next."""
        every = list(learnt())
        tried = self._spans(every, 4 * self._chunk)
        if tried:
            self._sums(every, tried)
        if fast:
            torch.accelerator.synchronize()
        spent = sum(_size(one.part) + self._call for one in self.held)
        spent += sum(span.end - span.begin + self._call for span in tried)
        self._rate = max(1.0, spent / max(1e-9, time.perf_counter() - began))  # bytes a second
        self._all = self._of_whole_parameters()
        self._at, self._offset, self._sum = 0, 0, self._zero()
        self._watched: _Watched | None = None
        self._layer: _Layer | None = None
        self._wrong_share = self._zero()
        self.looked = [0] * len(self.held)
        """The step of the last good look at each tensor that a sweep looks at."""
        self._fresh, self._told_fresh = list[int](), list[int]()
        self._told_watched = list[_Span]()
        self.seconds = 0.0
        """The time of the host for all looks so far."""

    def _of_whole_parameters(self) -> Tensor:
        """The sum of each whole parameter in `held`. The ranks that have it together add up their parts. Collective."""
        groups = [getattr(one.owner, "ds_process_group", None) for one in self.held]
        whole = torch.zeros_like(self._own)
        for group in dict.fromkeys(group for group in groups if group is not None):
            of_group = torch.tensor([other is group for other in groups]).to(self._device)
            sums = self._own * of_group
            dist.all_reduce(sums, group=group)
            whole += sums * of_group
        return whole

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self._device)

    def _placed(self, one: Held) -> Tensor:
        return placed_sum(one.part, one.begin).to(self._device)

    def budget(self, seconds: float) -> int:
        """The bytes that can be added up in so many seconds."""
        return int(self._rate * seconds)

    # --- the share

    @_timed
    def sweep(self, size: int) -> int:
        """Go on with the sweep over this rank's share by about `size` bytes, at least one call. Returns its bytes."""
        looked = spent = 0
        self._fresh = []
        while self.held and (not spent or spent < size):
            one = self.held[self._at]
            data = _bytes(one.part)
            chunk = data[self._offset : self._offset + self._chunk]
            self._sum += placed_sum(chunk, one.begin + self._offset).to(self._device)
            self._offset += len(chunk)
            looked, spent = looked + len(chunk), spent + len(chunk) + self._call
            if self._offset >= len(data):
                wrong = (self._sum != self._own[self._at]) * (self._at + 1)
                self._wrong_share = torch.maximum(self._wrong_share, wrong)
                self._fresh.append(self._at)
                self._at, self._offset, self._sum = (self._at + 1) % len(self.held), 0, self._zero()
                if self._at == 0:
                    break
        return looked

    def sound(self, step: int) -> None:
        """Note that everything swept before the last `told` was right in the state after `step` updates."""
        for number in self._told_fresh:
            self.looked[number] = step

    def wrong_now(self, numbers: Sequence[int]) -> list[int]:
        """Those of what is held, by number from 0, that are wrong in this rank's share now. Waits for the device."""
        return [number for number in numbers if bool(self._placed(self.held[number]) != self._own[number])]

    # --- a layer

    @_timed
    def layer(self, parameters: Sequence[Any]) -> None:
        """Look at gathered parameters, as this rank is about to compute with them."""
        wrong, owned, computed = self._zero(), self._zero(), self._zero()
        for parameter in parameters:
            whole = placed_sum(parameter.data)
            if parameter.requires_grad:
                part, begin = _part(parameter)
                owned += placed_sum(part, begin).to(self._device)
                computed += whole
            else:
                number = self._number[id(parameter)]
                wrong = torch.maximum(wrong, (whole != self._all[number - 1]) * number)
        self._layer = _Layer(wrong, owned, computed)

    # --- what learns

    @_timed
    def watch(self, size: int) -> None:
        """Remember the sums of what learns from now until `told`, of as much of it as `size` bytes are, in turns."""
        every = list(self._learnt())
        spans = self._spans(every, size)
        self._watched = _Watched(spans, self._sums(every, spans)) if spans else None

    def _spans(self, every: Sequence[Learnt], size: int) -> list[_Span]:
        spans, spent, left = list[_Span](), 0, sum(_size(one.values) for one in every)
        number, begin = self._next
        while left and (not spent or spent < size):
            end = min(_size(every[number].values), begin + self._chunk)
            if begin < end:
                spans.append(_Span(number, begin, end))
                spent, left = spent + end - begin + self._call, left - (end - begin)
            done = end == _size(every[number].values)
            number, begin = ((number + 1) % len(every), 0) if done else (number, end)
        self._next = number, begin
        return spans

    def _sums(self, every: Sequence[Learnt], spans: Sequence[_Span]) -> Tensor:
        data = {number: _bytes(every[number].values) for number, _, _ in spans}
        return torch.cat([block_sums(data[number][begin:end]).to(self._device) for number, begin, end in spans])

    @_timed
    def told(self) -> tuple[float | Tensor, ...]:
        """The results since the last call, as the fields of `Told`. What learns has not been updated meanwhile."""
        learnt: float | Tensor = 0.0
        if self._watched is not None:
            now = self._sums(list(self._learnt()), self._watched.spans)
            differ = now != self._watched.sums
            learnt = torch.where(differ.any(), 1 + differ.int().argmax(), 0)
            self._told_watched = self._watched.spans
        layer, self._layer = self._layer or _Layer(self._zero(), self._zero(), self._zero()), None
        in_share, self._wrong_share = self._wrong_share, self._zero()
        self._told_fresh, self._fresh = self._fresh, []
        return in_share, layer.wrong, learnt, *_halves(layer.owned), *_halves(layer.computed)

    def learnt_name(self, number: int) -> str:
        """The name of what learns that `Told.learnt` means, of the last `told`."""
        every = list(self._learnt())
        for place, begin, end in self._told_watched:
            blocks = -(-(end - begin) // BLOCK)
            if number <= blocks:
                return every[place].name_at(begin + (number - 1) * BLOCK)
            number -= blocks
        raise AssertionError("the number is of no block")


def _bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _size(values: Tensor) -> int:
    return values.numel() * values.element_size()


def _halves(number: Tensor) -> tuple[Tensor, Tensor]:
    return number & (_HALF - 1), (number >> 32) & (_HALF - 1)


def is_mixed(ranks: Sequence[Told]) -> list[bool]:
    """Whether each rank has computed with other values of what learns than its owners have."""
    owned = sum(rank.owned for rank in ranks) % 2**64
    return [rank.computed != owned for rank in ranks]


def _part(parameter: Any) -> tuple[Tensor, int]:
    """This rank's part of a parameter without padding, and the bytes of the parameter before it."""
    group = parameter.ds_process_group
    begin, end = share(parameter.ds_numel, dist.get_world_size(group), dist.get_rank(group))
    return parameter.ds_tensor.data[: end - begin], begin * parameter.element_size()


def _frozen(model: nn.Module) -> Iterator[Held]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield Held(name, parameter, *_part(parameter))


def _whole(model: nn.Module, beside: Iterable[nn.Module]) -> Iterator[Held]:
    """Yield the tensors that do not learn and are whole on each rank: buffers that are stored with the base, means of
    scales, and the parameters of modules beside the model.
    """
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        path = name.rpartition(".")[0]
        if name in stored or isinstance(model.get_submodule(path), HeldWeights):
            yield Held(name, buffer, buffer, 0)
    for module in beside:
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:  # the decoder's own weights are the model's
                yield Held(f"the tower: {name}", parameter, parameter, 0)
