"""`--verify` refuses an export in which anything has changed that a program reads: weights, settings, tokens,
templates, files.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.material import SPECIALS, Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.base.find.tokenizer import beside_no_config, read_tokenizer, tokenizer_files
from trainer.config import Data, Model, override
from trainer.data.format.formats import explicit_form
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.models import settings_of
from trainer.export.__main__ import _export
from trainer.export.destination import ExportProgress
from trainer.export.figures import Proof
from trainer.export.format import find_format
from trainer.export.proof import verify
from trainer.export.proof.rendering import SourceRow, Texts, check_rendering, documents, source_rows, trained_texts
from trainer.export.proof.verify import check_again
from trainer.export.trained import resolve_trained_base, trained_config, with_trained_template, with_trained_tokenizer
from trainer.run.folder import run_config
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store

Change = Callable[[Path], object]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:"
    " {% endif %}"
)
RUNS = TEMPLATE.replace("<s>{{ m.role }}", "<s>[{{ m.role }}]").replace("<s>assistant", "<s>[assistant]")
ROWS = [list(range(3, 60)), list(range(200, 290))]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, some merges, four special tokens and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*SPECIALS, "<sep>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the ant bee cat dog emu", "return answers, one word", "What is 2 + 2?"] * 9, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with a chat template of its own."""
    folder = tmp_path_factory.mktemp("run")
    workshop = Workshop(folder, "speck", vocab_size=300, shard_size="2KB")
    tokenizer().save_pretrained(workshop.base)
    (folder / "own.jinja").write_text(RUNS)
    commit(
        workshop.store.sub("done"), workshop.config("done", "data.format=chat", f"data.template={folder / 'own.jinja'}")
    )
    (folder / "own.jinja").write_text("edited since")
    return workshop.store.sub("done")


@pytest.fixture(scope="module")
def exports(run: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, silent = tmp_path_factory.mktemp("exports"), ExportProgress(lambda done, total: None, lambda said: None)
    for form in ("peft", "merged"):
        find_format(form).write(run, open_store(str(folder / form)), 4, silent)
    return {form: folder / form for form in ("peft", "merged")}


def in_json(name: str, change: Callable[[Any], object]) -> Change:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return apply


def setting(name: str, key: str, value: Any) -> Change:
    return in_json(name, lambda tree: tree.update({key: value}))


def in_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        file = max(folder.glob("*.safetensors"), key=lambda file: len(load_file(file)))
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return apply


def one_weight(weights: dict[str, torch.Tensor]) -> None:
    values = weights[min(weights)].view(-1)
    values[-1] += 0.01


def swapped(weights: dict[str, torch.Tensor]) -> None:
    first, second = next(
        (a, b)
        for a in weights
        for b in weights
        if a < b and weights[a].shape == weights[b].shape and not weights[a].equal(weights[b])
    )
    weights[first], weights[second] = weights[second], weights[first]


def swap_ids(tree: Any, one: int = 100, other: int = 101) -> None:
    names = {number: token for token, number in tree["model"]["vocab"].items()}
    tree["model"]["vocab"] |= {names[one]: other, names[other]: one}


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def text(name: str, change: Callable[[str], str]) -> Change:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def write(file: Path, content: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)


def swap_files(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def no_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("*token*"), *folder.glob("*.jinja")):
        file.unlink()


def begin_with_a_token(tree: Any) -> None:
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


# Damages that the rendering shows, whatever wrote the files.
TEXTS: dict[str, Change] = {
    "two ids swapped": in_json("tokenizer.json", swap_ids),
    "the last two ids swapped": in_json("tokenizer.json", lambda tree: swap_ids(tree, len(tree["model"]["vocab"]) - 2, len(tree["model"]["vocab"]) - 1)),
    "no merges": in_json("tokenizer.json", lambda tree: tree["model"].update(merges=[])),
    "the first merge missing": in_json("tokenizer.json", lambda tree: tree["model"]["merges"].pop(0)),
    "another normalizer": in_json("tokenizer.json", lambda tree: tree.update(normalizer={"type": "Lowercase"})),
    "a prefix space": in_json("tokenizer.json", lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True)),
    "another eos": setting("tokenizer_config.json", "eos_token", "<pad>"),
    "another bos": setting("tokenizer_config.json", "bos_token", "</s>"),
    "another pad": setting("tokenizer_config.json", "pad_token", "</s>"),
    "no eos": in_json("tokenizer_config.json", lambda tree: tree.pop("eos_token")),
    "an added token": in_json(
        "tokenizer.json", lambda tree: tree["added_tokens"].append({**tree["added_tokens"][0], "id": len(tree["model"]["vocab"]), "content": "bee"})
    ),
    "no template": lambda folder: (without("chat_template.jinja")(folder), setting("tokenizer_config.json", "chat_template", None)(folder)),
    "the base's template": text("chat_template.jinja", lambda _: TEMPLATE),
    "a template that edits spaces": text("chat_template.jinja", lambda said: said.replace("]: ", "]:")),
    "a template that trims": text("chat_template.jinja", lambda said: said.replace("m.content", "m.content|trim")),
    "a template without an end": text("chat_template.jinja", lambda said: said.replace("</s>", "")),
    "a template that differs for tools alone": text("chat_template.jinja", lambda said: "{% if tools %}!{% endif %}" + said),
    "a special token that is shown": in_json("tokenizer.json", lambda tree: tree["added_tokens"][3].update(special=False)),
    "answers are shown in other characters": in_json("tokenizer.json", lambda tree: tree.update(decoder=None)),
    "added tokens in a file of their own": lambda folder: (folder / "added_tokens.json").write_text('{"bee": 300}'),
    "special tokens in a file of their own": lambda folder: (folder / "special_tokens_map.json").write_text('{"eos_token": "<pad>"}'),
    "another class": setting("tokenizer_config.json", "tokenizer_class", "Qwen2Tokenizer"),
    "special tokens are split": setting("tokenizer_config.json", "split_special_tokens", True),
    "a template for calls beside it": lambda folder: write(folder / "additional_chat_templates/tool_use.jinja", "!" + RUNS),
    "a special token that takes spaces": in_json("tokenizer.json", lambda tree: tree["added_tokens"][2].update(lstrip=True)),
    "texts that begin with a token": in_json("tokenizer.json", begin_with_a_token),
    "no tokenizer": no_tokenizer,
    "a torn tokenizer": text("tokenizer.json", lambda said: said[: len(said) // 2]),
}  # fmt: skip
# Those that a program meets, and no text that is only encoded and rendered.
FILES: dict[str, Change] = {
    "a limit of length": in_json(
        "tokenizer.json", lambda tree: tree.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})
    ),
    "padding on the left": setting("tokenizer_config.json", "padding_side", "left"),
    "a processor's template": lambda folder: write(folder / "processor_config.json", '{"chat_template": "!"}'),
    "an older tool's template": lambda folder: write(folder / "chat_template.json", '{"chat_template": "!"}'),
    "a hidden file": lambda folder: write(folder / ".adapter_model.safetensors", "x"),
    "a checkpoint in a folder": lambda folder: write(folder / "checkpoint-9/adapter_model.safetensors", "x"),
    "pickled weights": lambda folder: write(folder / "pytorch_model.bin", "x"),
}  # fmt: skip
ADAPTERS: dict[str, Change] = {
    "another scale": in_weights(lambda weights: [value.mul_(2) for name, value in weights.items() if "lora_B" in name]),
    "half the digits": in_weights(lambda weights: weights.update({name: value.half() for name, value in weights.items()})),
    "one target less": in_json("adapter_config.json", lambda tree: tree["target_modules"].pop()),
    "one weight": in_weights(one_weight),
    "one matrix zeroed": in_weights(lambda weights: weights[max(weights)].zero_()),
    "two matrices swapped": in_weights(swapped),
    "a matrix missing": in_weights(lambda weights: weights.pop(min(weights))),
    "a matrix renamed": in_weights(lambda weights: weights.update(other=weights.pop(min(weights)))),
    "another type": in_weights(lambda weights: weights.update({name: value.to(torch.float64) for name, value in weights.items()})),
    "cut short": lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-7]),
    **{
        f"{key}: {value}": setting("adapter_config.json", key, value)
        for key, value in (
            ("r", 4), ("lora_alpha", 17), ("use_rslora", True), ("use_dora", True), ("target_modules", ["q_proj"]), ("fan_in_fan_out", True),
            ("alpha_pattern", {"q_proj": 2}), ("rank_pattern", {"q_proj": 4}), ("layers_to_transform", [0]), ("modules_to_save", ["lm_head"]),
            ("bias", "all"), ("peft_type", "IA3"), ("base_model_name_or_path", "/other"), ("revision", "other"),
        )
    },
    "a second adapter": lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"),
    "settings of a model": lambda folder: (folder / "config.json").write_text("{}"),
    "no settings": without("adapter_config.json"),
}  # fmt: skip
MERGES: dict[str, Change] = {
    "two shards swapped": lambda folder: swap_files(*sorted(folder.glob("*.safetensors"))[:2]),
    "half the digits": in_weights(lambda weights: weights.update({name: value.half() for name, value in weights.items()})),
    "no settings of answers": without("generation_config.json"),
    "answers are drawn otherwise": setting("generation_config.json", "temperature", 0.1),
    "one weight": in_weights(one_weight),
    "two tensors swapped": in_weights(swapped),
    "one bit": lambda folder: flip(max(folder.glob("*.safetensors"))),
    "a file missing": lambda folder: max(folder.glob("*.safetensors")).unlink(),
    "a file of another model beside": lambda folder: shutil.copy(min(folder.glob("*.safetensors")), folder / "model.safetensors"),
    "an adapter beside": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "an index that leaves one out": in_json("model.safetensors.index.json", lambda tree: tree["weight_map"].popitem()),
    **{
        f"{key}: {value}": setting("config.json", key, value)
        for key, value in (
            ("rms_norm_eps", 2e-6), ("rope_theta", 10001.0), ("sliding_window", 4), ("num_hidden_layers", 1), ("tie_word_embeddings", True),
            ("hidden_act", "gelu"), ("eos_token_id", 0), ("max_position_embeddings", 8), ("attention_bias", True), ("num_key_value_heads", 1),
        )
    },
    "other answers end": setting("generation_config.json", "eos_token_id", 0),
}  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)


# The texts of a merge are compared as those of an adapter, byte by byte.
CHANGES = {"peft": {**ADAPTERS, **FILES, **TEXTS}, "merged": MERGES}


@pytest.mark.parametrize(
    ("form", "damage"), [(form, damage) for form, changes in CHANGES.items() for damage in changes]
)
def test_a_damaged_export_is_refused(
    run: Store, exports: dict[str, Path], tmp_path: Path, form: str, damage: str
) -> None:
    copy = Path(shutil.copytree(exports[form], tmp_path / "copy"))
    CHANGES[form][damage](copy)
    with pytest.raises(CapstanError, match="It is not what was trained; do not use it"):
        check_again(find_format(form), run, 4, open_store(str(copy)))


@pytest.mark.parametrize("damage", TEXTS)
def test_texts_that_become_other_tokens_are_refused_whoever_wrote_the_files(
    run: Store, exports: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    config, copy = trained_config(run, read_manifest(run, 4)), Path(shutil.copytree(exports["peft"], tmp_path / "copy"))
    ours = trained_texts(config, resolve_trained_base(run, config.model, read_manifest(run, 4)).directory)
    check_rendering(ours, copy, ROWS)
    TEXTS[damage](copy)
    with pytest.raises(CapstanError, match="tokenizer .*It is not what was trained; do not use it"):
        check_rendering(ours, copy, ROWS)


def test_an_export_has_the_template_and_the_tokenizer_of_the_training_whatever_lies_beside_the_base_now(
    run: Store, exports: dict[str, Path], tmp_path: Path
) -> None:
    assert (exports["merged"] / "chat_template.jinja").read_text() == RUNS
    assert json.loads((exports["peft"] / "tokenizer_config.json").read_text())["chat_template"] == RUNS
    base = resolve_base(trained_config(run, read_manifest(run, 4)).model).directory
    kept = (base / "tokenizer.json").read_bytes()
    in_json("tokenizer.json", swap_ids)(base)
    try:
        for form, folder in exports.items():
            check_again(find_format(form), run, 4, open_store(str(folder)))
    finally:
        (base / "tokenizer.json").write_bytes(kept)


def test_an_evaluation_reads_texts_as_the_training_did_and_no_other_template_may_be_given(run: Store) -> None:
    manifest = read_manifest(run, 4)
    config, _ = settings_of(run, None, [], base_alone=False)
    data = with_trained_template(run, config.data, manifest)
    assert Path(run_config(run).data.template or "").read_text() == "edited since"
    assert Path(data.template or "").read_text() == RUNS
    base = resolve_base(config.model)
    kept = (base.directory / "tokenizer.json").read_bytes()
    in_json("tokenizer.json", swap_ids)(base.directory)
    (base.directory / "merges.txt").write_text("a file of the other tokenizer")
    try:
        directory = with_trained_tokenizer(run, base, manifest).directory
        assert (directory / "tokenizer.json").read_bytes() == kept
        assert (directory / "config.json").is_file()
        assert not (directory / "merges.txt").exists()
    finally:
        (base.directory / "tokenizer.json").write_bytes(kept)
        (base.directory / "merges.txt").unlink()
    with pytest.raises(ConfigError, match="data.template: 'chatml' would be other texts than the checkpoint of step 4"):
        settings_of(run, None, ["data.template=chatml"], base_alone=False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_5"])
def test_a_tokenizer_alone_gives_the_tokens_that_it_gives_beside_the_bases_config(tmp_path: Path, kind: str) -> None:
    """By the config.json of a Qwen, transformers takes Qwen's own class for any tokenizer, which splits texts in its
    own way.
    """
    base, alone = tmp_path / "base", tmp_path / "alone"
    tokenizer().save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    files = {file.name: file.read_bytes() for file in base.iterdir() if file.name != "config.json"}
    alone.mkdir()
    for name, content in beside_no_config(files, base, kind).items():
        (alone / name).write_bytes(content)
    check_rendering(Texts(read_tokenizer(base, kind)), alone, ROWS)


def test_rows_of_the_sources_are_rendered_by_what_was_exported(
    run: Store, exports: dict[str, Path], tmp_path: Path
) -> None:
    """A template that differs for one question alone differs in no conversation that a proof brings along."""
    config, copy = trained_config(run, read_manifest(run, 4)), Path(shutil.copytree(exports["peft"], tmp_path / "copy"))
    talk = [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nobody."}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(50)))
    config = override(config, f"data.train=[{{path: {rows}}}]")
    ours = trained_texts(config, resolve_trained_base(run, config.model, read_manifest(run, 4)).directory)
    sources = source_rows(config)
    assert len(sources) == 40
    check_rendering(ours, copy, [], sources)
    other = RUNS.replace("m.content", "m.content|replace('Who', 'You')")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        content = (copy / name).read_text()
        (copy / name).write_text(content.replace(json.dumps(RUNS)[1:-1], json.dumps(other)[1:-1]).replace(RUNS, other))
    ours.__dict__["_instead"] = other  # so that the template's own text tells nothing
    with pytest.raises(CapstanError, match=r"the row .*rows\.jsonl:1 becomes other tokens"):
        check_rendering(ours, copy, [], sources)
    judged = override(config, f"data.eval=[{{path: {rows}}}]")
    assert [source.where for source in source_rows(judged)] == 2 * [source.where for source in sources]
    rows.unlink()
    assert source_rows(config) == []
    for name in ("0", "1", "2"):
        (tmp_path / f"of-{name}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    sources = source_rows(override(config, f"data.train=[{{path: {tmp_path}/of-*.jsonl}}]"))
    assert [source.where.rpartition("/")[2] for source in sources] == [
        f"of-{name}.jsonl:{line}" for name in range(3) for line in range(1, 14)
    ]
    for name in range(3, 50):
        (tmp_path / f"of-{name}.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    sources = source_rows(override(config, f"data.train=[{{path: {tmp_path}/of-*.jsonl}}]"))
    assert len({source.where.rpartition(":")[0] for source in sources}) == 40, "a row of each of the first files"


def test_without_rows_and_a_template_a_text_of_many_kinds_of_characters_is_compared(tmp_path: Path) -> None:
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    ours = Texts(read_tokenizer(tmp_path, "base"))
    check_rendering(ours, tmp_path, [])
    TEXTS["another normalizer"](tmp_path)
    with pytest.raises(CapstanError, match="becomes other tokens"):
        check_rendering(ours, tmp_path, [])


@pytest.mark.parametrize("conversation", [0, 1])
@pytest.mark.parametrize("begun", [False, True])
def test_conversations_are_compared_with_and_without_the_beginning_of_an_answer(
    tmp_path: Path, begun: bool, conversation: int
) -> None:
    class Unlike(Texts):
        def rendered(self, messages: Any, begun_: bool) -> str:
            asked = ("What is 2 + 2?" in str(messages), begun_)
            return super().rendered(messages, begun_) + "!" * (asked == (conversation == 0, begun))

    tokenizer().save_pretrained(tmp_path)
    check_rendering(Texts(read_tokenizer(tmp_path, "base")), tmp_path, [])
    with pytest.raises(CapstanError, match="a conversation becomes other tokens"):
        check_rendering(Unlike(read_tokenizer(tmp_path, "base")), tmp_path, [])


def test_a_row_that_one_tokenizer_refuses_becomes_the_reason() -> None:
    data, one = (Data.model_validate({"train": [{"path": "x"}], "format": name}) for name in ("chat", "text"))
    said = [{"role": role, "content": "What is 2 + 2?"} for role in ("user", "assistant")]
    sources = [
        SourceRow("a.jsonl:1", data, explicit_form(data), {"messages": said[:1] * 2 + said}),
        SourceRow("a.jsonl:2", data, explicit_form(data), {"messages": said}),
        SourceRow("b.jsonl:1", one, explicit_form(one), {"text": "What?"}),
    ]
    strict, silent = tokenizer(), tokenizer()
    strict.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + TEMPLATE
    silent.chat_template = None
    every, second, third = documents(tokenizer(), sources, own=True)
    refused, *others = documents(strict, sources, own=True)
    assert "too long" in str(refused)
    assert others == [second, third]
    *refused, text = documents(silent, sources, own=True)
    assert "chat template" in str(refused[0])
    assert [refused[1], text] == [refused[0], third]
    assert all(isinstance(found, list) for found in (every, second, third))


def test_whether_a_text_begins_with_a_token_is_what_the_tokenizer_does() -> None:
    plain = tokenizer()
    tree = json.loads(plain.backend_tokenizer.to_str())
    begin_with_a_token(tree)
    framed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), bos_token="<s>")
    assert [Texts(one).begins_with_bos for one in (plain, framed)] == [False, True]  # type: ignore[arg-type]


def test_templates_by_name_are_exported_too(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, "speck", vocab_size=300, shard_size="2KB")
    named = tokenizer()
    named.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}  # type: ignore[assignment]
    named.save_pretrained(workshop.base)
    run, name = workshop.store.sub("done"), "additional_chat_templates/tool_use.jinja"
    commit(run, workshop.config("done"))
    silent = ExportProgress(lambda done, total: None, lambda said: None)
    for form in ("peft", "merged"):
        folder = tmp_path / form
        find_format(form).write(run, open_store(str(folder)), 4, silent)
        assert (folder / name).read_bytes() == (workshop.base / name).read_bytes()
        check_again(find_format(form), run, 4, open_store(str(folder)))
        ours = Texts(read_tokenizer(workshop.base, "base"))
        check_rendering(ours, folder, ROWS)
        (folder / name).write_text(TEMPLATE)
        for check in (
            lambda form=form, folder=folder: check_again(find_format(form), run, 4, open_store(str(folder))),
            lambda folder=folder, ours=ours: check_rendering(ours, folder, ROWS),
        ):
            with pytest.raises(CapstanError, match="It is not what was trained; do not use it"):
                check()


def test_a_template_of_the_runs_own_is_alone_in_its_export(tmp_path: Path) -> None:
    named = tokenizer()
    named.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}  # type: ignore[assignment]
    named.save_pretrained(tmp_path)
    files = tokenizer_files(tmp_path, Model(base=str(tmp_path)), RUNS)
    assert [file for file in files if "template" in file] == ["chat_template.jinja"]


@pytest.mark.usefixtures("forked_modules")
def test_an_export_that_is_there_already_is_verified_as_it_is(
    run: Store,
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as one that was copied to where it is used."""
    copy = Path(shutil.copytree(exports["peft"], tmp_path / "copy"))
    proof = Proof(*[0.0] * 6, computed_in="fp32", rows="8 rows")
    monkeypatch.setattr(verify, "prove_adapter", lambda *_: proof)
    asked = Namespace(run=run.uri, destination=str(copy), options=[], format="peft", step=4, verify=True, server=None)
    assert _export(asked)["proof"]["rows"] == "8 rows"
    assert "is there already, so it is compared with the checkpoint of step 4" in capsys.readouterr().out
    in_weights(one_weight)(copy)
    before = (copy / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CapstanError, match="It is not what was trained; do not use it"):
        _export(asked)
    assert (copy / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(
        ConfigError, match="is not empty. Name a new folder; if it is an export of this run, --verify proves it"
    ):
        _export(Namespace(**{**vars(asked), "verify": False}))
