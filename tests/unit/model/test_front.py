"""A packed row with pictures is what each of its documents is alone in plain transformers: logits and gradients of LoRA."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.families import SIZES
from trainer.base.describe.language_model import outputs_lack_nothing
from trainer.model.documents import keep_documents_apart
from trainer.model.features import Reads, alike, given_back, observed
from trainer.model.front import CannotSee, Front, _end_to_end, _Tokens, part_of_row
from trainer.model.micro_batch import Seen
from trainer.model.rows.row import lengths_known

_TEXT = {**SIZES, "num_hidden_layers": 4, "head_dim": 16}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_TOWER = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}}
IMAGE = 258
_BLOCKS = {"image_token_id": IMAGE, "text_config": {**_TEXT, **_WINDOWS}}
# A family -> its settings, the tokens that stand for one picture, and what its processor makes of a document: pixels
# (in patches, where the tower takes these) and the tokens' types.
FAMILIES: dict[str, dict[str, Any]] = {
    # Plain: the features take the place of states.
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "vision_feature_layer": -1,
        "image_seq_length": 4,
    },
    # A picture is a block of tokens that see each other, under windows and without.
    "gemma3": {
        **_BLOCKS,
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "mm_tokens_per_image": 4,
    },
    # A prompt is read in both directions, and positions begin at 1.
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma"},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
        "image_token_index": IMAGE,
        "projection_dim": 64,
    },
    # Positions turn by three axes, and features are added in deeper layers.
    "qwen3_vl": {
        "text_config": {**_TEXT, **_TURNED, "model_type": "qwen3_vl_text"},
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 16},
        "image_token_id": IMAGE,
        "vision_start_token_id": 257,
        "vision_end_token_id": 256,
    },
    # States of linear attention, with a convolution over the tokens before, go on through a document.
    "qwen3_5": {
        "text_config": {**_TEXT, **_TURNED, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 64, "num_position_embeddings": 16},
        "image_token_id": IMAGE,
        "vision_start_token_id": 257,
        "vision_end_token_id": 256,
    },
}
TOKENS = 4
_IN_PATCHES = ("qwen3_vl", "qwen3_5")
# The tokens before each picture of a document, and behind its last one.
DOCUMENTS = ((9, 14), (3, 5, 6), (11,))


def whole_model(kind: str) -> Any:
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # Gemma 3's projection begins as zeros
                parameter.normal_(0, 0.1)
    return model


def document(kind: str, words: Sequence[int], seed: int) -> dict[str, Tensor]:
    """What the processor of a family makes of a document: one picture lies between two stretches of words."""
    draw = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(3, 250, (words[0],), generator=draw)]
    for count in words[1:]:
        pieces += [torch.full((TOKENS,), IMAGE), torch.randint(3, 250, (count,), generator=draw)]
    ids, pictures = torch.cat(pieces)[None], len(words) - 1
    made = {"input_ids": ids}
    if kind == "paligemma":  # half of the words behind the last picture are the answer
        made["token_type_ids"] = (torch.arange(ids.shape[1]) >= ids.shape[1] - words[-1] // 2).long()[None]
    types = (ids == IMAGE).long()
    if pictures and kind in _IN_PATCHES:  # 4 x 4 patches of two frames, four of which are a token
        made["pixel_values"] = torch.randn(pictures * 16, 3 * 2 * 4 * 4, generator=draw)
        made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * pictures)
        made["mm_token_type_ids"] = types
    elif pictures:
        made["pixel_values"] = torch.randn(pictures, 3, 16, 16, generator=draw)
        made |= {"token_type_ids": types} if kind == "gemma3" else {}
    return made


def with_lora(model: Any) -> Any:
    """LoRA of random matrices on every linear layer of the decoder."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    targets = [f"{path}.{name}" for name, module in decoder.named_modules() if type(module) is nn.Linear]
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    return found


def packed(model: Any, front: Front, documents: Sequence[dict[str, Tensor]]) -> Tensor:
    """(T, V), by the decoder alone."""
    ids = torch.cat([one["input_ids"] for one in documents], 1)
    seen = [
        Seen(number, {name: value for name, value in one.items() if name != "input_ids"})
        for number, one in enumerate(documents)
        if len(one) > 1
    ]
    lengths = tuple(one["input_ids"].shape[1] for one in documents)
    with lengths_known(lengths):
        given = front.row(ids, model.get_input_embeddings(), lengths, seen)
        return model.lm_head(model.get_decoder()(**given, use_cache=False)[0])[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_with_pictures_is_each_of_its_documents_alone(kind: str) -> None:
    model = with_lora(whole_model(kind))
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    documents = [document(kind, words, seed) for seed, words in enumerate(DOCUMENTS)]
    alone = list[Tensor]()
    with outputs_lack_nothing():
        for one in documents:
            alone.append(model(**one, use_cache=False).logits[0])
            loss(alone[-1], one["input_ids"]).backward()
        expected = gradients(model)
        mirrored = {**documents[0], "pixel_values": documents[0]["pixel_values"].flip(-1)}
        moved = model(**mirrored, use_cache=False).logits[0, -1] - alone[0][-1]
    assert moved.abs().max() > 1e-3 * alone[0][-1].abs().max(), "it does not see"

    keep_documents_apart(model)
    found = packed(model, front, documents)
    each = found.split([one["input_ids"].shape[1] for one in documents])
    for one, other in zip(each, alone, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    torch.stack([loss(one, given["input_ids"]) for one, given in zip(each, documents, strict=True)]).sum().backward()
    learned = gradients(model)
    assert len(learned) > 8
    apart = sum(float((learned[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    assert apart <= 1e-5 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5

    with torch.no_grad():  # another picture in the first document changes no bit of the others
        changed = packed(model, front, [mirrored, *documents[1:]])
    size = documents[0]["input_ids"].shape[1]
    assert not changed[:size].equal(found[:size])
    assert changed[size:].equal(found[size:])


@pytest.mark.parametrize("kind", FAMILIES)
def test_kept_features_give_the_class_what_its_tower_gave_it(kind: str) -> None:
    """To the bit, also without any weight of the tower, and without pixels."""
    model = whole_model(kind)
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    documents = [document(kind, words, seed) for seed, words in enumerate(DOCUMENTS)]
    with torch.no_grad():
        expected = packed(model, front, documents)
    kept = list[dict[str, Tensor]]()
    for one in documents:
        ids = one["input_ids"]
        types = {name: value for name, value in one.items() if "token_type" in name}
        pixels = {name: value for name, value in one.items() if name not in ("input_ids", *types)}
        taken = front.taken_out(ids, pixels, types, torch.ones(*ids.shape, 64)).kept if pixels else {}
        assert "pixel_values" not in taken
        kept.append({"input_ids": ids, **taken, **types})
    for module in whole.modules():
        for name in module._parameters:
            module._parameters[name] = None
    with torch.no_grad():
        assert packed(model, front, kept).equal(expected)


@pytest.mark.parametrize("changed", ["prompt", "answer"])
@torch.no_grad()
def test_a_prompt_sees_its_end_and_nothing_sees_an_answer_that_follows(changed: str) -> None:
    """In a packed row, also for a document without a picture."""
    model = whole_model("paligemma")
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    documents = [document("paligemma", words, seed) for seed, words in enumerate(DOCUMENTS)]
    keep_documents_apart(model)
    plain = packed(model, front, documents)
    begin = 0
    for number, one in enumerate(documents):
        size, prompt = one["input_ids"].shape[1], int((one["token_type_ids"] == 0).sum())
        place = prompt - 1 if changed == "prompt" else prompt + 1
        other = one["input_ids"].clone()
        other[0, place] += 1
        found = packed(model, front, [*documents[:number], {**one, "input_ids": other}, *documents[number + 1 :]])
        differs = (found != plain).any(-1)
        assert differs[begin + place : begin + size].all()
        assert differs[begin : begin + prompt - 1].all() == (changed == "prompt")
        assert not differs[begin : begin + (0 if changed == "prompt" else place)].any()
        assert not differs[:begin].any()
        assert not differs[begin + size :].any()
        begin += size


def test_a_class_that_looks_at_pixels_beside_its_tower_cannot_do_without() -> None:
    whole = whole_model("gemma3")
    inner, plain = type(whole.model), type(whole.model).forward

    class Looks(inner):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **given: Any) -> Any:
            if given.get("pixel_values") is None:
                given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])
            return plain(self, *arguments, **given)

    whole.model.__class__ = Looks
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    one = document("gemma3", (3, 5), 1)
    ids, types = one["input_ids"], {"token_type_ids": one["token_type_ids"]}
    with pytest.raises(CannotSee, match="makes something else of kept features than of pixel_values"):
        front.taken_out(ids, {"pixel_values": one["pixel_values"]}, types, torch.ones(*ids.shape, 64))


@pytest.mark.parametrize(
    ("computes", "why"),
    [
        ("each picture by itself", "does not compute the features of all pictures of a document at once"),
        ("nothing", "does not compute the features of all pictures of a document at once"),
        ("a sum of pixels", r"cannot do without its tower \(AttributeError: .*'sum'\)"),
        ("other tokens", "^its class embeds tokens that are not those of the document"),
    ],
)
def test_a_class_whose_features_cannot_be_kept_is_refused_with_the_reason(computes: str, why: str) -> None:
    whole = whole_model("llava")
    inner, plain = type(whole.model), type(whole.model).forward

    class Computes(inner):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any = None, pixel_values: Any = None, **given: Any) -> Any:
            if computes == "each picture by itself":
                self.get_image_features(pixel_values=pixel_values, return_dict=True)
            if computes == "nothing":
                pixel_values = None
                input_ids = torch.where(input_ids == IMAGE, 5, input_ids)
            if computes == "a sum of pixels":
                pixel_values.sum()
            if computes == "other tokens" and pixel_values is None:
                self.get_input_embeddings()(input_ids[:, 1:])
            return plain(self, input_ids=input_ids, pixel_values=pixel_values, **given)

    whole.model.__class__ = Computes
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    one = document("llava", (3, 5), 1)
    ids = one.pop("input_ids")
    with pytest.raises(CannotSee, match=why):
        front.taken_out(ids, one, {}, torch.ones(*ids.shape, 64))


def _makes_tokens(model: Any, times: float) -> Any:
    """Make a model one that reads a picture as tokens of its vocabulary, as Emu 3 does, by states `times` as large."""

    class Reads(type(model.model)):  # type: ignore[misc]
        def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
            return (50 * pixel_values.flatten(1)[:, :TOKENS]).abs().long() % 250

        def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:
            found: Any = list(times * self.get_input_embeddings()(self.get_image_tokens(pixel_values)))
            return BaseModelOutputWithPooling(pooler_output=found)

    model.model.__class__ = Reads
    return model


def test_tokens_that_a_class_makes_of_pictures_are_looked_up_once_with_all_others() -> None:
    model = _makes_tokens(whole_model("llava"), 1.0)
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    looked_up, counted = list[Tensor](), front.operations
    model.get_input_embeddings().register_forward_hook(lambda module, given, result: looked_up.append(given[0]))
    documents = [document("llava", words, seed) for seed, words in enumerate(DOCUMENTS)]
    with torch.no_grad():
        for row in (documents[2:], documents, documents):  # that there are such tokens is seen in the first picture
            expected = torch.cat([model(**one).logits[0] for one in row])
            looked_up.clear()
            found = packed(model, front, row)
            assert [one.shape[1] for one in looked_up] == [len(found)]
            assert torch.allclose(found, expected, atol=1e-5)
    assert front.operations is counted, "and what was computed to see it does not count"
    assert (looked_up[0] == IMAGE).sum() == 0


def test_whether_a_class_makes_tokens_is_not_asked_of_features_that_were_kept() -> None:
    """They are no tokens of any vocabulary, whatever the class makes of pictures that follow."""
    model = _makes_tokens(whole_model("llava"), 1.0)
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    pictured = document("llava", DOCUMENTS[0], 0)
    features = torch.randn(TOKENS, 64)
    with torch.no_grad():
        packed(model, front, [{"input_ids": pictured["input_ids"], "features/pooler_output/0": features}])
        found = packed(model, front, [pictured])
        assert torch.allclose(found, model(**pictured).logits[0], atol=1e-5)


def test_a_class_that_changes_the_states_of_such_tokens_is_refused() -> None:
    model = _makes_tokens(whole_model("llava"), 2.0)
    whole = copy.deepcopy(model)
    front = Front(whole, whole.get_decoder(), whole.get_input_embeddings())
    with pytest.raises(CannotSee, match="its class embeds tokens that are not those of the document"):
        packed(model, front, [document("llava", DOCUMENTS[0], 0)])


@pytest.mark.parametrize("width", [3, 8])
def test_each_of_many_tokens_is_known_by_its_state(width: int) -> None:
    tokens, first, second = _Tokens(width, torch.bfloat16), torch.arange(90, 20_090), torch.tensor([5, 6])
    states = torch.cat([tokens.states_of(first[None]), tokens.states_of(second[None])], 1)
    order = torch.randperm(states.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens.found(states[:, order]), torch.cat([first, second])[None, order])
    with pytest.raises(CannotSee, match="changes the states of tokens before its decoder gets them"):
        tokens.found(states + 1)


def test_a_rank_has_the_values_of_its_own_tokens_and_of_the_pictures_in_them() -> None:
    pictured = torch.tensor([[False, True, True, False, False, True, True, True]])
    tokens, features = torch.arange(8.0).view(1, 8, 1), torch.tensor([1.0, 2.0, 5.0, 6.0, 7.0])[:, None]
    whole: Any = {
        "inputs_embeds": tokens,
        "position_ids": torch.arange(24).view(3, 1, 8),
        "visual_pos_masks": pictured,
        "deepstack_visual_embeds": [features, 10 * features],
        "attention_mask": {"full_attention": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
        "scale": 2.0,
    }
    parts: list[Any] = [part_of_row(whole, first, 4) for first in (0, 4)]
    for first, part in zip((0, 4), parts, strict=True):
        assert part["inputs_embeds"].flatten().tolist() == list(range(first, first + 4))
        assert part["position_ids"].tolist() == whole["position_ids"][..., first : first + 4].tolist()
        assert part["attention_mask"]["full_attention"].shape == (1, 1, 8, 8)
        assert part["scale"] == 2.0
        for times, own in zip((1, 10), part["deepstack_visual_embeds"], strict=True):
            assert torch.equal(own, times * part["inputs_embeds"][part["visual_pos_masks"]]), "a picture's own token"
    with pytest.raises(CannotSee, match="not known to which tokens the others of its decoder belong"):
        part_of_row({**whole, "others": torch.zeros(4, 2), "flags": torch.ones(1, 4, dtype=torch.bool)}, 0, 4)


def test_documents_that_want_different_values_of_one_number_are_refused() -> None:
    assert _end_to_end([2.0, None, 2.0], [3, 1, 2], "scale") == 2.0
    given = [None, {"scale": None, "size": 2.0}, {"scale": None}]
    assert _end_to_end(given, [3, 1, 2], "scales") == {"scale": None, "size": 2.0}
    with pytest.raises(CannotSee, match="takes one scale for all documents"):
        _end_to_end([2.0, None, 3.0], [3, 1, 2], "scale")


class _Body(nn.Module):
    """A decoder with an embedding of each layer's inputs beside that of states (Gemma 3n, Gemma 4 E2B)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.by_layer = nn.Embedding(20, 8), nn.Embedding(20, 6)

    def forward(self, inputs_embeds: Tensor, position_ids: Any = None, per_layer_inputs: Any = None) -> Any:
        return inputs_embeds


class _Looking(nn.Module):
    """A class that looks tokens up in both, and hands its decoder what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.tower = _Body(), nn.Linear(3, 8)

    def forward(self, input_ids: Tensor, pixels: Any = None, **_given: Any) -> Any:
        states, inputs = self.decoder.embed(input_ids), self.decoder.by_layer(input_ids)
        if pixels is not None:
            states = states + self.tower(pixels)
        return self.decoder(inputs_embeds=states, per_layer_inputs=inputs.unflatten(2, (3, 2)))


def test_what_a_class_looks_up_in_other_embeddings_of_its_decoder_is_that_of_the_one_that_trains() -> None:
    whole = _Looking()
    training: Any = copy.deepcopy(whole.decoder)
    nn.init.normal_(training.by_layer.weight)
    asked = list[int]()
    training.by_layer.register_forward_pre_hook(lambda _, given: asked.append(given[0].numel()))
    front = Front(whole, whole.decoder, whole.decoder.embed)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    seen = [Seen(1, {"pixels": torch.ones(1, 2, 3)})]
    handed = front.row(ids, training.embed, (3, 2), seen, decoder=training)
    assert torch.equal(handed["per_layer_inputs"], training.by_layer(ids).unflatten(2, (3, 2)))
    assert asked == [5, 5], "once for the row, as the ranks gather the embedding together"
    assert torch.equal(handed["inputs_embeds"][:, :3], training.embed(ids[:, :3]))
    expected = training.embed(ids[:, 3:]) + whole.tower(torch.ones(1, 2, 3))
    torch.testing.assert_close(handed["inputs_embeds"][:, 3:], expected)
    assert handed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    alone = front.row(ids, training.embed, (3, 2), seen)
    assert not alone["per_layer_inputs"].any(), "zeros without a decoder"


class _Drawing(_Looking):
    """A class that makes tokens of a picture, which take the places of the first ones."""

    def get_image_tokens(self, pixels: Tensor) -> Tensor:
        return pixels.long()[:, :, 0]

    def forward(self, input_ids: Tensor, pixels: Any = None, **_given: Any) -> Any:
        states = self.decoder.embed(input_ids)
        if pixels is not None:
            drawn = self.decoder.embed(self.get_image_tokens(pixels))
            states = torch.cat([drawn, states[:, drawn.shape[1] :]], 1)
        return self.decoder(inputs_embeds=states)


def test_a_class_without_weights_tells_the_shapes_of_a_row_with_pictures_that_become_tokens() -> None:
    whole = _Drawing().to("meta")
    front = Front(whole, whole.decoder, whole.decoder.embed)
    seen = [Seen(0, {"pixels": torch.ones(1, 2, 3, device="meta")})]
    ids = torch.ones(1, 7, dtype=torch.long, device="meta")
    handed = front.row(ids, lambda given: torch.empty(*given.shape, 8, device="meta"), (4, 3), seen)
    assert (handed["inputs_embeds"].shape, handed["inputs_embeds"].is_meta) == ((1, 7, 8), True)
    assert handed["position_ids"].shape == (1, 7)


class _Naming(_Body):
    """A decoder that names what classes of transformers pass on."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None, past_key_values: Any = None,
        cache: Any = None, return_dict: Any = None, output_hidden_states: Any = None, scales: Any = None,
    ) -> Any:  # fmt: skip
        raise AssertionError("it is not computed")


class _Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = _Naming()

    def forward(self, input_ids: Tensor, **_given: Any) -> Any:
        passed = {"past_key_values": [1], "cache": [1], "return_dict": True, "output_hidden_states": True, "labels": 1}
        return self.decoder(
            input_ids, self.decoder.embed(input_ids), True, **passed, scales=self.decoder.embed(input_ids)
        )


def test_a_decoder_gets_of_what_a_class_passes_on_only_what_belongs_to_a_packed_row() -> None:
    whole, embed, ids = _Passing(), nn.Embedding(20, 8), torch.tensor([[3, 4, 5, 6, 7]])
    handed = Front(whole, whole.decoder, whole.decoder.embed).row(ids, embed, (3, 2), [])
    assert handed.keys() == {"inputs_embeds", "scales", "position_ids"}
    assert torch.equal(handed["inputs_embeds"], embed(ids))
    assert torch.equal(handed["scales"], embed(ids))


def test_a_class_computes_without_dropout_and_nothing_of_it_learns() -> None:
    whole = nn.Module()
    whole.tower, whole.decoder = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), _Naming()
    front = Front(whole, whole.decoder, whole.decoder.embed)
    assert not any(module.training for module in front.whole.modules())
    assert not any(parameter.requires_grad for parameter in front.whole.parameters())


def test_a_class_that_does_without_its_decoder_is_refused() -> None:
    class Blind(_Looking):
        def forward(self, input_ids: Tensor, **_given: Any) -> Any:
            return self.decoder.embed(input_ids)

    whole = Blind()
    with pytest.raises(CannotSee, match="its class computes nothing by its decoder"):
        Front(whole, whole.decoder, whole.decoder.embed).row(torch.tensor([[1]]), nn.Embedding(20, 8), (1,), [])


@pytest.mark.parametrize("kept", ["pooler_output", "last_hidden_state/0"])
def test_what_was_kept_is_given_back_as_a_class_asks_for_it(kept: str) -> None:
    value = torch.ones(2, 3)
    (given,) = given_back({f"features/{kept}": value}).values()
    name, _, number = kept.partition("/")
    for found in (getattr(given, name), given[name]):
        assert (found[int(number)] if number else found) is value
    levels = [torch.ones(1) for _ in range(12)]
    (given,) = given_back({f"features/hidden_states/{number}": level for number, level in enumerate(levels)}).values()
    assert [found is level for found, level in zip(given["hidden_states"], levels, strict=True)] == [True] * 12


def test_a_video_that_a_class_encodes_as_pictures_is_kept_as_a_video_alone() -> None:
    class Encodes(nn.Module):
        def get_image_features(self, pixels: Tensor) -> Any:
            return SimpleNamespace(pooler_output=pixels)

        def get_video_features(self, frames: Tensor) -> Any:
            return self.get_image_features(frames)

    inner = Encodes()
    with observed(inner, Reads({})) as results:
        assert inner.get_video_features(torch.ones(1)).pooler_output == 1
    assert [list(one.kept()) for one in results] == [["features/video.pooler_output"]]


def test_features_are_alike_to_the_bit() -> None:
    one = {"a": torch.tensor([0.0, 1.0]), "b": [torch.ones(2, 3), None, 5]}
    assert alike(one, {"a": torch.tensor([0.0, 1.0]), "b": [torch.ones(2, 3), None, 5]})
    for other in (
        {**one, "a": torch.tensor([-0.0, 1.0])},
        {**one, "a": torch.tensor([0.0, 1.0]).view(torch.int32)},
        {**one, "a": torch.tensor([[0.0, 1.0]])},
        {"a": one["a"]},
        {**one, "b": [torch.ones(3, 2), None, 5]},
        {**one, "b": [torch.ones(2, 3), None]},
        {**one, "b": [torch.ones(2, 3), None, 6]},
        {**one, "b": None},
        one["a"],
    ):
        assert not alike(one, other)
