"""Features of pictures in a store: they come back as they were, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data.dataset.features import FeatureFiles, features_name, pictures_key
from trainer.data.dataset.pictures import PICTURE
from trainer.errors import Damaged
from trainer.store.store import Store, open_store

TENSORS = {
    "features/pooler_output/0": torch.linspace(-1, 1, 6).reshape(2, 3).bfloat16(),
    "features/deepstack/0/0": torch.linspace(-1, 1, 6).reshape(3, 2).t(),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
    "flag": torch.tensor(True),
}
INPUTS = {"image_grid_thw", "flag"}


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_every_tensor_comes_back_with_its_bits(folder: Store) -> None:
    files = FeatureFiles(folder, {"dtype": "bf16"})
    assert not files.has("ab")
    files.write("ab", TENSORS)
    assert files.has("ab")
    found = files.read("ab", INPUTS)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value)


def test_a_changed_byte_or_another_document_is_damage(folder: Store) -> None:
    files = FeatureFiles(folder, {})
    files.write("ab", TENSORS)
    content = bytearray(folder.get("ab/ab.safetensors"))
    folder.put("ac/ac.safetensors", bytes(content))
    content[-1] ^= 1
    folder.put("ab/ab.safetensors", bytes(content))
    for key in ("ab", "ac"):
        with pytest.raises(
            Damaged, match=f"{key}.safetensors has damaged features of pictures.*Delete .* computed again"
        ):
            files.read(key, INPUTS)
    with pytest.raises(Damaged, match="Delete .* computed again"):
        files.read("ad", INPUTS)


@pytest.mark.parametrize(
    "names",
    [
        ["features/pooler_output/x"],
        ["features/pooler_output/1"],
        ["features/pooler_output/00"],
        ["features/pooler_output", "features/pooler_output/0"],
        ["features/"],
        ["features/__class__"],
        ["input_ids"],
        ["use_cache"],
    ],
    ids=lambda names: names[0],
)
def test_names_that_are_no_features_are_one_sentence(names: list[str], folder: Store) -> None:
    """Whoever can write there can also write the right hash."""
    files = FeatureFiles(folder, {})
    files.write("ab", {name: torch.ones(1) for name in [*INPUTS, *names]})
    with pytest.raises(
        Damaged, match=r"no feature of a picture and no input of .*written it\. Delete .* computed again"
    ):
        files.read("ab", INPUTS)


def test_a_data_set_is_whole_once_that_is_written(folder: Store) -> None:
    files = FeatureFiles(folder, {"dtype": "fp32"})
    files.keep_weights({"projector.weight"})
    assert files.weights("train") is None
    files.finish("train", 3)
    assert files.weights("train") == {"projector.weight"}
    assert files.weights("eval") is None


def test_the_name_is_that_of_all_pictures_in_their_order_and_of_their_sizes() -> None:
    entries = np.zeros(2, PICTURE)
    entries["sha256"] = [b"a" * 32, b"b" * 32]
    entries["height"] = entries["width"] = 8
    moved, larger, wider = entries.copy(), entries.copy(), entries.copy()
    moved["begin"], larger["height"], wider["width"] = 5, 9, 9
    same, other = pictures_key(entries), {pictures_key(one) for one in (entries[::-1], larger, wider, entries[:1])}
    assert pictures_key(moved) == same
    assert len(other | {same}) == 5
    assert features_name({"dtype": "bf16"}) != features_name({"dtype": "fp32"})
