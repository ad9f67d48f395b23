"""The smoke run's material: real question-answer pairs, a tokenizer and a base that plain transformers loads."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launcher.smoke import pictures
from launcher.smoke import sample as material
from launcher.smoke.sample import (
    Material,
    Sizes,
    _docstring,
    _public,
    _tokens,
    make_sample,
    pairs,
    share_of_rate,
    source_code,
    split,
)
from launcher.smoke.small import made_once

SMALL = Sizes(hidden=64, intermediate=128, layers=1, steps=12, batch=4, sequence_length=64)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_sample(tmp_path_factory.mktemp("sample"), sizes=SMALL)


@pytest.fixture(scope="module")
def tokenizer(sample: Material) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sample.base)


def test_the_pairs_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from launcher.smoke.sample import pairs;"
        " print(hashlib.sha256(repr(pairs()).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_there_are_thousands_of_pairs_and_no_answer_occurs_twice() -> None:
    found = pairs()
    train, held_out = split(found)
    assert len(train) > 3000
    assert len(held_out) > 50
    assert not set(train) & set(held_out)
    assert len({answer for _, answer in found}) == len(found)
    assert max(len(answer) for _, answer in found) <= 1200
    answers = dict(found)
    assert answers["What does os.path.join do?"].startswith("Join two or more pathname components")
    assert "What does json.dumps do?" in answers
    assert "What does antigravity.geohash do?" not in answers
    assert "What does queue.Queue.qsize do?" in answers
    assert "What does queue.SimpleQueue.qsize do?" not in answers, "the same words, and a later name"


def test_an_address_in_memory_is_no_answer_because_each_process_has_another() -> None:
    told = "The default of the module, and what it is."
    assert _docstring(SimpleNamespace(__doc__=told)) == told
    assert _docstring(SimpleNamespace(__doc__=f"{told} <object object at 0x7f12>")) == ""


def test_a_long_answer_ends_with_a_paragraph_or_a_line_and_a_short_one_is_none() -> None:
    def told(docstring: str | None) -> str:
        return _docstring(SimpleNamespace(__doc__=docstring))

    first, line = "The first paragraph, which is enough.", "x" * 99
    lines = "\n".join([line] * 20)
    assert told(f"{first}\n\n{lines}") == first
    assert told(lines) == "\n".join([line] * 12)
    whole = "\n\n".join(["y" * 599] * 2)[:1200]
    assert told(whole) == whole
    assert [told("z" * length) for length in (19, 20, 1200, 1201)] == ["", "z" * 20, "z" * 1200, ""]
    assert told("  The first line \n      and more  \n") == "The first line\nand more"
    assert told(None) == ""


def test_a_modules_own_functions_classes_methods_and_properties_are_asked_about() -> None:
    module = ModuleType("sea")
    code = """
from os.path import join
class Ship:
    def sail(self): ...
    @property
    def mast(self): ...
    @staticmethod
    def sink(): ...
    length = 7
    def _drift(self): ...
class _Raft: ...
def swim(): ...
def row(): ...
row.__module__ = "_sea"
depth = 9
"""
    exec(code, vars(module))
    names = [name for name, _ in _public("sea", module)]
    assert names == ["sea.Ship", "sea.Ship.mast", "sea.Ship.sail", "sea.Ship.sink", "sea.row", "sea.swim"]


def test_the_base_learns_from_whole_modules_as_much_as_its_steps_read(tmp_path: Path) -> None:
    files = [tmp_path / f"{letter}.py" for letter in "ab"]
    for file in files:
        file.write_text(f"{file.stem} = '{file.stem * 30_000}'\n")
    tokenizer: Any = SimpleNamespace(encode=lambda text, add_special_tokens: [*map(ord, text)])
    sizes = Sizes(steps=3, batch=2, sequence_length=5_999)
    tokens = _tokens(tokenizer, files, sizes)
    assert tokens.shape == (3, 2, 6_000)
    text = "".join(map(chr, tokens.flatten().tolist()))
    first, second = text[:20_000], text[20_000:]
    assert {first, second[:16_000]} in (
        {source_code(a)[:20_000], source_code(b)[:16_000]} for a, b in (files, files[::-1])
    )


def test_the_base_reads_code_that_does_not_explain_itself(tmp_path: Path) -> None:
    code = tmp_path / "module.py"
    code.write_text('"""Of it."""\nclass Empty:\n    """Nothing."""\ndef f():\n    """One."""\n    return "1"\n')
    assert source_code(code) == "class Empty:\n    pass\n\ndef f():\n    return '1'"


def test_what_was_begun_after_a_sample_makes_that_one_incomplete(tmp_path: Path) -> None:
    def fails() -> dict[str, int]:
        raise OSError("the disk is full")

    def made(what: str, number: int) -> dict[str, int]:
        return made_once(tmp_path, {"what": what}, lambda: {"number": number}, lambda line: None)

    assert [made("a", 1), made("a", 2), made("b", 3), made("b", 4)] == [{"number": one} for one in (1, 1, 3, 3)]
    with pytest.raises(OSError, match="the disk is full"):
        made_once(tmp_path, {"what": "a"}, fails, lambda line: None)
    assert made("b", 5) == {"number": 5}, "files of it may have been replaced"


@pytest.mark.parametrize(
    ("module", "making", "arguments", "rows"),
    [(material, "make_sample", [], "auto"), (pictures, "make_pictures", ["make"], "pictures")],
    ids=["text", "pictures"],
)
def test_the_process_of_the_material_begins_what_the_run_needs_and_prints_it(
    module: Any,
    making: str,
    arguments: list[str],
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, begun = Material("/base", ["/a"], ["/b"], 3.0, 2.0, "fp32"), list[Any]()
    monkeypatch.setattr(module, making, lambda directory, report: print("by the way") or made)
    monkeypatch.setattr(module, "begin_runs", begun.append)
    monkeypatch.setattr("launcher.smoke.small.local_gpus", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["module", *arguments, "/here", "optim.lr=1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/store"))
    module._main()
    assert json.loads(capsys.readouterr().out) == asdict(made)
    (config,) = begun
    found = (config.run.store, config.model.base, config.data.format, config.optim.lr)
    assert found == ("/store", "/base", rows, 1.0)


def test_the_files_hold_chat_rows(sample: Material) -> None:
    rows = [json.loads(line) for path in sample.train for line in Path(path).read_text().splitlines()]
    assert len(sample.train) > 1
    assert len(rows) > 3000
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in row["messages"])
    held_out = [line for path in sample.eval for line in Path(path).read_text().splitlines()]
    assert len(held_out) > 50


TEXTS = [
    "def f(a, b):\n    return  a+b\n",
    "  indented, \ttabs",
    "unseen: é 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_fast_tokenizer_gives_the_text_back_with_offsets(tokenizer: Any, text: str) -> None:
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {position for start, end in encoded["offset_mapping"] for position in range(start, end)}
    assert covered == set(range(len(text)))


def test_the_fast_tokenizer_agrees_with_sentencepiece(sample: Material, tokenizer: Any) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(Path(sample.base) / "tokenizer.model"))  # type: ignore[call-arg]
    for _, answer in pairs()[::20]:
        assert tokenizer.encode(answer, add_special_tokens=False) == processor.encode(answer)


def test_the_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "Yes.<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


def test_the_base_is_an_ordinary_sharded_model_that_has_learnt(sample: Material, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = Path(sample.base)
    assert len(list(base.glob("*.safetensors"))) >= 2
    assert (base / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sample.loss_after < sample.loss_before - 0.3


def test_a_made_sample_is_not_made_again_and_a_half_made_one_is(sample: Material) -> None:
    directory = Path(sample.base).parent
    weights = next(Path(sample.base).glob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    assert make_sample(directory, sizes=SMALL) == sample
    assert weights.stat().st_mtime_ns == before

    (directory / "sample.json").unlink()
    make_sample(directory, sizes=SMALL)
    assert weights.stat().st_mtime_ns != before
    assert (directory / "sample.json").exists()


@pytest.mark.parametrize("change", ["another Python", "another size", "another folder"])
def test_a_sample_is_made_again_for_what_it_depends_on(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Any]()

    def make(*given: Any) -> Material:
        made.append(given[1])
        given[0].mkdir(exist_ok=True)
        return Material("/base", ["/a"], ["/b"], 3.0, 2.0, "fp32")

    monkeypatch.setattr(material, "_made", make)
    for _ in range(2):
        make_sample(tmp_path / "one")
    assert made == [Sizes()]
    sizes, folder = Sizes(), tmp_path / "one"
    if change == "another Python":
        monkeypatch.setattr(sys, "version", "3.99.0")
    elif change == "another size":
        sizes = SMALL
    else:
        folder = folder.rename(tmp_path / "two")
    make_sample(folder, sizes)
    assert made == [Sizes(), sizes]


def test_importing_the_module_leaves_torch_alone() -> None:
    program = (
        "import sys, launcher.smoke.sample; assert not {'torch', 'transformers', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_over_the_rest() -> None:
    shares = [share_of_rate(step, 40) for step in range(40)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[-1] == pytest.approx(1 / 36)
    assert shares[4:] == sorted(shares[4:], reverse=True)
