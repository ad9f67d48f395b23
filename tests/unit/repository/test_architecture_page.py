"""docs/architecture.md names what is there: a file that moves, or a package that comes, takes the page along."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def named() -> list[str]:
    """The paths on the page. In the drawing a name without a folder is of the folder that its line, or one above,
    begins with.
    """
    found, folder = [], ""
    for line in PAGE.splitlines():
        if begins := re.match(r" +((?:\w+/)+)(?= )", line):
            folder = begins[1]
        for name in re.findall(r"[\w./-]+\.(?:py|sh|toml)\b", line):
            found.append(name if "/" in name or name in ("pyproject.toml", "layers.toml") else folder + name)
    return found


def test_every_file_that_the_page_names_exists() -> None:
    assert len(named()) > 50
    assert [name for name in named() if not (ROOT / name).is_file()] == []


def test_every_file_that_the_page_on_extending_names_exists() -> None:
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    names = set(re.findall(r"(?:trainer|launcher|tests)/[\w./-]+\.py\b", page))
    assert len(names) > 10
    assert [name for name in names if not (name.endswith("/NAME.py") or (ROOT / name).is_file())] == []
    for table in re.findall(r"`([A-Z]+)(?: = |`)", page):
        files = (file for top in ("trainer", "launcher") for file in (ROOT / top).rglob("*.py"))
        assert any(f"\n{table}" in file.read_text(encoding="utf-8") for file in files), table


def test_larger_changes_touch_at_most_fifteen_places_each_and_name_what_is_there() -> None:
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    sketches = page.split("\n## Larger changes")[1].split("\n### ")[1:]
    code = {word for path in ROOT.glob("trainer/**/*.py") for word in re.findall(r"\w+", path.read_text("utf-8"))}
    code |= {word for path in ROOT.glob("launcher/**/*.py") for word in re.findall(r"\w+", path.read_text("utf-8"))}
    assert len(sketches) == 2
    for sketch in sketches:
        rows = re.findall(r"^\| (?:a new \w+ in )?`([^`]+)` \| (.+) \|$", sketch, re.MULTILINE)
        assert 5 < len(rows) <= 15
        assert [place for place, _ in rows if not (ROOT / place).exists()] == []
        assert [name for _, words in rows for name in re.findall(r"`(\w+)`", words) if name not in code] == []


def test_every_package_is_named() -> None:
    packages = {
        f"{top}.{init.parent.name}" for top in ("trainer", "launcher") for init in (ROOT / top).glob("*/__init__.py")
    }
    assert len(packages) > 15
    assert packages - set(re.findall(r"`(\w+\.\w+)`", PAGE)) == set()


def test_a_file_is_called_after_what_it_has_and_not_after_where_it_stands() -> None:
    unnamed = "around arrive before beside elsewhere leave opened seen side unfilled utils".split()
    assert [
        path for top in ("trainer", "launcher") for path in (ROOT / top).rglob("*.py") if path.stem in unnamed
    ] == []


def test_readme_and_contributing_lead_to_it() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "(docs/architecture.md)" in (ROOT / page).read_text(encoding="utf-8")
