"""Proof of an export: in plain transformers (and PEFT) it predicts what the model that Capstan trained predicts.

The proof compares distributions over the next token on rows of the run's own data (trainer/export/proof/rows.py). It
computes in fp32, in which the two sides differ only by the order of additions. If fp32 does not fit, or the base is
stored in 4 bits for products in bf16, both sides compute in `model.dtype`. In either case the allowed difference is
measured on the spot, by moving the last bits of every product. The adapter's own effect is the control: an allowed
difference must be smaller.

Each side is a process of its own. It is on the GPU if it fits there, whole or a decoder layer at a time, else on the
CPU (trainer/export/proof/sides.py).

If the base was quantized for training, a merged model is not quite the trained one, because it is merged into the
base's own weights. The proof then covers only the merging: the model predicts what PEFT's own merge predicts, rounded
to the same types.

First, every byte of the export is compared with a second export of the checkpoint. The second export writes nothing:
the format writes to a store that compares. Predictions on some rows would not reveal one weight among billions, a
setting that matters only for long texts, or a token that no row has. The export's tokenizer and chat template must also
give the run's texts the tokens of the training (trainer/export/proof/rendering.py).

A merged model that was quantized again, to 4 or 8 bits, is compared with the model as it was trained. No rounding of
products explains that difference, so nothing is proven equal. The difference may be half of what the training changed:
otherwise the quantization has undone much of the training.

A served export is proven by the server's log-probabilities on the run's rows and on tokens that the server draws. The
other side, transformers and PEFT, computes in fp32. The server usually computes in bf16, so the allowed difference is
the effect of moving the last bit of every product in bf16. The control is what the training has changed.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.base.describe.language_model import model_config
from trainer.base.find.processor import Processor, read_processor
from trainer.base.load.front import weights_beside
from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.data.dataset.pictures import PICTURE
from trainer.data.order.pictures import ServedPictures
from trainer.errors import CapstanError, ConfigError, NotFound
from trainer.export.destination import CARD, ExportProgress, Written
from trainer.export.figures import NOT_TRAINED, Proof, ServedProof
from trainer.export.format import ExportFormat
from trainer.export.proof import plain
from trainer.export.proof.models import (
    Trained,
    base_directory,
    dequantized_by_transformers,
    directory_of,
    grown_base,
    plain_base,
    plain_model,
)
from trainer.export.proof.rows import Distance, Probe, ProbeRow, distance
from trainer.export.write.adapter import export_adapter
from trainer.model.towers import seeing_name
from trainer.servers import Answer, CompletionsServer, Pictured, refuse_head, refuse_reader_of_prompts
from trainer.store.scratch import scratch_folder
from trainer.store.store import PART_BYTES, Buffer, Entry, Store, open_store

# How far a product's outputs are moved to measure what rounding does, as a share of themselves. It is one last bit in
# bf16, and five bits in fp32, because the order of thousands of additions reaches that far.
SHAKEN_BY = {"bf16": 2**-8, "fp32": 2**-18}
# A divergence grows with the square of a difference.
TOLERATED_NOISE = 3.0


def prove_adapter(folder: Store, step: int, adapter: Store) -> Proof:
    """Compare the model of `step` with the exported adapter."""
    trained = Trained.at(folder, step)
    if trained.method.exports_model:
        return _prove_model(trained, adapter)
    if trained.method.through:
        raise ConfigError(
            "--verify: the run was trained through the base's codes (tuning.through: stored), and its adapter beside"
            " the base is another model. Verify --format merged as=stored."
        )
    trained.check_texts(adapter)
    computed_in, rows = trained.computed_in, trained.probe.rows
    expected = trained.predictions()
    # The other side holds some weights as the values that quantizing leaves, because bitsandbytes has no layer for
    # them: see `plain.quantize`.
    packed = trained.config.quant.held.in_linear4bit and trained.method.adapts_4_bits
    found, allowed, effect = trained.exported(_adapter_side, adapter.uri, computed_in, packed=packed)
    return make_proof(trained.probe, computed_in, distance(expected, found, rows), allowed, effect)


def _adapter_side(trained: Trained, adapter: str, computed_in: str) -> tuple[list[Tensor], Distance, Distance]:
    """Return the logits with the exported adapter, how far rounding may move them, and how far the base's are."""
    rows, look = trained.probe.rows, plain.head_logits if trained.head else plain.place_logits
    with base_directory(trained.base) as base, directory_of(open_store(adapter)) as folder:
        # The end of every name is "".
        unpacked = plain.adapted_weights(folder) if trained.method.adapts_4_bits else ("",)
        model = plain_base(trained, base, computed_in, unpacked)
        model, without = plain.add_adapter(model, folder, trained.method)
        with _computing(model, computed_in):
            found, allowed = _predictions(model, rows, computed_in, look)
            with without:
                effect = distance(found, look(model, rows), rows)
    return found, allowed, effect


def prove_merged(folder: Store, step: int, merged: Store) -> Proof:
    """Compare the merged model with PEFT's merge of the exported adapter, in fp32.

    For information it is also compared with the model of `step`.
    """
    trained = Trained.at(folder, step)
    if trained.method.exports_model:
        return _prove_model(trained, merged)
    trained.check_texts(merged)
    rows = trained.probe.rows
    as_trained = trained.predictions()
    beside, alone, expected, allowed = trained.exported(_merging_side, packed=False)
    found = trained.exported(merged_side, merged.uri, rows, packed=False)
    return make_proof(
        trained.probe,
        "fp32",
        distance(expected, found, rows),
        allowed,
        distance(found, alone, rows),
        trained_kl=distance(as_trained, found, rows).kl,
        rounding_kl=distance(beside, found, rows).kl,
    )


def _merging_side(trained: Trained) -> tuple[list[Tensor], list[Tensor], list[Tensor], Distance]:
    """Return the logits of base and adapter side by side, of the base alone, and of PEFT's own merge.

    The result also says how far rounding may move the last ones.
    """
    rows = trained.probe.rows
    sources = dict(trained.weights.sources)
    if trained.sees:
        sources |= {seeing_name(name): source for name, source in weights_beside(trained.base).items()}
    stored = {name: SOURCE_DTYPES[source.dtype] for name, source in sources.items()}
    with base_directory(trained.base) as base, scratch_folder("adapter") as folder:
        export_adapter(trained.run, open_store(folder), trained.manifest.step)
        streamed = trained.streamed_layers()
        model = grown_base(trained, base, streamed)
        model, without = plain.add_adapter(model, Path(folder), trained.method)
        with plain.computing_in_fp32(model):
            beside = plain.place_logits(model, rows)
            with without:
                alone = plain.place_logits(model, rows)
            plain.merge_and_round(model, stored, trained.base.architecture.embedding, streamed)
            expected, allowed = _predictions(model, rows, "fp32")
    return beside, alone, expected, allowed


def merged_side(trained: Trained, merged: str, rows: Sequence[ProbeRow]) -> list[Tensor]:
    """Return the logits of a model stored at `merged`. Only the base gets rows for added tokens, which it lacks."""
    with directory_of(open_store(merged)) as folder:
        model = plain.grow(plain_model(trained, folder), trained.vocabulary)
        with plain.computing_in_fp32(model):
            return plain.place_logits(model, rows)


def _prove_model(trained: Trained, destination: Store) -> Proof:
    """Compare a model whose base itself has learnt with the model of `step`.

    Its effect is the difference from the base as it was.
    """
    trained.check_texts(destination)
    computed_in, rows = trained.computed_in, trained.probe.rows
    expected = trained.predictions()
    found, allowed = trained.exported(_model_side, destination.uri, computed_in, packed=False)
    effect = distance(found, trained.exported(_base_side, computed_in, packed=False), rows)
    return make_proof(trained.probe, computed_in, distance(expected, found, rows), allowed, effect)


def _model_side(trained: Trained, exported: str, computed_in: str) -> tuple[list[Tensor], Distance]:
    with directory_of(open_store(exported)) as folder:
        model = plain_model(trained, folder)
        with _computing(model, computed_in):
            return _predictions(model, trained.probe.rows, computed_in)


def _base_side(trained: Trained, computed_in: str) -> list[Tensor]:
    with base_directory(trained.base) as folder:
        model = plain_base(trained, folder, computed_in)
        with _computing(model, computed_in):
            return plain.place_logits(model, trained.probe.rows)


def _predictions(
    model: Any,
    rows: Sequence[ProbeRow],
    computed_in: str,
    look: Callable[[Any, Sequence[ProbeRow]], list[Tensor]] = plain.place_logits,
) -> tuple[list[Tensor], Distance]:
    """Return the logits at the rows' places, and how far from them rounding may be.

    That is several times as far as the last bits of every product move them.
    """
    found = look(model, rows)
    with plain.shaken(model, SHAKEN_BY[computed_in]):
        noise = distance(found, look(model, rows), rows)
    return found, Distance(TOLERATED_NOISE**2 * noise.kl, TOLERATED_NOISE * noise.log_prob)


def make_proof(
    probe: Probe,
    computed_in: str,
    found: Distance,
    allowed: Distance,
    effect: Distance,
    *,
    trained_kl: float | None = None,
    rounding_kl: float | None = None,
) -> Proof:
    """Make the proof from the difference of the predictions, the allowed difference, and the effect of the training."""
    return Proof(
        kl=found.kl,
        kl_allowed=allowed.kl,
        kl_effect=effect.kl,
        log_prob=found.log_prob,
        log_prob_allowed=allowed.log_prob,
        log_prob_effect=effect.log_prob,
        computed_in=computed_in,
        rows=probe.origin,
        trained_kl=trained_kl,
        rounding_kl=rounding_kl,
    )


def _computing(model: Any, computed_in: str) -> AbstractContextManager[None]:
    return plain.computing_in_fp32(model) if computed_in == "fp32" else nullcontext()


def prove_recoded(folder: Store, step: int, exported: Store) -> Proof:
    """Compare the trained model of `step` with the files in `exported`.

    The effect of a training is the difference between the model after it and before it.
    """
    trained = Trained.at(folder, step)
    trained.check_texts(exported)
    rows, computed_in = trained.probe.rows, trained.computed_in
    expected, begun = trained.predictions(), trained.predictions(learnt=False)
    found = trained.exported(_recoded_side, exported.uri, packed=False, recoded=True)
    difference, effect = distance(expected, found, rows), distance(expected, begun, rows)
    return make_proof(trained.probe, computed_in, difference, half(effect), effect)


def half(effect: Distance) -> Distance:
    """Return the largest allowed difference by fewer bits, if the training has had this effect."""
    return Distance(0.5 * effect.kl, 0.5 * effect.log_prob)


def _recoded_side(trained: Trained, exported: str) -> list[Tensor]:
    """Return the logits of the model as transformers reads it. FP8 is decoded, because no CPU multiplies in FP8."""
    with directory_of(open_store(exported)) as folder:
        architecture: Any = model_config(folder, None)
        quantization = getattr(architecture, "quantization_config", None) or {}
        decoded = quantization.get("quant_method") == "fp8"
        with dequantized_by_transformers(architecture) if decoded else nullcontext():
            model = plain.load_plain(folder, trained.dtype, trained.dtype, architecture if decoded else None)
        plain.keep_packed(model)
        return plain.place_logits(model.to(plain.device()), trained.probe.rows)


_DRAWS = 24


def prove_served(folder: Store, step: int, destination: Store, given: str, *, whole_model: bool) -> ServedProof:
    """Compare what the server at the URL `given` serves with the export of `step`.

    The export is the whole model in `destination`, or the adapter over the base as its files hold it.

    Raises:
        ConfigError, CapstanError: the server raises them, or the run has a head.
    """
    trained = Trained.at(folder, step)
    refuse_head(trained.config)
    refuse_reader_of_prompts(trained.base.architecture.reads_prompts)
    server = CompletionsServer.find("--server", given, trained.config.run.name)
    processor = read_processor(trained.base.directory, trained.base.name) if trained.sees else None
    prompts = [_asked(row, processor) for row in trained.probe.rows]
    answers = [server.ask(prompt, _DRAWS) for prompt in prompts]
    if any(max(answer.drawn) >= trained.vocabulary for answer in answers):
        raise ConfigError(
            f"--server: {server.url} draws tokens that the export lacks. Start it with the run's base, and with this"
            " export."
        )
    answers = [_beside_pictures(answer, prompt, processor) for answer, prompt in zip(answers, prompts, strict=True)]
    rows = [
        _whole(row, answer, prompt, processor)
        for row, answer, prompt in zip(trained.probe.rows, answers, prompts, strict=True)
    ]
    whole_model = whole_model or trained.method.exports_model
    merged = destination.uri if whole_model else None
    expected, shaken, alone, blind = trained.exported(_side, merged, rows, packed=False)
    found = [torch.tensor([*answer.log_p, *answer.drawn_log_p]) for answer in answers]
    drawn = [slice(len(answer.log_p), None) for answer in answers]
    prompt = [slice(0, len(answer.log_p)) for answer in answers]
    return ServedProof(
        server=server.url,
        model=server.model,
        prompt=_mean(found, expected, prompt),
        drawn=_mean(found, expected, drawn),
        largest=max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)),
        allowed=TOLERATED_NOISE * _mean(shaken, expected),
        effect=_mean(alone, expected),
        from_base=_mean(found, alone),
        tokens=sum(len(answer.log_p) for answer in answers),
        draws=sum(len(answer.drawn) for answer in answers),
        rows=trained.probe.origin,
        from_blind=_mean(found, blind) if blind else None,
    )


def _asked(row: ProbeRow, processor: Processor | None) -> list[int] | Pictured:
    """Return a row as the server gets it, with its pictures."""
    ids = row.tokens[0].tolist()
    if not row.entries:
        return ids
    assert processor is not None
    return ServedPictures(open_store(row.folder), processor).prompt(np.frombuffer(row.entries, PICTURE), ids)


def _beside_pictures(answer: Answer, prompt: list[int] | Pictured, processor: Processor | None) -> Answer:
    """Return the answer without the tokens that stand for pictures. It ends before one of these or of video that is
    drawn, which shows none."""
    if processor is None:
        return answer
    log_p = [answer.log_p[place] for place in _places(prompt)]
    ends = (number for number, token in enumerate(answer.drawn) if token in processor.reserved)
    end = next(ends, len(answer.drawn))
    return Answer(log_p, answer.drawn[:end], answer.drawn_log_p[:end])


def _places(prompt: list[int] | Pictured) -> list[int]:
    """Return the places of a prompt whose next token is compared."""
    if not isinstance(prompt, Pictured):
        return list(range(len(prompt) - 1))
    return [place for place in range(len(prompt.tokens) - 1) if not any(place + 1 in span for span in prompt.spans)]


def _whole(row: ProbeRow, answer: Answer, prompt: list[int] | Pictured, processor: Processor | None) -> ProbeRow:
    """Return the row with the drawn tokens after it. Every token but the first, and those of pictures, is compared."""
    tokens = torch.cat([row.tokens, torch.tensor([answer.drawn], dtype=torch.int64)], 1)
    length = row.tokens.shape[1]
    places = torch.tensor([*_places(prompt), *range(length - 1, tokens.shape[1] - 1)])
    types = processor.token_types(tokens[0].tolist()) if processor and row.pictures else {}
    return ProbeRow(tokens, places, tokens[0, places + 1], pictures={**row.pictures, **types})


def _side(
    trained: Trained, merged: str | None, rows: Sequence[ProbeRow]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the log p of the rows' targets by the export, by it with the last bits moved, and by the base alone.

    The last are those by the adapter without what the tower has learnt, if it has learnt by LoRA."""
    with base_directory(trained.base) as base:
        model = grown_base(trained, base, trained.streamed_layers())
        with plain.computing_in_fp32(model):
            alone = _log_p(model, rows)
        if merged is None:
            with scratch_folder("adapter") as folder:
                export_adapter(trained.run, open_store(folder), trained.manifest.step)
                model, _ = plain.add_adapter(model, Path(folder), trained.method)
                with plain.computing_in_fp32(model):
                    exported, shaken = _twice(model, rows)
                    return exported, shaken, alone, _log_p(model, rows) if _blinded(model, trained) else []
    del model
    with directory_of(open_store(merged)) as folder:
        model = plain_model(trained, folder)
        with plain.computing_in_fp32(model):
            return *_twice(model, rows), alone, []


@torch.no_grad()
def _blinded(model: torch.nn.Module, trained: Trained) -> bool:
    """Take from a model with an adapter what the tower has learnt by LoRA. Return whether there was any."""
    adapters: list[str] = (trained.method.sees(trained.base.architecture) or {}).get("adapters", [])
    for path in adapters:
        changed = next(one for name, one in model.named_parameters() if f"{path}.lora_B." in name)
        changed.zero_()
    return bool(adapters)


def _twice(model: torch.nn.Module, rows: Sequence[ProbeRow]) -> tuple[list[Tensor], list[Tensor]]:
    found = _log_p(model, rows)
    with plain.shaken(model, SHAKEN_BY["bf16"]):
        return found, _log_p(model, rows)


def _log_p(model: torch.nn.Module, rows: Sequence[ProbeRow]) -> list[Tensor]:
    logits = plain.place_logits(model, rows)
    return [
        values.log_softmax(-1).gather(-1, row.targets[:, None])[:, 0] for values, row in zip(logits, rows, strict=True)
    ]


def _mean(one: Sequence[Tensor], other: Sequence[Tensor], parts: Sequence[slice] | None = None) -> float:
    """Return the mean absolute difference over these parts of all rows, or over the whole rows."""
    gaps = [(a - b).abs() for a, b in zip(one, other, strict=True)]
    gaps = gaps if parts is None else [gap[part] for gap, part in zip(gaps, parts, strict=True)]
    return float(torch.cat(gaps).mean())


class ComparedStore(Store):
    """The folder of an export, which accepts only what is in it already.

    Until then it looks empty to the code that exports to it.

    The model card is left out: it has the evaluations that the run has by now.
    """

    def __init__(self, there: Store) -> None:
        # This is not the URI of a local folder, because a format might move a file into that folder itself.
        super().__init__(there.uri.removeprefix("file://"), there._backend, there._prefix, there._request_seconds)
        self._there = there
        self._written: set[str] = {CARD}

    def list(self, prefix: str = "") -> list[Entry]:
        return []

    def put(self, key: str, data: bytes) -> None:
        self.put_chunks(key, [data], len(data))

    def create(self, key: str, data: bytes) -> None:
        self.put_chunks(key, [data], len(data))

    def put_chunks(self, key: str, chunks: Iterable[Buffer], size: int) -> None:
        if key == CARD:
            return
        self._written.add(key)
        where, position = f"{self.uri}/{key}", 0
        try:
            found = self._there.head(key).size
        except NotFound as error:
            raise CapstanError(f"{where} is missing. {NOT_TRAINED}") from error
        if found != size:
            raise CapstanError(f"{where} has {found} bytes instead of {size}. {NOT_TRAINED}")
        for chunk in chunks:
            for part in _parts(chunk):
                end = position + len(part)
                if self._there.get_range(key, position, end) != part:
                    raise CapstanError(
                        f"{where} differs from what was trained between bytes {position} and {end}. {NOT_TRAINED}"
                    )
                position = end

    def check_nothing_else(self) -> None:
        """Raise `CapstanError` for a file that was not written: a program might load it beside the others."""
        others = [entry.key for entry in self._there.list() if entry.key not in self._written]
        if others:
            raise CapstanError(f"{self.uri}/{others[0]} is no part of the export. {NOT_TRAINED}")


def _parts(chunk: Buffer) -> Iterable[memoryview]:
    view = memoryview(chunk)
    return (view[begin : begin + PART_BYTES] for begin in range(0, len(view), PART_BYTES))


def check_again(form: ExportFormat, folder: Store, step: int, destination: Store) -> Written:
    """Return what the format finds out once more.

    Raises `CapstanError` if `destination` is not the export of `step` in this form, file by file and byte by byte.
    """
    compared = ComparedStore(destination)
    written = form.write(folder, compared, step, ExportProgress(_silent, _silent))
    compared.check_nothing_else()
    return written


def _silent(*_told: object) -> None:
    """Report nothing: the export has already been reported."""
