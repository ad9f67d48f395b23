"""The first step over answers or classes with pictures, videos or sounds, by transformers and PEFT alone: each
conversation by itself, through the class that people load and its processor, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.dist.assembled import adapter_value
from tests.dist.seeing import ADAPTED, answer, inputs
from trainer.config import Config, parse_config

Row = dict[str, Any]


class _Plain:
    """The base, its processor, and the folder of the files of rows."""

    def __init__(self, config: Config, folder: Path) -> None:
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model: Any = AutoModelForMultimodalLM.from_pretrained(config.model.base, **options)
        self.model.requires_grad_(False).eval()
        self._processor, self._folder = AutoProcessor.from_pretrained(config.model.base), folder
        self.score: Any = nn.Linear(1, 1)

    def learn(self, config: Config, outputs: int) -> list[nn.Parameter]:
        """Add LoRA and a head of `outputs`, with the values of `adapter_value`. -> what learns"""
        from peft import inject_adapter_in_model

        from trainer.tuning.lora import METHODS

        adapter = METHODS[config.tuning.method](config.tuning).adapting(["q_proj"])
        adapter.target_modules = ADAPTED
        inject_adapter_in_model(adapter, self.model)
        adapters = {name: parameter for name, parameter in self.model.named_parameters() if "lora_" in name}
        for name, parameter in adapters.items():
            parameter.data = adapter_value(name.replace("model.language_model.", "model."), tuple(parameter.shape))
        if not outputs:
            return list(adapters.values())
        self.score = nn.Linear(self.model.config.get_text_config().hidden_size, outputs, bias=False)
        self.score.weight.data = adapter_value("score.weight", tuple(self.score.weight.shape))
        return [*adapters.values(), self.score.weight]

    def log_p(self, row: Row, name: str, prompt: Row | None = None) -> Tensor:
        """The logarithm of the probability of an answer."""
        made = inputs(self._processor, [*(prompt or row)["prompt"], *row[name]], self._folder)
        logits = self.model(**made, use_cache=False).logits[0, :-1].float()
        labels = answer(self._processor, made)[0, 1:]
        return -functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def outputs(self, talk: Any) -> Tensor:
        """What the head makes of the last token of a conversation."""
        made = inputs(self._processor, talk, self._folder)
        return self.score(self.model.model(**made, use_cache=False).last_hidden_state[0, -1])


Losses = Callable[[], list[Tensor]]


def _dpo(plain: _Plain, rows: list[Row], config: Config) -> Losses:
    def margins() -> list[Tensor]:
        return [plain.log_p(row, "chosen") - plain.log_p(row, "rejected") for row in rows]

    with torch.no_grad():
        before = margins()
    beta: Any = config.objective.beta
    return lambda: [
        -functional.logsigmoid(beta * (now - then)) / len(rows) for now, then in zip(margins(), before, strict=True)
    ]


def _kto(plain: _Plain, rows: list[Row], config: Config) -> Losses:
    """Equation 7 of the paper. The answer of the row before is the mismatched one."""

    def mismatched() -> Tensor:
        return torch.stack([plain.log_p(rows[place - 1], "completion", row) for place, row in enumerate(rows)])

    with torch.no_grad():
        before, mismatched_before = [plain.log_p(row, "completion") for row in rows], mismatched()
    beta: Any = config.objective.beta

    def losses() -> list[Tensor]:
        with torch.no_grad():
            z0 = (mismatched() - mismatched_before).mean().clamp(min=0)
        assert z0 > 0.01, "z0 is 0 anyway, so this says nothing of it"
        gains = [plain.log_p(row, "completion") - then - z0 for row, then in zip(rows, before, strict=True)]
        return [
            torch.sigmoid(-beta * gain if row["label"] else beta * gain) / len(rows)
            for row, gain in zip(rows, gains, strict=True)
        ]

    return losses


def _reward(plain: _Plain, rows: list[Row], config: Config) -> Losses:
    def reward(row: Row, name: str) -> Tensor:
        return plain.outputs([*row["prompt"], *row[name]])[0]

    return lambda: [-functional.logsigmoid(reward(row, "chosen") - reward(row, "rejected")) / len(rows) for row in rows]


def _classes(plain: _Plain, rows: list[Row], config: Config) -> Losses:
    places = [(config.data.labels or []).index(row["label"]) for row in rows]
    return lambda: [
        functional.cross_entropy(plain.outputs(row["messages"]), torch.tensor(place)) / len(rows)
        for row, place in zip(rows, places, strict=True)
    ]


def _several_classes(plain: _Plain, rows: list[Row], config: Config) -> Losses:
    flags = [torch.tensor([float(label in row["label"]) for label in config.data.labels or []]) for row in rows]
    return lambda: [
        functional.binary_cross_entropy_with_logits(plain.outputs(row["messages"]), flag) / len(rows)
        for row, flag in zip(rows, flags, strict=True)
    ]


_OBJECTIVES: dict[str, Callable[[_Plain, list[Row], Config], Losses]] = {
    "dpo": _dpo,
    "kto": _kto,
    "reward": _reward,
    "classification": _classes,
    "multilabel_classification": _several_classes,
}


def plain_first_step(config_text: str, rows: str) -> tuple[float, float]:
    """The loss of all rows of a file as one step, and the norm of its gradient."""
    config = parse_config(config_text)
    torch.set_num_threads(1)
    plain, given = _Plain(config, Path(rows).parent), [json.loads(line) for line in Path(rows).read_text().splitlines()]
    losses = _OBJECTIVES[config.objective.name](plain, given, config)
    learns = plain.learn(config, {"reward": 1}.get(config.objective.name, len(config.data.labels or [])))
    total = torch.stack(losses()).sum()
    total.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in learns if parameter.grad is not None])
    return float(total.detach()), float(norms.norm())
