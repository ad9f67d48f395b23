"""GGUF exports without a conversion: what is written and proven for which types, the texts of a file, and what
llama.cpp is asked.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import Config, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.export.destination import CARD, TRAINED, ExportProgress
from trainer.export.figures import Proof
from trainer.export.format import find_format
from trainer.export.formats import gguf as format_file
from trainer.export.formats import gguf_adapter
from trainer.export.gguf import predictions
from trainer.export.proof.rows import Distance, ProbeRow
from trainer.store.store import open_store

gguf = pytest.importorskip("gguf")

TEXTS: dict[str, Any] = {
    "tokens": ["a", "b", "c", "<e>"],
    "types": [1, 1, 1, 3],
    "merges": ["a b"],
    "end": 3,
    "begin": 2,
    "begins": False,
    "template": "{{ x }}",
    "model": "gpt2",
}


def ours(*pair: str) -> Any:
    merges = json.dumps({"model": {"merges": [pair or ("a", "b")]}})
    return SimpleNamespace(
        tokenizer=SimpleNamespace(
            # One that texts are shown with, and one that the base has no row for.
            added_tokens_decoder={number: SimpleNamespace(special=number != 1) for number in (1, 3, 9)},
            eos_token_id=3,
            bos_token_id=2,
            get_vocab=lambda: {"a": 0, "b": 1, "c": 2, "<e>": 3},
            backend_tokenizer=SimpleNamespace(to_str=lambda: merges),
        ),
        template="{{ x }}",
        begins_with_bos=False,
    )


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({}, None),
        ({"template": "{{ y }}"}, "chat template"),
        ({"template": None}, "chat template"),
        ({"end": 1}, "end of text"),
        ({"begin": 1}, "begin of text"),
        ({"begin": None}, None),
        ({"types": [1, 1, 1, 1]}, "set of special tokens"),
        ({"types": [1, 1, 1, 2]}, None),
        ({"begins": True}, "first token of a text"),
        ({"begins": None}, None),
        ({"merges": ["b a"]}, "set of merges"),
        ({"merges": ["b a"], "model": "llama"}, None),
        ({"tokens": ["b", "a", "c", "<e>"]}, "numbering of tokens"),
    ],
)
def test_a_file_has_the_texts_of_the_run_or_is_refused(
    tmp_path: Path, changed: dict[str, Any], what: str | None
) -> None:
    from trainer.export.gguf.proof import _check_texts

    given = TEXTS | changed
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model(given["model"])
    writer.add_token_list(given["tokens"])
    writer.add_token_types(given["types"])
    writer.add_token_merges(given["merges"])
    writer.add_eos_token_id(given["end"])
    if given["begin"] is not None:
        writer.add_bos_token_id(given["begin"])
    if given["begins"] is not None:
        writer.add_add_bos_token(given["begins"])
    if given["template"] is not None:
        writer.add_chat_template(given["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if what is None:
        _check_texts(tmp_path / "model.gguf", ours())
        return
    with pytest.raises(CapstanError, match=f"model.gguf has another {what} than the run"):
        _check_texts(tmp_path / "model.gguf", ours())


def test_a_space_inside_a_part_of_a_merge_is_the_sign_for_a_byte() -> None:
    from trainer.export.gguf.proof import _merges

    assert _merges(ours("a b", " c")) == ["a\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}b \u0120c"]


class LlamaCpp:
    """llama.cpp, which tells all probabilities beside a word that is text, here 5."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tells: bool = True, form: Callable[[Any], Any] = json.dumps
    ) -> None:
        self.asked, self.tells, self.form = list[Any](), tells, form
        module: Any = ModuleType("xllamacpp")
        module.CommonParams = lambda: SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        )
        module.ggml_type = SimpleNamespace(GGML_TYPE_F32="fp32")
        module.llama_flash_attn_type = SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED="off")
        module.CommonAdapterLoraInfo = lambda path, scale: (path, scale)
        module.Server = self.serves
        monkeypatch.setitem(sys.modules, "xllamacpp", module)

    def serves(self, params: Any) -> "LlamaCpp":
        self.params = params
        return self

    def handle_completions(self, asked: dict[str, Any]) -> Any:
        ((word, bias),) = asked["logit_bias"]
        self.asked.append((asked["prompt"], word, asked["n_predict"], asked["n_probs"]))
        assert bias > 500, "whatever the model says"
        told = [{"id": number, "logprob": -float(number)} for number in (2, 0, 1)]
        if not self.tells or word != 5:
            told = told[1:]  # an end of text, or a part of a character, hides some
        return self.form({"choices": [{"logprobs": {"content": [{"top_logprobs": told}]}}]})


@pytest.mark.parametrize(
    "form", [json.dumps, lambda said: json.dumps(said).encode(), lambda said: said], ids=["text", "bytes", "object"]
)
def test_llama_cpp_is_asked_for_whole_distributions_beside_a_word_that_is_text(
    form: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its versions answer with text, bytes or an object."""
    llama = LlamaCpp(monkeypatch, form=form)
    question = predictions.LlamaCppQuestion("m.gguf", [[7, 7, 5], [7]], 3, adapter="a.gguf")
    assert list(predictions._answers(question)) == [[0.0, -1.0, -2.0]] * 2
    assert llama.asked == [([7, 7, 5], 7, 1, 3), ([7, 7, 5], 5, 1, 3), ([7], 7, 1, 3), ([7], 5, 1, 3)]
    assert llama.params.lora_adapters == [("a.gguf", 1.0)]
    assert llama.params.n_ctx >= 3 + 1
    assert (llama.params.cache_type_k, llama.params.cache_type_v, llama.params.n_gpu_layers) == ("fp32", "fp32", 0)
    silent = predictions.LlamaCppQuestion("m.gguf", [[7, 5]], 3)
    LlamaCpp(monkeypatch, tells=False)
    with pytest.raises(CapstanError, match="llama.cpp tells no probabilities of all 3 tokens"):
        list(predictions._answers(silent))


def test_a_process_that_asks_llama_cpp_says_why_it_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, codes = predictions.LlamaCppQuestion("m.gguf", [[7, 5]], 3, "a.gguf"), [1, 0]

    def run(command: list[str], **_: Any) -> Any:
        asked, answer = command[3:]
        assert predictions.LlamaCppQuestion(**json.loads(Path(asked).read_text())) == question
        np.save(answer, np.array([[0.0, -1.0, -2.0]], np.float32))
        return SimpleNamespace(returncode=codes.pop(), stderr="the file has an unknown type")

    monkeypatch.setattr(predictions.children, "run", run)
    monkeypatch.setattr(predictions, "find_spec", lambda name: name)
    assert predictions.next_tokens(question, tmp_path).tolist() == [[0, -1, -2]]
    with pytest.raises(CapstanError, match="^llama.cpp could not predict with m.gguf; what it said is above.$"):
        predictions.next_tokens(question, tmp_path)
    assert capsys.readouterr().err == "the file has an unknown type\n"
    monkeypatch.setattr(predictions, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Install it: pip install 'capstan-llm\[gguf\]'"):
        predictions.next_tokens(question, tmp_path)


def config(**changed: Any) -> Config:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}"
    made = parse_config(text)
    return made.model_copy(update=changed)


class Written:
    """An export in GGUF, none of whose parts does anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from trainer.export.gguf import q4_0
        from trainer.export.write import decoded, foreseen, merged

        self.done, self.room = list[Any](), list[Any]()
        architecture = SimpleNamespace(weights=lambda *kinds: 3200)
        base = SimpleNamespace(versions=[("a", 500, ""), ("b", 500, "")], architecture=architecture)
        manifest = SimpleNamespace(step=4)
        monkeypatch.setattr(format_file, "trained_checkpoint", lambda *_: (manifest, config(), None))
        monkeypatch.setattr(format_file, "check_converter", lambda: self.done.append("converter"))
        monkeypatch.setattr(format_file, "has_converter", lambda: False)
        monkeypatch.setattr(format_file, "describe_base", lambda _: None)
        monkeypatch.setattr(format_file, "check_mergeable_run", lambda *_: self.done.append("mergeable"))
        monkeypatch.setattr(format_file, "resolve_trained_base", lambda *_: base)
        monkeypatch.setattr(format_file, "check_room", self.room.append)
        monkeypatch.setattr(format_file, "model_card", lambda folder, config, manifest, content: content.usage.encode())
        monkeypatch.setattr(format_file, "convert", lambda model, kind, file, name: self.made(file, kind))
        monkeypatch.setattr(decoded, "as_plain", lambda of: of)
        monkeypatch.setattr(merged, "write_model", lambda *_: self.done.append("merged model"))
        layout = SimpleNamespace(check_layout=lambda: self.done.append("layout"))
        monkeypatch.setattr(foreseen, "Foreseen", lambda *_: layout)
        moved = SimpleNamespace(facts=lambda rounding: {"rounding": rounding}, sentence=lambda: "codes moved")
        monkeypatch.setattr(q4_0, "export_q4_0", lambda *of: (self.made(of[5], f"q4_0 {of[6]}"), moved)[1])

    def made(self, file: Path, what: str) -> None:
        self.done.append(what)
        file.write_text(what)

    def write(self, tmp_path: Path, *options: str) -> Any:
        form = find_format("gguf", [*options, f"scratch={tmp_path}"])
        said = ExportProgress(lambda done, total: None, lambda sentence: None)
        return form.write(open_store(str(tmp_path / "run")), open_store(str(tmp_path / "out")), None, said)


def test_a_file_of_each_type_is_written_and_the_codes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    # An export that was killed left the card, a whole file and a half one.
    for name, content in {CARD: TRAINED, "a-q4_0.gguf": "old", f"a-f16.gguf{gguf_adapter.PART}": "half"}.items():
        out.put(name, content.encode())
    one = Written(monkeypatch)
    made = one.write(tmp_path, "types=[q4_0, f16, q8_0]", "rounding=dither")
    assert one.done == ["converter", "mergeable", "layout", "merged model", "f16", "q8_0", "q4_0 dither"]
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert files.pop(CARD) == "llama-server -m a-q4_0.gguf"
    assert files == {"a-q4_0.gguf": "q4_0 dither", "a-f16.gguf": "f16", "a-q8_0.gguf": "q8_0"}
    assert made.facts == {"files": ["a-q4_0.gguf", "a-f16.gguf", "a-q8_0.gguf"], "rounding": "dither"}
    assert made.remarks == ("codes moved",)
    # Four models in 16 bits while codes are made; 18 bytes for 32 weights, 2 for each, and 34 for 32.
    assert one.room == [[(tmp_path, 4000), (tmp_path / "out", 100 * 18 + 6400 + 100 * 34)]]


def test_codes_alone_need_no_merged_model_and_one_type_needs_room_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    codes = Written(monkeypatch)
    codes.write(tmp_path, "types=[q4_0]")
    assert codes.done[3:] == ["q4_0 nearest"]
    plain = Written(monkeypatch)
    (tmp_path / "bf16").mkdir()
    plain.write(tmp_path / "bf16", "types=[bf16]")
    assert plain.room == [[(tmp_path / "bf16", 1000), (tmp_path / "bf16" / "out", 6400)]]
    with pytest.raises(ConfigError, match=r"scratch: .*gone is no folder. Make it, or name another"):
        Written(monkeypatch).write(tmp_path / "gone")


def test_what_llama_cpp_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_file, "check_mergeable_run", lambda *_: None)
    form, base = find_format("gguf"), None
    form.check(config(), base)  # type: ignore[arg-type]
    ours = config()
    long = ours.model.model_copy(update={"rope_scaling": SimpleNamespace(rope_type="longrope")})
    with pytest.raises(ConfigError, match="rope_type: longrope for Phi-3 alone"):
        form.check(config(model=long), base)  # type: ignore[arg-type]
    seeing = ours.tuning.model_copy(update={"towers": "projector"})
    with pytest.raises(ConfigError, match="would lose what the tower has learnt"):
        form.check(config(tuning=seeing), base)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="how the codes of q4_0 are rounded, which types does not name"):
        find_format("gguf", ["types=[f16]", "rounding=dither"])


@pytest.mark.parametrize(
    ("types", "holds", "proven"),
    [
        ("[f16]", True, ["gguf"]),
        ("[q4_0]", True, ["q4_0 nearest"]),
        ("[f16, q4_0]", True, ["gguf", "q4_0 nearest"]),
        ("[f16, q4_0]", False, ["gguf"]),
    ],
)
def test_codes_are_proven_where_all_other_files_are(
    monkeypatch: pytest.MonkeyPatch, types: str, holds: bool, proven: list[str]
) -> None:
    from trainer.export.gguf import proof

    done = list[str]()
    other = Proof(0.01 if holds else 9.0, 0.02, 0.5, 0.03, 0.04, 0.6, "fp32", "8 rows")
    monkeypatch.setattr(proof, "prove_gguf", lambda *_: (done.append("gguf"), other)[1])
    monkeypatch.setattr(proof, "prove_q4_0", lambda *of: done.append(f"q4_0 {of[3]}"))
    nowhere: Any = None
    found: Any = find_format("gguf", [f"types={types}"]).prove(nowhere, 4, nowhere)
    assert done == proven
    assert found is (None if proven[-1] != "gguf" else other)


def test_the_proof_of_several_models_is_that_of_the_farthest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.export.gguf import proof

    far = {"f16": Distance(0.01, 0.04), "q8_0": Distance(0.02, 0.05), "f32": Distance(0.0, 0.01)}
    trained: Any = SimpleNamespace(
        run=None, manifest=None, config=None, base=None, probe=SimpleNamespace(origin="its rows")
    )
    trained.exported = lambda *_, packed: [torch.zeros(1, 7)]
    monkeypatch.setattr(proof, "_rows", lambda trained: [])
    monkeypatch.setattr(proof, "write_model", lambda *_: None)
    monkeypatch.setattr(proof, "base_directory", lambda base: nullcontext(tmp_path))
    monkeypatch.setattr(proof, "_in_llama_cpp", lambda model, adapter, vocabulary, rows: model)
    monkeypatch.setattr(
        proof, "distance", lambda expected, found, rows: far[found] if isinstance(found, str) else Distance(0.8, 0.6)
    )
    files: Any = [(name, None) for name in far]
    found = proof._prove(trained, files)
    assert (found.kl, found.kl_allowed, found.kl_effect) == (0.02, 0.4, 0.8)
    assert (found.log_prob, found.log_prob_allowed, found.log_prob_effect) == (0.05, 0.3, 0.6)


def test_the_files_in_16_or_8_bits_are_proven_together_and_their_texts_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file in Q4_0 has a proof of its own."""
    from trainer.export.gguf import proof

    for name in ("a-f16.gguf", "a-q8_0.gguf", "a-q4_0.gguf", "README.md"):
        (tmp_path / name).touch()
    looked, trained = list[str](), SimpleNamespace(config=None, base=SimpleNamespace(directory=None))
    monkeypatch.setattr(proof.Trained, "at", lambda *_: trained)
    monkeypatch.setattr(proof, "trained_texts", lambda *_: "the run's")
    monkeypatch.setattr(proof, "_check_texts", lambda file, ours: looked.append(f"{file.name}: {ours}"))
    monkeypatch.setattr(proof, "_prove", lambda of, files: files)
    found: Any = proof.prove_gguf(open_store(str(tmp_path)), 4, open_store(str(tmp_path)))
    assert sorted(found) == [(tmp_path / "a-f16.gguf", None), (tmp_path / "a-q8_0.gguf", None)]
    assert sorted(looked) == ["a-f16.gguf: the run's", "a-q8_0.gguf: the run's"]


def test_llama_cpp_is_asked_for_the_token_behind_a_few_places_of_each_row_up_to_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainer.export.gguf import proof

    long = ProbeRow(torch.arange(20, 32)[None], torch.arange(1, 11), torch.arange(22, 32))
    short = ProbeRow(torch.arange(40, 44)[None], torch.tensor([0, 2]), torch.tensor([41, 43]))
    trained: Any = SimpleNamespace(probe=SimpleNamespace(rows=[long, short]))
    rows, asked = proof._rows(trained), list[Any]()
    assert [row.places.tolist() for row in rows] == [[1, 4, 7, 10], [0, 2]]
    assert [row.targets.tolist() for row in rows] == [[22, 25, 28, 31], [41, 43]]

    def answer(question: Any, folder: Path) -> Any:
        asked.append(question)
        return np.arange(len(question.texts) * 3, dtype=np.float32).reshape(-1, 3)

    monkeypatch.setattr(proof, "next_tokens", answer)
    found = proof._in_llama_cpp(tmp_path / "m.gguf", tmp_path / "a.gguf", 3, rows)
    (question,) = asked
    assert (question.model, question.vocabulary, question.adapter) == (
        str(tmp_path / "m.gguf"),
        3,
        str(tmp_path / "a.gguf"),
    )
    assert question.texts == [
        *([*range(20, 21 + place)] for place in (1, 4, 7, 10)),
        *([*range(40, 41 + place)] for place in (0, 2)),
    ]
    assert [logits.shape for logits in found] == [(4, 3), (2, 3)]
    assert found[1][0].tolist() == [12, 13, 14]


def test_codes_that_only_llama_cpp_reads_are_written_by_the_format_of_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(format_file, "check_mergeable_run", lambda *_: None)
    called, usual = list[str](), {"types": ["q4_0"], "rounding": None}
    for given, expected in (([], usual), (["rounding=dither"], {**usual, "rounding": "dither"})):
        form: Any = find_format("merged", ["as=q4_0", *given])
        made = form._gguf
        assert {name: getattr(made, name) for name in usual} == expected
    for name in ("check", "check_files", "check_here", "write", "prove"):
        monkeypatch.setattr(format_file.Gguf, name, lambda self, *_, name=name: called.append(name))
    form.check(None, None)
    form.check_files(None)
    form.check_here()
    form.write(None, None, None, None)
    form.prove(None, 4, None)
    assert called == ["check", "check_files", "check_here", "write", "prove"]
    other: Any = find_format("merged", ["as=int4"])
    other.check_here()
    assert (other._gguf, other._rounding, called[5:]) == (None, "nearest", [])
    assert find_format("merged", ["as=stored"])._rounding == "dither"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["rounding=dither"], "a merge in 16 bits has none. Give as=stored"),
        (["as=int4", "rounding=gptq"], "rounding: gptq is for as=stored"),
    ],
)
def test_roundings_that_have_no_effect_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_format("merged", options)


def test_an_adapter_in_vllms_layout_is_not_read_by_peft_and_so_not_proven() -> None:
    nowhere: Any = None
    with pytest.raises(ConfigError, match="PEFT does not read layout=vllm"):
        find_format("peft", ["layout=vllm"]).prove(nowhere, 4, nowhere)


def test_an_adapters_file_is_written_for_its_own_base_where_nothing_is_in_its_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done, manifest = list[Any](), SimpleNamespace(step=4)
    exported = SimpleNamespace(what="A LoRA adapter", files={"adapter_config.json": b"{}"})
    method = SimpleNamespace(export=lambda weights, model: exported)
    given = {
        "trained_checkpoint": lambda *_: (manifest, config(), method),
        "describe_base": lambda _: None,
        "base_files": lambda _: tmp_path,
        "check_converter": lambda: done.append("converter"),
        "check_destination": lambda destination, *own: done.append(own),
        "check_base_at_hand": lambda model, of: done.append(("base", model.base, of.step)),
        "model_card": lambda folder, config, manifest, content: content.usage.encode(),
    }
    for name, function in given.items():
        monkeypatch.setattr(gguf_adapter, name, function)
    monkeypatch.setattr("trainer.state.checkpoint.learnt_weights.LearntWeights", lambda *_: SimpleNamespace(whole={}))
    monkeypatch.setattr(
        "trainer.export.gguf.lora.write_gguf_lora", lambda files, base, scratch, file: file.write_text("it")
    )
    destination = open_store(str(tmp_path / "out"))
    said = ExportProgress(lambda done, total: None, lambda sentence: None)
    made = find_format("gguf-adapter").write(open_store(str(tmp_path / "run")), destination, None, said)
    assert done == ["converter", (f"a-adapter.gguf{gguf_adapter.PART}",), ("base", "b", 4)]
    assert made.facts == {"files": ["a-adapter.gguf"]}
    assert destination.get("a-adapter.gguf") == b"it"
    assert destination.get(CARD) == b"llama-server -m BASE.gguf --lora a-adapter.gguf"
    seeing = config().tuning.model_copy(update={"towers": "projector"})
    with pytest.raises(ConfigError, match=r"--format gguf-adapter: .* would lose what the tower has learnt"):
        find_format("gguf-adapter").check(config(tuning=seeing), None)  # type: ignore[arg-type]
