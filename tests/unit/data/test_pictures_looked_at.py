"""`capstan data show` and `data check` over rows with pictures: each picture in its place, sizes, copies, bad ones."""

import hashlib
import io
import json
import re
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.data.data import Shown, page_of_rows, render_shown, report_data, report_table, show
from launcher.report.report import write_report
from launcher.view.console import Terminal
from tests.unit.launcher.test_report import make_run, start, step
from trainer.base.find.locate import resolve_base
from trainer.base.find.media.video import VIDEO
from trainer.config import dump_config, load_config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.overlap import overlap_of
from trainer.data.look.show import SeenDocument, SeenRow, ShownPicture, TextPiece
from trainer.run import layout
from trainer.store.store import Store, open_store

pytest.importorskip("torchvision")
from tests.seeing import content, picture, seeing_base, video


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
    assert (bool(shown.pictures), json.loads(json.dumps(shown.to_json()))["pictures"]) == (True, {})
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


def test_a_check_names_no_field_that_a_row_is_read_from(run: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "one.png").write_bytes(content(picture(30, 20, 1)))
    rows = [
        {"conversations": talk, "image": "one.png", "id": 3},
        {"messages": talk, "images": ["one.png"], "note": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    given = f"data.train=[{{path: {tmp_path}/rows.jsonl}}]"
    found = report_data(run, (given, "data.eval=[]"), lambda line: None).splits["train"]
    assert (found.bad_rows, {name: one.rows for name, one in found.unused_fields.items()}) == (0, {"id": 1, "note": 1})


@pytest.fixture(scope="module")
def trained(run: Path) -> Store:
    """The folder of a run that has trained over these rows."""
    config = load_config(run)
    store = open_store(config.run.store)
    data = {"train": prepare(config, resolve_base(config.model), store).train}
    return make_run(store, [start(data=data), step(1)], name="looked", config=dump_config(config).encode())


def test_a_report_shows_small_pictures_of_a_few_rows_in_their_places(trained: Store, run: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    (run.parent / "one.png").write_bytes(content(picture(30, 20, 1)))
    write_report([trained])
    page = trained.get(layout.REPORT).decode()
    rows = page[page.index("<h2>Rows as they were seen</h2>") :]
    inline = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="picture of ([^"]+) pixels', rows)
    assert [title for _, title in inline] == ["30 x 20", "24 x 40", "30 x 20"]
    sizes = [Image.open(io.BytesIO(b64decode(source))).size for source, _ in inline]
    assert sizes == [(30, 20), (24, 40), (30, 20)]
    assert rows.index("see ") < rows.index("<img") < rows.index(" or ") < rows.index("<img", rows.index(" or "))
    assert "<mark>a cat" in rows
    assert "<script" not in rows
    assert "document 1: " in rows


def test_a_report_says_why_it_shows_no_rows(trained: Store, run: Path) -> None:
    one = run.parent / "one.png"
    kept = one.read_bytes()
    try:
        one.write_bytes(content(picture(30, 20, 9)))
        write_report([trained])
    finally:
        one.write_bytes(kept)
    page = trained.get(layout.REPORT).decode()
    assert f"They are not shown: {one}: the picture has changed since the data was compiled" in page
    assert "<img" not in page


def test_what_a_report_shows_of_rows_is_bounded_and_escaped(run: Path, tmp_path: Path) -> None:
    """Six rows with a picture of 1,600 x 1,200 pixels each and a long hostile text."""
    hostile = "<script>alert('&')</script><img src=x>"
    lines = list[str]()
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(content(picture(1600, 1200, number), "JPEG"))
        talk = [
            {"role": "user", "content": f"<image>{hostile}{'long ' * 600}"},
            {"role": "assistant", "content": "a cat"},
        ]
        lines.append(json.dumps({"messages": talk, "images": [f"{number}.jpg"]}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    given = f"data.train=[{{path: {tmp_path}/rows.jsonl}}]"
    config = load_config(run, (given, "data.eval=[]", "data.sequence_length=8192", f"run.store={tmp_path}/store"))
    store = open_store(config.run.store)
    data = {"train": prepare(config, resolve_base(config.model), store).train}
    folder = make_run(store, [start(data=data), step(1)], name="bounded", config=dump_config(config).encode())
    write_report([folder])
    page = folder.get(layout.REPORT).decode()
    rows = page[page.index("<h2>Rows as they were seen</h2>") :]
    assert rows.count("<img") == 4
    assert rows.count("long ") < 4 * 400
    assert "&lt;script&gt;alert(" in rows
    assert "<script" not in rows
    assert all(len(source) < 40_000 for source in re.findall(r'base64,([^"]+)"', rows))


@pytest.mark.parametrize("labels", [(True, False), (False, False)])
def test_labelled_answers_about_pictures_are_named_and_counted(
    run: Path, tmp_path: Path, labels: tuple[bool, ...]
) -> None:
    (tmp_path / "one.png").write_bytes((run.parent / "one.png").read_bytes())
    asked = {"prompt": [{"role": "user", "content": "<image>what?"}], "images": ["one.png"]}
    answers = [{**asked, "completion": [{"role": "assistant", "content": "a cat"}], "label": one} for one in labels]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    given = (
        "objective.name=kto",
        "data.format=labelled_pictures",
        f"data.train=[{{path: {tmp_path}/rows.jsonl}}]",
        "data.eval=[]",
    )
    shown = show(run, given, row=None, packed=False, split="train")
    assert [row.documents[0].part for row in shown.rows] == ["desired" if one else "undesired" for one in labels]
    report = report_data(run, given, lambda line: None)
    assert report.splits["train"].desired == sum(labels)
    assert bool(report.refusals) == (len(set(labels)) == 1), "kto needs answers of both kinds"


def test_a_video_has_its_frames_in_a_terminal_a_player_on_a_page_and_its_first_frame_in_a_report(
    run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    moving = video(12, 32, 48, 1)
    (tmp_path / "it.mp4").write_bytes(moving)
    talk = [{"role": "user", "content": "see <video>"}, {"role": "assistant", "content": "a cat"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk, "videos": ["it.mp4"]}) + "\n")
    given = (f"data.train=[{{path: {tmp_path}/rows.jsonl}}]", "data.eval=[]", f"run.store={tmp_path}/store")
    shown = show(run, given, row=None, packed=False, split="train")
    text = render_shown(shown, Terminal(no_color=True, width=200))
    assert re.search(r"see \[video of 4 frames of 32 x 48 pixels, \d+ tokens\]", text)
    (source,) = re.findall(r'<video controls src="data:video/mp4;base64,([^"]+)"', page_of_rows(shown))
    assert b64decode(source) == moving
    report = report_data(run, given, lambda line: None)
    (kind, found) = next(iter(report.splits["train"].files.items()))
    assert (kind, found.count, found.different, found.sizes) == ("videos", 1, 1, {"4 frames of 32 x 48 pixels": 1})
    console = Terminal(width=200)
    with console.capture() as said:
        console.print(report_table(report))
    assert "sizes of videos" in said.get()
    config = load_config(run, given)
    store = open_store(config.run.store)
    data = {"train": prepare(config, resolve_base(config.model), store).train}
    folder = make_run(store, [start(data=data), step(1)], name="watched", config=dump_config(config).encode())
    write_report([folder])
    page = folder.get(layout.REPORT).decode()
    assert 'alt="video of 4 frames of 32 x 48 pixels' in page[page.index("<h2>Rows as they were seen</h2>") :]


def test_a_video_that_is_a_list_of_pictures_is_these_pictures_on_a_page() -> None:
    frames = [content(picture(30, 20, seed)) for seed in (1, 2)]
    piece = TextPiece("a video", False, False, ShownPicture("ab", 20, 30, 4, "video", "video of 2 frames"))
    document = SeenDocument("rows.jsonl:1", "", [1, 2], [False, True], [piece])
    row = SeenRow("rows.jsonl:1", "", [document], [])
    page = page_of_rows(Shown("train", [row], pictures={"ab": VIDEO.joined(frames)}))
    assert [b64decode(one) for one in re.findall(r'<img src="data:image;base64,([^"]+)"', page)] == frames
    assert "<video" not in page


def test_texts_that_are_equal_but_for_their_pictures_are_no_duplicates(run: Path, tmp_path: Path) -> None:
    """Pictures of one size have the same tokens, and questions about pictures are often the same."""

    def source(name: str, numbers: Sequence[int]) -> str:
        talk = [{"role": "user", "content": "<image>a cat?"}, {"role": "assistant", "content": "yes"}]
        rows = [{"messages": talk, "images": [f"{number}.png"]} for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"data.{name}=[{{path: {tmp_path / name}.jsonl}}]"

    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(content(picture(30, 20, number)))
    given = source("train", [0, 1, 2, 3, 1]), source("eval", [4, 5, 2, 6])
    train, held_out = report_data(run, given, lambda line: None).splits.values()
    assert (train.exact_duplicates, train.near_duplicates) == (1, 0)
    assert (held_out.exact_duplicates, held_out.near_duplicates) == (0, 0)
    assert held_out.in_train == {"exact": 1, "near": 0}
    config = load_config(run, (*given, f"run.store={tmp_path}/store"))
    store = open_store(config.run.store)
    datasets = prepare(config, resolve_base(config.model), store)
    found = overlap_of(store, datasets.train, str(datasets.eval))
    assert found
    assert (found.shared, found.documents) == (1, 4)
