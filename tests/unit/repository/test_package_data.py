"""What lies beside the code is installed with it."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_wheel_has_every_file_that_lies_beside_the_code() -> None:
    """setuptools takes what is not Python only where it is listed, and the tests run from a checkout, which has
    everything.
    """
    listed: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    taken = {
        file
        for package, patterns in listed.items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    rooms = ("trainer", "launcher", "ds_configs", "slurm")
    there = {
        file
        for room in rooms
        for file in (ROOT / room).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert there
    assert there <= taken
