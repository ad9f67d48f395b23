"""The machines and the numbers of a start's ranks: each finds what the one of its number has left on its machine."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster.ray import keepers
from launcher.cluster.ray.cluster import Need
from launcher.cluster.ray.keepers import Places, numbered


@pytest.mark.parametrize(
    ("nodes", "before", "numbers"),
    [
        ("ab", {}, [0, 1]),
        ("ab", {0: "a", 1: "b"}, [0, 1]),
        ("ba", {0: "a", 1: "b"}, [1, 0]),
        ("ca", {0: "a", 1: "b"}, [1, 0]),
        ("cb", {0: "a", 1: "b"}, [0, 1]),
        ("ccaa", {0: "a", 1: "a", 2: "b", 3: "b"}, [2, 3, 0, 1]),
        ("aab", {0: "b", 1: "a", 2: "a"}, [1, 2, 0]),
        # The ranks of a node have consecutive numbers.
        ("aab", {0: "a", 1: "b", 2: "a"}, [0, 1, 2]),
        # Of a larger world before, numbers that are not there any more are nobody's.
        ("b", {0: "a", 1: "b"}, [0]),
    ],
)
def test_ranks_are_numbered_by_what_their_machines_keep(nodes: str, before: dict[int, str], numbers: list[int]) -> None:
    assert numbered(list(nodes), before) == numbers


@dataclass
class FakeSpare:
    node: str | None
    given_up: list[str | None] = field(default_factory=list)

    def give_up(self) -> None:
        self.given_up.append(self.node)


def places(monkeypatch: pytest.MonkeyPatch, alive: str, spares: list[FakeSpare], log: list[str]) -> Places:
    """Those of a run whose ranks are at home on a and b, when the nodes `alive` are left."""
    monkeypatch.setattr(keepers, "alive_nodes", lambda: {node: f"host/{node}" for node in alive})
    made: Any = Places(None, len(spares), log.append)
    made._home, made._places, made._spares = {"a", "b"}, 2, spares
    return made


def test_a_spare_is_given_up_for_each_machine_that_the_ranks_have_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    spares, log = [FakeSpare(None), FakeSpare("lost"), FakeSpare("c"), FakeSpare("d")], list[str]()
    chosen = places(monkeypatch, "acdx", list(spares), log)
    for _ in range(3):  # whoever waits for room asks again and again
        chosen.stand_in([])
    assert [spare.given_up for spare in spares] == [[], [], ["c"], []]
    assert log == ["cluster.spares: host/c takes the place of a machine of the ranks"]
    chosen.stand_in(["a"])  # it is slow
    assert spares[3].given_up == ["d"]
    chosen.stand_in(["c"])
    assert len(log) == 2, "there is none for a third"


def test_ranks_go_on_where_they_were_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that are free have no keeper."""
    chosen, asked, need = places(monkeypatch, "abx", [], []), list[list[str]](), Need(2, 2, {"CPU": 1.0})

    def room(_each: dict[str, float], without: list[str]) -> int:
        asked.append(without)
        return min(len(asked), 2)  # the room of the ranks that were killed is not free at once

    monkeypatch.setattr(keepers, "room", room)
    assert chosen.others(need, 2, []) == ["x"]
    assert asked == [["x"], ["x"]]
    assert chosen.others(need, 2, ["y"]) == ["y", "x"]
    assert chosen.others(need, 1, ["y"]) == ["y"], "the run has become smaller"
    monkeypatch.setattr(keepers, "_FREED_SECONDS", 0.0)
    monkeypatch.setattr(keepers, "room", lambda *_: 1)
    assert chosen.others(need, 2, []) == [], "somebody else has taken their room"
    assert places(monkeypatch, "axy", [], []).others(need, 2, []) == [], "a machine is lost, and no spare was there"


def test_the_next_starts_ranks_are_numbered_by_the_machines_that_kept_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = keepers._Keepers(None)
    monkeypatch.setattr(every, "prepare", lambda node: f"the actor of {node}")
    assert every.number(["a", "a", "b"]) == [0, 1, 2]
    for rank, node in enumerate("aab"):
        assert every.machine(node, rank) == f"the actor of {node}"
    assert every.number(["b", "a", "a"]) == every.order() == [2, 0, 1]
    assert every.nodes() == ["b", "a", "a"]
    assert every.number(["b", "a", "a"]) == [0, 1, 2], "no rank of the start between has begun"


def test_a_machine_whose_keeper_does_not_answer_gets_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()
    actor = SimpleNamespace(remote=lambda gpus: made.append(f"{gpus} GPU") or len(made))
    monkeypatch.setattr("ray.remote", lambda kind: SimpleNamespace(options=lambda **_: actor))
    monkeypatch.setattr(keepers, "on_node", lambda node: node)
    every = keepers._Keepers(1)
    assert [every.machine("a", 0), every.machine("a", 1), every.machine("b", 2)] == [1, 1, 2]
    every.forget("a")
    assert every.machine("a", 0) == 3
    assert made == ["1 GPU"] * 3


def test_spares_are_reserved_beside_the_ranks_and_have_a_keeper_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, prepared, log = list[tuple[Any, Any]](), list[str](), list[str]()

    def group(bundles: list[Any], bundle_label_selector: Any) -> Any:
        asked.append((bundles, bundle_label_selector))
        return SimpleNamespace(wait=lambda seconds: len(asked) > 1)

    place = SimpleNamespace(
        nodes=SimpleNamespace(remote=lambda: list("aab")), prepare=SimpleNamespace(remote=prepared.append)
    )
    monkeypatch.setattr("ray.get", lambda found, timeout: found)
    monkeypatch.setattr("ray.util.placement_group", group)
    monkeypatch.setattr(keepers, "alive_nodes", lambda: {"c": "host/c"})
    where = dict[int, str | None]()
    monkeypatch.setattr(keepers._Spare, "node", property(lambda spare: where.get(id(spare))))
    chosen: Any = Places(place, 2, log.append)
    wanted = Need(3, 3, {"CPU": 1.0, "GPU": 1.0})
    chosen.begun(wanted)
    machine, elsewhere = [{"CPU": 2.0, "GPU": 2.0}], {"ray.io/node-id": "!in(a, b)"}
    assert (chosen._home, chosen._places) == ({"a", "b"}, 3)
    assert [(bundles, {key: "!in(a, b)" for key in given[0]}) for bundles, given in asked] == [(machine, elsewhere)]
    assert log == ["cluster.spares: no machine without ranks has room for 2 ranks now; one that comes is taken"]
    chosen.begun(wanted)
    assert len(asked) == 1, "the first is not there yet"
    where[id(chosen._spares[0])] = "c"
    for _ in range(2):
        chosen.begun(wanted)
    assert prepared == ["c"]
    assert log[1:] == ["cluster.spares: host/c waits with a keeper"]
    assert asked[1][1][0]["ray.io/node-id"].endswith(", c)")
    chosen.begun(wanted)
    assert len(asked) == 2, "the second is not there yet"
    where[id(chosen._spares[1])] = "f"
    chosen.begun(wanted)
    assert (len(asked), prepared.pop()) == (2, "f"), "there are as many as are wanted"
    del where[id(chosen._spares[1])]
    where[id(chosen._spares[0])] = "d"  # c was lost, and Ray has found another one
    chosen.begun(wanted)
    assert prepared == ["c", "d"]
    monkeypatch.setattr(keepers, "room", lambda *_: 3)
    chosen.others(wanted, 3, [])
    place.nodes = SimpleNamespace(remote=lambda: list("dde"))
    chosen.begun(wanted)
    assert chosen._home == {"d", "e"}, "the next start has its own machines"
    given_up = list[str | None]()
    monkeypatch.setattr(keepers._Spare, "give_up", lambda spare: given_up.append(where.get(id(spare))))
    chosen.close()
    assert given_up == [None, "d"]
