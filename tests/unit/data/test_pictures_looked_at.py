"""`capstan data show` and `data check` over rows with pictures: each picture in its place, sizes, copies, bad ones."""

import hashlib
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from launcher.data.data import page_of_rows, render_shown, report_data, report_table, show
from launcher.view.console import Terminal

pytest.importorskip("torchvision")
from tests.seeing import content, picture, seeing_base


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run over rows with pictures: one with two, one with the first of them, one with none, and
    two whose picture is missing or truncated; one with the first picture to evaluate."""
    folder = tmp_path_factory.mktemp("looked-at")
    base = seeing_base(folder / "base", "qwen3_vl")
    (folder / "one.png").write_bytes(content(picture(30, 20, 1)))
    (folder / "two.png").write_bytes(content(picture(24, 40, 2)))
    (folder / "half.png").write_bytes(content(picture(24, 40, 2))[:60])

    def row(question: str, *names: str) -> dict[str, Any]:
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
        return {"messages": talk, "images": list(names)}

    two = row("see <image> or <image>?", "one.png", "two.png")
    rows = [two, row("<image>what?", "one.png"), row("<b>?"), row("<image>", "no.png"), row("<image>", "half.png")]
    for name, given in (("rows", rows), ("eval", [row("<image>new?", "one.png")])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    config = f"""
model: {{base: {base}}}
data:
  format: pictures
  train: [{{path: {folder}/rows.jsonl}}]
  eval: [{{path: {folder}/eval.jsonl}}]
  sequence_length: 256
  on_bad_row: skip
train: {{steps: 1}}
run: {{name: looked, store: {folder}/store}}
"""
    (folder / "run.yaml").write_text(config)
    return folder / "run.yaml"


def test_a_picture_is_shown_in_its_place_by_its_size_and_on_the_page_itself(run: Path) -> None:
    shown = show(run, (), row=None, packed=False, split="train")
    text = render_shown(shown, Terminal(no_color=True, width=200))
    assert re.search(r"see <begin>\[picture of 30 x 20 pixels, \d+ tokens\]<end> or <begin>\[picture of 24 x 40", text)
    assert "<image>" not in text
    page = page_of_rows(shown)
    inline = re.findall(r'<img src="data:image;base64,([^"]+)" alt="picture of ([^"]+) pixels', page)
    folder = run.parent
    given = [(folder / f"{name}.png").read_bytes() for name in ("one", "two", "one")]
    assert [b64decode(source) for source, _ in inline] == given
    assert [title for _, title in inline] == ["30 x 20", "24 x 40", "30 x 20"]
    assert page.index("see ") < page.index("<img") < page.index(" or ") < page.index("<img", page.index(" or "))
    assert "&lt;b&gt;?" in page
    assert "<mark>a cat" in page
    named = shown.to_json()["rows"][1]["documents"][0]["pieces"]
    (own,) = [piece["picture"] for piece in named if piece["picture"]]
    assert own["sha256"] == hashlib.sha256(given[0]).hexdigest()


def test_packed_rows_have_the_pictures_of_each_document(run: Path) -> None:
    shown = show(run, ("data.sequence_length=512",), row=None, packed=True, split="train")
    pieces = [[piece.picture for piece in one.pieces if piece.picture] for one in shown.rows[0].documents]
    assert sorted(len(pictures) for pictures in pieces) == [0, 1, 2]
    assert page_of_rows(shown).count("<img") == 3


def test_a_check_counts_pictures_copies_sizes_and_bad_ones(run: Path) -> None:
    report = report_data(run, (), lambda line: None)
    train, held_out = report.splits["train"], report.splits["eval"]
    assert train.pictures
    assert held_out.pictures
    assert (train.pictures.count, train.pictures.different, train.pictures.also_trained) == (3, 2, None)
    assert train.pictures.sizes == {"30 x 20": 2, "24 x 40": 1}
    assert train.pictures.pixels == {"min": 600, "median": 600, "max": 960}
    assert (train.bad_rows, train.bad_pictures) == (2, 2)
    assert (held_out.pictures.count, held_out.pictures.also_trained, held_out.bad_pictures) == (1, 1, 0)
    console = Terminal(width=200)
    with console.capture() as said:
        console.print(report_table(report))
    assert "3, 2 of them different" in said.get()
    assert "30 x 20 (2), 24 x 40 (1)" in said.get()
    json.dumps(report.to_json())
