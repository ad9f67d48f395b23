"""Answers are sampled while a run learns, by its ranks or by servers; whatever is killed, each is trained on once, with
the same losses.
"""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.view.status import read_generation
from tests.composites import make_composite
from tests.dist import rollouts
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, make_base
from tests.needs import need
from tests.real_vllm import TARGETS, VLLM, vllm
from tests.rollout_kills import begin, config_of, fed, kill, place_of, train
from tests.unit.export.test_served import stub
from trainer.config import dump_config
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT
from trainer.data.dataset.rollouts import Rollouts, chapter_figures, is_committed, is_judged
from trainer.export.write.adapter import export_adapter, per_expert_files
from trainer.export.write.as_quantized import write_as_quantized
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.objective.rollouts import unlike_sampler

STEPS = 10
TEN = f"train.steps={STEPS}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("rollouts"))


def gradients(run: Store) -> list[float]:
    """The norm of the gradient of each step."""
    return [record["grad_norm"] for record in read_generation(run, 1)["step"]]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_reward_rises_by_what_the_ranks_sample_and_a_kill_changes_nothing(workshop: Workshop) -> None:
    config = config_of(workshop, "own", TEN)
    found, run = train(workshop, config), workshop.store.sub("own")
    place = place_of(workshop, config)
    figures = [chapter_figures(place, step) for step in range(STEPS)]
    rewards = [figure["reward"] for figure in figures]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert {figure["adapter"] - step for step, figure in enumerate(figures)} == {0}
    records = map(json.loads, run.get(layout.metrics(1)).splitlines())
    assert all(abs(record["ratio"] - 1) < 1e-3 for record in records if record["kind"] == "step")

    again = config_of(workshop, "killed", TEN)
    killed, given = begin(workshop, again)
    place = place_of(workshop, again)
    with running(1, *given) as group:
        group.wait_until(lambda: is_committed(place, 5))
        group.kill()
    assert launch(1, *given)[0]["outcome"] == "finished"
    assert losses(killed) == found
    # The losses are sums of advantages that cancel, so the gradients tell more.
    assert fed(workshop, run, "two", TEN, world_size=2) == pytest.approx(found, abs=2e-5)
    assert gradients(workshop.store.sub("two")) == pytest.approx(gradients(run), rel=1e-3)


@pytest.mark.long
def test_a_loss_over_answers_that_is_not_finite_ends_every_start(workshop: Workshop) -> None:
    """No rows are left out, as the answers of a step are made for it."""
    config = config_of(workshop, "poisoned", TEN)
    _, given = begin(workshop, config)
    for _ in range(2):
        assert launch(1, *given, "poison_chapter", timeout=120.0)[0]["outcome"] == "NonFiniteLoss"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_several_updates_learn_from_the_same_answers_and_a_kill_changes_nothing(workshop: Workshop) -> None:
    """The ratio is 1 in the first of them alone."""
    settings = (TEN, "rollout.updates=2", "checkpoint.every_steps=3")
    config = config_of(workshop, "twice", *settings)
    found, place = train(workshop, config), place_of(workshop, config)
    assert [chapter_figures(place, number)["adapter"] for number in range(5)] == [0, 2, 4, 6, 8]
    assert not is_committed(place, 5)
    steps = read_generation(workshop.store.sub("twice"), 1)["step"]
    assert [step["lag"] for step in steps] == [0, 1] * 5
    assert [abs(step["ratio"] - 1) < 1e-3 for step in steps] == [True, False] * 5, steps

    # The chapters before the newest checkpoint go, but for the one that it stands in.
    again = config_of(workshop, "twice-killed", *settings, "checkpoint.keep_last=1")
    killed, given = begin(workshop, again)
    with running(1, *given) as group:
        group.wait_until(lambda: 3 in committed_steps(killed))  # the middle of a chapter
        group.kill()
    assert launch(1, *given)[0]["outcome"] == "finished"
    assert losses(killed) == found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_a_teacher_holds_likely_becomes_so(workshop: Workshop) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop.base)

    def judge(body: dict[str, Any]) -> Any:
        if "max_tokens" not in body:
            return {"tokens": tokenizer.encode(body["prompt"], add_special_tokens=False)}
        likely = [" " <= tokenizer.decode([token]) <= "~" for token in body["prompt"]]
        places = [
            {str(token): {"logprob": -4.6 if one else -9.0}} for token, one in zip(body["prompt"], likely, strict=True)
        ]
        return {"choices": [{"prompt_logprobs": places, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]}

    with stub(judge, "big") as url:
        config = config_of(workshop, "opd", TEN, f"objective={{name: opd, teacher: '{url}#big'}}")
        train(workshop, config)
    figures = [chapter_figures(place_of(workshop, config), step) for step in range(STEPS)]
    divergences, rewards = ([figure[name] for figure in figures] for name in ("divergence", "reward"))
    assert sum(divergences[-3:]) < sum(divergences[:3]) - 1.0, divergences
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_teacher_on_ranks_of_its_own_judges_what_the_run_samples(workshop: Workshop) -> None:
    """It is killed on the way and goes on at another number of ranks; what it says is its log p of each token."""
    if not (teacher := workshop.folder / "teacher").exists():
        make_base(teacher, intermediate_size=96)
    learns = f"objective={{name: opd, teacher: {teacher}}}", "train.steps=6", "rollout.max_tokens=6"
    config = config_of(workshop, "taught", *learns)
    run, given = begin(workshop, config)
    place = place_of(workshop, config)
    with running(1, *given, timeout=900) as trainer:
        with running(1, rollouts.judge, dump_config(config), timeout=900) as judge:
            judge.wait_until(lambda: is_judged(place, 1))
            judge.kill()
        found = launch(2, rollouts.judge, dump_config(config), timeout=900)
        assert trainer.wait()[0]["outcome"] == "finished"
    assert found[0]["steps"] == 6
    assert found[0]["made"] <= 4
    divergences = [record["divergence"] for record in read_generation(run, 1)["step"]]
    assert sum(divergences[3:]) < sum(divergences[:3]) - 0.15, divergences
    model, said = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), Rollouts(place, 6, judged=True)
    data = said.chapters.get(5)
    first, last = data.offsets[:2].tolist()
    stored = data.read(np.array([0])).gather(np.array([0]))[first:last]
    ids, trained = torch.from_numpy((stored & ID_BITS).astype(np.int64)), torch.from_numpy(stored & TARGET_BIT != 0)
    with torch.no_grad():
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0][trained[1:]]
    sampled, advantage = said.read([5 * 2**32]).T
    assert sampled + advantage == pytest.approx(log_p.numpy(), abs=1e-4)
    said.chapters.close()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_whatever_is_killed_each_chapter_is_trained_on_once(tmp_path: Path) -> None:
    assert kill(tmp_path, seed=5, kills=5) == []


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen3-moe", ("tuning.experts=true",)), ("gemma3", ())], ids=["experts", "composite"]
)
def test_an_adapter_is_published_as_it_is_exported_for_vllm(
    tmp_path: Path, kind: str, settings: tuple[str, ...]
) -> None:
    workshop = Workshop(tmp_path)
    base = tmp_path / kind
    make_composite(base, kind) if kind == "gemma3" else make_base(base, kind)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = f"model.base={base}", f"rollout.engine=[http://127.0.0.1:{port}]", "rollout.max_lag=0", "train.steps=2"
    config = config_of(workshop, "served", *given, "checkpoint={every_steps: 1, keep_last: 9}", *settings)
    run, ranks = begin(workshop, config)
    with running(1, rollouts.serve, port), running(1, rollouts.sample, run.uri), running(1, *ranks) as trainer:
        assert trainer.wait()[0]["outcome"] == "finished"
    exported = open_store(str(tmp_path / "exported"))
    export_adapter(run, exported, 1, arranged=per_expert_files)
    published = place_of(workshop, config).sub(layout.rollout_adapter(1))
    for name in (PEFT_SETTINGS, PEFT_WEIGHTS):
        assert published.get(name) == exported.get(name)
    names = load(published.get(PEFT_WEIGHTS))
    assert any((".experts.1." if settings else "language_model") in name for name in names), [*names][:3]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_in_4_bits_is_sampled_on_its_base_as_it_is_quantized(tmp_path: Path) -> None:
    """As `capstan dequantize` writes it. That a server has another base is found by the first step: here a run over the
    base itself is sampled there.
    """
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop = Workshop(tmp_path, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.bfloat16)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.5 if value.ndim == 2 else 1.0)  # random weights of the usual size exaggerate any rounding
    model.save_pretrained(workshop.base)
    for stale in (*workshop.base.glob("model-*"), *workshop.base.glob("*.index.json")):
        stale.unlink()
    kinds = {"nf4": ("quant.type=nf4", "model.dtype=bf16"), "none": ("quant.type=none", "model.dtype=bf16")}
    served = tmp_path / "as-quantized"
    write_as_quantized(workshop.config("nf4", *kinds["nf4"]), open_store(str(served)), lambda done, total: None)
    with vllm(served, tmp_path / "vllm.log", "--dtype", "bfloat16") as url:
        for kind, settings in kinds.items():
            given = f"rollout.engine=[{url}]", "rollout.max_lag=0", f"train.steps={3 if kind == 'nf4' else 1}"
            targets = f"tuning.targets=[{', '.join(TARGETS)}]"
            config = config_of(workshop, kind, *given, *settings, "rollout.max_tokens=8", targets)
            run, ranks = begin(workshop, config)
            with (
                running(1, *ranks, timeout=900) as trainer,
                running(1, rollouts.sample, run.uri, timeout=900) as sampler,
            ):
                assert trainer.wait()[0]["outcome"] == "finished"
                assert sampler.wait()[0]["outcome"] == "finished"
            steps, alike = read_generation(run, 1)["step"], kind == "nf4"
            gaps = [record["log_ratio"] for record in steps]
            print(gaps)
            assert all((gap < 0.015) is alike for gap in gaps), gaps
            assert (unlike_sampler(steps[0]) is None) is alike, "it is said"
