"""What the body of a model is handed for a packed row, and what is known of the row inside."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from trainer.model.attention import Attention
from trainer.model.documents import _chunks_of_row
from trainer.model.front import Front
from trainer.model.micro_batch import ModelInput, Role, Seen, Segments
from trainer.model.packed import PackedModel
from trainer.model.parts import decoder_layers
from trainer.model.rows.row import AtWork, by_documents, described, lengths_known, row_at_work
from trainer.model.towers import Lent

ALONE, SHARED = Segments((3, 1), (Role.DOCUMENT, Role.PADDING)), cast(Any, SimpleNamespace(size=2, part=0))
PREFIXED = Segments((2, 2), (Role.DOCUMENT, Role.ALTERNATIVE), ((0, 0), (0, 1)))
IDS, POSITIONS = torch.tensor([[4, 5, 6, 0]]), torch.tensor([[0, 1, 2, 0]])


class _Body(nn.Module):
    """Notes what it is given, and the row that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 2)
        self.given, self.row = dict[str, Any](), cast(Any, None)

    def forward(self, **given: Any) -> tuple[Tensor]:
        self.given, self.row = given, described(given["position_ids"], False)
        return (torch.arange(8.0).view(1, 4, 2),)


class _Front:
    """A front that hands on the tokens that it gets, with what joins them."""

    def row(self, tokens: Tensor, embed: Any, lengths: Any, seen: Any, lent: Any, body: Any) -> dict[str, Tensor]:
        return {"inputs_embeds": embed(tokens), "position_ids": torch.arange(tokens.shape[1])[None]}


def model(**settings: Any) -> tuple[PackedModel, _Body]:
    body = _Body()
    whole = SimpleNamespace(get_input_embeddings=lambda: body.embedding, get_decoder=lambda: body)
    return PackedModel(cast(Any, whole), Attention("eager", ""), **settings), body


def test_the_body_knows_the_documents_and_their_prefixes_and_the_ranks_that_share_them() -> None:
    packed, body = model(peers=SHARED, padding=9)
    row = ModelInput.of(IDS, POSITIONS, ALONE)
    packed.hidden(row)
    assert body.given["input_ids"].tolist() == [[4, 5, 6, 9]]
    assert row.input_ids.tolist() == [[4, 5, 6, 0]], "the row is another model's too, of another padding token"
    assert (body.row.lengths, list(body.row.prefixes), body.row.peers) == ([3, 1], [], None)
    packed.hidden(ModelInput.of(IDS, POSITIONS, PREFIXED))
    assert (body.row.lengths, list(body.row.prefixes)) == ([2, 2], [(0, 0), (0, 1)])
    packed.hidden(row.cut(0, 2))
    assert (body.given["input_ids"].tolist(), body.row.peers) == ([[4, 5]], SHARED)


def test_padding_before_a_slice_of_a_row_is_none_of_its_tokens() -> None:
    packed, body = model(padding=9)
    roles = (Role.DOCUMENT, Role.PADDING, Role.DOCUMENT)
    ids = torch.arange(8)[None]
    packed.hidden(ModelInput.of(ids, ids, Segments((1, 1, 6), roles)).cut(1, 2))
    assert body.given["input_ids"].tolist() == [[4, 5, 6, 7]]
    packed.hidden(ModelInput.of(ids, ids, Segments((2, 4, 2), roles)).cut(1, 2))
    assert body.given["input_ids"].tolist() == [[9, 9, 6, 7]]


def test_logits_are_those_of_the_text_without_the_reserved_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedModel, "head", property(lambda _: nn.Identity()))
    packed, body = model(reserved=2)
    assert packed.logits(IDS[:, :2]).tolist() == [[[4, 5], [6, 7]]]
    assert body.given["input_ids"].tolist() == [[0, 0, 4, 5]]


def test_what_learns_beside_the_language_model_is_in_the_graph_of_rows_without_pictures_too() -> None:
    """Each rank has to give its gradient in each step."""
    value = torch.ones(3, requires_grad=True)
    lent = Lent({"projector": value}, True)
    packed, body = model(lender=SimpleNamespace(lent=lambda: lent))
    packed.hidden(ModelInput.of(IDS, POSITIONS, ALONE))
    assert body.given["inputs_embeds"].equal(body.embedding(IDS))
    body.given["inputs_embeds"].sum().backward()
    assert value.grad is not None


@pytest.mark.parametrize("part", [0, 1])
def test_a_slice_of_a_row_with_pictures_is_cut_behind_the_front(part: int) -> None:
    packed, body = model(front=cast(Front, _Front()), padding=9)
    row = replace(ModelInput.of(IDS, POSITIONS, ALONE), seen=(Seen(0, {"pixels": torch.ones(1)}),))
    packed.hidden(row)
    whole = torch.tensor([[4, 5, 6, 9]])
    assert body.given["inputs_embeds"].equal(body.embedding(whole))
    packed.hidden(row.cut(part, 2))
    assert body.given["inputs_embeds"].equal(body.embedding(whole[:, 2 * part : 2 * part + 2]))
    assert body.given["position_ids"].tolist() == [[[0, 1], [2, 3]][part]]


def test_a_chunk_counts_from_the_beginning_of_a_document_also_behind_a_prefix() -> None:
    """The last token is the fourth of its document, whose first two are those of the row."""
    with lengths_known((3, 2), None, ((0, 0), (0, 2))), AtWork(described(torch.tensor([[0, 1, 2, 2, 3]]), False)):
        in_one_chunk = _chunks_of_row(3, cast(Any, None))
    behind_the_prefix = torch.tensor(3)
    assert [bool(in_one_chunk(0, 0, behind_the_prefix, torch.tensor(key))) for key in (0, 1)] == [False, False]
    assert bool(in_one_chunk(0, 0, torch.tensor(4), torch.tensor(4)))


def test_a_layer_hands_on_its_states_alone_in_rows_of_any_number_of_documents() -> None:
    def layer(states: Tensor) -> tuple[Tensor, Tensor]:
        return states, torch.ones(1)

    states = torch.randn(1, 4, 2)
    for lengths in ((4,), (1, 3)):
        with lengths_known(lengths):
            found, other = by_documents(described(POSITIONS, False), layer, (states,), {})
        assert found.equal(states)
        assert other is None


def test_a_row_on_one_rank_has_the_lengths_that_were_known_and_waits_for_no_device() -> None:
    with lengths_known((2, 6), SHARED):
        row = described(torch.arange(4, device="meta")[None], False)
    assert row.undivided.lengths == [2, 6]
    assert row.undivided.positions.shape == (1, 8)


def test_a_row_that_is_computed_again_inside_of_itself_leaves_each_row_as_it_was() -> None:
    first, second = (described(POSITIONS, False) for _ in range(2))
    again = AtWork(second)
    with AtWork(first):
        with again:
            with again:
                assert row_at_work() is second
            assert row_at_work() is second
        assert row_at_work() is first
    assert row_at_work() is None


def test_the_decoder_layers_are_the_list_that_has_as_many_as_the_configuration_says() -> None:
    body = _Body()
    body.branches, body.layers = (nn.ModuleList(nn.Identity() for _ in range(count)) for count in (2, 4))
    for count, found in ((4, body.layers), (2, body.branches), (7, body.branches)):
        config = SimpleNamespace(num_hidden_layers=count)
        model: Any = SimpleNamespace(
            config=config, get_decoder=lambda: body, get_input_embeddings=lambda: body.embedding
        )
        assert decoder_layers(model) is found
