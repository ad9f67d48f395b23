"""Proof of a GGUF export: llama.cpp's predictions against those of the same model in transformers.

The two share no code, from the tokens to the products, so predictions in 16 or 8 bits differ. As for every export in
fewer bits, the difference may be half of what the training changed.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, Keys, TokenType
from torch import Tensor

from trainer.base.find.locate import base_files
from trainer.errors import CapstanError
from trainer.export.figures import NOT_TRAINED, KeptProof, Proof, Rounding
from trainer.export.gguf.converter import convert
from trainer.export.gguf.lora import write_gguf_lora
from trainer.export.gguf.predictions import LlamaCppQuestion, next_tokens
from trainer.export.gguf.q4_0 import convert_side, write_q4_0
from trainer.export.proof.kept import ROWS_OF_SHARES, kept_proof
from trainer.export.proof.models import Trained, base_directory, directory_of
from trainer.export.proof.rendering import Texts, trained_texts
from trainer.export.proof.rows import ProbeRow, distance
from trainer.export.proof.verify import half, make_proof, merged_side
from trainer.export.write.as_stored import CodesMoved
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import write_model
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

_IN_CODES = "*-q4_0.gguf"
_PLACES = 4  # at most, in a row: llama.cpp is asked for each place, and returns a whole vocabulary as text


def prove_gguf(folder: Store, step: int, exported: Store) -> Proof:
    """Compare each model in `exported` but that in Q4_0 with the merged model of `step`.

    Returns the proof of the file that is farthest from it.
    """
    trained = Trained.at(folder, step)
    with directory_of(exported) as directory:
        files = [file for file in directory.glob("*.gguf") if not file.match(_IN_CODES)]
        for file in files:
            _check_texts(file, trained_texts(trained.config, trained.base.directory))
        return _prove(trained, [(file, None) for file in files])


def prove_q4_0(folder: Store, step: int, exported: Store, rounding: Rounding, usual: Rounding) -> KeptProof:
    """Measure in llama.cpp the base in Q4_0, the adapter of `step` beside it, and the merge in `exported`.

    Raises `ConfigError` for an adapter that llama.cpp does not load.
    """
    trained = Trained.at(folder, step, rows=ROWS_OF_SHARES)
    with directory_of(exported) as directory, scratch_folder("gguf") as scratch:
        (file,) = directory.glob(_IN_CODES)
        _check_texts(file, trained_texts(trained.config, trained.base.directory))
        plain, model, adapter = as_plain(trained.base), Path(scratch, "q4_0.gguf"), Path(scratch, "adapter.gguf")
        learnt = LearntWeights(folder, trained.manifest, trained.dtype)
        files = trained.method.export(learnt.whole, trained.config.model).files
        write_gguf_lora(files, base_files(trained.config.model), Path(scratch), adapter)
        with base_directory(plain) as base:
            link = Path(scratch, "base")
            link.symlink_to(base)
            write_q4_0(convert_side(link, plain, trained.config), None, model, rounding, CodesMoved())
        rows = _rows(trained)
        alone, beside, merged = (
            _in_llama_cpp(path, learnt_beside, trained.vocabulary, rows)
            for path, learnt_beside in ((model, None), (model, adapter), (file, None))
        )
    return kept_proof(trained, rows, alone, beside, merged, rounding, usual, computed_in="llama.cpp")


def prove_gguf_adapter(folder: Store, step: int, exported: Store) -> Proof:
    """Compare the adapter in `exported`, beside the base in f16, with the merged model of `step`."""
    trained = Trained.at(folder, step)
    with directory_of(exported) as directory, scratch_folder("gguf") as scratch, base_directory(trained.base) as base:
        model = Path(scratch, "base.gguf")
        convert(base, "f16", model, "base")
        return _prove(trained, [(model, file) for file in directory.glob("*.gguf")])


def _check_texts(file: Path, ours: Texts) -> None:
    """Raise `CapstanError` if the file's texts differ from the run's.

    They differ in the chat template, the special tokens, the merges, the numbering of tokens, or the first token of a
    text.
    """
    reader = GGUFReader(file)

    def told(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    types, control = told(Keys.Tokenizer.TOKEN_TYPE) or [], (TokenType.CONTROL, TokenType.UNKNOWN)
    special = [number for number, token in ours.tokenizer.added_tokens_decoder.items() if token.special]
    tokens, added = told(Keys.Tokenizer.LIST), {*ours.tokenizer.added_tokens_decoder}
    numbered = {number: token for token, number in ours.tokenizer.get_vocab().items() if number not in added}
    same = {
        "chat template": (told(Keys.Tokenizer.CHAT_TEMPLATE) or None) == (ours.template or None),
        "end of text": told(Keys.Tokenizer.EOS_ID) == ours.tokenizer.eos_token_id,
        "begin of text": told(Keys.Tokenizer.BOS_ID) in (None, ours.tokenizer.bos_token_id),
        "set of special tokens": all(types[number] in control for number in special if number < len(types)),
        "first token of a text": told(Keys.Tokenizer.ADD_BOS) in (None, ours.begins_with_bos),
        "set of merges": told(Keys.Tokenizer.MODEL) != "gpt2" or (told(Keys.Tokenizer.MERGES) or []) == _merges(ours),
        "numbering of tokens": all(tokens[number] == token for number, token in numbered.items()),
    }
    for what, alike in same.items():
        if not alike:
            raise CapstanError(f"{file.name} has another {what} than the run. {NOT_TRAINED}")


def _merges(ours: Texts) -> list[str]:
    """Return the merges of a byte-level tokenizer in llama.cpp's form.

    A merge is two parts with a space between; a space inside a part has another sign.
    """
    backend: Any = ours.tokenizer
    pairs = json.loads(backend.backend_tokenizer.to_str())["model"].get("merges") or []
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]


def _prove(trained: Trained, files: Sequence[tuple[Path, Path | None]]) -> Proof:
    """Prove `files`, which are models, each with the adapter beside it or None."""
    rows = _rows(trained)
    with scratch_folder("gguf") as folder:
        write_model(
            trained.run, trained.manifest, trained.config, open_store(f"{folder}/merged"), lambda done, total: None
        )
        expected = trained.exported(merged_side, f"{folder}/merged", rows, packed=False)
    with base_directory(trained.base) as base:
        effect = distance(expected, trained.exported(merged_side, str(base), rows, packed=False), rows)
    found = (distance(expected, _in_llama_cpp(*pair, expected[0].shape[1], rows), rows) for pair in files)
    proof = make_proof(trained.probe, "fp32", max(found), half(effect), effect)
    return replace(proof, compared="its predictions in llama.cpp against the merged model's in transformers")


def _rows(trained: Trained) -> list[ProbeRow]:
    """Return the rows with fewer places, at even distances, including the last one."""
    rows = list[ProbeRow]()
    for row in trained.probe.rows:
        kept = torch.linspace(len(row.places) - 1, 0, min(_PLACES, len(row.places))).long().flip(0)
        rows.append(ProbeRow(row.tokens, row.places[kept], row.targets[kept]))
    return rows


def _in_llama_cpp(model: Path, adapter: Path | None, vocabulary: int, rows: Sequence[ProbeRow]) -> Sequence[Tensor]:
    """Return for each row (P, V), log-probabilities."""
    texts = [row.tokens[0, : place + 1].tolist() for row in rows for place in row.places]
    with scratch_folder("gguf") as folder:
        question = LlamaCppQuestion(str(model), texts, vocabulary, adapter and str(adapter))
        found = next_tokens(question, Path(folder))
    return torch.from_numpy(found).split([len(row.places) for row in rows])
