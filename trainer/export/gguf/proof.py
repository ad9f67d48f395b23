"""Proof of a GGUF export: llama.cpp's predictions against those of the same model in transformers.

The two share no code, from the tokens to the products. What is in 16 or 8 bits differs by that, so, as for every export in fewer
bits, the difference is allowed to be half of what the training changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.figures import Proof
from trainer.export.gguf.converter import convert
from trainer.export.gguf.predictions import LlamaCppQuestion, next_tokens
from trainer.export.proof import plain
from trainer.export.proof.distributions import distance
from trainer.export.proof.recoded import half
from trainer.export.proof.rows import ProbeRow
from trainer.export.proof.verify import Trained, base_directory, directory_of, make_proof, plain_model
from trainer.export.write.merged import write_model
from trainer.files.scratch import scratch_folder
from trainer.store import Store, open_store

_PLACES = 4  # of a row, at most: llama.cpp is asked for each of them, and tells a whole vocabulary as text


def prove_gguf(run: Store, step: int, exported: Store) -> Proof:
    """Each model in `exported` against the merged model of `step`; the proof is that of the file which is farthest from it."""
    with directory_of(exported) as folder:
        return _prove(Trained.at(run, step), [(file, None) for file in folder.glob("*.gguf")])


def prove_gguf_adapter(run: Store, step: int, exported: Store) -> Proof:
    """The adapter in `exported`, beside the base in f16, against the merged model of `step`."""
    trained = Trained.at(run, step)
    with directory_of(exported) as folder, scratch_folder("gguf") as scratch, base_directory(trained.base) as base:
        model = Path(scratch, "base.gguf")
        convert(base, "f16", model, "base")
        return _prove(trained, [(model, file) for file in folder.glob("*.gguf")])


def _prove(trained: Trained, files: Sequence[tuple[Path, Path | None]]) -> Proof:
    """`files` are models, each with the adapter beside it or None."""
    rows = _rows(trained)
    with scratch_folder("gguf") as folder:
        write_model(
            trained.run, trained.manifest, trained.config, open_store(f"{folder}/merged"), lambda done, total: None
        )
        expected = trained.exported(_in_transformers, f"{folder}/merged", packed=False)
    with base_directory(trained.base) as base:
        effect = distance(expected, trained.exported(_in_transformers, str(base), packed=False), rows)
    found = (distance(expected, _in_llama_cpp(*pair, expected, rows), rows) for pair in files)
    proof = make_proof(trained.probe, "fp32", max(found), half(effect), effect)
    return replace(proof, compared="its predictions in llama.cpp against the merged model's in transformers")


def _with_fewer_places(row: ProbeRow) -> ProbeRow:
    """The same row with places at even distances, the last one among them."""
    kept = torch.linspace(len(row.places) - 1, 0, min(_PLACES, len(row.places))).long().flip(0)
    return ProbeRow(row.tokens, row.places[kept], row.targets[kept])


def _rows(trained: Trained) -> list[ProbeRow]:
    return [_with_fewer_places(row) for row in trained.probe.rows]


def _in_transformers(trained: Trained, folder: str) -> list[Tensor]:
    """The predictions of the model in `folder`, for a process of their own."""
    model = plain.grow(plain_model(trained, Path(folder)), trained.vocabulary)
    with plain.computing_in_fp32(model):
        return plain.place_logits(model, _rows(trained))


def _in_llama_cpp(
    model: Path, adapter: Path | None, expected: Sequence[Tensor], rows: Sequence[ProbeRow]
) -> Sequence[Tensor]:
    """For each row (P, V), as `expected` has them."""
    texts = [row.tokens[0, : place + 1].tolist() for row in rows for place in row.places]
    with scratch_folder("gguf") as folder:
        question = LlamaCppQuestion(str(model), texts, expected[0].shape[1], adapter and str(adapter))
        found = next_tokens(question, Path(folder))
    return torch.from_numpy(found).split([len(row.places) for row in rows])
