"""`capstan dequantize`: the base of a run in 4 or 8 bits, as the run computes with it, for the servers that sample for
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from launcher.export.export import bar, run_module
from launcher.start.check import anchored
from trainer.base.find.locate import describe_base
from trainer.config import dump_config, load_config
from trainer.config.paths import local_path
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Dequantized:
    """The base that was written to `destination`; no `bytes` were in a dry run."""

    base: str
    quantized: str
    destination: str
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dry_run": self.bytes is None}

    def sentence(self) -> str:
        size = " (dry run: nothing written)" if self.bytes is None else f" ({decimal(self.bytes)})"
        return f"{self.base}, {self.quantized} as the run computes with it, in {self.destination}{size}"


def dequantize(
    path: Path, destination: str, overrides: Sequence[str], *, dry_run: bool, log: Callable[[str], None]
) -> Dequantized:
    """Write the base of the run that `path` describes to a folder or an s3://, gs:// or az:// URI.

    Raises `ConfigError` where the run computes with the base as its files have it, or the destination is taken.
    """
    config = anchored(load_config(path, overrides, log))
    if "://" not in destination:
        destination = str(local_path(destination, "DEST"))
    stored = describe_base(config.model).stored
    if stored.unmergeable or not (config.quant.held.quantizes or stored.decoded):
        raise ConfigError(
            f"quant.type: {config.quant.type} computes with {config.model.base} as its files have it. Serve that"
            " itself."
        )
    if config.model.layers:
        raise ConfigError("model.layers: only the whole base can be written. Leave it out.")
    found = Dequantized(config.model.base, config.quant.held.in_words, destination)
    if dry_run:
        return found
    with bar("writing") as progress:
        made = run_module("trainer.export.write.as_quantized", dump_config(config), destination, progress=progress)
    return Dequantized(found.base, found.quantized, destination, made["bytes"])
