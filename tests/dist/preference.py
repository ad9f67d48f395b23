"""The first step of each preference objective, ours and by PyTorch alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dist.assembled import adapter_value, assemble_run, chapters_of
from tests.dist.gradients import observed_gradients, plain_base
from trainer.config import Config, override, parse_config
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.train.loop import train
from trainer.tuning.objective import find_objective

# A name -> the settings of the objective.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "sigmoid": ("objective.name=dpo", "objective.beta=0.4"),
    "smoothed": ("objective.name=dpo", "objective.beta=0.4", "objective.label_smoothing=0.2"),
    "hinge": ("objective.name=dpo", "objective.beta=0.2", "objective.loss_type=hinge"),
    "ipo": ("objective.name=dpo", "objective.beta=0.3", "objective.loss_type=ipo"),
    "apo-zero": ("objective.name=dpo", "objective.beta=0.4", "objective.loss_type=apo_zero"),
    "apo-down": ("objective.name=dpo", "objective.beta=0.4", "objective.loss_type=apo_down"),
    "with-sft": ("objective.name=dpo", "objective.beta=0.4", "objective.sft_weight=0.3"),
    "orpo": ("objective.name=orpo", "objective.beta=0.7"),
    "simpo": ("objective.name=simpo", "objective.beta=1.7", "objective.gamma=0.6"),
}


def first_steps(
    config_text: str, fingerprint: str, folder: str, objectives: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """One step of the loop from `adapter_value` by each of the `objectives`, a name -> its settings; rank 0 writes the
    gradients that the optimizer got.

    -> the record of each step.
    """
    config = parse_config(config_text)
    here = assemble_run(override(config, *next(iter(objectives.values()))), fingerprint)
    gradients = observed_gradients(here)
    records = {}
    for name, settings in objectives.items():
        objective = find_objective(override(config, *settings))
        # One engine for all of them: only the function that it calls differs.
        here.engine._engine.module._loss = objective.loss
        here.set_masters()
        here.stream = train_stream(config, chapters_of(config, fingerprint), here.ranks.rank, here.ranks.world_size)
        records[name] = next(train(here.training(objective=objective), 0, Position()))
        if here.ranks.rank == 0:
            save_file(gradients, Path(folder) / f"{name}.safetensors")
    return records


def plain_first_steps(
    config_text: str, pairs: list[dict[str, str]], folder: str, glued: bool
) -> dict[str, dict[str, float]]:
    """The same by transformers and PEFT alone: one process, each answer by itself, the papers' formulas.

    `glued`: the rejected answer's tokens see those of the chosen one, as they must not.
    """
    config = parse_config(config_text)
    torch.set_num_threads(1)
    model = plain_base(config)
    with torch.no_grad():
        reference = [answers(model, config, pair, glued) for pair in pairs]
    adapters = adapt(model, config)
    found = {}
    for name, formula in FORMULAS.items():
        model.zero_grad()
        measures = torch.zeros(4)
        for pair, base in zip(pairs, reference, strict=True):
            loss, chosen, rejected = formula(*answers(model, config, pair, glued), *base)
            (loss / len(pairs)).backward()
            measures += torch.stack([loss, chosen, rejected, (chosen > rejected).float()]).detach() / len(pairs)
        save_file(
            {key: parameter.grad.clone() for key, parameter in adapters.items()}, Path(folder) / f"{name}.safetensors"
        )
        names = ("loss", "reward_chosen", "reward_rejected", "reward_accuracy")
        found[name] = dict(zip(names, measures.tolist(), strict=True))
    return found


def adapt(model: Any, config: Config) -> dict[str, Any]:
    """Put PEFT's adapters with the weights of `adapter_value` on the model -> these, by name."""
    from peft import inject_adapter_in_model

    from trainer.tuning.lora import METHODS

    inject_adapter_in_model(METHODS[config.tuning.method](config.tuning).adapting("all-linear"), model)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in adapters.items():
        parameter.data = adapter_value(name, tuple(parameter.shape))
    return adapters


def answers(model: Any, config: Config, pair: dict[str, str], glued: bool) -> tuple[Tensor, Tensor]:
    """The log-probability of each trained token of the chosen and of the rejected answer: (tokens,) each."""
    chosen, tokens = answer(model, config, pair["prompt"], pair["chosen"], [])
    rejected, _ = answer(model, config, pair["prompt"], pair["rejected"], tokens if glued else [])
    return chosen, rejected


def answer(model: Any, config: Config, prompt: str, text: str, before: list[int]) -> tuple[Tensor, list[int]]:
    """The log-probability of each token of the answer `text` and its end, behind the tokens `before`; and all of the
    tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    asked, answered = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    tokens = torch.tensor([*before, *asked, *answered, tokenizer.eos_token_id])
    logits = model(input_ids=tokens[None]).logits[0, :-1].float()
    log_p = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    return log_p[len(before) + len(asked) - 1 :], tokens.tolist()


Formula = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def dpo(beta: float, loss_of: Callable[[Tensor], Tensor]) -> Formula:
    """A loss of beta times the difference of the log-ratios to the reference; with the two rewards."""

    def formula(c: Tensor, r: Tensor, base_c: Tensor, base_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (c.sum() - base_c.sum()), beta * (r.sum() - base_r.sum())
        return loss_of(chosen - rejected), chosen, rejected

    return formula


def apo(c: Tensor, r: Tensor, base_c: Tensor, base_r: Tensor, down: bool) -> tuple[Tensor, Tensor, Tensor]:
    """APO-zero and APO-down, section 3."""
    chosen, rejected = 0.4 * (c - base_c).sum(), 0.4 * (r - base_r).sum()
    of_chosen, of_rejected = 1 / (1 + torch.exp(-chosen)), 1 / (1 + torch.exp(-rejected))
    loss = of_chosen - 1 / (1 + torch.exp(rejected - chosen)) if down else of_rejected - of_chosen
    return loss + 1, chosen, rejected


def with_sft(c: Tensor, r: Tensor, *bases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RPO, equation 1: DPO and the chosen answer's next-token loss, over its length."""
    loss, chosen, rejected = FORMULAS["sigmoid"](c, r, *bases)
    return loss - 0.3 * c.sum() / len(c), chosen, rejected


def orpo(c: Tensor, r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ORPO, equations 3 to 7: odds = P / (1 - P) of the geometric mean P; in double precision."""
    p, q = c.double().mean().exp(), r.double().mean().exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    loss = -c.double().mean() + 0.7 * -torch.log(1 / (1 + torch.exp(-torch.log(ratio))))
    return loss.float(), 0.7 * c.mean(), 0.7 * r.mean()


def simpo(c: Tensor, r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SimPO, equation 6."""
    chosen, rejected = 1.7 / len(c) * c.sum(), 1.7 / len(r) * r.sum()
    return -torch.log(torch.sigmoid(chosen - rejected - 0.6)), chosen, rejected


FORMULAS: dict[str, Formula] = {
    "sigmoid": dpo(0.4, lambda h: -torch.log(torch.sigmoid(h))),
    "smoothed": dpo(0.4, lambda h: -0.8 * torch.log(torch.sigmoid(h)) - 0.2 * torch.log(torch.sigmoid(-h))),
    "hinge": dpo(0.2, lambda h: torch.clamp(1 - h, min=0)),
    "ipo": dpo(0.3, lambda h: (h / 0.3 - 1 / (2 * 0.3)) ** 2),
    "apo-zero": lambda *given: apo(*given, down=False),
    "apo-down": lambda *given: apo(*given, down=True),
    "with-sft": with_sft,
    "orpo": orpo,
    "simpo": simpo,
}
