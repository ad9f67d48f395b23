"""A base that cannot be trained is refused before any rank starts, with the setting, the numbers and the way out."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tests.material import KINDS, SIZES, Workshop
from trainer.base.architecture import architecture_mismatches
from trainer.base.base import Description, file_versions
from trainer.base.describe.description import parse_base_config
from trainer.base.find import check as checks
from trainer.base.find.check import (
    LeftOutPart,
    check_base,
    check_sight,
    check_weights,
    content_of,
    left_out_sentence,
    tokenizer_size,
)
from trainer.base.find.locate import base_files, resolve_base
from trainer.base.find.media.still import STILL
from trainer.base.find.media.video import VIDEO
from trainer.base.load.load import empty_model
from trainer.base.rows.parameters import FoundWeights, find_all_weights, find_weights
from trainer.base.unreadable import read_by_transformers, without_panics
from trainer.config import Data, Model, Tuning, override
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.render.chat_template import template_text
from trainer.errors import ConfigError
from trainer.export.proof import plain
from trainer.model.attention import Attention
from trainer.store.store import open_store
from trainer.tuning.method import find_method


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(workshop.base, tmp_path / "base"))


def check(workshop: Workshop, base: Path | str, *overrides: str) -> None:
    config = workshop.config("check", f"model.base={base}", *overrides)
    check_base(resolve_base(config.model), config)
    check_weights(resolve_base(config.model), config.model)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_base_passes(workshop: Workshop, base: Path) -> None:
    check(workshop, base)
    assert tokenizer_size(base, str(base)) == 259


@pytest.mark.parametrize("name", ["config.json", "chat_template.json", "additional_chat_templates/tool_use.jinja"])
def test_a_pipe_or_a_device_among_its_files_is_refused_and_not_waited_for(base: Path, name: str) -> None:
    file = base / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(file)
        with pytest.raises(ConfigError, match=f"model.base: .*{name} cannot be read: it is no file, but a pipe"):
            resolve_base(Model(base=str(base)))
        file.unlink()


def test_so_is_a_template_that_is_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.jinja")
    with pytest.raises(ConfigError, match="data.template: .* cannot be read: it is no file, but a pipe"):
        template_text(Data.model_validate({"train": [{"path": "x"}], "template": str(tmp_path / "own.jinja")}))


def test_packing_is_refused_where_documents_would_see_each_other(workshop: Workshop, base: Path) -> None:
    config = workshop.config("check", f"model.base={base}")
    mixing = replace(resolve_base(config.model).architecture, isolates_documents=False)
    (sentence,) = architecture_mismatches(config, mixing)
    assert "data.packing" in sentence
    assert not architecture_mismatches(override(config, "data.packing=false"), mixing)


def test_rows_longer_than_the_positions_are_refused(workshop: Workshop, base: Path) -> None:
    check(workshop, base, "data.sequence_length=256")
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 257 exceeds the base's 256 positions"):
        check(workshop, base, "data.sequence_length=257")


@pytest.mark.parametrize("value", ["x", 0, -1.0, True, float("nan"), [1]])
def test_a_cap_that_is_no_positive_number_is_refused(value: object) -> None:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        with pytest.raises(ConfigError, match=rf"config\.json has {key} .*\. Possible are positive numbers and null\."):
            parse_base_config("base", json.dumps({**SIZES, **KINDS["gemma2"], key: value}).encode())


def test_more_layers_than_the_base_has_are_refused(workshop: Workshop, base: Path) -> None:
    check(workshop, base, "model.layers=2")
    with pytest.raises(ConfigError, match=r"model\.layers: 3 exceeds the base's 2 layers"):
        check(workshop, base, "model.layers=3")


def test_no_more_layers_keep_their_activations_than_are_trained_on(workshop: Workshop, base: Path) -> None:
    check(workshop, base, "train.activation_checkpointing=2")
    with pytest.raises(
        ConfigError, match=r"train\.activation_checkpointing: 3 exceeds the 2 layers that are trained on"
    ):
        check(workshop, base, "train.activation_checkpointing=3")
    check(workshop, base, "model.layers=1", "train.activation_checkpointing=1")
    with pytest.raises(
        ConfigError, match=r"train\.activation_checkpointing: 2 exceeds the 1 layers that are trained on"
    ):
        check(workshop, base, "model.layers=1", "train.activation_checkpointing=2")
    offloaded = ("model.layers=1", "train.activation_offload=true")
    check(workshop, base, *offloaded, "train.activation_checkpointing=auto")
    with pytest.raises(
        ConfigError, match=r"train\.activation_offload: has no effect .* 1, as all 1 layers keep their activations then"
    ):
        check(workshop, base, *offloaded, "train.activation_checkpointing=1")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(workshop: Workshop, base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<more>"})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="has 260 tokens, the embedding 259 rows.*resize_token_embeddings"):
        check(workshop, base)


def remove(pattern: str) -> Callable[[Path], object]:
    def damage(base: Path) -> None:
        for path in list(base.glob(pattern)):
            path.unlink()

    return damage


def drop_embedding(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    embedding = names["model.embed_tokens.weight"]
    edit(index, weight_map={name: file for name, file in names.items() if file != embedding})


def other_name(base: Path) -> None:
    remove("model*")(base)
    (base / "weights.safetensors").write_bytes(b"")


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text(content)


def folder_in_place_of_config(base: Path) -> None:
    (base / "config.json").unlink()
    (base / "config.json").mkdir()


def config(**values: object) -> Callable[[Path], object]:
    return lambda base: edit(base / "config.json", **values)


def tokenizer(**values: object) -> Callable[[Path], object]:
    return lambda base: edit(base / "tokenizer.json", **values)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "has no config.json. Give a Hugging Face model directory"),
    "config is no JSON": (text("config.json", "{"), "config.json is not JSON"),
    "config is not UTF-8": (
        lambda base: (base / "config.json").write_bytes(b"\xff\xfe{"),
        "config.json is not JSON",
    ),
    "config is deep": (text("config.json", "[" * 100_000), "config.json is not JSON"),
    "config is a list": (text("config.json", "[1]"), r"config.json is no JSON object, but \[1\]"),
    "config is null": (text("config.json", "null"), "config.json is no JSON object, but null"),
    "config is a folder": (
        folder_in_place_of_config,
        "config.json cannot be read",
    ),
    "no layers": (config(num_hidden_layers=0), "has num_hidden_layers 0. Possible are whole numbers from 1 to 10000"),
    "fewer than no layers": (config(num_hidden_layers=-1), "has num_hidden_layers -1"),
    "a billion layers": (config(num_hidden_layers=10**9), "has num_hidden_layers 1000000000"),
    "an empty vocabulary": (config(vocab_size=0), "has vocab_size 0"),
    "a billion layers of the part that reads": (
        config(text_config={"num_hidden_layers": 10**9}),
        "has num_hidden_layers 1000000000. Possible",
    ),
    "too many experts of another name": (
        config(num_hidden_layers=10_000, n_routed_experts=10_000),
        "has 10000 num_hidden_layers of 10000 experts each",
    ),
    "a size of text": (config(hidden_size="a"), "has hidden_size 'a'"),
    "a size of a fraction": (config(head_dim=1.5), "has head_dim 1.5"),
    "a size of true": (config(num_key_value_heads=True), "has num_key_value_heads true"),
    "heads that do not divide": (
        config(num_key_value_heads=3),
        "4 num_attention_heads, which 3 num_key_value_heads do not",
    ),
    "other architecture": (
        config(model_type="mine", architectures=["Mine"]),
        "is a 'mine' model, .* does not know. Give",
    ),
    "other name of an architecture": (
        config(model_type="mine"),
        r'is a .mine. model, .* Its "architectures" are .*: write "model_type": "llama" into its config.json',
    ),
    "an encoder with a decoder": (config(model_type="t5"), "is a t5 model, an encoder with a decoder. Give"),
    "an encoder": (config(model_type="vit"), "is a vit model, which is no causal language model. Give one"),
    "no name of an architecture": (
        config(model_type=["llama"]),
        r"is a \['llama'\] model, which transformers .* does not know",
    ),
    "code of its own": (
        config(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"}),
        r"is a 'mine' model, .* Its own code \(auto_map\) is never run",
    ),
    "quantized already": (
        config(quantization_config={"quant_method": "gptq"}),
        "is stored by 'gptq', which cannot be read. Readable are .* Give the 16-bit model",
    ),
    "quantized by nothing": (config(quantization_config={}), "has an empty quantization_config, which transformers"),
    "too many experts": (
        config(num_hidden_layers=10_000, num_experts=10_000),
        "has 10000 num_hidden_layers of 10000 experts each. Possible are 131072 experts in all",
    ),
    "too many experts in some of the layers": (
        config(num_hidden_layers=100, num_experts=[1, 9000]),
        "has 100 num_hidden_layers of 9000 experts each",
    ),
    "more experts for a token than there are": (
        config(model_type="mixtral", num_local_experts=8, num_experts_per_tok=9),
        "has 9 num_experts_per_tok, but 8 experts",
    ),
    "quantized by text": (config(quantization_config="x"), "has the quantization_config 'x', which is no JSON object"),
    "another embedding": (
        config(vocab_size=300),
        r"model\.embed_tokens\.weight is \[259, 64\] .*, \[300, 64\] by config",
    ),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), "tokenizer.json of .* cannot be read"),
    "tokenizer is a list": (text("tokenizer.json", "[]"), "tokenizer.json of .* cannot be read"),
    "tokenizer is deep": (text("tokenizer.json", "[" * 100_000), "tokenizer.json of .* cannot be read"),
    "tokenizer without a model": (
        text("tokenizer.json", "{}"),
        r"tokenizer.json of .* cannot be read \(it lacks 'model'\)",
    ),
    "tokenizer without tokens": (tokenizer(model={"vocab": {}}, added_tokens=[]), "its vocabulary is empty"),
    "tokenizer with ids of text": (tokenizer(model={"vocab": {"a": "b"}}), "ids that are no whole numbers"),
    "tokenizer with other additions": (tokenizer(added_tokens=5), "tokenizer.json of .* cannot be read"),
    "no safetensors": (remove("*.safetensors"), r"holds no \*.safetensors file. Convert the model"),
    "a single file of another name": (
        other_name,
        r"holds weights\.safetensors, but neither model\.safetensors nor model\.safetensors\.index\.json, where",
    ),
    "one file missing": (remove("model-00002-*"), "names model-00002-.*, which is not there"),
    "no embedding": (drop_embedding, r"has no tensor model\.embed_tokens\.weight"),
    "no tokenizer": (remove("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_lacks_something_is_refused_by_name(workshop: Workshop, base: Path, damage: str) -> None:
    do, reason = DAMAGES[damage]
    do(base)
    with pytest.raises(ConfigError, match=reason) as error:
        check(workshop, base)
    assert error.value.exit_code == 2
    assert str(base) in str(error.value)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "vocab": {}}},
            r"the tokenizer of .* cannot be read \(.*\)\. Copy",
        ),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "the tokenizer of .* cannot be read"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
            r"the tokenizer of .* needs code that the base brings along \(auto_map\), which is never run",
        ),
    ],
)
def test_a_tokenizer_that_transformers_cannot_read_is_refused(
    workshop: Workshop, base: Path, file: str, values: dict[str, object], reason: str
) -> None:
    edit(base / file, **values)
    with pytest.raises(ConfigError, match=reason):
        load_tokenizer(resolve_base(workshop.config("t", f"model.base={base}").model))


@pytest.mark.parametrize("values", [{"hidden_act": "none such"}, {"rope_parameters": "x"}, {"rms_norm_eps": "x"}])
def test_a_configuration_that_transformers_cannot_build_is_refused(
    workshop: Workshop, base: Path, values: dict[str, object]
) -> None:
    edit(base / "config.json", **values)
    config = workshop.config("t", f"model.base={base}")
    with pytest.raises(ConfigError, match=r"config\.json of .* cannot be read \(.*\)\. Copy the model again\."):
        empty_model(resolve_base(config.model), config, Attention("sdpa", ""))


def test_an_export_that_transformers_or_peft_cannot_read_is_one_sentence(base: Path, tmp_path: Path) -> None:
    remove("*.safetensors")(base)
    with pytest.raises(ConfigError, match=r"^--verify: transformers cannot read .*/base \(.*\), so nothing is proven"):
        plain.load_plain(base, torch.bfloat16, torch.bfloat16)
    for name, library in (("lora", "PEFT"), ("bottleneck", "the method's own loader")):
        with pytest.raises(ConfigError, match=rf"^--verify: {library} cannot read .* \(.*\), so nothing is proven"):
            plain.add_adapter(torch.nn.Linear(1, 1), tmp_path, find_method(Tuning(method=name)))


def rewritten(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """All tensors of the base in one file, as `change` leaves them."""
    tensors = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    remove("model*")(base)
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a tensor more": (
        lambda tensors: tensors.update({"model.layers.0.a.bias": torch.ones(2), "model.layers.2.b": torch.ones(2)}),
        (
            r"has the tensor model\.layers\.0\.a\.bias, which the architecture .* lacks \(2 such tensors\)\. Give the"
            r" config"
        ),
    ),
    "a tensor less": (lambda tensors: tensors.pop(UP), rf"has no tensor {UP}, which its architecture needs"),
    "another shape": (
        lambda tensors: tensors.update({UP: tensors[UP][1:].clone()}),
        rf"{UP} is \[171, 64\] in .*, \[172, 64\] by config\.json\. Copy the model again",
    ),
    "another type": (
        lambda tensors: tensors.update({UP: tensors[UP].double()}),
        rf"{UP} is of type F64\. Readable are BF16, F16, F32\.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_weight_that_does_not_fit_the_architecture_is_named(workshop: Workshop, base: Path, misfit: str) -> None:
    change, reason = MISFITS[misfit]
    found = resolve_base(workshop.config("misfit", f"model.base={base}").model)
    assert len(find_all_weights(found).sources) == 2 * 9 + 3
    rewritten(base, change)
    with pytest.raises(ConfigError, match=reason) as error:
        find_all_weights(resolve_base(workshop.config("misfit", f"model.base={base}").model))
    assert error.value.exit_code == 2


def test_layers_that_the_model_is_cut_off_before_are_left_out_and_nothing_else(workshop: Workshop, base: Path) -> None:
    config = workshop.config("cut", f"model.base={base}", "model.layers=1")

    def find() -> FoundWeights:
        found = resolve_base(config.model)
        return find_weights(found, empty_model(found, config, Attention("sdpa", "")), 1)

    assert len(find().sources) == 9 + 3
    rewritten(base, lambda tensors: tensors.update({"model.layers.0.a.bias": torch.ones(2)}))
    with pytest.raises(ConfigError, match=r"has the tensor model\.layers\.0\.a\.bias.*\(1 such"):
        find()


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "one", "a/b/c"])
def test_a_missing_directory_is_refused_without_asking_the_hub(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError, match=f"the directory '{name}' does not exist"):
        check(workshop, name)


def test_a_hub_id_that_the_hub_does_not_give_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("trainer.base.find.locate.hub_answers", lambda: True)
    with pytest.raises(ConfigError, match=r"'some/model' is no directory here.*\(no route to host\).*HF_TOKEN"):
        check(workshop, "some/model")


@pytest.mark.parametrize("answers", [True, False])
def test_of_a_base_on_the_hub_come_the_files_that_are_read_and_no_second_copy_of_its_weights(
    workshop: Workshop, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "config.json tokenizer.json tokenizer.model merges.txt chat_template.jinja README.md".split()
    small.append("additional_chat_templates/tool_use.jinja")
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = "consolidated.safetensors consolidated.00.pth pytorch_model.bin model.gguf original/params.json".split()
    others += ["onnx/config.json", "original/model.safetensors"]
    asked = list[tuple[Any, ...]]()

    def download(name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any, local_files_only: bool) -> str:
        every = [*small, *weights, *others]
        given = filter_repo_objects(every, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((name, revision, set(given), local_files_only))
        return str(workshop.base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("trainer.base.find.locate.hub_answers", lambda: answers)
    model = Model(base="some/model", revision="v2")
    assert resolve_base(model).directory == base_files(model) == workshop.base
    assert asked == [
        ("some/model", "v2", {*small, *weights}, not answers),
        ("some/model", "v2", {*small}, not answers),
    ]


def test_what_the_first_layers_of_a_base_leave_out_is_asked_for_each_number_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: Any = SimpleNamespace(fingerprint="f", name="it")
    asked = list[Any]()

    def answer(question: Any, facts: Any, parse: Any) -> Any:
        asked.append(facts)
        raise ConfigError("the files have a weight that the architecture does not know")

    monkeypatch.setattr(checks, "kept_answer", answer)
    for layers in (1, 2):
        with pytest.raises(ConfigError, match="have a weight"):
            checks.check_weights(base, Model(base="it", layers=layers))
    assert asked == [["f", None], ["f", 1], ["f", None], ["f", 2]]


def test_a_modality_that_the_class_cannot_be_trained_with_is_refused_by_its_name(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def answer(question: Any, facts: Any, parse: Any) -> Any:
        asked.append((question.given["kind"], facts[-1]))
        return {"fails": "its class fails over them"}

    monkeypatch.setattr(checks, "kept_answer", answer)
    with pytest.raises(
        ConfigError, match=r"rows with videos cannot be trained with it, as its class fails over them\. Give"
    ):
        checks.check_taken(workshop.base, "it", VIDEO)
    with pytest.raises(ConfigError, match=r"Give another base, or rows without pictures\.$"):
        checks.check_taken(workshop.base, "it", STILL)
    assert asked == [("video", "video"), ("image", "image")]


def test_what_was_found_out_with_pictures_is_found_out_anew_where_anything_differs_that_decides_it(
    workshop: Workshop, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    monkeypatch.setattr(checks, "kept_answer", lambda question, facts, parse: asked.append(json.dumps(facts)) or [])
    found = resolve_base(workshop.config("t", f"model.base={base}").model)

    def costs(**changed: Any) -> None:
        given: dict[str, Any] = {"sizes": [(64, 96)], "learning": None, "modality": 0, **changed}
        checks.picture_costs(found, given["sizes"], given["learning"], given["modality"])

    costs()
    costs()
    assert asked[0] == asked[1]
    for changed in ({"sizes": [(96, 64)]}, {"modality": 1}, {"learning": {"dtype": "bf16"}}):
        costs(**changed)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(checks.platform, "node", lambda: "another machine")
        costs()
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (base / name).write_text("{}")
        costs()
    edit(base / "tokenizer.json", version="2.0")
    costs()
    found = replace(found, config={**found.config, "image_token_id": 3})
    costs()
    assert len(set(asked[1:])) == len(asked) - 1 == 9


def test_what_is_right_for_all_layers_is_asked_once_and_first(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = workshop.config("t").model, list[Any]()
    found = resolve_base(model)

    def answer(wrong: bool) -> Callable[..., Any]:
        def kept(question: Any, facts: Any, parse: Any) -> Any:
            asked.append((facts[1], question.given["model"]["layers"]))
            if wrong and facts[1] is None:
                raise ConfigError("layer 1 is damaged")
            return parse([["vision_tower", 3, 40]])

        return kept

    left_out = [LeftOutPart("vision_tower", 3, 40)]
    monkeypatch.setattr(checks, "kept_answer", answer(wrong=False))
    assert check_weights(found, override(workshop.config("t"), "model.layers=1").model) == left_out
    assert asked == [(None, None)]
    asked.clear()
    monkeypatch.setattr(checks, "kept_answer", answer(wrong=True))
    assert check_weights(found, override(workshop.config("t"), "model.layers=1").model) == left_out
    assert asked == [(None, None), (1, 1)], "the first layer is whole"
    with pytest.raises(ConfigError, match="layer 1 is damaged"):
        check_weights(found, model)


def test_positions_that_are_no_angles_cannot_be_scaled(workshop: Workshop) -> None:
    config = workshop.config("t", "model.rope_scaling={rope_type: yarn, factor: 2}", "data.sequence_length=64")
    model = replace(resolve_base(workshop.config("t").model).architecture, positions=32)
    wrong = architecture_mismatches(config, replace(model, rotary=False))
    assert "model.rope_scaling: this base has no rotary positions that transformers could scale. Remove it." in wrong
    plain = workshop.config("t", "data.sequence_length=65")
    (longer,) = architecture_mismatches(plain, replace(model, rotary=False))
    assert longer.endswith("65 exceeds the base's 32 positions (config.json). Lower it.")
    (scaled,) = architecture_mismatches(plain, model)
    assert scaled.endswith("Lower it, or set model.rope_scaling: {rope_type: yarn, factor: 3}.")
    assert architecture_mismatches(workshop.config("t", "data.sequence_length=32"), model) == []


def test_weights_in_folders_inside_the_base_are_not_its_own(workshop: Workshop, base: Path) -> None:
    """Some bases have their weights a second time there, in another form."""
    model = workshop.config("f", f"model.base={base}").model
    before = resolve_base(model)
    (base / "original").mkdir()
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, base / "original" / "consolidated.safetensors")
    after = resolve_base(model)
    assert after.versions == before.versions
    assert after.tensors.keys() == before.tensors.keys()
    store = open_store("memory://")
    for key in ("b.safetensors", "a.safetensors", "original/consolidated.safetensors", "a.bin"):
        store.put(key, key.encode())
    found = file_versions(store)
    assert {(name, size) for name, size, _ in found} == {("a.safetensors", 13), ("b.safetensors", 13)}
    store.put("a.safetensors", b"another one..")
    assert file_versions(store) != found


def test_the_order_of_settings_in_config_json_is_no_part_of_the_fingerprint(workshop: Workshop, base: Path) -> None:
    model = workshop.config("f", f"model.base={base}").model
    before = resolve_base(model).fingerprint
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert resolve_base(model).fingerprint == before


def test_the_fingerprint_changes_with_the_architecture_and_the_tensors(workshop: Workshop, base: Path) -> None:
    def fingerprint() -> str:
        return resolve_base(workshop.config("f", f"model.base={base}").model).fingerprint

    before = fingerprint()
    assert before == resolve_base(workshop.config("f").model).fingerprint
    edit(base / "config.json", rms_norm_eps=1e-3)
    assert fingerprint() != before


def test_the_fingerprint_covers_all_of_a_tensor_but_its_values(workshop: Workshop) -> None:
    model = workshop.config("f").model
    name, tensor = next(iter(resolve_base(model).tensors.items()))

    def fingerprint(name: str = name, **changed: object) -> str:
        base = resolve_base(model)
        others = {path: other for path, other in base.tensors.items() if other != tensor}
        base.__dict__["tensors"] = {**others, name: replace(tensor, **changed)}
        return base.fingerprint

    before = resolve_base(model).fingerprint
    assert fingerprint() == before
    changed = [
        fingerprint("other"),
        fingerprint(key="other.safetensors"),
        fingerprint(dtype="F16"),
        fingerprint(shape=(*tensor.shape, 1)),
        fingerprint(offset=tensor.offset + 2),
    ]
    assert len({before, *changed}) == 6


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        ({"model": {"vocab": {"a": 0, "b": 1}}}, 2),
        ({"model": {"vocab": {"a": 0, "b": 300}}}, 301),  # with a gap
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0]]}}, 3),  # Unigram
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 7}, {"id": 5}]}, 8),
        ({"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": [{"id": 3}]}, 10),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 0}]}, None),
        ({"model": {"vocab": {"a": 0, "b": -1}}}, None),
        ({"model": {"vocab": {"a": 0, "b": True}}}, None),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": -2}]}, None),
    ],
)
def test_a_tokenizer_has_one_token_more_than_its_largest_number(
    tree: dict[str, Any], size: int | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    if size is not None:
        assert tokenizer_size(tmp_path, "mine") == size
        return
    with pytest.raises(ConfigError, match=r"^model\.base: tokenizer\.json of mine cannot be read \(its vocabulary is"):
        tokenizer_size(tmp_path, "mine")


@pytest.mark.parametrize("content", [b"", b"no model of sentencepiece"])
def test_a_tokenizer_of_sentencepiece_that_is_none_is_refused(base: Path, content: bytes) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^model\.base: tokenizer\.model of mine cannot be read"):
        tokenizer_size(base, "mine")


def test_a_base_that_cannot_be_trained_with_pictures_is_refused_where_rows_have_them(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.config("check")
    base, sight = resolve_base(config.model), dict[str, Any]()
    monkeypatch.setattr(checks, "kept_answer", lambda *_: sight)
    monkeypatch.setattr(Description, "mismatches", lambda *_: [])
    check_base(base, config)
    seeing = override(config, "data.format=pictures")
    sight |= {"fails": "it sees nothing"}
    with pytest.raises(ConfigError, match=r"^data\.format: pictures cannot be trained with .*, as it sees nothing\."):
        check_base(base, seeing)
    sight |= {"fails": None, "keeps": {"fails": "they are in two places", "values": 0.5}}
    check_base(base, seeing)
    assert check_sight(base) == 0.5
    with pytest.raises(ConfigError, match=r"^sharding\.tower_limit: .* cannot be kept with .*, as they are in two"):
        check_sight(base, keeps=True)
    sight["keeps"]["fails"] = None
    assert check_sight(base, keeps=True) == 0.5


def test_what_is_left_out_of_a_base_is_said_with_its_sizes() -> None:
    assert left_out_sentence([]) == ""
    parts = [LeftOutPart("vision", 3, 4096), LeftOutPart("model.mtp", 1, 7)]
    assert left_out_sentence(parts) == (
        "left out of the base, as its language model has no place for them: vision (3 tensors, 4,096 weights),"
        " model.mtp (1 tensors, 7 weights)"
    )


def test_the_facts_of_a_base_in_a_bucket_have_the_versions_of_its_objects(workshop: Workshop) -> None:
    """A checkpoint keeps them, and a later version has to find the same ones."""
    base: Any = SimpleNamespace(
        name="s3://bucket/base", samples={"a": "1"}, directory=workshop.folder, headers={}, versions=[["a", 5, "v1"]]
    )
    assert content_of(base) == {"weights": {"a": "1"}, "versions": "bf77748b64483c33"}
    base.name = str(workshop.folder)
    assert content_of(base) == {"weights": {"a": "1"}}


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("hidden_size", 1, 2**31),
        ("intermediate_size", 1, 2**31),
        ("moe_intermediate_size", 1, 2**31),
        ("vocab_size", 1, 2**31),
        ("num_attention_heads", 1, 2**31),
        ("max_position_embeddings", 1, 2**31),
        ("head_dim", 0, 2**31),
        ("num_experts", 0, 10_000),
        ("n_shared_experts", 0, 10_000),
        ("num_experts_per_tok", 0, 10_000),
        ("num_hidden_layers", 1, 10_000),
        ("n_layer", 1, 10_000),
    ],
)
def test_sizes_have_limits(key: str, least: int, most: int) -> None:
    for size in (least, most, None):
        assert parse_base_config("mine", json.dumps({key: size}).encode()) == {key: size}
    for wrong in (least - 1, most + 1, True, 2.0, "8"):
        with pytest.raises(ConfigError, match=f"has {key} .* Possible are whole numbers from {least} to {most}"):
            parse_base_config("mine", json.dumps({"text_config": {key: wrong}}).encode())


def test_layers_have_so_many_experts_in_all() -> None:
    parse_base_config("mine", json.dumps({"num_local_experts": 8, "num_experts_per_tok": 8}).encode())
    parse_base_config("mine", json.dumps({"num_hidden_layers": 128, "num_experts": 1024}).encode())
    with pytest.raises(ConfigError, match="Possible are 131072 experts in all"):
        parse_base_config("mine", json.dumps({"num_hidden_layers": 129, "num_experts": 1024}).encode())


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_caps_are_positive(key: str) -> None:
    for cap in (0.5, 30, None):
        parse_base_config("mine", json.dumps({key: cap}).encode())
    for wrong in (0, -1.0, 2**31, True, "30"):
        with pytest.raises(ConfigError, match=f"has {key} .* Possible are positive numbers and null"):
            parse_base_config("mine", json.dumps({key: wrong}).encode())


class PanicException(BaseException):
    """As each library that is written in Rust has one."""


def test_a_panic_is_one_sentence_and_an_interrupt_ends_what_it_interrupts() -> None:
    said = r"model\.base: the tokenizer of mine cannot be read \(no such byte\)"
    for reads in (without_panics, read_by_transformers):
        with pytest.raises(ConfigError, match=said), reads("mine", "the tokenizer"):
            raise PanicException("no such byte")
        with pytest.raises(KeyboardInterrupt), reads("mine", "the tokenizer"):
            raise KeyboardInterrupt
    with pytest.raises(ConfigError, match=r"cannot be read \(AssertionError\)"), read_by_transformers("mine", "it"):
        raise AssertionError  # an error without words is told by its kind
    for other in (KeyboardInterrupt(), KeyError("a mistake")):
        with pytest.raises(type(other)), without_panics("mine", "the tokenizer"):
            raise other
