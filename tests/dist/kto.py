"""The first step of KTO by PyTorch alone."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.dist.gradients import plain_base
from tests.dist.preference import adapt, answer
from trainer.config import override, parse_config
from trainer.config.section import part
from trainer.tuning.objective.kto import KtoSettings

# A name -> the settings of the objective.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "even": ("objective.name=kto", "objective.beta=0.4"),
    "weighted": (
        "objective.name=kto",
        "objective.beta=0.3",
        "objective.desirable_weight=0.8",
        "objective.undesirable_weight=1.6",
    ),
}


def plain_first_steps(
    config_text: str, rows: list[dict[str, Any]], folder: str, parts: int
) -> dict[str, dict[str, float]]:
    """KTO, equation 7, by transformers and PEFT: one process, each answer by itself.

    `parts`: the batch is divided into so many, each with a z0 of its own, as it must not be.
    """
    config = parse_config(config_text)
    torch.set_num_threads(1)
    model = plain_base(config)
    mismatched = [(row["prompt"], rows[place - 1]["completion"]) for place, row in enumerate(rows)]

    def sums(prompts_and_answers: list[tuple[str, str]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([answer(model, config, *both, [])[0].sum() for both in prompts_and_answers])

    labelled = [(row["prompt"], row["completion"]) for row in rows]
    base, base_mismatched = sums(labelled), sums(mismatched)
    adapters = adapt(model, config)
    divergence = (sums(mismatched) - base_mismatched).view(parts, -1).mean(1).clamp(min=0)
    found = {}
    for name, settings in OBJECTIVES.items():
        given = override(config, *settings).objective
        assert given.beta
        weights = part(given, KtoSettings)
        model.zero_grad()
        total, rewards, lengths = (
            0.0,
            {True: list[float](), False: list[float]()},
            {True: list[int](), False: list[int]()},
        )
        for place, row in enumerate(rows):
            log_p, _ = answer(model, config, *labelled[place], [])
            ratio, z0 = log_p.sum() - base[place], divergence[place * parts // len(rows)]
            if row["label"]:
                loss = weights.desirable_weight * (1 - 1 / (1 + torch.exp(-given.beta * (ratio - z0))))
            else:
                loss = weights.undesirable_weight * (1 - 1 / (1 + torch.exp(-given.beta * (z0 - ratio))))
            (loss / len(rows)).backward()
            total += float(loss) / len(rows)
            rewards[row["label"]].append(given.beta * float(ratio))
            lengths[row["label"]].append(len(log_p))
        save_file(
            {key: parameter.grad.clone() for key, parameter in adapters.items()}, Path(folder) / f"{name}.safetensors"
        )
        found[name] = {
            "loss": total,
            "reward_desired": mean(rewards[True]),
            "reward_undesired": mean(rewards[False]),
            "reward_margin": mean(rewards[True]) - mean(rewards[False]),
            "log_ratio": mean(rewards[True] + rewards[False]) / given.beta,
            "length_desired": mean(lengths[True]),
            "length_undesired": mean(lengths[False]),
            "kl": float(divergence.mean()),
        }
    return found


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)
