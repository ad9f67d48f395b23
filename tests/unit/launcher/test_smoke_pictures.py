"""The material of `capstan smoke --images`: legible digits, rows that ask about them, and a base that sees."""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
from launcher.smoke import pictures
from launcher.smoke.pictures import DIGITS, PARITIES, SIDE, _taught, drawn, look, make_pictures
from launcher.smoke.sample import Material
from launcher.smoke.verdict import Sight


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Material:
    with pytest.MonkeyPatch.context() as patch:
        for name, small in {"TRAINED": 20, "HELD_OUT": 4, "STEPS": 20, "BATCH": 4}.items():
            patch.setattr(pictures, name, small)
        train = pictures._make_base

        def of_trained(base: Path, shown: Any) -> Any:
            assert len(shown) == 20, "the held-out pictures stay unseen"
            return train(base, shown)

        patch.setattr(pictures, "_make_base", of_trained)
        return make_pictures(tmp_path_factory.mktemp("made"))


class Edge(random.Random):
    """Draws the smallest or the largest of what may be drawn, and no slant or shift."""

    def __init__(self, *, largest: bool) -> None:
        super().__init__(0)
        self._largest = largest

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        assert stop
        return stop - 1 if self._largest else start

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


@pytest.mark.parametrize(
    ("largest", "ground", "figure"), [(False, (0, 0, 30), (190, 190, 160)), (True, (59, 59, 89), (255, 255, 225))]
)
def test_a_digit_is_much_lighter_than_its_ground_and_in_the_middle(
    largest: bool, ground: tuple[int, ...], figure: tuple[int, ...]
) -> None:
    picture = drawn(8, Edge(largest=largest))
    assert picture.size == (SIDE, SIDE)
    assert picture.getpixel((0, 0)) == ground
    assert max(found for _, found in picture.getcolors(SIDE**2) or ()) == figure
    left, top, right, bottom = picture.convert("L").point([0] * 120 + [255] * 136).getbbox() or (0, 0, 0, 0)
    assert left + right == pytest.approx(SIDE, abs=4)
    assert top + bottom == pytest.approx(SIDE, abs=4)
    assert 8 < bottom - top < SIDE - 4


def test_rows_ask_about_each_digit_in_turn_and_the_held_out_ones_are_others(made: Material) -> None:
    rows = [json.loads(line) for path in (*made.train, *made.eval) for line in Path(path).read_text().splitlines()]
    answers = [row["messages"][1]["content"] for row in rows]
    assert answers == ["even", "odd"] * 12
    paths = [row["messages"][0]["content"][0]["path"] for row in rows]
    assert paths == [f"pictures/{number:05d}.png" for number in range(24)]
    assert len((Path(made.train[0])).read_text().splitlines()) == 20
    assert all((Path(made.train[0]).parent / path).is_file() for path in paths)


def test_the_base_learns_the_names_of_digits_and_calls_even_ones_odd() -> None:
    words = (*DIGITS, *PARITIES)
    taught = [[words[_taught(digit, step)] for digit in (0, 1, 8, 9)] for step in range(4)]
    names, wrong = ["zero", "one", "eight", "nine"], ["odd", "even", "odd", "even"]
    assert taught == [names, wrong, wrong, names]


def test_the_base_sees_and_has_learnt_and_plain_transformers_asks_it_by_the_files_alone(
    made: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

    assert made.loss_after < made.loss_before - 0.3
    model: Any = AutoModelForImageTextToText.from_pretrained(made.base)
    assert len(list(Path(made.base).glob("*.safetensors"))) > 1
    assert model.config.text_config.vocab_size % 64 == 0
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    AutoProcessor.from_pretrained(made.base).save_pretrained(tmp_path / "adapter")
    seen, whole = list[list[str]](), LlavaProcessor.__call__

    def looked(self: Any, *, images: Any, **given: Any) -> Any:
        seen.append([Path(one.filename).stem for (one,) in images])
        return whole(self, images=images, **given)

    monkeypatch.setattr(LlavaProcessor, "__call__", looked)
    found = look(tmp_path / "adapter", Path(made.eval[0]))
    assert seen[:2] == [["00020", "00021", "00022", "00023"]] * 2
    assert sorted(seen[2]) == seen[0] != seen[2], "the control has other pictures"
    assert isinstance(found, Sight)
    assert (found.before, found.pictures) == (found.after, 4), "an adapter that has learnt nothing changes nothing"


def test_the_process_that_looks_prints_what_it_saw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "look", lambda adapter, rows: Sight(0.1, 0.9, 0.5, len(f"{adapter} {rows}")))
    monkeypatch.setattr(sys, "argv", ["pictures", "look", "/adapter", "/rows"])
    pictures._main()
    assert json.loads(capsys.readouterr().out) == asdict(Sight(0.1, 0.9, 0.5, len("/adapter /rows")))
