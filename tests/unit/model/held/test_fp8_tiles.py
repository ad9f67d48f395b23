"""A merged model in FP8 has a scale for each tile, with which other programs multiply."""

import torch

from trainer.model.held import WeightError, encoders


def test_each_tile_is_divided_by_its_largest_weight_over_448() -> None:
    torch.manual_seed(1)
    shape, weights = (256, 384), 0.02 * torch.randn(256, 384)
    weights[128:, :128] = 0
    weights[:128, 128:256] *= 1e4
    weights[128:, 256:] = 8.8e-43  # a 448th of it is no number of fp32, and the nearest one is a third smaller
    encoder, error = encoders()["fp8"].encoder(torch.bfloat16), WeightError()
    assert encoder.at_once(shape) == 128 * 384, "tiles side by side"
    pieces = weights.flatten().split(encoder.at_once(shape))
    written = b"".join(encoder.encode(iter(pieces), shape, error))
    codes, scales = encoder.entries("a.weight", shape)
    assert (codes.name, codes.dtype, codes.shape) == ("a.weight", "F8_E4M3", shape)
    assert (scales.name, scales.dtype, scales.shape) == ("a.weight_scale_inv", "F32", (2, 3))
    stored = torch.frombuffer(bytearray(written[: codes.size]), dtype=torch.float8_e4m3fn).view(shape).float()
    by = torch.frombuffer(bytearray(written[codes.size :]), dtype=torch.float32).view(2, 3)
    tiles = {(i, j): weights[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] for i in range(2) for j in range(3)}
    assert bool(stored.isfinite().all())
    for place, tile in tiles.items():
        assert by[place] == (tile.abs().max() / 448 if tile.any() else 1)
    spread = by.repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = stored * spread
    near = (found - weights).abs() <= weights.abs() * 2.0**-4 + spread * 2.0**-10  # half a step of e4m3
    assert bool(near[:128].all())
    assert bool(near[128:, :256].all())
    assert not found[128:, :128].any()
    torch.testing.assert_close(error.relative, float((found - weights).norm() / weights.norm()), rtol=1e-4, atol=0)


def test_a_matrix_of_no_whole_tiles_stays_as_it_is_and_is_named() -> None:
    encoder = encoders()["fp8"].encoder(torch.bfloat16)
    assert encoder.takes((128, 256))
    assert not encoder.takes((192, 256))
    assert not encoder.takes((256, 192))
    told = encoder.configuration(["lm_head"])
    assert told["modules_to_not_convert"] == ["lm_head"]
    assert (told["quant_method"], told["weight_block_size"]) == ("fp8", [128, 128])


def test_nothing_was_lost_of_nothing() -> None:
    error = WeightError()
    assert error.relative == 0
    error.add(torch.zeros(3), torch.zeros(3))
    assert error.relative == 0
    error.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    assert error.relative == 0.1
