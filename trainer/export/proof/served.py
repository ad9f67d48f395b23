"""Proof of a served export: a server's log-probabilities are those of transformers and PEFT.

They are compared on the run's rows and on tokens that the server draws. The other side computes in fp32. The server
usually computes in bf16, so the allowed difference is the effect of moving the last bit of every product in bf16. The
control is what the training has changed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.export.figures import ServedProof
from trainer.export.proof import plain
from trainer.export.proof.models import Trained, base_directory, directory_of, grown_base, plain_model
from trainer.export.proof.rows import ProbeRow
from trainer.export.proof.verify import SHAKEN_BY, TOLERATED_NOISE
from trainer.export.write.adapter import export_adapter
from trainer.servers.completions import Answer, CompletionsServer, refuse_head
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

_DRAWS = 24


def prove_served(folder: Store, step: int, destination: Store, given: str, *, whole_model: bool) -> ServedProof:
    """Compare what the server at the URL `given` serves with the export of `step`.

    The export is the whole model in `destination`, or the adapter over the base as its files hold it.

    Raises:
        ConfigError, CapstanError: the server raises them, or the run has a head.
    """
    trained = Trained.at(folder, step)
    refuse_head(trained.config)
    server = CompletionsServer.find("--server", given, trained.config.run.name)
    probe = trained.probe.rows
    answers = [server.ask(row.tokens[0].tolist(), _DRAWS) for row in probe]
    if any(max(answer.drawn) >= trained.vocabulary for answer in answers):
        raise ConfigError(
            f"--server: {server.url} draws tokens that the export lacks. Start it with the run's base, and with this"
            " export."
        )
    rows = [_whole(row, answer) for row, answer in zip(probe, answers, strict=True)]
    whole_model = whole_model or trained.method.exports_model
    expected, shaken, alone = trained.exported(_side, destination.uri if whole_model else None, rows, packed=False)
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
    )


def _whole(row: ProbeRow, answer: Answer) -> ProbeRow:
    """Return the row with the drawn tokens after it. Every token but the first is compared."""
    tokens = torch.cat([row.tokens, torch.tensor([answer.drawn], dtype=torch.int64)], 1)
    return ProbeRow(tokens, torch.arange(tokens.shape[1] - 1), tokens[0, 1:])


def _side(
    trained: Trained, merged: str | None, rows: Sequence[ProbeRow]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the log p of the rows' targets by the export, by it with the last bits moved, and by the base alone."""
    with base_directory(trained.base) as base:
        model = grown_base(trained, base, trained.streamed_layers())
        with plain.computing_in_fp32(model):
            alone = _log_p(model, rows)
        if merged is None:
            with scratch_folder("adapter") as folder:
                export_adapter(trained.run, open_store(folder), trained.manifest.step)
                model, _ = plain.add_adapter(model, Path(folder), trained.method)
                with plain.computing_in_fp32(model):
                    return *_twice(model, rows), alone
    del model
    with directory_of(open_store(merged)) as folder:
        model = plain_model(trained, folder)
        with plain.computing_in_fp32(model):
            return *_twice(model, rows), alone


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
