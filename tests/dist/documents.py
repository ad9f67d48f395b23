"""Gradients of packed rows under ZeRO-3, and of the same documents unpacked, in families with all kinds of layers."""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, SIZES
from trainer.config import parse_config
from trainer.model.attention import Attention
from trainer.model.documents import keep_documents_apart, recomputed
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.model.packed import PackedModel
from trainer.processes.ranks import join
from trainer.state.zero.engine import Engine
from trainer.state.zero.partition import Partitioner
from trainer.state.zero.policy import build_deepspeed_config

# The documents of each rank's row, step by step: another number on every rank, and in every step.
ROWS = (((19, 30, 11, 4), (50, 14)), ((64,), (7, 8, 9, 40)))


def packed_and_alone(config_text: str, kinds: list[str], apart: bool) -> list[float]:
    """For each of `kinds` the largest distance of a parameter's gradient, relative to its norm, of any step; all
    parameters learn, and layers are computed again in backward. `apart`: whether we keep documents apart."""
    ranks, config = join(), parse_config(config_text)
    torch.set_num_threads(1)
    settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
    distances = list[float]()
    for kind in kinds:
        plain, model = _model(kind), _model(kind)
        model.lm_head = nn.Identity()
        if apart:
            keep_documents_apart(model)
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
        partitioner = Partitioner(settings, torch.float32, "world", ranks.world)
        for name, parameter in list(model.named_parameters()):
            partition = partitioner.make(parameter.shape, torch.float32)
            partition.write(0, parameter.data.flatten())
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, partition.parameter.requires_grad_(True))
        groups = [{"name": "all", "lr_ratio": 1.0, "params": list(model.parameters())}]
        packed = PackedModel(model, Attention("eager", ""))
        engine = Engine(
            packed, lambda packed, row: _loss(packed.hidden(row.input)), groups, config.optim, settings, ranks
        )
        for number, step in enumerate(ROWS):
            rows = [_row(lengths, 10 * number + rank) for rank, lengths in enumerate(step)]
            engine.backward(engine.loss(rows[ranks.rank]), last=True)
            found = {name: safe_get_full_grad(parameter) for name, parameter in engine.model.named_parameters()}
            plain.zero_grad()
            for row in rows:
                for document in row.input.input_ids.split(row.input.cu_seqlens.diff().tolist(), dim=1):
                    _loss(plain.model(input_ids=document, use_cache=False).last_hidden_state).backward()
            wanted = {name: part.grad for name, part in plain.named_parameters() if part.grad is not None}
            distances.append(max(float((found[name] - part).norm() / part.norm()) for name, part in wanted.items()))  # type: ignore[operator]
            engine.step(0.0)
    each = len(ROWS)
    return [max(distances[each * number : each * (number + 1)]) for number in range(len(kinds))]


def _model(kind: str) -> Any:
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{"tie_word_embeddings": False, **SIZES, **FAMILIES[kind]})
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).train()


def _loss(states: Tensor) -> Tensor:
    """The sum over tokens of something that is not the same for all of a state's elements."""
    return (states[0] * torch.linspace(-1, 1, states.shape[-1])).tanh().sum()


def _row(lengths: tuple[int, ...], seed: int) -> MicroBatch:
    ids = torch.randint(3, SIZES["vocab_size"], (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    row = ModelInput.of(ids, positions, Segments.of_documents(lengths))
    return MicroBatch(row, ids, sum(lengths), sum(lengths))
