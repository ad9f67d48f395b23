"""Which ranks read the base, and which go on with what the ranks before them have left in memory."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trainer.base.find.check import LeftOutPart
from trainer.base.load import load
from trainer.base.load.load import Placement
from trainer.config import Model, Quant
from trainer.errors import Damaged
from trainer.store.store import open_store

LEFT = {"layers.0": [0.5]}


class Kept:
    """The memory of a machine, in which ranks before this one have left `means` or nothing."""

    room = "the machine's memory"

    def __init__(self, means: dict[str, list[float]] | None) -> None:
        self._means, self.told = means, list[Any]()

    def found(self, key: str) -> dict[str, list[float]] | None:
        self.key = key
        return self._means

    def forget(self) -> None:
        self.told.append("forgotten")

    def keep(self, key: str, means: Any) -> None:
        assert key == self.key
        assert means == LEFT
        self.told.append("kept")


class Ranks:
    """This rank, the first, and another one, each of which has its share in memory or lacks it."""

    rank, world_size, device = 0, 2, torch.device("cpu")
    agreeing = staticmethod(nullcontext)

    def __init__(self, own: bool, other: bool) -> None:
        self._has = [own, other]

    def gather(self, has: bool) -> list[list[float]]:
        assert has == self._has[0]
        return [[float(one)] for one in self._has]

    def broadcast(self, value: Any) -> Any:
        return value


def started(own: bool, other: bool, cache: str = "", scope: str = "world", **quant: Any) -> tuple[list[Any], Kept]:
    """Return what each attempt to fill the shares took them from, and what became of the memory."""
    kept, tried = Kept(LEFT if own else None), list[Any]()
    config: Any = SimpleNamespace(model=Model(base="b"), quant=Quant(cache=bool(cache), **quant))
    base: Any = SimpleNamespace(versions=[["a.safetensors", 7, "v"]])
    anything: Any = None

    class Load(load._Load):
        def _filled(self, source: Any, *, apart: bool = False) -> Any:
            tried.append((type(source).__name__, apart, source.room))
            if cache == "damaged" and type(source).__name__ == "Cached":
                raise Damaged("it is gone.")
            return SimpleNamespace(placement=SimpleNamespace(means=lambda: LEFT))

        def from_store(self, room: Any) -> Any:
            tried.append(("together", False, room))
            return SimpleNamespace(placement=SimpleNamespace(means=lambda: LEFT))

        def _cache_folder(self) -> Any:
            return SimpleNamespace(exists=lambda _key: cache != "missing")

        def _cache_in(self, folder: Any) -> Any:
            return anything

    ranks: Any = Ranks(own, other)
    Load(base, config, {}, ranks, anything, anything, scope, lambda _: None, anything).from_memory(kept)  # type: ignore[arg-type]
    assert {room for _, _, room in tried} == {Kept.room}
    return [(name, apart) for name, apart, _ in tried], kept


@pytest.mark.parametrize(
    ("own", "other", "settings", "expected", "told"),
    [
        (True, True, {}, [("InMemory", False)], []),
        (False, False, {}, [("together", False)], ["forgotten", "kept"]),
        (True, False, {}, [("InMemory", True)], []),
        (False, True, {}, [("Files", True)], ["kept"]),
        # Each node has a whole base, which the ranks of all nodes read together.
        (True, False, {"scope": "node"}, [("together", False)], ["forgotten", "kept"]),
        # Scales of scales are computed from those of all ranks.
        (False, True, {"double": True}, [("together", False)], ["forgotten", "kept"]),
        (False, True, {"double": True, "cache": "whole"}, [("Cached", True)], ["kept"]),
        (False, True, {"cache": "missing"}, [("together", False)], ["forgotten", "kept"]),
        (False, True, {"cache": "damaged"}, [("Cached", True), ("together", False)], ["forgotten", "kept"]),
    ],
)
def test_a_rank_that_has_lost_its_share_reads_alone_where_it_can_and_else_all_read_again(
    own: bool, other: bool, settings: dict[str, Any], expected: list[Any], told: list[str]
) -> None:
    found, kept = started(own, other, **{"double": False, **settings})
    assert found == expected
    assert kept.told == told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_cache_is_gone_before_the_base_is_quantized_again(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = open_store(str(tmp_path)), list[Any]()
    folder.put(load.MANIFEST, b"damaged")
    config: Any = SimpleNamespace(model=Model(base="b"), quant=Quant(cache=True))
    ranks, anything = Ranks(True, True), cast(Any, None)
    ranks.rank = rank
    monkeypatch.setattr(ranks, "broadcast", lambda _value: True)  # as the first rank has found it

    class Load(load._Load):
        def _filled(self, source: Any, *, apart: bool = False) -> Any:
            told.append((type(source).__name__, folder.exists(load.MANIFEST)))
            if isinstance(source, load.Cached):
                raise Damaged("It is damaged.")
            return SimpleNamespace(placement=Placement(), partitioner="its partitioner")

        def _cache_folder(self) -> Any:
            return folder

        def _cache_in(self, folder: Any) -> Any:
            return anything

    monkeypatch.setattr(load, "write_cache", lambda *given: told.append((given[0], given[3])))
    loading = Load(anything, config, {}, ranks, anything, anything, "world", told.append, anything)  # type: ignore[arg-type]
    loading.from_store(anything)
    said = ["quant.cache: It is damaged. The base is quantized from its source again."] * (rank == 0)
    assert told == [("Cached", True), *said, ("Files", rank != 0), (folder, "its partitioner")]


def test_what_was_left_by_ranks_of_another_base_or_division_is_not_taken() -> None:
    def key(scope: str = "world", versions: str = "v", world_size: int = 2, model: Any = None, **quant: Any) -> str:
        kept, ranks = Kept(LEFT), Ranks(True, True)
        ranks.world_size = world_size
        config: Any = SimpleNamespace(model=Model(base="b", **(model or {})), quant=Quant(**quant))
        base: Any = SimpleNamespace(versions=[["a.safetensors", 7, versions]])
        anything: Any = None

        class Load(load._Load):
            def _filled(self, source: Any, *, apart: bool = False) -> Any:
                return None

        Load(base, config, {}, ranks, anything, anything, scope, print, anything).from_memory(kept)  # type: ignore[arg-type]
        return kept.key

    others = [{"scope": "node"}, {"versions": "w"}, {"world_size": 4}, {"model": {"layers": 3}}, {"type": "fp4"}]
    assert len({key(), *(key(**other) for other in others)}) == 1 + len(others)
    assert key() == key()


@pytest.mark.parametrize(("kind", "rank"), [("chat", 0), ("chat", 1), ("pictures", 0)])
def test_the_first_rank_says_what_is_left_out_of_the_base_where_rows_do_not_need_it(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = list[str](), list[str]()
    anything: Any = None
    monkeypatch.setattr(load, "empty_model", lambda *_: None)
    left_out = [LeftOutPart("vision_tower", 3, 40)]
    monkeypatch.setattr(load, "find_weights", lambda *_: SimpleNamespace(left_out=left_out, sources={}))
    monkeypatch.setattr(load, "Partitioner", lambda *_, **__: None)
    monkeypatch.setattr(load, "place_partitions", lambda *_: None)
    ranks: Any = SimpleNamespace(rank=rank, agreeing=nullcontext)
    model = SimpleNamespace(dtype="bf16", layers=None)
    config: Any = SimpleNamespace(model=model, quant=anything, data=SimpleNamespace(kind=kind))
    stored = SimpleNamespace(check=lambda *_: told.append("checked"))
    base: Any = SimpleNamespace(stored=stored, architecture=SimpleNamespace(quantizable=dict))
    kernels: Any = SimpleNamespace(name="none", why="set by model.kernels")
    kept: Any = SimpleNamespace(begin=lambda: told.append("begun"))
    source: Any = SimpleNamespace(room=None, fill=lambda *_: 5)
    filled = load._Load(base, config, {}, ranks, anything, kernels, "world", said.append, kept)._filled(source)
    assert filled.read_bytes == 5
    assert told == ["checked", "begun"]
    kernel = "kernels: none (set by model.kernels)"
    parts = "left out of the base, as its language model has no place for them: vision_tower (3 tensors, 40 weights)"
    assert said == ([] if rank else [kernel] if kind == "pictures" else [kernel, parts])
