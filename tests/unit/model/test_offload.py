"""Memory of the host in which inputs of layers wait for their backward pass."""

import pytest
import torch

from trainer.model.activations import _Arena


def test_a_place_is_used_again_by_rows_that_fit_in_it_and_never_by_a_longer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, made = torch.empty, list[tuple[int, ...]]()

    def empty(*shape: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(shape)
        return plain(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    arena = _Arena(3)
    first, second = arena.place_of(1000), arena.place_of(1024)
    assert first.nbytes == second.nbytes == 1024
    arena.give_back(first)
    assert arena.place_of(10).data_ptr() == first.data_ptr()
    longer = arena.place_of(4000)
    assert longer.nbytes == 4032
    arena.give_back(second)
    arena.give_back(longer)
    places = [arena.place_of(size) for size in (4000, 10, 4032, 4000)]
    assert [place.nbytes for place in places] == [4032] * 4
    assert len({place.data_ptr() for place in places}) == 4
    assert sum(count for count, size in made if size == 4032) == 4, "three at first, and one more when it was asked for"
