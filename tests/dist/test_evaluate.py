"""`capstan evaluate` measures what plain transformers, PEFT and lm-evaluation-harness measure, on one rank and on
two.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.view.status import read_generation
from tests.dist import evaluating, runs
from tests.dist.evaluating import adapted, write_rows
from tests.dist.launch import launch
from tests.material import Workshop, byte_tokenizer, commit, make_data
from tests.unit.export.test_served import completing, stub
from trainer.config import dump_config
from trainer.evaluate.evaluate import evaluate
from trainer.evaluate.program import Ask
from trainer.evaluate.subjects import task_specs
from trainer.run import layout
from trainer.run.evaluations import FEWEST
from trainer.store.store import Store

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TEXTS = ["a bee and a cat", "the jay saw an emu", "dog", "two hens, one fox: none left", "an ant is not an ibis"]
PAIRS = [("The nurse said he ", "The nurse said she "), ("The pilot said he ", "The pilot said she ")]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The run, its settings, and how far its losses may be from those of transformers and PEFT.
RUNS = {
    "fp32": (("model.dtype=fp32", "quant.type=none"), 1e-5),
    "bf16": (("quant.type=none",), 1e-3),
    "nf4": ((), 1e-3),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With sets, pairs and tasks beside its base. bitsandbytes' CPU kernels want rows of whole blocks."""
    here = Workshop(tmp_path_factory.mktemp("evaluate"), intermediate_size=192)
    make_data(here.folder / "task.jsonl", documents=11, seed=8)
    write_rows(here.folder / "general.jsonl", [{"text": text} for text in TEXTS])
    write_rows(here.folder / "pairs.jsonl", [{"group": "nurses", "pair": pair} for pair in PAIRS])
    write_tasks(here.folder / "tasks")
    for name, (settings, _) in RUNS.items():
        evaluated = (f"eval.bias={here.folder}/pairs.jsonl", f"eval.tasks=[{here.folder}/tasks]")
        commit(
            here.store.sub(name), here.config(name, *sets(here), *evaluated[: 2 if name == "fp32" else 1], *settings)
        )
    return here


def sets(workshop: Workshop) -> tuple[str, str]:
    """A set without a name, and one of another format."""
    general = f"{{path: {workshop.folder}/general.jsonl, format: text}}"
    return f"data.eval=[{{path: {workshop.folder}/task.jsonl}}]", f"eval.sets={{general: {general}}}"


def write_tasks(folder: Path) -> None:
    """A task of each kind, over rows of our own."""
    folder.mkdir()
    choices = [" a dog", " an emu", " none"]
    rows = [{"question": f"{text} or", "choices": choices, "answer": number % 3} for number, text in enumerate(TEXTS)]
    data = {"data_files": {"test": str(write_rows(folder / "questions.jsonl", rows))}}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{question}}"}
    tasks: dict[str, dict[str, Any]] = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
        "written": {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"},
    }
    tasks["written"]["generation_kwargs"] = {"until": ["e"], "max_gen_toks": 9}
    metrics = {"choice": ["acc", "acc_norm"], "written": ["exact_match", "chrf"], "text": ["bits_per_byte"]}
    for name, task in tasks.items():
        measured = {"metric_list": [{"metric": metric} for metric in metrics[name]]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task, **measured}))


@pytest.fixture(scope="module")
def begun(workshop: Workshop) -> Store:
    """A run that was trained and evaluated on two ranks."""
    settings = (*sets(workshop), *RUNS["fp32"][0], "eval.every=3", "train.steps=4")
    config = workshop.config("begun", *settings)
    datasets, run = workshop.prepare(config), workshop.store.sub("begun")
    run.put(layout.CONFIG, dump_config(config).encode())
    given = (dump_config(config), datasets.train, "start", datasets.eval, dict(datasets.sets))
    assert launch(2, runs.run, *given, timeout=300)[0]["outcome"] == "finished"
    return run


@pytest.fixture(scope="module")
def found(workshop: Workshop, begun: Store) -> dict[str, dict[str, Any]]:
    """The evaluation of each run, on one rank; "on two" is that of fp32 on two."""
    asked = {name: {"what": "evaluate", "run": workshop.store.sub(name).uri} for name in (*RUNS, "begun")}
    one = launch(1, evaluating.answers, list(asked.values()), timeout=400)[0]
    two = launch(2, evaluating.answers, [asked["fp32"]], timeout=400)[0]
    return {**dict(zip(asked, one, strict=True)), "on two": two[0]}


def documents(workshop: Workshop) -> dict[str, list[tuple[list[int], int]]]:
    """The tokens of each document of both sets, and where its trained ones begin, written out here once more."""
    tokenizer = byte_tokenizer()
    rows = [json.loads(line) for line in (workshop.folder / "task.jsonl").read_text().splitlines()]
    parts = {"eval": [(row["prompt"], row["completion"]) for row in rows], "general": [("", text) for text in TEXTS]}
    end: Any = tokenizer.convert_tokens_to_ids("</s>")
    return {
        name: [([*tokenizer.encode(a + b), end], max(1, len(tokenizer.encode(a)))) for a, b in found]
        for name, found in parts.items()
    }


@torch.no_grad()
def nats(model: Any, tokens: list[int], first: int) -> Tensor:
    """-log p of the tokens from `first` on, by plain transformers."""
    ids = torch.tensor(tokens)
    scores = model(ids[None]).logits[0].float().log_softmax(-1)
    return -scores[:-1].gather(1, ids[1:, None])[first - 1 :, 0]


def loss(model: Any, found: list[tuple[list[int], int]]) -> float:
    return float(torch.cat([nats(model, *document) for document in found]).mean())


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_transformers_and_peft_on_the_same_tokens(
    workshop: Workshop, found: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """The control: base and adapter differ by far more."""
    settings, within = RUNS[name]
    dtype = TYPES[workshop.config("x", *settings).model.dtype]
    packing = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    quantized: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**packing)} if name == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=dtype, **quantized)
    model.train(name == "nf4")  # else bitsandbytes takes a kernel for the CPU that rounds otherwise
    texts, measured = documents(workshop), [found[name], *([found["on two"]] if name == "fp32" else [])]
    before = {of: loss(model, rows) for of, rows in texts.items()}
    with adapted(model, workshop.store.sub(name).uri, tmp_path / "adapter") as tuned:
        tuned.train(name == "nf4")
        after = {of: loss(tuned, rows) for of, rows in texts.items()}
        begun = [[float(nats(tuned, byte_tokenizer().encode(text), 1).sum()) for text in pair] for pair in PAIRS]
    gaps = torch.tensor([second - first for first, second in begun])
    for evaluation in measured:
        assert evaluation["sets"].keys() == texts.keys()
        for of, one in evaluation["sets"].items():
            counted = len(texts[of]), sum(len(tokens) - first for tokens, first in texts[of])
            assert (one["documents"], one["tokens"]) == counted
            assert one["base"]["loss"] == pytest.approx(before[of], rel=within)
            assert one["adapter"]["loss"] == pytest.approx(after[of], rel=within)
            assert abs(one["difference"]) > 3 * within * after[of]
            assert (one["interval"] is None) == (one["documents"] < FEWEST)
            if one["interval"]:
                assert one["interval"][0] < one["difference"] < one["interval"][1]
        nurses = evaluation["bias"]["nurses"]
        assert nurses["pairs"] == len(PAIRS)
        wanted = pytest.approx([float(gaps.mean()), float(gaps.std(correction=0))], abs=100 * within)
        assert [nurses["adapter"]["mean"], nurses["adapter"]["std"]] == wanted
    assert json.loads(workshop.store.sub(name).get(layout.evaluation(4)))["sets"].keys() == texts.keys()


def test_tasks_are_scored_as_by_the_harness_own_model_on_one_rank_and_on_two(
    workshop: Workshop, found: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The control: base and adapter have other scores."""
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32).eval()
    theirs = {"base": harness(model, workshop.folder / "tasks")}
    with adapted(model, workshop.store.sub("fp32").uri, tmp_path / "adapter") as tuned:
        theirs["adapter"] = harness(tuned, workshop.folder / "tasks")
    assert theirs["base"]["written"]["chrf,none"] != theirs["adapter"]["written"]["chrf,none"]
    assert theirs["base"]["written"]["chrf_stderr,none"] != theirs["adapter"]["written"]["chrf_stderr,none"]
    assert theirs["base"]["text"]["bits_per_byte,none"] != theirs["adapter"]["text"]["bits_per_byte,none"]
    for evaluation in (found["fp32"], found["on two"]):
        assert evaluation["tasks"].keys() == {"choice", "written", "text"}
        for task, metrics in evaluation["tasks"].items():
            for metric, scores in metrics.items():
                for side, expected in theirs.items():
                    assert scores[side] == pytest.approx(expected[task][f"{metric},none"], rel=1e-5), (task, metric)
                for side, name in (("base", "base_stderr"), ("adapter", "stderr")):
                    error = theirs[side][task][f"{metric}_stderr,none"]  # "N/A" where there is none
                    assert scores[name] == (None if error == "N/A" else pytest.approx(error)), (task, metric)


def test_a_server_of_the_export_measures_what_the_ranks_do(
    workshop: Workshop, found: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    run = workshop.store.sub("fp32")
    ask, log = Ask("evaluate", run.uri, 4, server=""), list[dict[str, Any]]()
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32).eval()
    with adapted(model, run.uri, tmp_path / "adapter") as tuned:

        def complete(asked: dict[str, Any]) -> Any:
            with tuned.disable_adapter() if asked["model"] == "small" else nullcontext():
                return completing(tuned)(asked)

        alone = Lock()  # as the adapter is switched off for all
        with stub(
            lambda asked: [alone.acquire(), complete(asked), alone.release()][1], "small", "fp32", parent="small"
        ) as url:
            served = evaluate(replace(ask, server=url), log.append)
    ours, name = found["fp32"], f"{url}#fp32"
    assert {"log": f"the answers are those of small and fp32 at {url}"} in log
    assert served["server"] == name
    for part in ("sets", "bias"):
        for of, one in served[part].items():
            for side in ("base", "adapter"):
                assert one[side] == pytest.approx(ours[part][of][side], rel=1e-4, abs=1e-4), (part, of, side)
            assert one["server"] == name
    assert served["sets"]["eval"]["interval"] == pytest.approx(ours["sets"]["eval"]["interval"], abs=1e-4)
    for task, metrics in served["tasks"].items():
        for metric, one in metrics.items():
            assert one.pop("server") == name
            for figure, value in ours["tasks"][task][metric].items():  # None where the harness has no standard error
                wanted = None if value is None else pytest.approx(value, rel=1e-4)
                assert one[figure] == wanted, (task, metric, figure)
    assert json.loads(run.get(layout.evaluation(4)))["tasks"]["choice"]["acc"]["server"] == name


def harness(model: Any, tasks: Path) -> dict[str, dict[str, float]]:
    """The scores by lm-eval's own model of transformers."""
    make: Any = HFLM
    own = make(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, device="cpu")
    evaluate: Any = simple_evaluate
    options = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 200, "log_samples": False}
    return evaluate(own, tasks=task_specs([str(tasks)]), **options)["results"]


def test_a_run_is_evaluated_before_its_first_step_and_its_losses_are_those_of_evaluate(
    begun: Store, found: dict[str, dict[str, Any]]
) -> None:
    """Its last records are what is found of its last checkpoint, those of step 0 what is found of the base."""
    records = read_generation(begun, 1)["eval"]
    evaluated = [(step, name) for step in (0, 3, 4) for name in ("general", None)]
    assert [(record["step"], record.get("set")) for record in records] == evaluated
    for record in records:
        if record["step"] != 3:
            one = found["begun"]["sets"][record.get("set") or "eval"]
            assert record["loss"] == pytest.approx(one["adapter" if record["step"] else "base"]["loss"], rel=1e-5)
