"""A sharded load gives bitsandbytes' bytes and transformers' logits, whatever the ranks, and no rank holds the
whole.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.smoke.local_s3 import S3Server
from tests.dist import loading
from tests.dist.launch import launch
from tests.material import KINDS, Workshop, make_base, quantize_base
from tests.store.proxy import Tokens, faulty_proxy
from trainer.config import dump_config
from trainer.export.write.as_quantized import write_as_quantized
from trainer.store.store import open_store

# The bytes of a tensor that one rank tells all others, and those that a rank reads at once, alone or for its neighbours.
WAYS = {"told": (2**20, 2**22), "for-neighbours": (0, 2**13), "alone": (0, 2**10)}
_LONG = pytest.mark.long
# World size, ranks of one "node" if each node holds a copy of the base, and the way of reading.
LOADS: list[tuple[str, tuple[tuple[int, int | None], str], Any]] = [
    ("3-ranks", ((3, None), "told"), ()),
    ("3-ranks-for-neighbours", ((3, None), "for-neighbours"), _LONG),
    ("3-ranks-alone", ((3, None), "alone"), _LONG),
    ("2-nodes-of-2", ((4, 2), "told"), _LONG),
    ("2-nodes-of-2-for-neighbours", ((4, 2), "for-neighbours"), ()),
    ("2-nodes-of-2-alone", ((4, 2), "alone"), _LONG),
    *((f"{ranks}-ranks", ((ranks, None), "told"), _LONG) for ranks in (1, 2, 4)),
]
# Every pair of values occurs.
QUANTS = [
    [f"quant.type={kind}", f"quant.block_size={block}", f"quant.double={double}"]
    for kind, block, double in [
        ("nf4", 64, "false"),
        ("nf4", 128, "true"),
        ("fp4", 64, "true"),
        ("fp4", 128, "false"),
        ("int8", 64, "false"),
    ]
]
STORED: dict[str, tuple[str, bool]] = {
    "nf4": ("nf4", False),
    "fp4-double": ("fp4", True),
    "int8": ("int8", False),
    "none": ("none", False),
}
# One base of each architecture: the other kinds are a Llama of special sizes.
ONE_OF_EACH = tuple(kind for kind in KINDS if kind not in ("llama-tied", "ragged", "speck"))


@dataclass(frozen=True)
class Case:
    """One load: by how many ranks, of how many to a node, stored how, of which bases."""

    world_size: int
    per_node: int | None
    stored: str
    kinds: tuple[str, ...] = tuple(KINDS)

    @property
    def scope(self) -> list[str]:
        return ["sharding.scope=node"] if self.per_node else []


CASES = {
    "1-rank-nf4": Case(1, None, "nf4"),
    "2-ranks-nf4": Case(2, None, "nf4"),
    "3-ranks-fp4-double": Case(3, None, "fp4-double"),
    "2-ranks-none": Case(2, None, "none"),
    "3-ranks-int8": Case(3, None, "int8", ("llama", "mixtral", "ragged")),
    "4-ranks-nf4": Case(4, None, "nf4", ONE_OF_EACH),
    "1-node-of-1-nf4": Case(1, 1, "nf4", ONE_OF_EACH),
    "2-nodes-of-1-nf4": Case(2, 1, "nf4", ONE_OF_EACH),
    "3-nodes-of-1-nf4": Case(3, 1, "nf4", ONE_OF_EACH),
    "2-nodes-of-2-nf4": Case(4, 2, "nf4", ONE_OF_EACH),
}


QUICK = ("2-ranks-nf4",)


def cases_of(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, with the long cases marked so."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in names]


@dataclass
class Loaded:
    """The results of a load: for each kind of base, rank 0's logits and every rank's facts."""

    logits: dict[str, torch.Tensor]
    facts: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_base(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def load(
    workshop: Workshop, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Loaded]:
    """The result of a case; every case is loaded once."""
    done: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in done:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            kind, double = STORED[case.stored]
            overrides = [f"quant.type={kind}", f"quant.double={str(double).lower()}"]
            config = dump_config(workshop.config("load", *case.scope))
            names = [str(bases[kind]) for kind in case.kinds]
            results = launch(
                case.world_size,
                loading.loaded_logits,
                config,
                names,
                overrides,
                str(folder),
                ranks_per_node=case.per_node,
            )
            done[name] = Loaded(
                {kind: load_file(folder / f"{kind}.safetensors")["logits"] for kind in case.kinds},
                {kind: [rank[index] for rank in results] for index, kind in enumerate(case.kinds)},
            )
        return done[name]

    return get


@pytest.fixture(scope="module")
def stock(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """By stored form: what transformers + bitsandbytes give as one process."""

    @cache
    def get(stored: str) -> Loaded:
        folder, (quant_type, double) = tmp_path_factory.mktemp(f"stock-{stored}"), STORED[stored]
        (facts,) = launch(
            1, loading.stock_logits, [str(bases[kind]) for kind in KINDS], quant_type, double, str(folder)
        )
        return Loaded(
            {kind: load_file(folder / f"{kind}.safetensors")["logits"] for kind in KINDS},
            {kind: [fact] for kind, fact in zip(KINDS, facts, strict=True)},
        )

    return get


@pytest.mark.parametrize(("world", "way"), [pytest.param(*case, id=name, marks=marks) for name, case, marks in LOADS])
def test_packed_bytes_and_scales_are_those_of_quantizing_the_whole_tensor(
    workshop: Workshop, bases: dict[str, Path], world: tuple[int, int | None], way: str, tmp_path: Path
) -> None:
    world_size, per_node = world
    scope = ["sharding.scope=node"] if per_node else []
    config = dump_config(workshop.config("load", "model.layers=1", *scope))
    given = [bases["llama"], bases["ragged"], bases["speck"]]
    # Other types are turned into model.dtype first, as transformers does.
    given += [make_base(tmp_path / str(dtype), "ragged", dtype) for dtype in (torch.float16, torch.float32)]
    quants = QUANTS[:2] if per_node else QUANTS
    results = launch(
        world_size,
        loading.quantized_bytes,
        config,
        [str(base) for base in given],
        quants,
        *WAYS[way],
        ranks_per_node=per_node,
    )
    for result in results:
        assert result["differing"] == []
        assert result["compared"] == len(quants) * len(given) * 7  # linears of a layer
        assert result["scales"] <= 3  # of seven matrices: of those that are filled in one round


@pytest.mark.parametrize("name", cases_of(CASES))
def test_logits_are_those_of_transformers_and_bitsandbytes(
    load: Callable[[str], Loaded], stock: Callable[[str], Loaded], name: str
) -> None:
    loaded, expected = load(name), stock(CASES[name].stored)
    for kind, logits in loaded.logits.items():
        difference = float((logits - expected.logits[kind]).abs().max())
        assert torch.equal(logits, expected.logits[kind]), f"{kind}: largest difference {difference}"
        assert len({fact["digest"] for fact in loaded.facts[kind]}) == 1, f"{kind}: ranks disagree"


@pytest.mark.long
@pytest.mark.parametrize("case", ["2-ranks-nf4", "3-ranks-fp4-double", "3-ranks-int8"])
def test_a_base_that_is_written_as_it_is_quantized_has_the_same_logits_to_the_bit(
    load: Callable[[str], Loaded], workshop: Workshop, bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """`capstan dequantize`: what it writes is what the ranks make of their packed weights, in every family."""
    kind, double = STORED[CASES[case].stored]
    given = f"quant={{type: {kind}, double: {str(double).lower()}}}"
    for name in CASES[case].kinds:
        config = workshop.config("written", f"model.base={bases[name]}", given)
        write_as_quantized(config, open_store(str(tmp_path / name)), lambda done, total: None)
    places, plain = [str(tmp_path / name) for name in CASES[case].kinds], dump_config(workshop.config("load"))
    launch(1, loading.loaded_logits, plain, places, ["quant.type=none"], str(tmp_path))
    for name, logits in load(case).logits.items():
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["logits"], logits), name


@pytest.mark.parametrize("name", cases_of(CASES))
def test_the_engine_leaves_packed_bytes_alone(load: Callable[[str], Loaded], name: str) -> None:
    for kind, facts in load(name).facts.items():
        for fact in facts:
            assert bool(fact["packed"]) == (CASES[name].stored != "none"), kind


@pytest.mark.parametrize("name", cases_of(CASES))
def test_rotary_frequencies_stay_transformers_own_in_fp32(
    load: Callable[[str], Loaded], stock: Callable[[str], Loaded], name: str
) -> None:
    for kind, facts in load(name).facts.items():
        (expected,) = stock(CASES[name].stored).facts[kind]
        for fact in facts:
            rotary = {buffer: value for buffer, value in fact["buffers"].items() if "rotary" in buffer}
            assert rotary == expected["buffers"], kind
            assert {dtype for dtype, _ in rotary.values()} == {"torch.float32"}, kind


@pytest.mark.parametrize("name", cases_of(["2-ranks-nf4", "3-ranks-fp4-double", "2-ranks-none"]))
def test_all_ranks_together_read_the_files_once_and_keep_equal_shares(
    load: Callable[[str], Loaded], bases: dict[str, Path], name: str
) -> None:
    facts = load(name).facts["llama"]
    files = sum(path.stat().st_size for path in bases["llama"].glob("*.safetensors"))
    assert 0.9 * files < sum(fact["read_bytes"] for fact in facts) <= 1.1 * files
    kept = [fact["kept_bytes"] for fact in facts]
    assert max(kept) < 1.05 * sum(kept) / len(kept)


@pytest.mark.parametrize(
    ("world_size", "quant_type", "double"), [(3, "nf4", True), pytest.param(2, "fp4", False, marks=pytest.mark.long)]
)
def test_a_base_that_came_quantized_gives_the_logits_of_transformers_own_load(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, world_size: int, quant_type: str, double: bool
) -> None:
    kinds = ("llama", "qwen2", "gemma3", "ragged")
    stored = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    names = [str(quantize_base(bases[kind], tmp_path / kind, **stored)) for kind in kinds]
    for side in ("ours", "stock"):
        (tmp_path / side).mkdir()
    config = dump_config(workshop.config("load", f"quant.type={quant_type}", f"quant.double={str(double).lower()}"))
    results = launch(world_size, loading.loaded_logits, config, names, [], str(tmp_path / "ours"))
    launch(1, loading.stock_logits, names, "none", False, str(tmp_path / "stock"))
    for index, kind in enumerate(kinds):
        ours, expected = (load_file(tmp_path / side / f"{kind}.safetensors")["logits"] for side in ("ours", "stock"))
        assert torch.equal(ours, expected), f"{kind}: largest difference {float((ours - expected).abs().max())}"
        files = sum(path.stat().st_size for path in (tmp_path / kind).glob("*.safetensors"))
        assert sum(rank[index]["read_bytes"] for rank in results) <= files


@pytest.mark.long
def test_each_node_keeps_a_whole_base_and_all_read_it_once(load: Callable[[str], Loaded]) -> None:
    world, node = (load(name).facts["llama"] for name in ("2-ranks-nf4", "2-nodes-of-2-nf4"))
    assert [fact["kept_bytes"] for fact in node] == [fact["kept_bytes"] for fact in world] * 2
    assert sum(fact["read_bytes"] for fact in node) == sum(fact["read_bytes"] for fact in world)


@pytest.mark.parametrize(
    ("per_node", "way", "quant"),
    [
        (2, "for-neighbours", "nf4"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                (2, "alone", "none"),
                (1, "for-neighbours", "none"),
                (4, "for-neighbours", "none"),
                (4, "alone", "fp4"),
            ]
        ),
    ],
)
def test_large_tensors_are_read_once_by_all_ranks_in_both_scopes(
    workshop: Workshop, bases: dict[str, Path], tmp_path: Path, per_node: int, way: str, quant: str
) -> None:
    """One rank by itself gives the same logits."""
    kinds, overrides = ("llama", "mixtral"), [f"quant.type={quant}"]
    names = [str(bases[kind]) for kind in kinds]
    scope = [] if per_node == 4 else ["sharding.scope=node"]
    config, facts, logits = dump_config(workshop.config("load", *scope)), list[Any](), list[Any]()
    for ranks in (1, 4):
        given = WAYS[way] if ranks > 1 else WAYS["told"]
        size = per_node if ranks > 1 else None
        every = launch(
            *(ranks, loading.logits_read_by, *given, config, names, overrides, str(tmp_path)), ranks_per_node=size
        )
        facts.append([sum(rank[index]["read_bytes"] for rank in every) for index in range(len(kinds))])
        logits.append([load_file(tmp_path / f"{kind}.safetensors")["logits"] for kind in kinds])
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))
    # Blocks of 64 weights at the borders are read by both sides, and the matrices here are of some thousand weights.
    assert all(alone <= together <= 1.2 * alone for alone, together in zip(*facts, strict=True)), facts


def test_a_rank_that_cannot_read_stops_all_with_its_own_sentence(workshop: Workshop) -> None:
    config = dump_config(workshop.config("load", "quant.double=true"))
    results = launch(3, loading.load_that_fails_on, 1, config, 11)
    for result in results:
        assert result["outcome"] == "StorageError"
        assert result["exit_code"] == 6
        assert result["message"].startswith("cannot read model-")


def test_a_base_in_a_bucket_is_read_by_ranges_and_gives_the_same_logits(
    workshop: Workshop,
    load: Callable[[str], Loaded],
    bases: dict[str, Path],
    s3: S3Server,
    tmp_path: Path,
) -> None:
    environment = {**s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    uri = f"{s3.uri('test-bases')}/llama"
    bucket = open_store(uri)
    for path in bases["llama"].iterdir():
        bucket.put(path.name, path.read_bytes())
    config = dump_config(workshop.config("load"))
    results = launch(2, loading.loaded_logits, config, [uri], [], str(tmp_path), extra_environment=environment)
    facts = [rank[0] for rank in results]
    expected = load("2-ranks-nf4")
    assert torch.equal(load_file(tmp_path / "llama.safetensors")["logits"], expected.logits["llama"])
    assert [fact["read_bytes"] for fact in facts] == [fact["read_bytes"] for fact in expected.facts["llama"]]
    local = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "config.json" in local
    assert not any(name.endswith(".safetensors") for name in local)
    # What the ranks have read is on this machine's disk for a second start, if the settings say so.
    given = (config, [uri], [f"model.local_copy={tmp_path / 'copy'}"], str(tmp_path))
    for read in (sum(fact["read_bytes"] for fact in facts), 0):
        results = launch(2, loading.loaded_logits, *given, extra_environment=environment)
        assert sum(rank[0]["read_bytes"] for rank in results) == read
        assert torch.equal(load_file(tmp_path / "llama.safetensors")["logits"], expected.logits["llama"])


@pytest.mark.long
def test_a_bucket_that_refuses_what_is_too_much_is_asked_more_slowly(
    workshop: Workshop, bases: dict[str, Path], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load takes little more than its bytes and its requests need, and no rank fails."""
    uri, a_second = f"{s3.uri('slow-bases')}/llama", 40
    bucket = open_store(uri)
    for path in bases["llama"].iterdir():
        bucket.put(path.name, path.read_bytes())
    config = dump_config(workshop.config("load"))

    def seconds_with(tokens: Tokens) -> float:
        with faulty_proxy(s3.endpoint, [], tokens) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
            given = (*WAYS["alone"], config, [uri], [], str(tmp_path))
            facts = launch(3, loading.logits_read_by, *given, extra_environment=environment)
        return max(rank[0]["seconds"] for rank in facts)

    freely, shares = seconds_with(Tokens(1e6, 1e6)), list[float]()
    while (
        len(shares) < 3 and min(shares, default=2) > 1.2
    ):  # other work on the machine makes a load slower, never faster
        tokens = Tokens(a_second, 10)
        slowly = seconds_with(tokens)
        assert tokens.given > 200
        assert tokens.refused > 0
        shares.append(slowly / (freely + tokens.given / a_second))
    assert min(shares) <= 1.2, shares


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_partitions_lie_over_the_memory_that_a_source_gives(workshop: Workshop, quant: str) -> None:
    """The engine, which is made afterwards, leaves them there."""
    config = workshop.config(f"over-{quant}", f"quant.type={quant}", "model.dtype=fp32")
    for found in launch(2, loading.laid_over_a_buffer, dump_config(config)):
        assert found["compared"] > 10
        assert (found["differing"], found["elsewhere"]) == ([], [])
