"""The packages that a machine with torch and without internet needs for benchmarks/gpu.py, as a folder of wheels."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 60 * 2**20
_ROOT = Path(__file__).parents[2]
# What a run of one rank imports beside what torch brings: neither Ray nor pyarrow nor trackers.
BESIDE_TORCH = (
    "accelerate annotated-doc annotated-types anyio bitsandbytes certifi charset-normalizer click deepspeed einops h11 hf-xet hjson httpcore2 httpx2 "
    "huggingface_hub idna jinja2 markdown-it-py markupsafe mdurl msgpack ninja obstore packaging peft propcache protobuf psutil py-cpuinfo pydantic "
    "pydantic-core pygments pyyaml regex requests rich safetensors sentencepiece shellingham tokenizers tqdm transformers truststore typer "
    "typing-extensions typing-inspection urllib3 zstandard"
).split()  # fmt: skip
WITH_TORCH = {"filelock", "fsspec", "numpy", "torch"}
_BUILT = "deepspeed"
# Of bitsandbytes' libraries a card of today takes that of CUDA 13.
_LEFT_OUT = re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu|cuda13)|/tests?/")


def write(folder: Path, python: str) -> None:
    """Fetch the pinned versions for this `python` on x86, without the files that a card does not need."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    here = ["--only-binary=:all:", "--python-version", python]
    for platform in (*(f"manylinux_2_{version}" for version in range(34, 16, -1)), "manylinux2014"):
        here += ["--platform", f"{platform}_x86_64"]
    wanted = _pinned()
    built = [requirement for requirement in wanted if requirement.startswith(_BUILT)]  # there is no wheel of it
    fetched = [requirement for requirement in wanted if requirement not in built]
    subprocess.run([*pip, "download", "--no-deps", *here, "--dest", str(folder), *fetched], check=True)
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *built]
    subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, check=True)
    for wheel in folder.glob("*.whl"):
        _lighten(wheel)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels of {size / 2**20:.1f} MiB for Python {python} are in {folder}.")
    if size > MOST_BYTES:
        raise SystemExit(f"That is more than the {MOST_BYTES / 2**20:.0f} MiB that a machine may be handed.")


def use(folder: Path) -> None:
    """Have this process and those that it starts import from the wheels in `folder`, before what the machine has of its
    own.
    """
    there = tempfile.mkdtemp(prefix="capstan-carried-")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(there)
    os.environ["PYTHONPATH"] = os.pathsep.join([there, str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.path.insert(0, there)


def _pinned() -> list[str]:
    """The packages at their versions of constraints.txt, where it has them."""
    lines = (_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = {_name(line.split("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}
    return [versions.get(_name(package), package) for package in BESIDE_TORCH]


def _name(package: str) -> str:
    return package.lower().replace("_", "-")


def _lighten(wheel: Path) -> None:
    """Leave files out of a wheel; it is imported from and never installed, so nobody compares its record."""
    lighter = wheel.with_suffix(".lighter")
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(lighter, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as kept:
        for entry in given.infolist():
            if not _LEFT_OUT.search(entry.filename):
                kept.writestr(entry, given.read(entry))
    lighter.replace(wheel)
