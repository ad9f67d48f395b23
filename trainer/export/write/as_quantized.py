"""The base as a run in 4 or 8 bits computes with it, as an ordinary model, for servers that sample for the run.

    python -m trainer.export.write.as_quantized CONFIG DEST

CONFIG is the text of the run's settings. The files are made like those of a merge (trainer/export/write/merged.py).
They have the names, shapes and types of the base's own. The program reports its progress as `trainer.export` does. The
last line is a JSON object with the bytes that were written.
"""

import json
import sys
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from trainer.base.find.locate import resolve_base
from trainer.base.load.load import DTYPES
from trainer.base.partitions.filling import SOURCE_DTYPES, as_tensor
from trainer.base.partitions.reading import cut
from trainer.base.rows.parameters import find_all_weights
from trainer.base.stored.shared.cached_values import LastMade
from trainer.config import Config, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.export.destination import CARD, TRAINED, BytesWritten, check_destination, print_bytes
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import OURS, files_with, write_files
from trainer.model.held import HeldFormat, Spanning
from trainer.store.safetensors_index import StoredTensor
from trainer.store.store import Store, open_store

_KEPT = 16  # matrices whose scales stay in memory, because pieces of several matrices are in flight


def write_as_quantized(config: Config, destination: Store, report: BytesWritten) -> None:
    """Write the base as the run computes with it.

    Raises `ConfigError` if the base is not here, the destination is taken, or the base's files cannot hold what the run
    computes with.
    """
    base, quant, dtype = as_plain(resolve_base(config.model)), config.quant, DTYPES[config.model.dtype]
    weights, updates, scales = find_all_weights(base), dict[str, AsQuantized](), LastMade[Tensor]()
    for name, shape in base.architecture.quantizable().items() if quant.held.quantizes else ():
        source = weights.sources[name]
        if dtype == torch.float32 != SOURCE_DTYPES[source.dtype]:
            raise ConfigError(
                f"model.dtype: fp32 computes with weights that {base.name} has no room for in its type,"
                f" {source.dtype.lower()}. Set model.dtype: bf16."
            )
        updates[name] = AsQuantized(name, source, shape, quant.held, dtype, scales)  # type: ignore[arg-type]  # nothing in a plain base is packed
    check_destination(destination, *OURS)
    destination.put(
        CARD, f"{base.name} as a model computes with it that is {TRAINED} over it {quant.held.in_words}.\n".encode()
    )
    write_files(base, config, files_with(base, weights, updates), destination, report)


@dataclass(frozen=True)
class AsQuantized:
    """The weight `name` as packed layers make it (trainer/model/held). Each matrix is quantized by itself."""

    name: str
    source: StoredTensor
    shape: tuple[int, ...]
    form: HeldFormat
    dtype: torch.dtype
    scales: LastMade[Tensor] = field(repr=False, compare=False)

    def apply_to(self, rows: Tensor, first: int) -> None:
        """Replace these rows. Their values are read again in whole units of the format, which rows may not be."""
        begin, size = first * self.shape[-1], prod(self.shape[-2:])
        for matrix in range(begin // size, -(-(begin + len(rows)) // size)):
            start = matrix * size
            here, there = max(begin, start), min(begin + len(rows), start + size)
            rows[here - begin : there - begin] = self._values(start, here - start, there - start)

    def _values(self, start: int, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of the matrix that begins with the element `start`."""
        first, last = begin // self._unit, -(-end // self._unit)
        before, behind = first * self._unit, min(last * self._unit, prod(self.shape[-2:]))
        parts = self._encoded(start, before, behind)
        if spanning := self.form.spanning:
            scales = self.scales.get((self.name, start), _KEPT, lambda: self._spanned(start, spanning))
            parts[spanning.part] = scales[first:last].view(torch.uint8)
        values = self.form.decode(parts, behind - before, self.shape[-1], self.dtype)
        return values[begin - before : end - before]

    @property
    def _unit(self) -> int:
        rows, columns = self.shape[-2:]
        return self.form.unit(rows, columns)

    def _encoded(self, start: int, begin: int, end: int) -> dict[str, Tensor]:
        values = as_tensor(self.source.read(start + begin, start + end), self.source).to(self.dtype)
        return self.form.encode(values, self.shape[-1])

    def _spanned(self, start: int, spanning: Spanning) -> Tensor:
        """Return the fp32 scales of a matrix, which are quantized together."""
        pieces = cut(self.source, 0, prod(self.shape[-2:]), self._unit)
        scales = [self._encoded(start, *piece)[spanning.part].view(torch.float32) for piece in pieces]
        return spanning.left(torch.cat(scales))


def main() -> None:
    try:
        destination = open_store(sys.argv[2], setting="DEST")
        write_as_quantized(parse_config(sys.argv[1]), destination, print_bytes)
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"bytes": sum(entry.size for entry in destination.list())}))


if __name__ == "__main__":
    main()
