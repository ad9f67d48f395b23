"""Measures what the imports of a rank cost from where its environment lies. Each start of each rank pays it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from launcher.plan.starts import keep_import_seconds
from trainer.config.paths import file_system
from trainer.processes import children

# A fresh interpreter imports what a rank does. It counts the files that this opens: modules, and libraries in memory.
_PROBE = """
import time
began = time.perf_counter()
import trainer.rank
took = time.perf_counter() - began
import json, os, sys
files = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
files |= {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
sizes = [os.path.getsize(file) for file in files if os.path.exists(file)]
print(json.dumps({"seconds": took, "files": len(sizes), "bytes": sum(sizes)}))
"""
_MOST_SECONDS = 600
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "9p", "fuse", "panfs", "wekafs")


class Imports(NamedTuple):
    """The seconds of a rank's imports, the files that they open and their bytes, and the file system of the
    environment.
    """

    seconds: float
    files: int
    bytes: int
    file_system: str

    @property
    def over_network(self) -> bool:
        return self.file_system.startswith(_NETWORK)

    def sentence(self) -> str:
        return (
            f"{self.seconds:.1f} s for {self.files:,} files of {self.bytes / 2**20:,.0f} MiB from {sys.prefix}"
            f" ({self.file_system}); less where the machine has read them before"
        )


def imports() -> Imports | str:
    """Measure a rank's imports, or return why they fail. A later plan on this machine uses the figure."""
    try:
        told = children.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"they took longer than {_MOST_SECONDS} s"
    if told.returncode:
        return (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
    found = Imports(
        **json.loads(told.stdout.splitlines()[-1]), file_system=file_system(Path(sys.prefix).resolve()) or "unknown"
    )
    keep_import_seconds(found.seconds)
    return found
