"""How far an exported model may be from the trained one, and how that is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.errors import ConfigError
from trainer.export.proof import plain, verify
from trainer.export.proof.rows import Distance, ProbeRow
from trainer.store.store import Store


@pytest.mark.parametrize(("computed_in", "size"), [("bf16", 1 / 256), ("fp32", 1 / 262144)])
def test_rounding_explains_three_times_what_the_last_bits_of_every_product_move(
    monkeypatch: pytest.MonkeyPatch, computed_in: str, size: float
) -> None:
    """A divergence grows with the square of a difference."""
    shaken, model = list[float](), nn.Linear(2, 2)
    real = plain.shaken
    monkeypatch.setattr(plain, "shaken", lambda of, by: (shaken.append(by), real(of, by))[1])
    monkeypatch.setattr(verify, "distance", lambda *_: Distance(2.0, 3.0))
    found, allowed = verify._predictions(model, [], computed_in, lambda of, rows: [torch.zeros(1)])
    assert [logits.tolist() for logits in found] == [[0.0]]
    assert allowed == Distance(18.0, 9.0)
    assert shaken == [size]


def test_fewer_bits_may_undo_half_of_what_the_training_changed() -> None:
    assert verify.half(Distance(2.0, 3.0)) == Distance(1.0, 1.5)


def test_products_are_moved_up_and_down_by_no_more_than_asked_and_always_alike() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    linear, router, turned = nn.Linear(4, 1000), Router(4, 4), Conv1D(1000, 4)
    nn.init.ones_(turned.weight)
    x = torch.ones(1, 4)
    with torch.no_grad():
        before, moved = linear(x), list[Tensor]()
        for _ in range(2):
            with plain.shaken(nn.ModuleList([linear, router, turned]), 0.25):
                moved.append(linear(x))
                assert torch.equal(router(x)[0], router(x)[0])
        assert torch.equal(linear(x), before)
        with plain.shaken(turned, 0.25):
            assert 0.2 < float((turned(x) / 4 - 1).abs().max()) <= 0.2501, "a matrix that is kept as its transpose"
    change = (moved[0] / before - 1).flatten()
    assert 0.2 < float(change.max()) <= 0.2501
    assert -0.2501 <= float(change.min()) < -0.2
    assert torch.equal(*moved)


class _Predicts(nn.Module):
    """Predicts at each place the number of the place, after so many virtual tokens."""

    device = torch.device("cpu")

    def __init__(self, virtual: int) -> None:
        super().__init__()
        self.virtual = virtual

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        places = torch.arange(-self.virtual, input_ids.shape[1]).float()
        return SimpleNamespace(logits=places[None, :, None].expand(1, -1, 3))


@pytest.mark.parametrize("virtual", [0, 4])
def test_places_are_those_of_the_row_whatever_stands_before_it(virtual: int) -> None:
    row = ProbeRow(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([1, 4]), torch.tensor([0, 0]))
    (found,) = plain.place_logits(_Predicts(virtual), [row])
    assert found[:, 0].tolist() == [1.0, 4.0]


def test_an_adapter_trained_through_codes_proves_nothing_beside_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = SimpleNamespace(method=SimpleNamespace(exports_model=False, through=True))
    monkeypatch.setattr(verify.Trained, "at", lambda folder, step: trained)
    nowhere = Store("memory://x", None)
    with pytest.raises(ConfigError, match="Verify --format merged as=stored"):
        verify.prove_adapter(nowhere, 4, nowhere)


def test_what_the_part_that_sees_has_learnt_is_taken_away_and_nothing_else() -> None:
    names = ("tower.q.lora_A.default.weight", "tower.q.lora_B.default.weight", "model.q.lora_B.default.weight")
    weights = {name: nn.Parameter(torch.ones(2)) for name in names}
    model: Any = SimpleNamespace(named_parameters=lambda: weights.items())

    def trained(seen: Any) -> Any:
        return SimpleNamespace(base=SimpleNamespace(architecture=None), method=SimpleNamespace(sees=lambda _: seen))

    assert not verify._blinded(model, trained(None))
    assert verify._blinded(model, trained({"adapters": ["tower.q"]}))
    assert [float(weight.sum()) for weight in weights.values()] == [2.0, 0.0, 2.0]
