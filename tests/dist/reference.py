"""DPO whose reference is stored: by PyTorch alone, and what becomes of a pass that is interrupted."""

import copy
import io
import os
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from tests.dist.assembled import assemble_run
from tests.dist.full import plain_model, plain_stream
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.model.micro_batch import MicroBatch, Role
from trainer.run.requests import StopSignal
from trainer.train.horizon import learning_rate
from trainer.train.reference import ReferencePass


def plain_losses(config_text: str, fingerprint: str, frozen: bool = True) -> list[float]:
    """The loss of every step by transformers and AdamW, each answer by itself, against a copy of the model as it was;
    with `frozen` False against the model that learns, as if its reference went along."""
    config = parse_config(config_text)
    model, learning = plain_model(config)
    reference = copy.deepcopy(model) if frozen else model
    matrices = [parameter for parameter in learning.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in learning.values() if parameter.ndim == 1]
    optim, steps, beta = config.optim, config.train.steps, config.objective.beta
    assert steps
    assert beta
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    stream, curve, position = plain_stream(config, fingerprint), list[float](), Position()
    for step in range(1, steps + 1):
        batches = [batch.to(torch.device("cpu")) for batch in stream.step(position)]
        pairs, sum_of_losses = sum(len(batch.documents) for batch in batches), 0.0
        for batch in batches:
            for rejected in batch.segments(Role.REJECTED).tolist():
                margin = torch.zeros(())
                for segment, sign in ((rejected - 1, 1), (rejected, -1)):
                    with torch.no_grad():
                        base = _log_p(reference, batch, segment)
                    margin = margin + sign * (_log_p(model, batch, segment) - base)
                loss = -torch.log(torch.sigmoid(beta * margin)) / pairs
                loss.backward()
                sum_of_losses += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(learning.values(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(sum_of_losses)
        position = stream.advance(position)
    return curve


def _log_p(model: Any, batch: MicroBatch, segment: int) -> Tensor:
    """log p of the trained tokens of one segment of a row, by itself."""
    begin, end = batch.input.cu_seqlens[segment : segment + 2].tolist()
    logits = model(input_ids=batch.input.input_ids[:, begin:end], use_cache=False).logits[0].float()
    labels = batch.labels[0, begin:end]
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def passes(config_text: str, fingerprint: str, stop_after: int | None = None) -> dict[str, Any]:
    """One pass through the reference, where rank 0 is asked to stop in its row `stop_after`.

    -> {"values": the data set's, or None after a stop, "rows": those that this rank computed, "log": rank 0's lines}
    """
    config = parse_config(config_text)
    here = assemble_run(config, fingerprint)
    stop, rows = StopSignal(here.run, watches=False, seconds=60), []
    look = here.engine.look

    def counted(function: Any, row: Any) -> Tensor:
        rows.append(row)
        if len(rows) == stop_after and os.environ["RANK"] == "0":
            stop.request()
        return look(function, row)

    here.engine.look = counted  # type: ignore[method-assign]
    reference = ReferencePass(here.start(stop=stop), here.engine, here.attention.name)
    with redirect_stdout(io.StringIO()) as printed:
        values = reference.log_probabilities(fingerprint)
    log = [*here.log, *printed.getvalue().splitlines()]
    return {"values": None if values is None else values.tolist(), "rows": len(rows), "log": log}
