"""What the looks for wrong bytes tell, without a model: sums in halves, names of places, and turns."""

import time
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.errors import ConfigError
from trainer.model.held.layers import HeldWeights
from trainer.state.kept import BLOCK
from trainer.state.zero import looks as zero_looks
from trainer.state.zero import partition
from trainer.state.zero.looks import Learnt, Looks, Told, _halves, is_mixed


def told(owned: int, computed: int) -> Told:
    def halves(number: int) -> tuple[int, ...]:
        signed = number - 2**64 if number >= 2**63 else number
        return tuple(int(half) for half in _halves(torch.tensor(signed)))

    return Told(0, 0, 0, *halves(owned), *halves(computed))


def test_sums_of_parts_are_that_of_the_whole_whatever_overflows() -> None:
    whole = (2**63 + 2**62) * 2 % 2**64 + 5
    ranks = [told(2**63 + 2**62, whole), told(2**63 + 2**62 + 5, whole), told(0, whole + 1)]
    assert [rank.owned for rank in ranks] == [2**63 + 2**62, 2**63 + 2**62 + 5, 0]
    assert is_mixed(ranks) == [False, False, True]


def test_a_place_is_named_by_the_parameters_in_its_block() -> None:
    per_block = BLOCK // 4
    names = {0: "a", 2 * per_block: "b", 2 * per_block + 10: "c", 5 * per_block: "d"}
    learnt = Learnt("master", torch.zeros(6 * per_block), names)
    assert learnt.name_at(0) == learnt.name_at(BLOCK) == "master of a"
    assert learnt.name_at(2 * BLOCK) == "master of one of b, c"
    assert learnt.name_at(3 * BLOCK) == learnt.name_at(4 * BLOCK) == "master of c"
    assert learnt.name_at(5 * BLOCK) == "master of d"


def looks(monkeypatch: pytest.MonkeyPatch, *learnt: Learnt, chunk: int = 4 * BLOCK) -> Looks:
    model: Any = SimpleNamespace(named_parameters=list, named_buffers=list, state_dict=lambda keep_vars: {})
    made = Looks(model, [], lambda: iter(learnt), torch.device("cpu"))
    made._chunk, made._call, made._next = chunk, 0, (0, 0)
    return made


def test_all_that_learns_is_watched_in_turns_and_a_wrong_byte_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.zeros(10 * BLOCK // 4)
    moments = torch.zeros(3 * BLOCK // 4)
    every = Learnt("weights", weights, {0: "w"}), Learnt("exp_avg", moments, {0: "m"})
    look = looks(monkeypatch, *every)
    watched = list[tuple[int, int, int]]()
    for _ in range(2):
        look.watch(8 * BLOCK)
        assert look._watched is not None
        watched += [tuple(span) for span in look._watched.spans]
        assert float(look.told()[2]) == 0
    assert [(number, begin // BLOCK, end // BLOCK) for number, begin, end in watched] == [
        *((0, 0, 4), (0, 4, 8)),
        *((0, 8, 10), (1, 0, 3), (0, 0, 4)),
    ]
    look._next = (0, 8 * BLOCK)
    look.watch(5 * BLOCK)  # two blocks of the weights, three of the moments
    moments[BLOCK // 4 + 3] = 1.0
    number = int(look.told()[2])
    assert number == 4, "the fourth of the blocks that were watched"
    assert look.learnt_name(number) == "exp_avg of m"
    look._next = (0, 8 * BLOCK)
    look.watch(5 * BLOCK)
    weights[8 * BLOCK // 4] = 1.0
    assert look.learnt_name(int(look.told()[2])) == "weights of w"


def test_a_wrong_byte_behind_values_that_fill_no_whole_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, moments = torch.zeros(5 * BLOCK // 8), torch.zeros(9)  # two blocks and a half, and less than one
    look = looks(monkeypatch, Learnt("weights", weights, {0: "w"}), Learnt("exp_avg", moments, {0: "m"}))
    for wrong, name in ((weights, "weights of w"), (moments, "exp_avg of m")):
        look.watch(4 * BLOCK)
        wrong[-1] += 1.0
        assert look.learnt_name(int(look.told()[2])) == name


def test_the_tower_beside_the_model_is_looked_at_without_what_the_model_has_already() -> None:
    tower: Any = torch.nn.Sequential(
        torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False, device="meta")
    )
    tower.requires_grad_(False)
    model: Any = SimpleNamespace(named_parameters=list, named_buffers=list, state_dict=lambda keep_vars: {})
    look = Looks(model, [tower], lambda: iter(()), torch.device("cpu"))
    assert [one.name for one in look.held] == ["the tower: 0.weight"]
    tower[0].weight[1, 1] += 1.0
    look.sweep(10**6)
    assert float(look.told()[0]) == 1


def test_a_share_is_swept_in_turns_and_a_wrong_byte_is_told_once() -> None:
    first, mean, places = (torch.zeros(blocks * BLOCK, dtype=torch.uint8) for blocks in (10, 3, 1))
    buffers = {"norm.first": first, "packed.mean": mean, "rotary.places": places}
    modules = {"norm": torch.nn.Module(), "packed": HeldWeights(), "rotary": torch.nn.Module()}
    model: Any = SimpleNamespace(
        named_parameters=list,
        named_buffers=lambda: list(buffers.items()),
        state_dict=lambda keep_vars: {"norm.first": first},  # those beside it come from the configuration
        get_submodule=modules.get,
    )
    look = Looks(model, [], lambda: iter(()), torch.device("cpu"))
    look._chunk, look._call = 4 * BLOCK, 0
    assert [one.name for one in look.held] == ["norm.first", "packed.mean"]
    mean[-1] = 1
    assert [look.sweep(8 * BLOCK) // BLOCK for _ in range(2)] == [8, 5]
    assert [float(look.told()[0]) for _ in range(2)] == [2, 0], "the second one, and nothing that was told before"
    assert look.wrong_now([0, 1]) == [1]
    mean[-1] = 0
    assert look.sweep(20 * BLOCK) // BLOCK == 13
    assert float(look.told()[0]) == 0
    look.sweep(4 * BLOCK)
    look.sound(7)
    assert look.looked == [7, 7]


def test_parts_that_begin_within_a_word_are_swept_and_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(100, dtype=torch.uint8)
    learns: Any = SimpleNamespace(data=whole, requires_grad=True)
    frozen: Any = SimpleNamespace(data=whole, requires_grad=False)
    model: Any = SimpleNamespace(
        named_parameters=lambda: [("w", frozen)], named_buffers=list, state_dict=lambda keep_vars: {}
    )
    ranks = list[Told]()
    for begin, end in ((0, 13), (13, 100)):
        part = whole[begin:end].clone()
        monkeypatch.setattr(zero_looks, "_part", lambda parameter, own=(part, begin): own)
        look = Looks(model, [], lambda: iter(()), torch.device("cpu"))
        look._chunk, look._call = 16, 0
        assert look.sweep(1000) == end - begin
        look.layer([learns])
        ranks.append(Told(*map(int, look.told())))
    assert [rank.share for rank in ranks] == [0, 0]
    assert is_mixed(ranks) == [False, False]
    assert is_mixed([ranks[0], ranks[1]._replace(owned_low=ranks[1].owned_low + 1)]) == [True, True]


def test_looks_tell_the_hosts_time_for_all_of_them_and_what_a_time_is_enough_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = looks(monkeypatch, Learnt("weights", torch.zeros(BLOCK), {0: "w"}))
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    look.watch(BLOCK)
    look.sweep(BLOCK)
    look.told()
    assert look.seconds == 3
    look._rate = 1000.0
    assert look.budget(0.25) == 250


def test_each_node_has_a_base_of_its_own_if_its_ranks_are_numbered_node_by_node() -> None:
    def group(scope: Any, per_node: int, even: bool = True) -> Any:
        world: Any = SimpleNamespace(
            world_size=4,
            ranks_per_node=per_node,
            have_even_nodes=lambda: even,
            group_of=lambda size: f"groups of {size}",
        )
        return partition._partition_group(scope, world)

    assert group("world", 2) is None
    assert group("node", 2) == "groups of 2"
    assert group("node", 4) is None, "there is one node"
    with pytest.raises(ConfigError, match="sharding.scope: node needs as many ranks on every node"):
        group("node", 2, even=False)


def test_what_is_read_of_a_partition_is_this_ranks_part_and_the_rest_is_dropped() -> None:
    parameter: Any = SimpleNamespace(shape=(3, 4))
    own = partition.Partition(parameter, 4, 8, torch.zeros(4))
    own.write(0, torch.arange(6.0))
    assert own.local.tolist() == [4.0, 5.0, 0.0, 0.0]
    own.write(6, torch.arange(6.0, 12.0))
    assert own.local.tolist() == [4.0, 5.0, 6.0, 7.0]
    own.write(8, torch.ones(4))
    own.write(0, torch.ones(4))
    assert own.local.tolist() == [4.0, 5.0, 6.0, 7.0]
    assert own.numel == 12


def test_what_learns_of_the_base_has_the_type_of_the_model_in_its_partition_too() -> None:
    parameter: Any = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    parameter.ds_tensor = torch.ones(3)
    partition.let_learn(parameter, torch.bfloat16)
    assert (parameter.dtype, parameter.ds_tensor.dtype) == (torch.bfloat16, torch.bfloat16)
    assert parameter.requires_grad
