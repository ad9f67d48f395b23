"""Answers are those of transformers and PEFT, with keys and values kept or not, on one rank and on two, and while a run
trains.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.dist import evaluating, runs
from tests.dist.evaluating import adapted, write_rows
from tests.dist.launch import launch
from tests.dist.test_linear_adapters import adapting
from tests.material import Workshop, byte_tokenizer, commit
from trainer.config import dump_config
from trainer.run import layout
from trainer.store.store import Store

pytestmark = pytest.mark.timeout(900)
METHODS = ("lora", "prefix", "prompt")
PROMPTS = ["a bee and ", "the jay saw an emu? ", "dog"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}{% if add_generation_prompt %}assistant: {%"
    " endif %}"
)
TOKENS = 12
FP32 = ("model.dtype=fp32", "quant.type=none")
SAMPLED = {"max_tokens": TOKENS, "temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base that ends a text, beside the tokenizer's own end, with a token that it soon writes behind the first
    prompt.
    """
    here = Workshop(tmp_path_factory.mktemp("generate"))
    free = continued(AutoModelForCausalLM.from_pretrained(here.base, dtype=torch.float32), encoded(PROMPTS[0]))
    (here.base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[4]]}))
    (here.folder / "chat.jinja").write_text(TEMPLATE)
    commit(here.store.sub("lora"), here.config("lora", *FP32))
    for method in ("prefix", "prompt"):
        commit(here.store.sub(method), adapting(here, method, method, *FP32))
    settings = ("data.format=chat", f"data.template={here.folder}/chat.jinja", *FP32)
    commit(here.store.sub("chat"), here.config("chat", *settings))
    return here


@pytest.fixture(scope="module")
def answers(workshop: Workshop) -> dict[str, dict[str, Any]]:
    """Of each run, on one rank; "two" are those of lora on two, and "sampled" and "again" such that are drawn, on one
    and on two.
    """
    plain, prompts = {"max_tokens": TOKENS}, [[{"prompt": prompt} for prompt in PROMPTS]]

    def asked(name: str, base: bool, sampling: dict[str, Any]) -> dict[str, Any]:
        uri = workshop.store.sub(name).uri
        return {"what": "generate", "run": uri, "base": base, "sampling": sampling, "prompts": prompts}

    one = {name: asked(name, True, plain) for name in (*METHODS, "chat")}
    one["sampled"], one["other"] = (asked("lora", False, {**SAMPLED, "seed": seed}) for seed in (5, 6))
    two = {"two": asked("lora", True, plain), "again": asked("lora", False, SAMPLED)}
    found = [
        launch(ranks, evaluating.answers, list(asks.values()), timeout=400)[0] for ranks, asks in ((1, one), (2, two))
    ]
    return dict(zip([*one, *two], [*found[0], *found[1]], strict=True))


def encoded(prompt: str, template: str | None = None) -> list[int]:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    if template is not None:
        prompt = f"user: {prompt}<s>assistant: "
    return tokenizer.encode(prompt, add_special_tokens=False)


def continued(model: Any, tokens: list[int]) -> list[int]:
    """Greedily, by transformers itself."""
    ids = torch.tensor([tokens])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(tokens) :].tolist()


@torch.no_grad()
def grown(model: Any, tokens: list[int], ends: list[int]) -> list[int]:
    """The same without `generate`: PEFT's forward over the whole text for each token."""
    written = list[int]()
    while len(written) < TOKENS and not (written and written[-1] in ends):
        written.append(int(model(input_ids=torch.tensor([[*tokens, *written]])).logits[0, -1].argmax()))
    return written


def text(tokens: list[int]) -> Any:
    return byte_tokenizer().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", [*METHODS, "chat"])
def test_greedy_answers_are_those_of_transformers(
    workshop: Workshop, answers: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """The controls: base and adapter answer differently, and the first answer of the base ends early."""
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    prompts = [encoded(prompt, TEMPLATE if name == "chat" else None) for prompt in PROMPTS]
    before = [continued(model, tokens) for tokens in prompts]
    with adapted(model, workshop.store.sub(name).uri, tmp_path / "adapter") as tuned:
        if name in ("prefix", "prompt"):
            after = [grown(tuned, tokens, ends) for tokens in prompts]
        else:
            after = [continued(tuned, tokens) for tokens in prompts]
    for found in (answers[name], *([answers["two"]] if name == "lora" else [])):
        rows = found["answers"]
        assert [row["prompt"] for row in rows] == PROMPTS
        assert [row["base"] for row in rows] == [text(tokens) for tokens in before]
        assert [row["adapter"] for row in rows] == [text(tokens) for tokens in after]
        assert all(row["base"] != row["adapter"] for row in rows)
        pieces = "".join(
            told["piece"] for told in found["told"] if told.get("number") == 0 and told["side"] == "adapter"
        )
        assert pieces == rows[0]["adapter"].rstrip("\N{REPLACEMENT CHARACTER}")
    assert name == "chat" or len(before[0]) < TOKENS


def test_draws_depend_on_the_seed_and_not_on_the_ranks(answers: dict[str, dict[str, Any]]) -> None:
    drawn, other, again, greedy = (
        [row["adapter"] for row in answers[name]["answers"]] for name in ("sampled", "other", "again", "lora")
    )
    assert drawn == again
    assert drawn != other
    assert drawn != greedy


@pytest.mark.long
def test_samples_are_taken_while_a_run_trains_and_do_not_change_it(workshop: Workshop) -> None:
    """The first ones are the base's answers; with samples or without, the losses are the same bits."""
    prompts = write_rows(workshop.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    options = (f"eval.prompts={prompts}", f"eval.max_tokens={TOKENS}", "train.sample_every=2")
    stores = list[Store]()
    for name, given in (("sampling", options), ("plain", ())):
        config = workshop.config(name, *FP32, "train.steps=3", "optim.lr=0.02", *given)
        (outcome, _) = launch(2, runs.run, dump_config(config), workshop.prepare(config).train, timeout=300)
        assert outcome["outcome"] == "finished", outcome
        stores.append(workshop.store.sub(name))
    taken = {
        step: [json.loads(line) for line in stores[0].get(layout.samples(step)).splitlines()] for step in (0, 2, 3)
    }
    assert [entry.key for entry in stores[0].list(layout.SAMPLES)] == [layout.samples(step) for step in taken]
    assert [entry.key for entry in stores[1].list(layout.SAMPLES)] == []
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    wanted = [{"prompt": prompt, "adapter": text(continued(model, encoded(prompt)))} for prompt in PROMPTS]
    assert taken[0] == wanted
    assert taken[3] != wanted
    losses = [evaluating.step_losses(store) for store in stores]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
