"""The memory that `plan` counts is that of published runs of other tools, where the runs are alike; the differences are
stated.
"""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.unit.base.test_published_models import MODELS
from tests.unit.plan.test_plan import LLAMA_70B
from trainer.base.describe.description import describe
from trainer.config import parse_config
from trainer.plan.needs import GpuMemory
from trainer.plan.plan import make_plan

RUN = "run: {name: demo}\nmodel: {base: /models/base}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
GB, GIB = 1e9, 2**30
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TORCHTUNE = "torchtune's README, its table of memory by model and recipe"
FSDP_QLORA = "AnswerDotAI/fsdp_qlora, benchmarks of March 2024"
LLAMA_FACTORY = "LLaMA-Factory's wiki, its table of a 7B model by length"


@dataclass(frozen=True)
class Run:
    """A run and the bytes that were reported of it.

    `logit_bytes` are those that the tool has of each logit of the whole row, where it makes no chunks: bf16, fp32 and a
    gradient are 10, and where labels are shifted by a copy 14. `in_torch`: torch counted, and the CUDA context is left
    out. `half_states`: adapters, gradients and moments are in bf16, 8 bytes an element where we have 18.
    """

    source: str
    base: dict[str, Any]
    gpus: int
    reported: float
    settings: tuple[str, ...]
    length: int = 2048
    batch: int = 1
    logit_bytes: int = 0
    in_torch: bool = True
    half_states: bool = False


RUNS = {
    "70B-lora": Run(TORCHTUNE, LLAMA_70B, 8, 27.6 * GIB, ("quant.type=none", "tuning.rank=16"), batch=2),
    "405B-qlora": Run(TORCHTUNE, MODELS["Llama-3.1-405B"].config, 8, 44.8 * GB, ("tuning.rank=16",)),
    **{
        f"7B-batch-{batch}": Run(
            FSDP_QLORA,
            LLAMA_2_7B,
            2,
            gib * GIB,
            ("tuning.rank=64",),
            batch=batch,
            logit_bytes=14,
            half_states=True,
        )
        for batch, gib in ((1, 5.2), (4, 11.2), (10, 21.0))
    },
    **{
        f"7B-{length}k": Run(
            LLAMA_FACTORY,
            LLAMA_2_7B,
            1,
            gb * GB,
            ("tuning.rank=8",),
            length=1024 * length,
            logit_bytes=10,
            in_torch=False,
        )
        for length, gb in ((1, 6), (2, 7), (4, 9), (8, 12), (16, 19), (32, 32))
    },
}


def planned(run: Run) -> GpuMemory:
    settings = (*run.settings, f"data.sequence_length={run.length}", f"train.micro_batch={run.batch}")
    config = parse_config(RUN, (*settings, f"train.global_batch={run.gpus * run.batch}"))
    base = describe({**run.base, "max_position_embeddings": 32768})
    return make_plan(config, base, run.gpus, run.gpus, None).memory_per_gpu


def as_that_tool(run: Run, memory: GpuMemory) -> float:
    """The plan's total, less and more what the other tool does otherwise."""
    logits = run.batch * run.length * run.base["vocab_size"] * run.logit_bytes
    total = memory.total + (logits - memory.logits if run.logit_bytes else 0)
    if run.half_states:
        total -= (memory.adapter_states + memory.adapter_weights) * (1 - 8 / 18)
    return total - (memory.context + memory.communicators if run.in_torch else 0)


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_within_12_percent_of_what_was_reported(name: str) -> None:
    run = RUNS[name]
    assert as_that_tool(run, planned(run)) == pytest.approx(run.reported, rel=0.12), run.source
