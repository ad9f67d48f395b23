"""Builds the documentation's site from the pages as the repository has them (a hook of mkdocs.yml).

Pages link to each other and to files beside docs/ as a reader of the repository needs it. On the site README.md is the
first page, and each file of the repository that a page links to lies under repository/.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")
_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_NAME = re.compile(r"[-\w.*]+")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, and what pages link to outside of docs/."""
    found = {"README.md"}
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        new = {target for target in _targets(waiting.pop()) if not target.startswith("docs/")} - found
        found |= new
        waiting += [target for target in new if target.endswith(".md")]
    for path in sorted(found):
        if (ROOT / path).is_dir():
            files.append(File.generated(config, _place(path), content=_folder_page(path)))
        else:
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the page's links to where the site has what they name."""
    here, source = page.file.src_uri, _source(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link[0])
        return link[0] if target is None else posixpath.relpath(_place(target), posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Keep the names in tables whole, which a browser would break at their hyphens."""
    return _CELL.sub(lambda cell: _CODE.sub(_of_whole_names, cell[0]), html)


def _of_whole_names(code: re.Match[str]) -> str:
    return _NAME.sub(r'<span class="whole">\g<0></span>', code[0])


def _targets(page: str) -> Iterator[str]:
    for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        target = _target(page, link)
        if target is not None:
            yield target


def _target(page: str, link: str) -> str | None:
    """The path in the repository that a link of `page` leads to; None when nothing is there, which mkdocs then
    reports.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return target if (ROOT / target).exists() and not target.startswith("..") else None


def _place(path: str) -> str:
    """Where the site has the repository's `path`."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}/README.md" if (ROOT / path).is_dir() else f"repository/{path}"


def _source(place: str) -> str:
    """The path in the repository of the site's page at `place`."""
    if place == "index.md":
        return "README.md"
    return place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}"


def _folder_page(path: str) -> str:
    """A page that shows each file of a folder."""
    shown = [f"# {path.capitalize()}\n"]
    for folder, _, names in sorted(os.walk(ROOT / path)):
        for name in sorted(names):
            file = Path(folder, name)
            text, kind = file.read_text(encoding="utf-8"), file.suffix.removeprefix(".")
            shown.append(f"## {file.relative_to(ROOT / path)}\n\n```{kind}\n{text.rstrip()}\n```\n")
    return "\n".join(shown)
