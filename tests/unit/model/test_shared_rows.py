"""Rows that ranks share: who may, what a plan says of them, and how a row is cut."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from launcher.view.status import RunStatus
from launcher.view.watch import render_status
from tests.families import FAMILIES, SIZES
from tests.unit.plan.test_plan import config, plan_of
from trainer.base.describe.meta import _Reader
from trainer.data.order.settings import Position
from trainer.errors import ConfigError
from trainer.evaluate.models import open_model
from trainer.model.attention import Attention
from trainer.model.micro_batch import ColumnValues, MicroBatch, ModelInput, Role, Seen, Segments
from trainer.model.packed import PackedModel
from trainer.model.rows.attention import _OfRank
from trainer.model.rows.heads import copies_of_keys, uneven_ranks
from trainer.model.rows.row import RankPeers, total
from trainer.store.store import open_store

LLAMA: dict[str, Any] = {**SIZES, **FAMILIES["llama"]}


def wrong(base: dict[str, Any], size: int, *settings: str) -> list[str]:
    """The sentences of a plan for as many ranks as share a row."""
    given = config(f"sharding.sequence_parallel={size}", "data.sequence_length=64", *settings)
    return plan_of(given, base, size, size, None).shortfalls


def test_what_ranks_cannot_share_is_refused_by_a_sentence() -> None:
    assert wrong(LLAMA, 2) == wrong(LLAMA, 4) == []
    (heads,) = wrong(LLAMA, 8)
    assert (
        heads
        == "sharding.sequence_parallel: 8 ranks cannot share the 4 heads of this base's attention evenly. Set a divisor"
        " of 4."
    )
    (tokens,) = wrong(LLAMA, 2, "data.sequence_length=63")
    assert "cannot share a row of 63 tokens evenly" in tokens
    assert wrong(LLAMA, 2, "data.sequence_length=63", "train.micro_batch=2") == [], "together they are even"
    (reserved,) = wrong(LLAMA, 2, "tuning.method=prompt", "tuning.virtual_tokens=5")
    assert reserved.endswith(
        "a row of 69 tokens evenly. Set data.sequence_length to a multiple of 2, less the 5 of tuning.virtual_tokens."
    )
    assert wrong(LLAMA, 2, "tuning.method=prefix", "tuning.virtual_tokens=5") == []
    assert wrong(LLAMA, 2, "objective.name=kto", "data.format=labelled") == []


def test_an_evaluation_has_each_row_on_one_rank_and_refuses_another_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an evaluation computes each row on one rank"):
        open_model(open_store(str(tmp_path)), None, ["sharding.sequence_parallel=2"], base_alone=False, log=print)


def test_heads_of_layers_that_pass_states_on_are_shared_as_those_of_attention() -> None:
    hybrid = {**SIZES, **FAMILIES["nemotron-h"], "num_attention_heads": 8}
    assert wrong(hybrid, 2) == wrong(hybrid, 4) == []
    (heads,) = wrong(hybrid, 8)
    assert "8 ranks cannot share the 4 heads or channels of a layer of this base that passes states on evenly" in heads
    # Attention: queries and results of 80 values, keys and values of 2 heads of 10, which four ranks need twice. Mamba:
    # 64 channels of the convolution, in and out; states and results of 40, a time step for each of 4 heads, B and C of
    # 6 for 2 groups, which four ranks need twice.
    for size, copies in ((2, 1), (4, 2)):
        values = 2 * 80 + copies * 2 * 20 + 2 * 64 + 2 * 40 + 4 + copies * 2 * 2 * 6
        given = config(f"sharding.sequence_parallel={size}", "data.sequence_length=64", "model.dtype=fp32")
        traffic = plan_of(given, hybrid, size, size, None).traffic_per_step.row_exchanges
        # Three passes, as layers are computed again; eight micro-batches.
        assert traffic == 3 * 8 * values * 64 // size * (size - 1) // size * 4


def test_a_layer_that_each_rank_computes_whole_keeps_all_of_the_row() -> None:
    def activations(kind: str, size: int) -> int:
        settings = (
            "data.sequence_length=64",
            "train.activation_checkpointing=none",
            f"sharding.sequence_parallel={size}",
        )
        return plan_of(config(*settings), {**SIZES, **FAMILIES[kind]}, size, size, None).memory_per_gpu.activations

    # Four heads of 10, whose results an attention layer has before and behind the exchange, for 32 tokens in 16 bits.
    assert activations("nemotron-h", 2) == activations("nemotron-h", 1) // 2 + 40 * 32 * 2
    assert activations("llama4", 2) > activations("llama4", 1) // 2 + 1


def test_a_base_whose_positions_follow_from_a_slice_is_refused() -> None:
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (dynamic,) = wrong({**LLAMA, "rope_parameters": rotary}, 2)
    assert "follow from the longest position of a slice (rope_type: dynamic)" in dynamic


@pytest.mark.parametrize(
    ("rotary", "fails"),
    [
        ({"rope_type": "dynamic"}, "its rotary frequencies follow from .* slice .rope_type: dynamic.$"),
        ({"rope_type": "longrope"}, "its rotary frequencies follow from .* slice .rope_type: longrope.$"),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}, "rope_type: longrope"),
        ({"rope_type": "yarn"}, "^tried$"),
        (None, "^tried$"),
    ],
)
def test_what_a_small_model_cannot_show_is_known_by_the_type_of_positions(rotary: Any, fails: str) -> None:
    reader: Any = SimpleNamespace(config=SimpleNamespace(rope_parameters=rotary))
    trial: Any = SimpleNamespace(fails_shared="tried")
    assert re.search(fails, _Reader._fails_shared(reader, trial) or "")
    assert _Reader._fails_shared(reader, None) == "no small model of its kind could be tried"


def test_the_ranks_are_a_multiple_on_each_node() -> None:
    assert uneven_ranks(4, 16, 8) is None
    assert uneven_ranks(4, 4, 6) is None
    assert "6 ranks are no multiple of 4" in (uneven_ranks(4, 6, 6) or "")
    assert "must be on one node" in (uneven_ranks(4, 8, 2) or "")
    with pytest.raises(ConfigError, match=r"cluster.workers: 6 is no multiple of sharding.sequence_parallel: 4"):
        config("sharding.sequence_parallel=4", "cluster.workers=6")
    with pytest.raises(ConfigError, match="lets the number of ranks change"):
        config("sharding.sequence_parallel=4", "cluster.workers=[4, 8]")


def test_a_plan_counts_groups_and_what_they_exchange() -> None:
    settings = (
        "data.sequence_length=64",
        "train.global_batch=8",
        "train.activation_checkpointing=none",
        "model.dtype=fp32",
    )
    one = plan_of(config(*settings), LLAMA, 4, 4, None)
    two = plan_of(config(*settings, "sharding.sequence_parallel=2"), LLAMA, 4, 4, None)
    assert (one.batch.accumulation, two.batch.accumulation) == (2, 4)
    assert (two.batch.data_groups, two.batch.sequence_parallel, two.batch.rows) == (2, 2, 8)
    # Half of all, and the results of two layers of attention once more, of 64 values for 32 tokens in fp32.
    assert two.memory_per_gpu.activations == one.memory_per_gpu.activations // 2 + 2 * 64 * 32 * 4
    # Two of all ranks, and one of those that share a row.
    assert 2 * two.memory_per_gpu.communicators == 3 * one.memory_per_gpu.communicators > 0
    assert one.traffic_per_step.row_exchanges == 0
    # Two layers; forward and backward; queries and results of 64 values, keys and values of 32; half of 32 tokens;
    # fp32; four micro-batches.
    assert two.traffic_per_step.row_exchanges == 2 * 2 * (2 * 64 + 2 * 32) * 16 * 4 * 4


@pytest.mark.parametrize(
    ("heads", "keys", "size", "copies"),
    [(8, 8, 4, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 3, 2, 2), (12, 3, 4, 4)],
)
def test_heads_of_keys_are_repeated_as_often_as_ranks_need_them(heads: int, keys: int, size: int, copies: int) -> None:
    assert copies_of_keys(heads, keys, size) == copies
    of_rank = _OfRank(cast(Any, None), heads, keys, cast(Any, SimpleNamespace(size=size, part=0)))
    assert of_rank.num_key_value_groups * (keys * copies // size) == heads // size


def test_status_says_how_many_ranks_share_rows() -> None:
    status = RunStatus(run="r", state="running", world_size=8, sequence_parallel=4, device="cuda:0")
    shown = io.StringIO()
    Console(file=shown, width=100).print(render_status(status))
    assert "8 = 2 x 4 that share rows on cuda:0" in shown.getvalue()


def test_slices_of_a_row_have_its_tokens_and_the_first_counts_them() -> None:
    labels = torch.tensor([[-100, 4, 5, -100, 7, -100, -100, -100]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]], dtype=torch.int32)
    segments = Segments((3, 3, 2), (Role.DOCUMENT, Role.DOCUMENT, Role.PADDING))
    given = ModelInput.of(torch.arange(8, dtype=torch.int32)[None], positions, segments)
    columns = {
        "of_target": ColumnValues("target", torch.arange(6).view(3, 2)),
        "of_token": ColumnValues("token", torch.arange(8)),
        "of_document": ColumnValues("document", torch.arange(2)),
    }
    row = MicroBatch(given, labels, 6, 3, (Position(),), (1, 2), columns)
    parts = [row.cut(part, 2) for part in range(2)]
    assert [part.column("of_target").tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert [part.column("of_token").tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [part.column("of_document").tolist() for part in parts] == [[0, 1], [0, 1]]
    assert torch.cat([part.input.input_ids for part in parts], dim=1).equal(row.input.input_ids)
    assert torch.cat([part.places + part.input.first for part in parts]).equal(row.places)
    assert [part.targets for part in parts] == [2, 1]
    assert [(part.tokens, part.documents, len(part.bins)) for part in parts] == [(6, (1, 2), 1), (0, (), 0)]
    assert [part.lengths for part in parts] == [row.lengths] * 2
    packed = PackedModel(cast(Any, None), Attention("eager", ""), peers=cast(Any, _Twice()), padding=9)
    assert [packed._padded(part.input).tolist() for part in parts] == [[[0, 1, 2, 3]], [[4, 5, 9, 9]]]
    one = torch.ones(1)
    assert packed.total(one, row.input).tolist() == [1], "nobody else has it"
    assert packed.total(one, parts[0].input).tolist() == [2]


def test_a_part_of_a_row_that_ranks_share_is_filled_up_so_that_each_has_as_many_tokens() -> None:
    """The second segment goes on from the first one's two tokens."""
    labels = torch.tensor([[4, 5, -100, 6, 7, -100, 8, 9]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 2, 3, 4, 0, 1]], dtype=torch.int32)
    roles = (Role.DOCUMENT, Role.ALTERNATIVE, Role.DOCUMENT)
    segments = Segments((3, 3, 2), roles, ((0, 0), (0, 2), (0, 0)))
    row = MicroBatch(ModelInput.of(torch.arange(8, dtype=torch.int32)[None], positions, segments), labels, 8, 6)
    whole = row.part(Role.ALTERNATIVE)
    assert whole.input.input_ids.tolist() == [[0, 1, 3, 4, 5]]
    assert (whole.tokens, whole.targets, whole.lengths) == (5, 4, (5,))
    parts = [row.cut(part, 2).to(torch.device("cpu")).part(Role.ALTERNATIVE) for part in range(2)]
    assert [part.input.input_ids.tolist() for part in parts] == [[[0, 1, 3]], [[4, 5, 0]]]
    assert [part.input.position_ids.tolist() for part in parts] == [[[0, 1, 2]], [[3, 4, 0]]]
    assert [part.labels.tolist() for part in parts] == [[[4, 5, 6]], [[7, -100, -100]]]
    assert [(part.targets, part.tokens) for part in parts] == [(3, 5), (1, 0)]
    assert {part.input.segments for part in parts} == {Segments((5, 1), (Role.DOCUMENT, Role.PADDING))}
    assert [part.input.first for part in parts] == [0, 3]
    seen = tuple(Seen(number, {}, f"document {number}") for number in range(3))
    shown = replace(row, input=replace(row.input, seen=seen)).part(Role.DOCUMENT).input.seen
    assert [(one.segment, one.key) for one in shown] == [(0, "document 0"), (1, "document 2")]
    assert row.cut(1, 2).part(Role.REJECTED).input.input_ids.tolist() == [[4, 5, 6, 7]], "a pass needs tokens"


def test_a_slice_of_a_row_with_pictures_has_the_ids_of_all_of_it() -> None:
    """Its front looks at whole documents. A row may have padding in several places."""
    roles = (Role.DOCUMENT, Role.PADDING, Role.DOCUMENT, Role.PADDING)
    segments, ids = Segments((2, 1, 2, 3), roles), torch.arange(8, dtype=torch.int32)[None]
    assert segments.padding == [(2, 3), (5, 8)]
    plain = ModelInput.of(ids, ids, segments)
    assert plain.cut(1, 2).every is None
    seen = replace(plain, seen=(Seen(2, {"pixels": torch.ones(1)}),)).cut(1, 2).to(torch.device("cpu"))
    assert seen.every is not None
    assert (seen.every.tolist(), seen.every.dtype) == (ids.tolist(), torch.int64)
    assert (seen.input_ids.tolist(), seen.first, seen.parts) == ([[4, 5, 6, 7]], 4, 2)
    assert [one.segment for one in seen.seen] == [2]
    there = seen.to(torch.device("meta"))
    assert there.every is not None
    every = (there.input_ids, there.position_ids, there.cu_seqlens, there.every, there.seen[0].inputs["pixels"])
    assert all(tensor.is_meta for tensor in every)


def test_a_sum_over_the_ranks_hands_each_the_gradient_of_its_own_part() -> None:
    mine = torch.tensor([3.0], requires_grad=True)
    found = total(mine, cast(Any, _Twice()))
    found.backward(torch.tensor([5.0]))
    assert found.item() == 6
    assert mine.grad is not None
    assert mine.grad.item() == 5


def test_a_rank_keeps_what_it_adds_to_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def add(every: torch.Tensor, group: Any) -> None:
        asked.append(group)
        every += 4

    monkeypatch.setattr(torch.distributed, "all_reduce", add)
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    peers, mine = RankPeers(group), torch.tensor([3.0])
    assert peers.total(mine).item() == 7
    assert mine.item() == 3
    assert (asked, peers.size, peers.part) == ([group], 2, 1)


class _Twice:
    """Peers that have the same value as this rank."""

    size, part = 2, 0

    def total(self, mine: torch.Tensor) -> torch.Tensor:
        return 2 * mine
