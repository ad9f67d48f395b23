"""Weights in codes as parts of a parameter that stays as it is stored: a mixture's experts, which files hold one by one."""

from collections.abc import Sequence
from math import prod

from trainer.base.rows.packed_parts import Weight
from trainer.store.codes import CodedTensor, Kept, KeptSources
from trainer.store.safetensors_index import DTYPE_BYTES, Joined, PackedSources, StoredTensor, Stretch


def kept_sources(weight: Weight) -> KeptSources | None:
    """Where the codes and the scales of a parameter are stored; None where it has to be decoded as it is read.

    Stretches of rows are joined where each is whole rows of tiles, so that the tiles of the parameter are those of its parts.
    """
    if isinstance(weight, CodedTensor):
        return weight.kept
    if not isinstance(weight, Joined):
        return None
    parts = [part.kept if isinstance(part, CodedTensor) else None for part in weight.parts]
    given = [part for part in parts if part is not None]
    if len(given) < len(parts) or len({part.kept for part in given}) != 1 or given[0].kept.transposed:
        return None
    kept = given[0].kept
    if not all(_is_whole(kept, weight.parts[one.part].shape, one, weight.shape) for one in weight.stretches):
        return None
    columns = weight.shape[-1]
    across = kept.code.tiles(1, columns)[1] * DTYPE_BYTES[kept.scales]
    codes = [_part(one, 8, kept.code.bits) for one in weight.stretches]
    scales = [_tiles(one, columns, kept.code.tile[0], across) for one in weight.stretches]
    sources = {name: [part.sources.parts[name] for part in given] for name in ("weight", "scales")}
    made: dict[str, StoredTensor] = {
        "weight": _joined(sources["weight"], codes),
        "scales": _joined(sources["scales"], scales),
    }
    return KeptSources(kept, PackedSources(made, None))


def _is_whole(kept: Kept, part: Sequence[int], stretch: Stretch, shape: Sequence[int]) -> bool:
    """Whether a stretch is whole rows of tiles, of its part of the shape `part` and of the parameter of this `shape`."""
    columns, down = shape[-1], kept.code.tile[0]
    if part[-1] != columns or stretch.begin % columns or stretch.numel % columns:
        return False
    if (stretch.begin, stretch.numel) == (0, prod(part)) and len(part) == 2 and part[0] == shape[-2]:
        return True
    return not any(size % down for size in (stretch.begin // columns, stretch.numel // columns, part[-2], shape[-2]))


def _part(stretch: Stretch, each: int, size: int) -> Stretch:
    """The stretch of bytes, where `each` elements have so many."""
    return Stretch(stretch.part, stretch.begin * size // each, stretch.numel * size // each)


def _tiles(stretch: Stretch, columns: int, down: int, across: int) -> Stretch:
    """The bytes of the scales of a stretch of rows, `across` for each row of tiles."""
    begin, rows = stretch.begin // columns // down, -(-stretch.numel // columns // down)
    return Stretch(stretch.part, begin * across, rows * across)


def _joined(parts: Sequence[StoredTensor], stretches: Sequence[Stretch]) -> Joined:
    return Joined(tuple(parts), tuple(stretches), (sum(stretch.numel for stretch in stretches),))
