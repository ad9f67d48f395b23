"""Some processors change more of a text than the places of pictures. The tokens of a row are their own, all the same."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

pytest.importorskip("torchvision")
from tests.dist import seeing
from tests.material import byte_tokenizer
from tests.seeing import picture, seeing_base, shown
from trainer.base.find.media.still import Size
from trainer.base.find.processor import Processor, WrittenAround, read_processor
from trainer.config import Data
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.dataset.pictures import PICTURE
from trainer.data.order.pictures import PictureReader
from trainer.data.render.document import reading
from trainer.errors import ConfigError, DataError
from trainer.store.store import open_store

SHOWN = [{"type": "image", "path": "one.png"}, {"type": "image", "path": "two.png"}]


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


ASKED = {
    "a picture before the words": [SHOWN[0], words("what is it?")],
    "words around it": [words("see "), SHOWN[0], words("well.")],
    "two that touch": [words("both "), *SHOWN, words("of them")],
    "nothing behind": [words("and "), SHOWN[1]],
    "apart": [SHOWN[0], words("b"), SHOWN[1], words(" c")],
    "the same words beside it": [words("a a"), SHOWN[0], words("a a"), SHOWN[1], words("a")],
    "no picture": [words("nothing to see")],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("base") / "paligemma", "paligemma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pictures")
    picture(24, 16, 1).save(found / "one.png")
    picture(16, 40, 2).save(found / "two.png")
    return found


def _encoded(base: Path, folder: Path, kind: str, *rows: dict[str, Any], **more: Any) -> list[Any]:
    given = {"train": [{"path": str(folder / "rows.jsonl")}], "format": kind, "template": "paligemma", **more}
    data = Data.model_validate(given)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.name_or_path = str(base)
    with reading(str(folder / "rows.jsonl")):
        return ROW_KINDS[kind].renderer(tokenizer, data).encode(list(rows))


def _talk(parts: Any, *answers: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": parts}, *({"role": "assistant", "content": one} for one in answers)]
    }


@pytest.mark.parametrize("parts", ASKED.values(), ids=ASKED)
def test_a_prompt_and_its_answer_have_the_tokens_of_a_text_and_its_suffix(
    parts: list[Any], base: Path, folder: Path
) -> None:
    (found,) = _encoded(base, folder, "pictures", _talk(parts, "a cat"))
    made = seeing.inputs(AutoProcessor.from_pretrained(base), _talk(parts, "a cat")["messages"], folder)
    assert found.tokens.tolist() == made["input_ids"][0].tolist()
    assert found.targets.tolist() == made["token_type_ids"].bool()[0].tolist()
    assert len(found.places) == sum(part["type"] == "image" for part in parts)
    processor = read_processor(base, "it")
    types = processor.token_types(found.tokens.tolist(), int(found.targets.argmax()))["token_type_ids"]
    assert types.equal(made["token_type_ids"])
    assert processor.token_types([5, 6])["token_type_ids"].tolist() == [[0, 0]]  # a prompt to be answered


def test_the_class_is_told_which_tokens_of_documents_without_pictures_are_before_the_answer(base: Path) -> None:
    ids = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
    reader = PictureReader(open_store("memory://"), read_processor(base, "it"))
    told = reader.begin(np.empty((0, PICTURE.itemsize), np.uint8), [], ids, [2, 1]).arrived()
    assert [(one.segment, one.key) for one in told] == [(0, ""), (1, "")]
    assert [one.inputs["token_type_ids"].tolist() for one in told] == [[[0, 0, 1]], [[0, 1]]]


def test_what_such_a_base_cannot_learn_is_a_bad_row(base: Path, folder: Path) -> None:
    several = {"messages": [*_talk("a", "b")["messages"], *_talk("c", "d")["messages"]]}
    shown = _talk("a", [words("b "), SHOWN[0]])
    talks = (  # a template of one's own may write several turns
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
        "{{ eos_token + '\n' if m.role == 'assistant' else ' ' }}{% endfor %}"
    )
    found = _encoded(base, folder, "pictures", several, shown, template=talks)
    assert [str(one) for one in found] == [
        "2 parts of it would be trained, but this base can learn only one part of a row, because it reads everything"
        " before an answer in both directions. Give the others weight: 0, or make a row of each",
        "it has a picture in or after the answer, but this base takes pictures only before the answer",
    ]
    several["messages"][1]["weight"] = 0
    (last,) = _encoded(base, folder, "pictures", several, template=talks)
    assert not isinstance(last, DataError)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    first = int(last.targets.argmax())
    assert tokenizer.decode(last.tokens[:first]) == "<s>a b</s>\nc \n"
    assert tokenizer.decode(last.tokens[first:]) == "d</s>\n"


@pytest.mark.parametrize("parts", [ASKED["words around it"], ASKED["no picture"]], ids=["picture", "no picture"])
def test_a_row_whose_answer_begins_inside_of_a_token_is_a_bad_row(
    parts: list[Any], base: Path, folder: Path, tmp_path: Path
) -> None:
    joins = shutil.copytree(base, tmp_path / "joins")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(["\na"])
    tokenizer.save_pretrained(joins)
    found, other = _encoded(joins, folder, "pictures", _talk(parts, "a cat"), _talk(parts, "no cat"))
    assert str(found) == (
        "a token spans the end of the prompt and the answer's beginning; end the prompt with white space"
    )
    assert not isinstance(other, DataError)


def test_answers_to_be_judged_begin_behind_the_same_prompt(base: Path, folder: Path) -> None:
    row = {"prompt": _talk(ASKED["words around it"])["messages"], "chosen": "yes", "rejected": "no"}
    (pair,) = _encoded(base, folder, "preference_pictures", row)
    prompts = [one.tokens[: one.targets.argmax()].tolist() for one in pair.answers]
    assert prompts[0] == prompts[1]
    made = seeing.inputs(AutoProcessor.from_pretrained(base), row["prompt"], folder)
    assert prompts[0] == made["input_ids"][0].tolist()


def test_a_text_with_a_class_is_read_whole(base: Path, folder: Path) -> None:
    row = {**_talk(ASKED["words around it"]), "label": "b"}
    (found,) = _encoded(base, folder, "classified_pictures", row, labels=["a", "b"])
    made = seeing.inputs(AutoProcessor.from_pretrained(base), row["messages"], folder)
    assert found.tokens.tolist() == [*made["input_ids"][0].tolist(), 1]


@pytest.fixture(scope="module")
def idefics2() -> Any:
    """Its processor has one token between pictures that touch, and a space before words behind one."""
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    own = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, extra_special_tokens=own, **named
    )
    pixels = Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=True)
    return Idefics2Processor(pixels, tokenizer, image_seq_len=3)


@pytest.mark.parametrize("parts", ASKED.values(), ids=ASKED)
def test_a_text_that_a_processor_changes_beside_pictures_has_its_tokens(parts: list[Any], idefics2: Any) -> None:
    processor = Processor(idefics2, "it")
    assert not processor.is_plain
    text = "".join(part.get("text", "<image>") for part in parts)
    pieces = text.split("<image>")
    pictures = [picture(24, 16 + number, number) for number in range(len(pieces) - 1)]
    sizes = tuple(Size(one.height, one.width) for one in pictures)
    for _ in range(2):  # the second time from what was kept of the pictures
        gaps = processor.gaps(pieces, sizes)
        written = (
            gaps.head + pieces[0] + "".join(a + b for a, b in zip(gaps.pictures, pieces[1:], strict=True)) + gaps.tail
        )
        images = {"images": [pictures]} if pictures else {}
        expected = idefics2(text=[text], return_tensors="pt", **images)["input_ids"]
        assert torch.tensor([processor.encode(written)]).equal(expected)
    image = processor.encode("<image>")
    assert all(processor.encode(one).count(image[0]) == 15 for one in gaps.pictures)
    assert processor.lacks(sizes, np.array(processor.encode(written), np.int32)) == 0
    if pictures:
        assert {"pixel_values", "pixel_attention_mask"} == set(
            processor.inputs(list(map(shown, pictures)), expected[0].tolist())
        )


class _OfItsOwn:
    """A processor that writes a text of its own, as ShieldGemma 2's."""

    image_token = "<image>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def create_mm_token_type_ids(self, input_ids: Any) -> Any:
        return [[0] * len(ids) for ids in input_ids]

    def __call__(self, **_: Any) -> dict[str, Any]:
        return dict(self.tokenizer(["is it allowed? <image>"], return_tensors="pt"))


def test_a_processor_that_writes_a_text_of_its_own_is_refused(idefics2: Any) -> None:
    with pytest.raises(ConfigError, match="the processor of it replaces a row's text by a text of its own"):
        Processor(_OfItsOwn(idefics2.tokenizer), "it")


_LATE = 40


class _ByRows:
    """A processor that writes a token for each row of patches."""

    image_token = "<image>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, self._rows
        self.begun, self.go_on = Event(), Event()

    def create_mm_token_type_ids(self, input_ids: Any) -> Any:
        return [[0] * len(ids) for ids in input_ids]

    def _rows(self, images: Any) -> dict[str, Any]:
        if images[0][0].height == _LATE:
            self.begun.set()
            assert self.go_on.wait(20)
        return {"rows": [one.height // 8 for one in images[0]], "pixel_values": torch.zeros(len(images[0]), 3, 2, 2)}

    def __call__(self, text: list[str], images: Any, **_: Any) -> dict[str, Any]:
        made = self.image_processor(images)
        first, *pieces = text[0].split("<image>")
        whole = first + "".join("<image>" * rows + piece for rows, piece in zip(made["rows"], pieces, strict=True))
        return {**self.tokenizer([whole], return_tensors="pt"), "pixel_values": made["pixel_values"]}


def test_threads_that_ask_at_once_get_the_text_of_their_own_sizes(idefics2: Any) -> None:
    """The first documents of a run are read by threads."""
    made, early, late = _ByRows(idefics2.tokenizer), (Size(16, 8),), (Size(_LATE, 8),)
    processor = Processor(made, "it")
    with ThreadPoolExecutor(1) as threads:
        coming = threads.submit(processor.replacements, late)
        assert made.begun.wait(20)
        found = processor.replacements(early)
        made.go_on.set()
        assert coming.result() == ["<image>" * 5]
    assert processor.gaps(["", ""], early) == WrittenAround("", found, "")
    assert found == ["<image>" * 2]


class _Begins:
    """A processor that writes the token that begins a text, and tokens of a picture among which its place is none, as
    Molmo 2's."""

    image_token = "<image>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, lambda images: {"pixel_values": torch.zeros(1, 3, 2, 2)}

    def create_mm_token_type_ids(self, input_ids: Any) -> Any:
        return [[0] * len(ids) for ids in input_ids]

    def __call__(self, text: list[str], images: Any = None, **_: Any) -> dict[str, Any]:
        patches = "<fake_token_around_image>" * 3
        made = self.tokenizer(["<s>" + text[0].replace("<image>", patches)], return_tensors="pt")
        placed = [{"text": "<image>", "replacement": patches}] * text[0].count("<image>")
        return {**made, **self.image_processor(images), "text_replacement_offsets": [placed]}


def test_what_begins_a_text_stands_before_pictures_without_the_token_of_their_place(idefics2: Any) -> None:
    made = _Begins(idefics2.tokenizer)
    processor, patches = Processor(made, "it"), "<fake_token_around_image>" * 3
    assert processor.gaps(["See ", " and ", "."], (Size(8, 8), Size(8, 8))) == WrittenAround(
        "<s>", [patches, patches], ""
    )
    (expected,) = made(["See <image>."])["input_ids"].tolist()
    assert processor.encode(f"<s>See {patches}.") == expected
