"""The trial of a base that sees finds a class that cannot be trained with pictures, and the processor says why it is
refused."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from launcher.plan.planning import plan_run
from trainer.base.describe.description import describe
from trainer.base.describe.empty_model import LanguagePart
from trainer.base.describe.language_model import inner_of, outputs_lack_nothing
from trainer.base.describe.trial.small import small_settings
from trainer.base.find.locate import resolve_base
from trainer.base.find.media.sound import SOUND
from trainer.base.find.media.still import STILL, Size
from trainer.base.find.media.video import VIDEO
from trainer.base.find.processor import Processor, _around, read_processor
from trainer.base.find.small_files import read_config
from trainer.base.find.without_files import without_values
from trainer.base.load import front as loading
from trainer.base.load import sight, sight_cost
from trainer.base.load.front import load_front, values_beside
from trainer.base.load.sight_cost import _Fused, _ShapesAlone, sight_costs
from trainer.config import Model, override, parse_config
from trainer.data.compile.prepare import prepare
from trainer.errors import ConfigError, DataError
from trainer.model import front
from trainer.model.attention import Attention
from trainer.model.documents import keep_documents_apart
from trainer.model.front import CannotSee
from trainer.model.micro_batch import ModelInput, Role, Seen, Segments
from trainer.model.packed import PackedModel
from trainer.plan.resolve import mismatches
from trainer.store.safetensors_index import PackedSources, PackedTensor
from trainer.store.store import open_store
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

pytest.importorskip("torchvision")
from tests.seeing import make_pictured, seeing_base

_PICTURES = """
run: {{name: seeing}}
model: {{base: {base}, dtype: fp32}}
data: {{format: pictures, train: [{{path: rows.jsonl}}], sequence_length: 128}}
train: {{steps: 4, micro_batch: 1}}
quant: {{type: none}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("base"), "gemma3")


@pytest.fixture
def small(base: Path) -> Any:
    return sight.small_seeing(AutoConfig.from_pretrained(base))


def test_a_class_that_sees_passes(base: Path, small: Any) -> None:
    keeps = {"fails": None, "values": 4 / 10}  # the text of a picture has six tokens around its own
    assert sight.try_pictures(small, read_processor(base, "it")) == {"fails": None, "keeps": keeps}


@pytest.mark.parametrize(("kind", "heads"), [("gemma3", ("AutoModelForSequenceClassification",)), ("qwen3_vl", ())])
def test_a_base_that_sees_has_the_heads_that_transformers_has_a_class_for(
    kind: str, heads: tuple[str, ...], tmp_path: Path
) -> None:
    seeing_base(tmp_path, kind)
    assert describe(read_config(str(tmp_path), tmp_path), name="it").architecture.heads == heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_counts_the_bytes_that_a_rank_loads(base: Path, dtype: torch.dtype) -> None:
    found = resolve_base(Model(base=str(base)))
    _, size = load_front(found, None, dtype, "sdpa", torch.device("cpu"))
    assert dtype.itemsize * found.architecture.weights_beside == pytest.approx(size, rel=0.02)
    assert size > 0


def test_over_kept_features_the_weights_that_are_needed_are_loaded_alone(base: Path) -> None:
    found, name = resolve_base(Model(base=str(base))), "model.multi_modal_projector.mm_input_projection_weight"
    front, size = load_front(found, None, torch.float32, "sdpa", torch.device("cpu"), {name})
    loaded = {name: value for name, value in front.whole.named_parameters() if not value.is_meta}
    assert list(loaded) == [name]
    assert size == loaded[name].numel() * 4
    values = values_beside(found, None, [name])
    assert list(values) == [name]
    assert torch.equal(values[name], loaded[name])
    assert values[name].shape == loaded[name].shape


def test_a_part_that_sees_is_refused_where_its_files_do_not_fit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve_base(Model(base=str(base)))
    name = "model.multi_modal_projector.mm_input_projection_weight"

    def refusal(change: Any) -> str:
        def convert(*given: Any) -> Any:
            made = plain(*given)
            made.sources[name] = change(made.sources[name])
            return made

        with monkeypatch.context() as patched:
            patched.setattr(loading, "convert", convert)
            with pytest.raises(ConfigError) as error:
                load_front(found, None, torch.float32, "sdpa", torch.device("cpu"))
        return str(error.value)

    plain = loading.convert
    assert f"has no tensor {name}, which its tower (encoder and projector) needs." in refusal(lambda _: None)
    said = refusal(lambda source: replace(source, shape=source.shape[::-1]))
    assert re.search(rf"{re.escape(name)} is \[\d+, \d+\] in .*, \[\d+, \d+\] by config\.json\.", said)
    packed = PackedTensor((1, 2), PackedSources({}, None), "nf4", 64, "bfloat16")
    assert "is in 4 bits, but the run computes with the tower in 16." in refusal(lambda _: packed)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    blind: Any = SimpleNamespace(name="mine", directory=tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.base: mine is a language model, which takes no pictures\. Give"):
        load_front(blind, None, torch.float32, "sdpa", torch.device("cpu"))


def test_a_tied_weight_of_a_part_that_sees_is_read_by_its_first_name(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plain = "model.multi_modal_projector.mm_input_projection_weight", loading.convert

    def convert(*given: Any) -> Any:
        made = plain(*given)
        made.sources["first"] = made.sources.pop(name)
        return made

    monkeypatch.setattr(loading, "convert", convert)
    monkeypatch.setattr(loading, "tied_names", lambda _: {name: "first"})
    assert list(values_beside(resolve_base(Model(base=str(base))), None, [name])) == [name]


def test_a_kernel_that_a_base_names_and_this_machine_may_lack_is_not_taken(base: Path, tmp_path: Path) -> None:
    named = shutil.copytree(base, tmp_path / "named")
    config = json.loads((named / "config.json").read_bytes())
    config["attn_implementation"] = "flash_attention_2"
    (named / "config.json").write_text(json.dumps(config))
    assert sight.sight_of(str(named), "it", True)["fails"] is None
    front, _ = load_front(resolve_base(Model(base=str(named))), None, torch.float32, "sdpa", torch.device("cpu"))
    whole: Any = front.whole
    assert whole.config.vision_config._attn_implementation == "sdpa"


def test_a_class_without_sdpa_is_loaded_and_its_tower_that_learns_is_measured(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts have SDPA all the same, as GOT-OCR 2's."""
    found = resolve_base(Model(base=str(base)))
    monkeypatch.setattr(Gemma3ForConditionalGeneration, "_supports_sdpa", False)
    front, _ = load_front(found, None, torch.float32, "sdpa", torch.device("cpu"))
    whole: Any = front.whole
    assert whole.config.vision_config._attn_implementation == "sdpa"
    config = parse_config(_PICTURES.format(base=base) + "tuning: {towers: lora}\n")
    learning = {"dtype": "fp32", "attention": "sdpa", **(method_of(config).sees(found.architecture) or {})}
    (cost,) = sight_costs(str(base), "it", [(64, 64)], learning)
    assert cost["kept"]["plain"][1] > 0


def test_attention_without_values_has_the_form_that_its_kernels_give() -> None:
    """Heads of a token lie side by side, as they are put afterwards without a copy."""
    query, key, value = (torch.empty(2, 3, *sizes, device="meta") for sizes in ((5, 4), (7, 4), (7, 6)))
    with _Fused():
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert found.shape == (2, 3, 5, 6)
    assert found.transpose(1, 2).is_contiguous()


def test_masks_and_grids_have_values_beside_tensors_that_have_none() -> None:
    states, mask = torch.empty(4, 3, device="meta"), torch.tensor([True, False, True, True])
    with _ShapesAlone():
        assert states[mask].shape == (3, 3)
        assert states[:, torch.tensor([0, 2])].shape == (4, 2)
        assert states[None, mask, :2].shape == (1, 3, 2)
        states[mask] = torch.ones(3, 3)
        assert torch.zeros_like(states, device="cpu").is_meta
        assert torch.arange(4, device="meta").tolist() == [0, 1, 2, 3]
        assert torch.ones(2).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            TypeError("not of my own class"),
            "a small model of its class fails over them (TypeError: not of my own class)",
        ),
        (CannotSee("its class computes nothing by them"), "its class computes nothing by them"),
    ],
)
def test_a_class_whose_features_cannot_be_kept_still_sees(base: Path, small: Any, raised: Exception, said: str) -> None:
    """It asks for a field of their output in a way that nothing else than the output has."""
    kind, plain = type(small.model), type(small.model).get_placeholder_mask

    class Asks(kind):  # type: ignore[misc, valid-type]
        def get_placeholder_mask(self, *arguments: Any, **given: Any) -> Any:
            if "get_image_features" in vars(self):
                raise raised
            return plain(self, *arguments, **given)

    small.model.__class__ = Asks
    found = sight.try_pictures(small, read_processor(base, "it"))
    assert found["fails"] is None
    assert found["keeps"] == {"fails": said, "values": 0.0}


def test_a_class_that_sees_nothing_fails(base: Path, small: Any) -> None:
    small.model.multi_modal_projector.mm_input_projection_weight.data.zero_()
    fails = sight.try_pictures(small, read_processor(base, "it"))["fails"]
    assert fails == "another picture changes nothing in a small model of its class"


def test_a_tower_of_many_convolutions_lets_a_picture_through() -> None:
    """FastVLM's has dozens, which transformers begins with so small weights that nothing is left behind them."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Conv2d(8, 8, 3, padding=1)
            self.factor = torch.nn.Parameter(torch.full((8, 1, 1), 1e-5))
            torch.nn.init.normal_(self.kernel.weight, 0, 0.02)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kernel(x) + self.factor * self.kernel(x)

    tower = torch.nn.Sequential(*[Scaled() for _ in range(40)])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        pixels = torch.rand(2, 8, 16, 16)
        assert tower(pixels).diff(dim=0).abs().max() < 1e-6
        sight.fill(tower)
        assert 1e-2 < tower(pixels).diff(dim=0).abs().max() < 1e2


@pytest.mark.parametrize(
    ("read", "fails"),
    [
        # Gemma 4 E2B and E4B do this, and use nothing of it.
        (lambda decoder, states: states, None),
        (lambda decoder, states: decoder.embed_tokens.weight[0] + states, "document 1 of a row is another than alone"),
        (lambda decoder, states: states + decoder.norm.weight, "its class computes with weights of its decoder"),
    ],
)  # fmt: skip
def test_a_class_that_reads_its_decoder_before_the_decoder_fails_if_it_uses_what_it_reads(
    read: Any, fails: str | None, base: Path, small: Any
) -> None:
    """A run has no weights of the decoder there."""
    kind, plain = type(small.model), type(small.model).get_image_features

    class Reads(kind):  # type: ignore[misc, valid-type]
        def get_image_features(self, *arguments: Any, **given: Any) -> Any:
            _ = self.language_model.embed_tokens.weight[0].view(1, 1, -1) + torch.zeros(1)
            made = plain(self, *arguments, **given)
            made.pooler_output = read(self.language_model, made.pooler_output)
            return made

    small.model.__class__ = Reads
    found = sight.try_pictures(small, read_processor(base, "it"))["fails"]
    assert found is None if fails is None else str(found).startswith(fails)


def test_documents_that_see_each_other_fail(base: Path, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = front._masks

    def together(values: Any, lengths: Any) -> torch.Tensor:
        masks = apart(values, lengths)
        assert masks.dtype == torch.bool
        masks[..., lengths[0] :, : lengths[0]] = True
        return masks

    monkeypatch.setattr(front, "_masks", together)
    fails = sight.try_pictures(small, read_processor(base, "it"))["fails"]
    assert fails == "document 2 of a row is another than alone in a small model of its class"


def test_a_decoder_that_sees_all_of_its_row_is_tried_with_one_document_in_each(base: Path, small: Any) -> None:
    def see_all_before(_module: Any, _given: Any, made: Any) -> Any:
        made.last_hidden_state = made.last_hidden_state + made.last_hidden_state.cumsum(1)
        return made

    inner_of(small).register_forward_hook(see_all_before)
    processor, again = read_processor(base, "it"), copy.deepcopy(small)
    fails = sight.try_pictures(small, processor)["fails"]
    assert fails == "document 2 of a row is another than alone in a small model of its class"
    assert sight.try_pictures(again, processor, isolates=False)["fails"] is None


def test_pictures_are_refused_in_one_sentence_where_documents_would_see_each_other(base: Path) -> None:
    """The setting that it names helps."""
    found = resolve_base(Model(base=str(base)))
    config = parse_config(_PICTURES.format(base=base))
    mixing = replace(found.description, architecture=replace(found.architecture, isolates_documents=False))

    def refusals(config: Any, description: Any = mixing) -> list[str]:
        method = method_of(config)
        return mismatches(config, description, method, find_objective(config, method))

    (said,) = refusals(config)
    assert said.startswith("data.packing: documents of one row would see each other")
    assert said.endswith("Set data.packing: false.")
    assert not refusals(override(config, "data.packing=false"))
    blind = replace(mixing, architecture=replace(mixing.architecture, weights_beside=0))
    (said,) = refusals(config, blind)
    assert said.startswith("data.format: pictures: this base has no tower (")


def test_a_document_alone_in_its_row_is_computed_with_its_pictures(base: Path) -> None:
    """A decoder that sees all of its row gets the document and the padding behind it as one."""
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    processor = read_processor(base, "it")
    document = sight._document(processor, ("See", " it."), (Size(64, 96),))
    with torch.no_grad():
        expected = sight._states(whole, document)
    made, _ = load_front(resolve_base(Model(base=str(base))), None, torch.float32, "eager", torch.device("cpu"))
    model = LanguagePart.of(whole)
    keep_documents_apart(model)
    ids, padding = document.pop("input_ids"), 7
    segments = Segments((ids.shape[1], padding), (Role.DOCUMENT, Role.PADDING))
    positions = torch.cat([torch.arange(length) for length in segments.lengths])[None]
    row = ModelInput.of(torch.nn.functional.pad(ids, (0, padding)), positions, segments)
    packed = PackedModel(model, Attention("eager", ""), padding=1, isolates=False, front=made)
    with torch.no_grad():
        found = packed.hidden(replace(row, seen=(Seen(0, document),)))
    assert torch.allclose(found[:, : ids.shape[1]], expected, atol=1e-5)


def test_an_output_without_the_hidden_states_of_a_tower_says_so() -> None:
    """transformers asks whether an output has them, and would take None for the states of Mistral 3's last layer."""
    with outputs_lack_nothing():
        output: Any = BaseModelOutput(last_hidden_state=None)
        assert not hasattr(output, "vision_hidden_states")
        assert output.image_outputs is None


def test_a_tower_keeps_how_many_times_its_layers_are_wide() -> None:
    """Llama 4 puts as many patches side by side as make the inner width."""
    made = sight._sized({"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34}, is_tower=True)
    assert made["intermediate_size"] == 4 * made["hidden_size"] < 1408
    assert made["num_hidden_layers"] < 34


def test_what_single_layers_of_a_tower_have_goes_with_them_and_channels_are_as_few_as_the_width() -> None:
    settings = {"num_hidden_layers": 42, "per_layer_config": {"1": {"experts": 4}, "25": {"experts": 8}}}
    made = sight._sized({**settings, "downsample_channels": [512, 896], "hidden_size": 896}, is_tower=True)
    assert made["per_layer_config"] == {"1": {"experts": 4}}
    assert made["downsample_channels"] == [made["hidden_size"]] * 2


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("deepstack_visual_indexes", [8, 16, 24], [1, 2, 3]),  # as many, of the last that are there
        ("out_layers", [2, 3, 4], [1, 2, 3]),
        ("feature_layer", [0, 3], [0, 3]),  # there already
        ("layers", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),  # more than there are
        ("sizes", [8, 16, 24], [8, 16, 24]),
        ("sizes", list(range(27)), list(range(27))),
        ("layer_sizes", [2] * 27, [2] * 4),  # one for each layer
        ("layer_types", ["a", "b", "c"] * 9, ["a", "b", "c", "a"]),
        ("types", ["a"] * 27, ["a"] * 27),
        ("layer_types", ["a"] * 26, ["a"] * 26),
    ],
)
def test_lists_about_the_layers_of_a_tower_are_about_those_that_are_left(
    key: str, value: list[Any], expected: list[Any]
) -> None:
    settings = {"depth": 27, key: value}
    assert sight._sized(settings, is_tower=True) == {"depth": 4, key: expected}
    assert sight._sized(settings, is_tower=False) == settings
    assert sight._sized({key: value}, is_tower=True) == {key: value}  # nothing says how many layers there are


def test_a_processor_that_writes_other_tokens_for_real_pictures_is_refused(
    base: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that begins every text may come before them."""
    own = [4, 5, 6]
    assert sight._ends(own, own)
    assert sight._ends([1, *own], own)
    assert not any(sight._ends(every, own) for every in ([1, 1, *own], [5, 6], [4, 5, 7], [1, 4, 5, 7]))
    monkeypatch.setattr(Processor, "is_plain", False)
    monkeypatch.setattr(Processor, "tokens", lambda *_: own)
    with pytest.raises(CannotSee, match="writes other tokens for real pictures than for blank ones"):
        sight.try_pictures(small, read_processor(base, "it"))


def test_what_a_template_writes_around_files_stands_around_their_places_and_pictures_need_none() -> None:
    processor: Any = SimpleNamespace(written_around=lambda modality: (f"<{modality.kind}>", f"</{modality.kind}>"))
    given = ("See ", " and ", " it.")
    clip, sound = VIDEO.small, SOUND.small
    assert sight._within(processor, given, (clip, sound)) == ["See <video>", "</video> and <audio>", "</audio> it."]
    assert sight._within(processor, given, (STILL.small, clip)) == ["See ", " and <video>", "</video> it."]
    assert sight._within(processor, given[:1], ()) == ["See "]


@pytest.mark.parametrize(("fails", "said"), [(None, None), (ValueError("no such\nand more"), "ValueError: no such")])
def test_files_of_several_modalities_are_tried_in_one_document(
    base: Path, monkeypatch: pytest.MonkeyPatch, fails: Exception | None, said: str | None
) -> None:
    tried = list[Any]()

    def states(_whole: Any, _document: Any) -> None:
        if fails is not None:
            raise fails

    processor = SimpleNamespace(takes=[STILL, VIDEO, SOUND])
    monkeypatch.setattr(sight, "read_processor", lambda *_: processor)
    monkeypatch.setattr(sight, "small_seeing", lambda _: None)
    monkeypatch.setattr(sight, "_document", lambda processor, words, shapes: tried.append((words, shapes)))
    monkeypatch.setattr(sight, "_states", states)
    assert sight.mixture_of(str(base), "it", ["image", "audio"]) == {"fails": said}
    assert tried == [(("See", " and", " it."), (STILL.small, SOUND.small))]


def test_a_modality_is_tried_by_its_kind_and_else_the_first_that_a_base_takes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[Any]()
    processor = SimpleNamespace(takes=[STILL, VIDEO])
    monkeypatch.setattr(sight, "read_processor", lambda *_: processor)
    monkeypatch.setattr(sight, "small_seeing", lambda _: None)
    monkeypatch.setattr(sight, "try_pictures", lambda *given: tried.append(given[2:]) or {})
    for kind in (None, "video", "image", "audio"):
        sight.sight_of(str(base), "it", True, kind)
    assert tried == [(True, one) for one in (STILL, VIDEO, STILL, STILL)]


def test_a_tower_has_the_layers_that_features_are_taken_of() -> None:
    config = AutoConfig.for_model("vipllava", vision_feature_layers=[-2, -5, 6])
    made = sight._smaller(config, config.get_text_config())
    assert made.vision_config.num_hidden_layers == 7
    assert made.vision_feature_layers == [-2, -5, 6]


@pytest.mark.parametrize("wide", [64 * 4, 1536 * 4])
def test_a_width_of_patches_side_by_side_stays_one(wide: int) -> None:
    """Muse's projector reads squares of 2 x 2 patches."""
    config = AutoConfig.for_model("muse_glimmer", out_hidden_size=wide, vision_config={"hidden_size": wide // 4})
    made = sight._smaller(config, config.get_text_config())
    assert made.out_hidden_size == 4 * made.vision_config.hidden_size == 256


def test_layers_that_name_the_source_of_their_keys_are_few_kinds() -> None:
    """Each of Mistral Large 4's 72 layers names another one, most of them itself."""
    text = AutoConfig.for_model("mistral_large4").get_text_config()
    assert small_settings(text)["kv_source_layers"] == [0, 1, 2]
    text.kv_source_layers[5:7] = [4, 4]
    assert small_settings(text)["kv_source_layers"] == [0, 1, 2, 2]


EIGHT = Size(8, 8)


class _Made:
    """A processor whose types of tokens follow from more than the ids, as those of Idefics 3."""

    image_token = "<image>"
    tokenizer: Any = None

    def create_mm_token_type_ids(self, input_ids: Any, batch_image_seq_lengths: Any) -> Any:
        raise AssertionError("nobody knows these lengths")

    def __call__(self, *, return_mm_token_type_ids: bool, **given: Any) -> dict[str, Any]:
        assert not return_mm_token_type_ids
        replaced = [[{"text": "<image>", "replacement": "<image><image>"} for _ in given["images"][0]]]
        return {
            "input_ids": torch.zeros(1, 2, dtype=torch.long),
            "attention_mask": torch.ones(1, 2),
            "pixel_values": torch.zeros(len(given["images"][0]), 3, 8, 8),
            "text_replacement_offsets": replaced,
        }


def test_types_that_do_not_follow_from_the_ids_are_left_out() -> None:
    processor = Processor(_Made(), "it")
    assert processor.replacements((EIGHT, EIGHT)) == ["<image><image>"] * 2
    assert list(processor.inputs([STILL.blank(EIGHT)], [1, 2])) == ["pixel_values"]


class _Around(_Made):
    """A processor that takes the token of a picture between two others alone, as its template writes it."""

    image_token = "<image>"

    def apply_chat_template(self, talk: Any, **_: Any) -> str:
        return "user: " + "".join(one.get("text", "<from><image><to>") for one in talk[0]["content"])

    def __call__(self, *, text: list[str], **given: Any) -> dict[str, Any]:
        if text[0].count("<from><image><to>") != len(given["images"][0]):
            raise ValueError("bare")
        return super().__call__(**given)


def test_a_place_for_a_picture_is_what_the_template_writes_where_the_token_alone_is_none() -> None:
    processor = Processor(_Around(), "it")
    assert processor.token == "<image>"
    assert processor.replacements((EIGHT, EIGHT)) == ["<image><image>"] * 2
    assert processor.written_around(STILL) == ("<from>", "<to>")


class _Elsewhere(_Around):
    """A processor whose template writes the token of no file."""

    def apply_chat_template(self, talk: Any, **_: Any) -> str:
        return "user: " + "".join(one.get("text", " a file ") for one in talk[0]["content"])

    __call__ = _Made.__call__


def test_nothing_stands_around_a_file_that_no_template_writes() -> None:
    assert Processor(_Made(), "it").written_around(STILL) == ("", "")
    assert Processor(_Elsewhere(), "it").written_around(STILL) == ("", "")


class _OfNothing(_Made):
    """A processor that makes no token of a picture of few pixels."""

    def __call__(self, **given: Any) -> dict[str, Any]:
        made = super().__call__(**given)
        for one, picture in zip(made["text_replacement_offsets"][0], given["images"][0], strict=True):
            one["replacement"] *= picture.width > 8
        return made


def test_a_picture_of_which_no_token_is_made_is_refused() -> None:
    processor = Processor(_OfNothing(), "it")
    assert processor.replacements((Size(9, 9),)) == ["<image><image>"]
    with pytest.raises(
        DataError, match=r"^its picture of 8 x 8 pixels is refused by .* \(it makes no token of so little"
    ):
        processor.replacements((EIGHT,))
    with pytest.raises(
        DataError, match=r"^its picture of 9 x 9 pixels, picture of 8 x 8 pixels are refused by the base's processor"
    ):
        processor.replacements((Size(9, 9), EIGHT))


def test_the_text_of_tokens_has_those_that_no_reader_sees(base: Path) -> None:
    processor = read_processor(base, "it")
    ids = processor.encode("a b")
    begin = processor.made.tokenizer.bos_token_id
    assert processor.decode([begin, *ids]) == processor.made.tokenizer.bos_token + "a b"


def test_the_tokenizer_of_a_run_takes_the_place_of_its_bases(base: Path) -> None:
    own = copy.deepcopy(read_processor(base, "it").made.tokenizer)
    own.add_tokens(["<more>"])
    assert read_processor(base, "it", own).made.tokenizer is own
    assert read_processor(base, "it").made.tokenizer is not own


class _Fewer(_Made):
    """A processor that makes fewer tokens of a picture which is not alone, as LLaVA-OneVision's."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens: [1, 1, 1, 1, 1, *[7] * text.count("<image>")],
            get_added_vocab=lambda: {"<image>": 7},
        )

    def __call__(self, **given: Any) -> dict[str, Any]:
        count = len(given["images"][0])
        one = {"text": "<image>", "replacement": "<image>" * (4 if count == 1 else 2)}
        return {**super().__call__(**given), "text_replacement_offsets": [[one] * count]}


def test_pictures_that_have_other_tokens_together_belong_together() -> None:
    processor = Processor(_Fewer(), "it")
    assert processor.together((EIGHT, EIGHT))
    assert not processor.together((EIGHT,))
    assert processor.lacks((EIGHT, EIGHT), np.array([7, 7, 1], np.int32)) == 2


class _OfExperts(_Made):
    def create_mm_token_type_ids(self, input_ids: Any) -> Any:  # type: ignore[override]
        return [[0] * len(ids) for ids in input_ids]

    def create_moe_mm_token_type_ids(self, input_ids: Any) -> Any:
        return [[1] * len(ids) for ids in input_ids]

    def __call__(self, *, return_mm_token_type_ids: bool, **given: Any) -> dict[str, Any]:
        made = super().__call__(return_mm_token_type_ids=False, **given)
        return {**made, "mm_token_type_ids": torch.zeros(1, 2), "moe_mm_token_type_ids": torch.ones(1, 2)}


def test_a_class_gets_every_type_of_its_tokens() -> None:
    """ERNIE's experts for pictures have types of their own."""
    found = Processor(_OfExperts(), "it").token_types([5, 6, 7])
    assert {name: value.tolist() for name, value in found.items()} == {
        "mm_token_type_ids": [[0, 0, 0]],
        "moe_mm_token_type_ids": [[1, 1, 1]],
    }


class _Listing(_Made):
    def __init__(self, listed: list[Any]) -> None:
        self.listed = listed
        super().__init__()

    def __call__(self, **given: Any) -> dict[str, Any]:
        return {**super().__call__(**given), "num_local_patches": self.listed}


def test_a_class_gets_a_list_of_numbers_as_its_processor_makes_it() -> None:
    """Unlimited OCR's cuts a tensor by it, which takes a list alone."""
    for listed in ([1], [[2, 3]]):
        inputs = Processor(_Listing(listed), "it").inputs([STILL.blank(EIGHT)], [5])
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
        assert front.as_taken(inputs, torch.float32)["num_local_patches"] == listed


@pytest.mark.parametrize("listed", [["a"], [1.5], [[1], [1, 2]]], ids=str)
def test_a_processor_that_makes_another_list_is_refused(listed: list[Any]) -> None:
    with pytest.raises(ConfigError, match="the processor of it makes a list of num_local_patches and no tensor"):
        Processor(_Listing(listed), "it")


class _Refusing(_Made):
    def __call__(self, **given: Any) -> dict[str, Any]:
        raise ValueError("a picture must stand between two tokens")


def test_a_processor_that_refuses_a_plain_place_is_refused_with_its_words() -> None:
    said = (
        "model.base: the processor of it refuses a text in which '<image>' stands for a picture .a picture must stand"
        " between two tokens.. Give another base."
    )
    with pytest.raises(ConfigError, match=f"^{said}$"):
        Processor(_Refusing(), "it")


def test_a_plan_says_how_many_bytes_kept_features_take(base: Path, tmp_path: Path) -> None:
    rows = make_pictured(tmp_path / "rows", 8)
    text = f"""
model: {{base: {base}, dtype: fp32}}
data: {{format: pictures, train: [{{path: {rows}}}], sequence_length: 128}}
train: {{steps: 4}}
run: {{name: planned, store: {tmp_path / "store"}}}
cluster: {{gpus_per_worker: 0}}
quant: {{type: none}}
"""
    assert plan_run(parse_config(text), None, None).features is None
    config = parse_config(text + "sharding: {tower_limit: 0}\n")
    planned = plan_run(config, None, None)
    assert planned.plan.memory_per_gpu.frozen_tower == 0
    assert planned.features is not None
    assert planned.features.bytes is None
    prepare(config, resolve_base(config.model), open_store(config.run.store))
    planned = plan_run(config, None, None)
    # Eight pictures of four tokens each, of 64 values of four bytes.
    assert planned.to_json()["features"] == {
        "bytes_a_token": 103,
        "documents": 6,
        "bytes": pytest.approx(8192, rel=0.02),
    }
    assert (
        "features of pictures are kept in run.store, 103 bytes for each token of a picture: about 8.2 kB"
        in " ".join(planned.plan.notes)
    )


def test_a_class_that_draws_random_numbers_fails(base: Path, small: Any) -> None:
    """A row could not be checked, and its documents would not be what they are alone."""
    noisy = small.model.multi_modal_projector.register_forward_hook(lambda _, given, made: made + torch.rand_like(made))
    try:
        fails = sight.try_pictures(small, read_processor(base, "it"))["fails"]
    finally:
        noisy.remove()
    assert fails == "a small model of its class draws random numbers when it computes pictures"


@pytest.mark.parametrize(
    ("raised", "fails"),
    [
        (CannotSee("its class hands on what no row can have"), "its class hands on what no row can have"),
        (
            ValueError("no such size\nand more"),
            "a small model of its class could not be tried with pictures (ValueError: no such size)",
        ),
    ],
)
def test_a_base_whose_trial_fails_says_why(
    raised: Exception, fails: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_given: Any) -> Any:
        raise raised

    monkeypatch.setattr(sight, "small_seeing", lambda _: None)
    monkeypatch.setattr(sight, "try_pictures", refuses)
    assert sight.sight_of(str(base), "it", True) == {"fails": fails}


def test_a_refusal_of_the_trial_is_no_result_of_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_given: Any) -> Any:
        raise ConfigError("install it")

    monkeypatch.setattr(sight, "small_seeing", refuses)
    with pytest.raises(ConfigError, match="^install it$"):
        sight.sight_of(str(base), "it", True)


def test_a_base_that_takes_one_picture_for_each_text_is_tried_with_one() -> None:
    class One:
        def __init__(self, most: int) -> None:
            self._most = most

        def gaps(self, words: Any, shapes: tuple[Any, ...]) -> None:
            assert len(words) == len(shapes) + 1
            if len(shapes) > self._most:
                raise DataError("it takes fewer")

    one: Any = One(1)
    first, (two, *_) = STILL.tried[0], STILL.tried[1]
    tried = [(list(words), shapes) for words, shapes in sight._tried(one, STILL)]
    assert tried == [(["See", " it."], first), (["Here ", " and there "], (two,)), (["No picture here."], ())]
    none: Any = One(0)
    with pytest.raises(DataError, match="it takes fewer"):
        list(sight._tried(none, STILL))


def test_a_tower_of_levels_keeps_their_proportions_and_what_has_no_sizes_stays() -> None:
    found = sight._sized({"base_channels": 128, "hidden_size": 1024, "depth": 9}, is_tower=True)
    assert found == {"base_channels": 32, "hidden_size": 256, "depth": 4}
    assert sight._sized({"base_channels": 16, "hidden_size": 64}, is_tower=True)["base_channels"] == 16
    assert sight._sized({0: "a class"}, is_tower=True) == {0: "a class"}  # type: ignore[dict-item]
    named: Any = SimpleNamespace(to_dict=lambda: {"architecture": "resnet50", "model_args": {"depth": 3}})
    assert sight._smaller(named, named) is named, "its name decides its sizes"


def test_a_class_that_cannot_be_counted_still_has_tokens_and_seconds(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_given: Any) -> None:
            pass

        def look(self, *_given: Any) -> Any:
            raise ValueError("a tensor on meta has no values")

    monkeypatch.setattr(sight_cost, "Empty", Failing)
    threads = list[int]()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    (cost,) = sight_costs(str(base), "it", [(64, 96)])
    assert cost["operations"] is None
    assert cost["of"] == "picture of 96 x 64 pixels"
    assert cost["seconds"] > 0
    assert cost["tokens"] > 1
    assert threads == [1, 3], "one core is measured, and all are there afterwards"


def test_files_that_a_base_does_not_take_cost_as_one_of_usual_size_that_it_takes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sight_cost, "_cost", lambda empty, again, processor, shape: {"shape": shape})
    monkeypatch.setattr(sight_cost, "Empty", lambda *_given: None)
    sizes = [(64, 96), (96, 64)]
    assert [one["shape"] for one in sight_costs(str(base), "it", sizes)] == [Size(64, 96), Size(96, 64)]
    assert [one["shape"] for one in sight_costs(str(base), "it", sizes, modality=2)] == [STILL.usual]


@pytest.mark.parametrize(("took", "expected"), [([0.5, 0.2, 0.9, 0.3], 0.3), ([1.5, 2.0], 2.0)], ids=["short", "long"])
def test_the_time_of_a_file_is_the_median_after_a_first_one(
    took: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, left = [0.0], list(took)

    def work() -> None:
        clock[0] += left.pop(0)

    monkeypatch.setattr(sight_cost, "time", SimpleNamespace(process_time=lambda: clock[0]))
    assert sight_cost._time(work) == pytest.approx(expected)
    assert left == []


def test_what_a_tower_that_learns_keeps_is_told_apart_by_rows_of_two_and_of_three_pictures() -> None:
    def part(operations: int, of_row: int, of_token: int) -> Any:
        def look(_processor: Any, shapes: list[Any]) -> sight_cost._Looked:
            tokens = 5 * len(shapes)
            kept: Any = SimpleNamespace(bytes=of_row + of_token * tokens, layer=3 * tokens, largest=1 + 2 * tokens)
            return sight_cost._Looked(tokens, operations * len(shapes), kept)

        return SimpleNamespace(look=look)

    processor: Any = None
    assert sight_cost._learnt(part(100, 7, 40), part(130, 9, 10), processor, STILL.small) == {
        "repeated": 30,
        "kept": {"plain": (7, 40), "recomputed": (9, 10), "layer": 3, "largest": 2},
    }


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (SimpleNamespace(), "the processor of it has no token for a picture. Give another base."),
        (SimpleNamespace(image_token=None, audio_token=""), "has no token for a picture"),
    ],
)
def test_a_processor_that_takes_no_files_is_refused(processor: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Processor(processor, "it")


def test_a_base_without_a_processor_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"it has no preprocessor_config.json, so it takes no pictures\. Give a base that"
    ):
        read_processor(tmp_path, "it")
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: object())
    for file in ("processor_config.json", "video_preprocessor_config.json"):  # one of them is enough
        folder = tmp_path / file.partition(".")[0]
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(ConfigError, match="it has no processor of pictures and text. Give a base that sees."):
            read_processor(folder, "it")
    with pytest.raises(ConfigError, match="it has no processor of pictures and text. Give a base that sees."):
        read_processor(base, "it")


def test_pixels_without_values_have_their_shape_and_take_no_memory() -> None:
    made = without_values([np.ones((2, 3, 4), np.float32), torch.ones(1, 2, 3), torch.ones(2, 3), "a", np.ones(2)])
    assert [getattr(one, "shape", None) for one in made] == [(2, 3, 4), (1, 2, 3), (2, 3), None, (2,)]
    assert not made[0].any()
    assert not made[1].any()
    assert made[1].stride() == (0, 0, 0)
    assert bool(made[2].all()), "a size of each picture, or its grid"
    assert made[3] == "a"


def test_a_frozen_part_gets_its_weights_and_its_buffers() -> None:
    whole: Any = torch.nn.ModuleDict({"tower": torch.nn.BatchNorm1d(2)})
    for name in ("tower.weight", "tower.running_mean"):
        loading._set(whole, name, torch.tensor([3.0, 4.0]))
    tower = whole["tower"]
    assert tower.weight.tolist() == tower.running_mean.tolist() == [3, 4]
    assert not tower.weight.requires_grad
    assert dict(tower.named_buffers()).keys() >= {"running_mean"}


def test_a_processor_that_changes_a_text_is_refused() -> None:
    assert _around("See", "<s>See<image>") == ("<s>", "<image>")
    with pytest.raises(DataError, match="changes text outside of its pictures"):
        _around("See", "<s>see")
