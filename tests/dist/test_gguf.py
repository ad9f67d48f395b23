"""An export for llama.cpp predicts in llama.cpp what the merged model predicts in transformers."""

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.dist import llama
from tests.dist.launch import launch
from tests.dist.proofs import together
from tests.material import Workshop, commit
from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.__main__ import _export
from trainer.export.destination import ExportProgress, Written
from trainer.export.figures import KeptProof
from trainer.export.format import find_format
from trainer.export.gguf import converter as llama_cpp
from trainer.export.gguf.proof import prove_gguf, prove_gguf_adapter
from trainer.export.proof import models
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long

PROMPTS = [[1, *range(262, 300)], [1, 5, 300, 17, 299, 270]]


@pytest.fixture(autouse=True)
def sides_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "aside", together)


def sentence_piece() -> bytes:
    """A tokenizer of a kind that the converter knows without a list of hashes: a byte is a token, some words are."""
    model, words = io.BytesIO(), "the ant bee cat dog emu fox gnu hen ibis jay".split()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([" ".join(words[k % 11 :]) for k in range(99)]),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def workshop_of(folder: Path, kind: str) -> Workshop:
    tokenizer = sentence_piece()
    vocabulary: int = SentencePieceProcessor(model_proto=tokenizer).vocab_size()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    workshop = Workshop(folder, kind, intermediate_size=192, vocab_size=vocabulary)
    for file in workshop.base.glob("*token*"):
        file.unlink()
    (workshop.base / "tokenizer.model").write_bytes(tokenizer)
    # Qwen2's own special tokens are others than those of this vocabulary.
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (workshop.base / "tokenizer_config.json").write_text(json.dumps(special))
    return workshop


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Committed after steps 4 and 5, whose adapters differ."""
    workshop = workshop_of(tmp_path_factory.mktemp(request.param), request.param)
    config, run = workshop.config("done", "tuning.method=rslora", "tuning.rank=4"), workshop.store.sub("done")
    commit(run, config, 4)
    commit(run, config, 5)
    return run


def exported(run: Store, folder: Path, form: str, *options: str, step: int = 4) -> Written:
    said: list[str] = []
    progress = ExportProgress(lambda done, total: None, said.append)
    return find_format(form, options).write(run, open_store(str(folder)), step, progress)


def in_llama_cpp(model: Path, adapter: Path | None = None) -> Tensor:
    """(prompts, vocabulary) log-probabilities of the next token."""
    arguments = (str(model), PROMPTS, 310, 300, None if adapter is None else str(adapter))
    (found,) = launch(1, llama.log_probabilities, *arguments, timeout=200)
    return torch.tensor(found)


def in_transformers(model: Any) -> Tensor:
    with torch.no_grad():
        last = [model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.stack(last).float().log_softmax(-1)


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("run", ["qwen2"], indirect=True)
def test_a_merged_model_predicts_the_same_in_llama_cpp_as_in_transformers(run: Store, tmp_path: Path) -> None:
    export_merged(run, open_store(str(tmp_path / "merged")), 4)
    export_merged(run, open_store(str(tmp_path / "other")), 5)
    written = exported(run, tmp_path / "gguf", "gguf", "types=[f16,q8_0]")
    assert written.facts["files"] == ["done-f16.gguf", "done-q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["README.md", *written.facts["files"]]

    expected, other = (in_transformers(loaded(tmp_path / name)) for name in ("merged", "other"))
    assert difference(in_llama_cpp(tmp_path / "gguf/done-f16.gguf"), expected) < 1e-2 < difference(expected, other)

    # transformers' own reader of GGUF gives the weights that 8 bits leave: their error, and no other, is llama.cpp's
    # too.
    rounded = in_transformers(loaded(tmp_path / "gguf", gguf_file="done-q8_0.gguf"))
    own_error = difference(rounded, expected)
    found = in_llama_cpp(tmp_path / "gguf/done-q8_0.gguf")
    assert 1e-2 < difference(found, expected) < 3 * own_error < 0.5 * difference(expected, other)

    gguf = open_store(str(tmp_path / "gguf"))
    proof, wrong = find_format("gguf", ["types=[f16,q8_0]"]).prove(run, 4, gguf), prove_gguf(run, 5, gguf)
    assert (proof.holds, wrong.is_alike) == (True, False), (proof, wrong)
    assert proof.sentence().startswith("its predictions in llama.cpp against the merged model's in transformers: KL ")


@pytest.mark.parametrize(
    "scaling",
    [
        "rope_type: linear, factor: 4.0",
        "rope_type: yarn, factor: 4.0, original_max_position_embeddings: 16",
        (
            "rope_type: llama3, factor: 4.0, original_max_position_embeddings: 16, low_freq_factor: 1.0,"
            " high_freq_factor: 4.0"
        ),
    ],
)
def test_scaled_positions_are_those_of_the_file(tmp_path: Path, scaling: str) -> None:
    workshop, found = workshop_of(tmp_path, "llama"), dict[str, Tensor]()
    for name, settings in (("scaled", [f"model.rope_scaling={{{scaling}}}"]), ("plain", [])):
        commit(workshop.store.sub(name), workshop.config(name, "tuning.rank=4", *settings), 4)
        export_merged(workshop.store.sub(name), open_store(str(tmp_path / f"{name}-merged")), 4)
        found[name] = in_transformers(loaded(tmp_path / f"{name}-merged"))
    exported(workshop.store.sub("scaled"), tmp_path / "gguf", "gguf", "types=[f32]")
    in_file = in_llama_cpp(tmp_path / "gguf/scaled-f32.gguf")
    assert difference(in_file, found["scaled"]) < 1e-2 < difference(found["scaled"], found["plain"])


@pytest.mark.parametrize("run", ["llama"], indirect=True)
def test_an_adapter_predicts_the_same_in_llama_cpp_as_in_peft(run: Store, tmp_path: Path) -> None:
    export_adapter(run, open_store(str(tmp_path / "peft")), 4)
    exported(run, tmp_path / "lora", "gguf-adapter")
    base = Path(run.uri.removeprefix("file://")).parents[1] / "base"
    llama_cpp.convert(base, "f32", tmp_path / "base.gguf", "base")

    plain = loaded(base)
    without = in_transformers(plain)
    expected = in_transformers(PeftModel.from_pretrained(plain, str(tmp_path / "peft")))
    found = in_llama_cpp(tmp_path / "base.gguf", tmp_path / "lora/done-adapter.gguf")
    assert difference(found, expected) < 1e-2 < difference(expected, without)
    assert difference(in_llama_cpp(tmp_path / "base.gguf"), without) < 1e-2

    lora = open_store(str(tmp_path / "lora"))
    proof, wrong = find_format("gguf-adapter").prove(run, 4, lora), prove_gguf_adapter(run, 5, lora)
    assert (proof.holds, wrong.is_alike) == (True, False), (proof, wrong)


def test_what_llama_cpp_cannot_have_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(form: str, *options: str, name: str = "done", kind: type[CapstanError] = ConfigError) -> str:
        with pytest.raises(kind) as error:
            exported(workshop.store.sub(name), tmp_path / "out", form, *options)
        return str(error.value)

    workshop = Workshop(tmp_path, intermediate_size=192)
    for name, *settings in (
        ["done"],
        ["dora", "tuning.method=dora"],
        [
            "longrope",
            "data.packing=false",
            (
                f"model.rope_scaling={{rope_type: longrope, factor: 4.0, short_factor: {[1.0] * 8}, long_factor:"
                f" {[4.0] * 8}}}"
            ),
        ],
        ["full", "tuning.method=full", "tuning.rank=16", "tuning.alpha=32", "quant.type=none"],
    ):
        commit(workshop.store.sub(name), workshop.config(name, *settings))
    assert "does not know this base's tokenizer" in refusal("gguf")
    assert not (tmp_path / "out").exists(), "it is refused before the merged model is written"
    asked = Namespace(run=workshop.store.sub("done").uri, destination=str(tmp_path / "out"), format="gguf", options=[])
    with pytest.raises(ConfigError, match="does not know this base's tokenizer"):
        _export(Namespace(**vars(asked), step=None, verify=False, server=None))
    assert not (tmp_path / "out").exists(), "a refusal leaves nothing, not even the card"
    assert "the factors of rope_type: longrope for Phi-3 alone" in refusal("gguf", name="longrope")
    assert "and this is DoRA. Export the merged model" in refusal("gguf-adapter", name="dora")
    assert "there is no adapter" in refusal("gguf-adapter", name="full")
    assert "Input should be 'f32', 'f16', 'bf16', 'q8_0' or 'q4_0'" in refusal("gguf", "types=[q4]")
    assert "Did you mean 'types'?" in refusal("gguf", "type=[f16]")
    assert "'ggfu' is not allowed" in refusal("ggfu")
    assert "is no folder" in refusal("gguf", f"scratch={tmp_path}/none")
    # as if it knew this tokenizer
    monkeypatch.setattr("trainer.export.formats.gguf.check_known", lambda *_, **options: None)
    monkeypatch.setattr(llama_cpp.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "0.0 GB free, and this export needs" in refusal("gguf", kind=StorageError)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert "pip install 'capstan-llm[gguf]'" in refusal("gguf")


@pytest.mark.long
def test_q4_0_has_the_same_bytes_by_any_number_of_ranks_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop, found = workshop_of(tmp_path, "llama-tied"), list[bytes]()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for ranks in (1, 2, 3):
        config = workshop.config("done", f"run.store={tmp_path / str(ranks)}")
        run, folder = open_store(config.run.store).sub("done"), tmp_path / f"merged-{ranks}"
        commit(run, config, 4, ranks=ranks)
        if ranks == 3:
            with monkeypatch.context() as during:
                during.setattr(Store, "put_chunks", killed)
                with pytest.raises(KeyboardInterrupt):
                    exported(run, folder, "merged", "as=q4_0")
        exported(run, folder, "merged", "as=q4_0")
        found.append((folder / "done-q4_0.gguf").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("run", ["qwen2"], indirect=True)
def test_the_codes_of_q4_0_follow_the_adapter(run: Store, tmp_path: Path) -> None:
    """Also in llama.cpp: transformers' own reader of GGUF and llama.cpp find the same model in the file."""
    written = exported(run, tmp_path / "gguf", "gguf", "types=[f16,q4_0]", "rounding=dither")
    assert written.facts["files"] == ["done-f16.gguf", "done-q4_0.gguf"]
    assert 0 < written.facts["codes_changed"] < written.facts["codes"]
    exported(run, tmp_path / "again", "merged", "as=q4_0", "rounding=dither")
    files = [tmp_path / name / "done-q4_0.gguf" for name in ("gguf", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(files[0]).tensors}
    assert {types[f"blk.1.{name}.weight"] for name in ("attn_q", "ffn_down")} == {"Q4_0"}
    assert types["token_embd.weight"] == "Q8_0"

    in_file = in_transformers(loaded(tmp_path / "gguf", gguf_file="done-q4_0.gguf"))
    found = in_llama_cpp(files[0])
    export_merged(run, open_store(str(tmp_path / "merged")), 4)
    expected = in_transformers(loaded(tmp_path / "merged"))
    assert difference(found, in_file) < 0.3 * difference(in_file, expected)  # llama.cpp multiplies in 8 bits

    proof = find_format("gguf", ["types=[q4_0]"]).prove(run, 4, open_store(str(tmp_path / "gguf")))
    assert isinstance(proof, KeptProof)
    assert proof.computed_in == "llama.cpp"
    assert proof.kl < proof.kl_effect, proof
