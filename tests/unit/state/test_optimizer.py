"""Each optimizer updates parts of parameters as a public implementation updates whole ones, however they are
divided.
"""

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers.optimization import Adafactor

from trainer.config import Optim
from trainer.errors import ConfigError
from trainer.state.optimizer import FlatPart, Reduce, State, adamw_8bit, find_optimizer, muon, states_by_name
from trainer.state.zero.engine import begun

# 8-bit blocks that borders cut, a matrix whose rows they cut, experts, and vectors below and above what is kept in
# bytes.
SHAPES = [(70, 90), (3, 50, 41), (7,), (64, 64), (5000,)]
STEPS = 4
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95}
NAMES = ["adamw", "adam", "adamw_8bit", "adafactor", "lion", "muon"]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    scales = [10.0 ** torch.randint(-3, 2, shape, generator=generator) for shape in SHAPES]
    return [torch.randn(scale.shape, generator=generator) * scale for scale in scales]


def no_exchange(values: Tensor, how: str) -> None:
    """In the place of an all-reduce: every rank goes by what it has."""


class Exchange:
    """An all-reduce between threads, one for each rank."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks, timeout=30), dict[int, Tensor]()

    def of(self, rank: int) -> Reduce:
        def reduce(values: Tensor, how: str) -> None:
            self.given[rank] = values.clone()
            self.barrier.wait()
            every = torch.stack([self.given[other] for other in sorted(self.given)])
            self.barrier.wait()
            values.copy_(every.sum(0) if how == "sum" else every.max(0).values)

        return reduce


def states_of(name: str, shape: tuple[int, ...]) -> tuple[State, ...]:
    return states_by_name(name, {"": shape})[""]


def parts_of(rank: int, ranks: int) -> Iterator[FlatPart]:
    """As ZeRO-3 lays them out: as much room for each parameter on every rank."""
    offset = 0
    for shape in SHAPES:
        numel = math.prod(shape)
        share = -(-numel // ranks)
        yield FlatPart(shape, share, min(numel, rank * share), min(numel, (rank + 1) * share), offset)
        offset += share


def of_rank(name: str, rank: int, ranks: int, reduce: Reduce) -> list[dict[str, tuple[int, Tensor]]]:
    """Each parameter's states on one rank after `STEPS`: name -> (first value, values)."""
    torch.set_num_threads(1)
    kind, parts = find_optimizer(Optim(name=name)), list(parts_of(rank, ranks))

    def filled(whole: list[Tensor]) -> Tensor:
        values = torch.zeros(sum(part.share for part in parts))
        for part, tensor in zip(parts, whole, strict=True):
            part.of(values).copy_(tensor.view(-1)[part.begin : part.end])
        return values

    flat = begun(kind, filled(start()), parts)
    for step in range(1, STEPS + 1):
        kind.update(flat, filled(gradients(step)), SETTINGS, step, reduce)
    found = [{"master": part.of(flat.values), **part.states} for part in parts]
    return [
        {state.name: (state.held(part.begin, part.end)[0], values[state.name]) for state in states_of(name, part.shape)}
        for part, values in zip(parts, found, strict=True)
    ]


def divided(name: str, ranks: int, exchange: Callable[[int], Reduce] | None = None) -> list[dict[str, Tensor]]:
    """Each parameter's states, whole, after `STEPS` on so many ranks; values that several ranks have must be the
    same.
    """
    exchange = exchange or Exchange(ranks).of
    with ThreadPoolExecutor(ranks) as pool:
        every = list(pool.map(lambda rank: of_rank(name, rank, ranks, exchange(rank)), range(ranks)))
    result = []
    for number, shape in enumerate(SHAPES):
        whole: dict[str, Tensor] = {}
        for state in states_of(name, shape):
            pieces = [rank[number][state.name] for rank in every]
            values = whole[state.name] = torch.empty(state.size(math.prod(shape)), dtype=pieces[0][1].dtype)
            for first, piece in pieces:
                values[first : first + len(piece)] = piece
            assert all(torch.equal(values[first : first + len(piece)], piece) for first, piece in pieces)
        result.append(whole)
    return result


_MOMENTS = "master exp_avg exp_avg_sq"


@pytest.mark.parametrize(
    ("name", "of_matrix", "of_vector"),
    [
        ("adamw", _MOMENTS, _MOMENTS),
        ("adam", _MOMENTS, _MOMENTS),
        ("adamw_8bit", "master exp_avg_absmax:25 exp_avg_sq_absmax:25 exp_avg:U8 exp_avg_sq:U8", _MOMENTS),
        ("adafactor", "master exp_avg_sq_row:70 exp_avg_sq_col:90", "master exp_avg_sq"),
        ("lion", "master exp_avg", "master exp_avg"),
        ("muon", "master momentum_buffer", _MOMENTS),
    ],
)
def test_a_checkpoint_has_the_weight_and_then_these_states_of_a_parameter(
    name: str, of_matrix: str, of_vector: str
) -> None:
    """The tensors of checkpoints that exist have these names and sizes, and lie in this order."""
    for shape, wanted in (((70, 90), of_matrix), ((7,), of_vector)):
        numel = math.prod(shape)
        found = [
            (state.name, state.dtype, state.size(numel)) for state in states_by_name(name, {"a": shape, "b": (1,)})["a"]
        ]
        expected = list[Any]()
        for one in wanted.split():
            known, _, other = one.partition(":")
            expected.append((known, other if other == "U8" else "F32", int(other) if other.isdigit() else numel))
        assert found == expected


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675, line by line."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, betas: Any, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        for theta in group["params"]:
            momentum = self.state[theta].setdefault("exp_avg", torch.zeros_like(theta))
            c = beta1 * momentum + (1 - beta1) * theta.grad
            theta.sub_(group["lr"] * (torch.sign(c) + group["weight_decay"] * theta))
            momentum.copy_(beta2 * momentum + (1 - beta2) * theta.grad)


class MuonAndAdamW:
    """torch's Muon of each matrix, also those of a stack, and torch's AdamW of vectors."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, rest: Any) -> None:
        self.parameters = parameters
        self.matrices = {
            parameter: [torch.nn.Parameter(matrix) for matrix in parameter.detach().view(-1, *parameter.shape[-2:])]
            for parameter in parameters
            if parameter.ndim > 1
        }
        every = [matrix for matrices in self.matrices.values() for matrix in matrices]
        self.muon = torch.optim.Muon(
            every, lr, rest["weight_decay"], momentum=SETTINGS["momentum"], adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW([parameter for parameter in parameters if parameter.ndim < 2], lr, **rest)

    def step(self) -> None:
        for parameter, matrices in self.matrices.items():
            assert parameter.grad is not None
            for matrix, gradient in zip(matrices, parameter.grad.view(-1, *parameter.shape[-2:]), strict=True):
                matrix.grad = gradient
        self.muon.step()
        self.adamw.step()

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        buffers = {
            parameter: {"momentum_buffer": torch.stack([self.muon.state[one]["momentum_buffer"] for one in matrices])}
            for parameter, matrices in self.matrices.items()
        }
        return {**self.adamw.state, **buffers}


def reference(name: str) -> list[dict[str, Tensor]]:
    """The same by torch's, bitsandbytes' or transformers' optimizer of whole parameters."""
    parameters = [torch.nn.Parameter(tensor) for tensor in start()]
    lr, decay = SETTINGS["lr"], SETTINGS["weight_decay"]
    rest: Any = {"betas": SETTINGS["betas"], "eps": SETTINGS["eps"], "weight_decay": decay}
    optimizer: Any = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr, **rest),
        "adam": lambda: torch.optim.Adam(parameters, lr, **rest),
        "adamw_8bit": lambda: AdamW8bit(parameters, lr, **rest),
        "adafactor": lambda: Adafactor(
            parameters, lr, weight_decay=decay, scale_parameter=False, relative_step=False, warmup_init=False
        ),
        "lion": lambda: Lion(parameters, lr, betas=SETTINGS["betas"], weight_decay=decay),
        "muon": lambda: MuonAndAdamW(parameters, lr, rest),
    }[name]()
    for step in range(1, STEPS + 1):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    theirs = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg_absmax", "absmax2": "exp_avg_sq_absmax"}
    result = []
    for parameter in parameters:
        state = {theirs.get(key, key): value for key, value in optimizer.state[parameter].items()}
        names = [state.name for state in states_of(name, tuple(parameter.shape))]
        whole = {"master": parameter.detach(), **state}
        result.append({key: whole[key].view(-1) for key in names})
    return result


def distance(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """The largest relative distance of any state; of bytes, the share of those that differ."""
    distances = list[float]()
    for ours, theirs in zip(found, expected, strict=True):
        assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}
        for key, values in theirs.items():
            if values.dtype == torch.uint8:
                distances.append(float((ours[key] != values).float().mean()))
            else:
                distances.append(float((ours[key] - values).norm() / values.norm()))
    return max(distances)


@pytest.mark.parametrize("ranks", [1, 2, 3, 17])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_updated_as_whole_parameters_are_elsewhere(name: str, ranks: int) -> None:
    assert distance(divided(name, ranks), reference(name)) < 1e-6


@pytest.mark.parametrize("ranks", [2, 3, 17])
def test_moments_in_bytes_are_the_same_bit_by_bit_however_they_are_divided(ranks: int) -> None:
    alone, together = divided("adamw_8bit", 1), divided("adamw_8bit", ranks)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if key != "master")


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "muon"])
def test_without_the_exchange_the_states_are_others(name: str) -> None:
    try:
        found = divided(name, 3, lambda rank: no_exchange)
    except AssertionError:  # two ranks have other values of one state
        return
    assert distance(found, reference(name)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_gradient_yet_stays_as_it_is(name: str) -> None:
    """In the first step an adapter's first matrix has none, because the second one is zeros."""
    kind, parts = find_optimizer(Optim(name=name)), list(parts_of(0, 1))
    values = torch.cat([tensor.flatten() for tensor in start()])
    before = values.clone()
    kind.update(begun(kind, values, parts), torch.zeros_like(values), SETTINGS | {"weight_decay": 0.0}, 1, no_exchange)
    assert torch.equal(values, before)


def test_a_step_in_bytes_takes_no_more_than_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_8bit, "_PIECE", 512)
    pieces = list(adamw_8bit._pieces(FlatPart((70, 90), 3150, 100, 5000, 0)))
    assert [piece.begin for piece in pieces] == [100, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == 5000
    assert max(piece.end - piece.begin for piece in pieces) == 512


def test_muon_exchanges_as_many_matrices_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [math.prod(shape) for shape in SHAPES if len(shape) > 1]
    monkeypatch.setattr(muon, "_EXCHANGED", matrices[0] + matrices[1])
    exchange, sizes = Exchange(2), list[int]()

    def noting(rank: int) -> Reduce:
        reduce = exchange.of(rank)

        def noted(values: Tensor, how: Any) -> None:
            sizes.append(values.numel())
            reduce(values, how)

        return noted if rank == 0 else reduce

    assert distance(divided("muon", 2, noting), reference("muon")) < 1e-6
    assert sizes == [matrices[0] + matrices[1], matrices[2]] * STEPS


@pytest.mark.parametrize(
    ("name", "on_a_cpu", "on_a_gpu"),
    [
        ("adamw", 12, 8),
        ("adam", 16, 12),  # with the decayed gradient
        ("lion", 8, 8),
        ("adafactor", 8, 8),
    ],
)
def test_a_step_takes_the_bytes_of_its_gradient_and_of_what_it_computes(
    name: str, on_a_cpu: int, on_a_gpu: int
) -> None:
    kind = find_optimizer(Optim(name=name))
    for on_gpu, each in ((False, on_a_cpu), (True, on_a_gpu)):
        assert kind.step_bytes(1000, 70, on_gpu) == 1000 * each


def test_a_step_by_pieces_takes_the_bytes_of_one_beside_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_EXCHANGED", 500)
    monkeypatch.setattr(adamw_8bit, "_PIECE", 50)
    for largest, exchanged, piece in ((40, 500, 40), (600, 600, 50)):
        assert find_optimizer(Optim(name="muon")).step_bytes(1000, largest, True) == 4000 + 10 * exchanged
        assert find_optimizer(Optim(name="adamw_8bit")).step_bytes(1000, largest, True) == 4000 + 16 * piece
    assert find_optimizer(Optim(name="muon")).step_bytes(300, 40, True) == 1200 + 10 * 300


def test_a_setting_that_the_optimizer_does_not_read_is_refused() -> None:
    assert find_optimizer(Optim(name="adafactor", weight_decay=0.1, lr=1e-3)).settings == ()
    with pytest.raises(ConfigError, match=r"optim\.betas: has no effect with optim\.name: adafactor\. Remove it\."):
        find_optimizer(Optim(name="adafactor", betas=(0.9, 0.95)))
    with pytest.raises(ConfigError, match=r"optim\.name: 'adamw8' is not allowed\. .*Did you mean adamw"):
        find_optimizer(Optim(name="adamw8"))


def test_finding_one_loads_no_torch() -> None:
    code = (
        "import sys; from trainer.state.optimizer import optimizers; optimizers(); "
        "print(*({'torch', 'bitsandbytes', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
