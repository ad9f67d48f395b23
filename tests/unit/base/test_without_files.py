"""What stands for files is found without making their pixels, and looked up where it is known."""

from typing import Any

import torch
from transformers import BatchFeature

from trainer.base.find.without_files import BlankPictures, BlankVideos, Listening, Steps


def test_a_length_between_two_of_one_text_has_that_text_and_any_other_has_its_own() -> None:
    steps = Steps()
    assert steps.find(5) is None
    steps.add(10, "<a>")
    steps.add(20, "<a>")
    steps.add(40, "<b>")
    steps.add(40, "<b>")
    found = {length: steps.find(length) for length in (9, 10, 15, 20, 21, 39, 40, 41)}
    assert found == {9: None, 10: "<a>", 15: "<a>", 20: "<a>", 21: None, 39: None, 40: "<b>", 41: None}


def test_a_tokenizer_notes_the_text_that_it_got_last() -> None:
    listening: Any = Listening(type("Tokenizer", (), {"__call__": lambda self, text, more: (text, more), "size": 3})())
    assert listening.heard is None
    assert listening(["one"], 1) == (["one"], 1)
    assert listening.heard == "one"
    assert listening("two", more=2) == ("two", 2)
    assert (listening.heard, listening.size) == ("two", 3)


class Made:
    """A processor of pixels that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = list[Any]()

    def __call__(self, sizes: list[tuple[int, int]], **given: Any) -> BatchFeature:
        self.asked.append(sizes)
        made = {"pixel_values": torch.ones(len(sizes), 3, *sizes[0]), "grid": torch.tensor(sizes)}
        return BatchFeature(made | ({"video_metadata": given["video_metadata"]} if given else {}))


def test_blank_pictures_of_the_same_sizes_are_made_once_and_have_no_values() -> None:
    made, known = Made(), dict[tuple[Any, ...], Any]()
    for number, sizes in enumerate([[(4, 6)], [(4, 6)], [(2, 2)], [(4, 6), (4, 6)]]):
        found = BlankPictures(made, tuple(sizes), known)(sizes)
        assert found["pixel_values"].shape == (len(sizes), 3, *sizes[0]), number
        assert not found["pixel_values"].any()
        assert found["grid"].tolist() == [list(size) for size in sizes]
        found.pop("grid")  # what its caller takes out stays for the next one
    assert made.asked == [[(4, 6)], [(2, 2)], [(4, 6), (4, 6)]]


def test_blank_videos_of_the_same_sizes_have_the_times_of_their_own_files() -> None:
    made, known = Made(), dict[tuple[Any, ...], Any]()
    for fps in (24.0, 30.0):
        told = [{"total_num_frames": 8, "fps": fps}]
        found = BlankVideos(made, ((4, 6),), known)([(4, 6)], video_metadata=told)
        assert [one.fps for one in found["video_metadata"]] == [fps]
    assert len(made.asked) == 1
