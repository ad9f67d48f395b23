"""The lowest version of each range in pyproject.toml, as constraints for pip:

python -m tests.lowest > build/lowest.txt && pip install -c build/lowest.txt -e '.[dev]'
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

_ROOT = Path(__file__).resolve().parents[1]


def lowest() -> Iterator[str]:
    """A line for each direct dependency, of the package itself and of its extras, that has a lower bound."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    for one in sorted({*project["dependencies"], *extras}, key=str.lower):
        required = Requirement(one)
        bounds = [bound.version for bound in required.specifier if bound.operator in (">=", "==")]
        if bounds:
            yield f"{required.name}=={bounds[0]}"


if __name__ == "__main__":
    print("\n".join(lowest()))
