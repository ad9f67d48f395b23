"""The speed that `plan` forecasts is beside that of published runs of other tools, and beside the arithmetic of
kernels."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.unit.repository.test_examples import LLAMA_8B
from trainer.base.describe.description import describe
from trainer.base.find.locate import known_config
from trainer.config import parse_config
from trainer.plan.flops import work_of
from trainer.plan.forecast import GatherTraffic, _experts_seconds, assumed_rate
from trainer.plan.gpus import read_gpu
from trainer.plan.needs import Traffic
from trainer.plan.plan import make_plan

RUN = "run: {name: demo}\nmodel: {base: /models/base}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"


@dataclass(frozen=True)
class Run:
    """A run and its reported tokens a second of each GPU."""

    source: str
    base: str
    method: str
    gpu: str
    gpus: int
    length: int
    reported: float
    settings: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return f"{self.base.rpartition('/')[2]}, {self.method}, {self.gpus} {self.gpu}, rows of {self.length:,}"

    def forecast(self) -> float:
        """Tokens a second of each GPU."""
        found = known_config(self.base)
        assert found is not None, self.base
        base, gpu, nodes = describe(found, None), read_gpu(self.gpu, "--gpu"), -(-self.gpus // 8)
        settings = (f"data.sequence_length={self.length}", f"train.global_batch={self.gpus}", *self.settings)
        config = parse_config(RUN, settings)
        plan = make_plan(config, base, self.gpus, min(8, self.gpus), gpu.memory)
        gathers = GatherTraffic(plan.traffic_per_step, plan.batch.accumulation, nodes, min(8, self.gpus))
        rate = assumed_rate(config, base.architecture, gpu, plan.recomputed_layers / plan.layers, gathers)
        assert rate is not None
        return rate.tokens_per_second


BF16 = ("quant.type=none", "tuning.rank=16")
RUNS = (
    Run("NeMo Automodel", "meta-llama/Llama-3.1-8B", "LoRA over 16 bits", "H100", 1, 4096, 12_473, BF16),
    Run("NeMo Automodel", "meta-llama/Llama-3.3-70B-Instruct", "LoRA over 16 bits", "H100", 8, 4096, 1_092, BF16),
    Run("torchtune", "meta-llama/Llama-3.1-405B", "QLoRA", "A100-80GB", 8, 2048, 653 / 8, ("tuning.rank=16",)),
    Run("TRL", "zai-org/GLM-4.6", "LoRA over 16 bits", "H100", 16, 2048, 2048 / 4.4, BF16),
)
ROOFLINES: dict[str, tuple[str, str, dict[int, float]]] = {
    "Kimi K2": ("moonshotai/Kimi-K2.5", "stored", {4096: 4.63, 16384: 5.80, 65536: 15.4}),
    "Qwen3-235B": ("Qwen/Qwen3-235B-A22B", "nf4", {4096: 1.12, 16384: 2.73, 65536: 9.17}),
}
"""Seconds of an H100 for the experts in a micro-batch of so many tokens and three passes: codes and scales read and 16
bits written once at 3.0 TB/s, products at 650 TFLOP/s or as fast as their matrices are read."""


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.what)
def test_a_forecast_is_between_two_fifths_and_six_fifths_of_a_published_speed(run: Run) -> None:
    assert 0.4 < run.forecast() / run.reported < 1.2


@pytest.mark.parametrize("name", ROOFLINES)
def test_the_time_of_experts_is_within_a_quarter_of_what_their_bytes_and_operations_take(name: str) -> None:
    base, held, seconds = ROOFLINES[name]
    found, gpu = known_config(base), read_gpu("H100", "--gpu")
    assert found is not None
    model: Any = describe(found, None).architecture
    for length, expected in seconds.items():
        config = parse_config(RUN, (f"data.sequence_length={length}", f"quant.type={held}"))
        assert _experts_seconds(config, model, gpu, work_of(config, model, 1, "H100")) == pytest.approx(expected, 0.25)


def test_more_tokens_take_the_products_and_what_the_kernels_of_experts_move() -> None:
    """Of each row that goes to an expert of Qwen3-235B, at 90 % of a bandwidth: two rows of 4,096 values in each pass; forward two
    of 1,536 read and one written; backward three read and two written."""
    found, gpu = known_config("Qwen/Qwen3-235B-A22B"), read_gpu("H100", "--gpu")
    assert found is not None
    model: Any = describe(found, None).architecture
    seconds, forward, backward = [], 3 * 1536 + 2 * 4096, 5 * 1536 + 2 * 4096
    for length in (65536, 131072):
        config = parse_config(RUN, (f"data.sequence_length={length}",))
        work = work_of(config, model, 1, "H100")
        seconds.append(_experts_seconds(config, model, gpu, work))
    assert work.products == 3
    products = 3 * 2 * 94 * 8 * 3 * 4096 * 1536 / (0.65 * 989e12)
    moved = 2 * 94 * 8 * (2 * forward + backward) / (0.9 * 3.35e12)
    assert (seconds[1] - seconds[0]) / 65536 == pytest.approx(products + moved, rel=0.002)


def test_a_row_waits_for_gathers_that_take_longer_than_the_device_and_says_so() -> None:
    """GLM-4.6 in 16 bits on 16 H100: 700 GB are gathered twice, and all of them enter each node."""
    found, gpu = known_config("zai-org/GLM-4.6"), read_gpu("H100", "--gpu")
    assert found is not None
    base, rates = describe(found, None), []
    for length in (1024, 32768):
        config = parse_config(RUN, (f"data.sequence_length={length}", "train.global_batch=16", *BF16))
        gathers = GatherTraffic(make_plan(config, base, 16, 8, gpu.memory).traffic_per_step, 1, 2, 8)
        assert gathers.seconds(gpu) == pytest.approx(2 * 704e9 / (8 * 45e9), rel=0.1)
        rates.append((gathers.seconds(gpu), assumed_rate(config, base.architecture, gpu, 1, gathers)))
    crossing = Traffic(0, 0, 0, 0, total=0, from_other_nodes=300 * 10**9)  # the other three quarters of 400 GB
    assert GatherTraffic(crossing, passes=2, nodes=4, ranks=8).seconds(gpu) == pytest.approx(200e9 / (8 * 45e9))
    twice = parse_config(RUN, ("data.sequence_length=1024", "train.micro_batch=2", "train.global_batch=32", *BF16))
    both = assumed_rate(twice, base.architecture, gpu, 1, gathers)
    (waited, slow), (_, fast) = rates
    assert both is not None
    assert both.seconds_a_row == pytest.approx(waited / 2), "the rows of a micro-batch wait for the same gathers"
    assert slow is not None
    assert fast is not None
    assert slow.seconds_a_row == pytest.approx(waited)
    assert "waits for gathers" in slow.basis
    assert fast.seconds_a_row > 2 * waited
    assert "waits for" not in fast.basis


@pytest.mark.parametrize(("recomputed", "passes"), [(0.0, 2), (1.0, 3)])
def test_short_rows_wait_for_the_hosts_launches_of_each_layer_and_pass(recomputed: float, passes: int) -> None:
    """The rows of a micro-batch share them."""
    found, gpu = known_config("Qwen/Qwen3-30B-A3B"), read_gpu("H100", "--gpu")
    assert found is not None
    model = replace(describe(found, None).architecture, parameters=())  # 48 layers of which a GPU has nothing to do
    for rows in (1, 4):
        config = parse_config(RUN, ("data.sequence_length=128", f"train.micro_batch={rows}", *BF16))
        rate = assumed_rate(config, model, gpu, recomputed)
        assert rate is not None
        assert rate.seconds_a_row == pytest.approx(80 * 5e-6 * 48 * passes / rows)
        assert "waits for the host's launches" in rate.basis


def test_a_run_through_codes_moves_those_of_all_weights_once_a_pass_of_a_micro_batch() -> None:
    """The change of a weight in fp64 and in fp32, each written and read: 24 bytes."""
    gpu = read_gpu("H100", "--gpu")
    model = describe({**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}, None).architecture
    weights = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    for rows in (1, 2):
        settings = ("quant.type=stored", "data.sequence_length=4096", f"train.micro_batch={rows}")
        plain, through = (
            assumed_rate(parse_config(RUN, [*settings, *more]), model, gpu, 1)
            for more in ([], ["tuning.through=stored"])
        )
        assert plain is not None
        assert through is not None
        moved = 3 * 24 * weights / (0.9 * 3350e9) / rows
        assert through.seconds_a_row - plain.seconds_a_row == pytest.approx(moved)
