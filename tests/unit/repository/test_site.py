"""The documentation's site builds without a warning and asks nobody for anything; a page or a link that is missing
fails it.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=source, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


class Loaded(HTMLParser):
    """What a browser fetches by itself for a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = given.get("src") or (given.get("href") if tag == "link" and given.get("rel") != "canonical" else None)
        self.addresses += [fetched] if fetched else []


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    assert [address for page in pages for address in Loaded(page).addresses if re.match(r"(\w+:)?//", address)] == []
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    for link in ("quickstart.html", "repository/examples/index.html", "repository/CONTRIBUTING.html"):
        assert f'href="{link}"' in home
        assert (tmp_path / link).is_file()
    settings = (tmp_path / "configuration.html").read_text(encoding="utf-8")
    for name in ("all-linear", "support-sft", "our-questions.yaml"):  # a browser would break them at their hyphens
        assert f'<span class="whole">{name}</span>' in settings


def test_a_link_or_a_page_that_is_lost_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("docs", "examples", "slurm", "benchmarks", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Containerfile", "mkdocs.yml"):
        shutil.copy(ROOT / name, source)
    (source / "docs/in-no-index.md").write_text("# Lost\n")
    lost = ("no-such-page.md", "../examples/no-such.yaml", "methods.md#no-such-anchor")
    with (source / "docs/quickstart.md").open("a", encoding="utf-8") as page:
        page.writelines(f"\n[a]({link})\n" for link in lost)
    built = build(source, tmp_path / "site")
    assert built.returncode != 0
    for words in ("in-no-index.md", *lost):
        assert words in built.stderr
