"""Sums of words add up over any parts of something, and show every wrong bit."""

import pytest
import torch

from trainer.state.kept import BLOCK, block_sums, placed_sum


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 4099])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_sums_of_parts_add_up_to_that_of_the_whole(size: int, parts: int) -> None:
    whole = torch.randint(0, 256, (size,), dtype=torch.uint8)
    share = -(-size // parts)
    sums = [placed_sum(whole[begin : begin + share], begin) for begin in range(0, size, share or 1)]
    assert sum(map(int, sums)) % 2**64 == int(placed_sum(whole)) % 2**64
    assert (
        sum(int(placed_sum(part.clone(), place * share)) for place, part in enumerate(whole.split(share or 1)))
        % (2**64)
        == int(placed_sum(whole)) % 2**64
    )


@pytest.mark.parametrize("begin", [0, 3, 8])
def test_every_wrong_bit_changes_the_sum(begin: int) -> None:
    part = torch.randint(0, 256, (21,), dtype=torch.uint8)
    before = placed_sum(part, begin)
    for place in range(21):
        for bit in range(8):
            part[place] ^= 1 << bit
            assert placed_sum(part, begin) != before
            part[place] ^= 1 << bit


@pytest.mark.parametrize("offset", [0, 4])
def test_blocks_tell_where_a_wrong_bit_is(offset: int) -> None:
    data = torch.randint(0, 256, (offset + 3 * BLOCK + 5,), dtype=torch.uint8)[offset:]
    before = block_sums(data)
    assert len(before) == 4
    for place, block in {0: 0, BLOCK: 1, 3 * BLOCK - 1: 2, 3 * BLOCK + 4: 3}.items():
        data[place] ^= 2
        assert (block_sums(data) != before).nonzero().flatten().tolist() == [block]
        data[place] ^= 2
