"""Writes docs/models.md from the tables of the tests: which families they take how far, and what well-known sizes need.

python -m tests.models_page            write the page
python -m tests.models_page --check    exit 1 when the page is not what would be written
"""

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from launcher.config_docs import write_or_check
from tests.dist import test_experts
from tests.every_model import RECORD, UNPACKED
from tests.families import FAMILIES, SIZES
from tests.unit.base.test_published_models import MODELS
from tests.unit.model import test_documents
from tests.unit.model.test_experts import FAMILIES as EXPERTS
from tests.unit.plan.test_published_speed import RUNS
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.description import describe
from trainer.config import parse_config
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

_HEADER = """\
# Models

<!-- Written by `python -m tests.models_page` from the tables of the tests: change these. -->

Capstan has no list of models. It lets transformers build the causal language model that a base's config.json describes,
without weights, and reads the parameters and layers off that model. transformers' own mapping says which tensors of the
files make up each parameter. Capstan refuses the following before it reads any weights, and says why: a model that
transformers does not know, one with code of its own (`auto_map`), an encoder with a decoder, and attention in both
directions.

This page lists what was tested, what well-known sizes need, and how to try a model that is in neither list.
[bases.md](bases.md) describes where a base may be and how it is loaded.
"""

_FAMILIES = """\
## Families that were tested

Each family is tested with a tiny base: random weights in the format of the published files, every kind of layer that
the family has, and awkward sizes. On 1, 2 and 3 ranks its packed bytes equal those of bitsandbytes, and its logits
equal those of transformers with the same weights dequantized, to the last bit. On 2 ranks, LoRA on all linear layers
trains for ten steps. PEFT loads the export with the same adapted layers, and its logits equal the trained model's to
the last bit. The merged model equals PEFT's own merge, bit by bit. There is one exception: in some families, dense
layers and shared experts have the names that experts' matrices once had (`gate_proj`, `up_proj`, `down_proj`). PEFT
0.21 adapts these by their weights, so its logits differ from the trained model's by 16-bit rounding.

The columns of the table say what else was tested:

- *packing*: if the first document of a packed row is exchanged, the results of the second do not change by a bit, in
  any kind of layer.
- *experts*: Capstan has one forward pass for all mixtures. It has the values and gradients of the family's own.
- *LoRA on experts*: its gradients are PEFT's, on any number of ranks.
- *shared rows*: two ranks that share a row (`sharding.sequence_parallel`) have the gradients of one, in fp64. `plan`
  refuses to share rows over other bases, with the reason.

The stored formats of [bases.md](bases.md) do not depend on the family. They are tested on matrices and stacks of
experts of awkward shapes.
"""

_SIZES = """\
## Well-known sizes

Parameters are in billions; "for one token" counts those that a token visits. The plan is for LoRA of rank 16 on all
linear layers over NF4, with documents packed into rows of 4,096 tokens, one row a GPU at a time, on machines of eight
GPUs with 80 GB each. Every layer is computed again in its backward pass (`train.activation_checkpointing: all`; `auto`
uses memory that is left). `capstan plan` shows the same for your run. "Fewest GPUs" is 1, 2, 4, 8 or a multiple of 8.

Kimi-K2 is planned here as the `deepseek_v3` model that it is. The config.json of `moonshotai/Kimi-K2-Instruct` names
code of its own (`kimi_k2`, which transformers lacks), so Capstan refuses it until you write
`"model_type": "deepseek_v3"` into a downloaded copy; the message says so. `moonshotai/Kimi-K2.5` is planned and trained
under its own name.
"""

_OTHERS = """\
## Another model

```sh
capstan plan my-run.yaml                 # reads config.json alone: the parameters by kind, what the run needs, or why it is refused
capstan smoke my-run.yaml --layers 2     # your base and data through a whole run in small, cut to two layers
```

`capstan smoke` trains a run, kills it, resumes it on another number of ranks, exports it and verifies the export: the
adapter must make the trained model's predictions in plain transformers and PEFT. `--layers` cuts a large base to its
first layers; take enough to include each kind of layer. Without a GPU it runs on the CPU. If your base passes, it has
been tested like the families above, with your own weights.
"""

_TRIED = """\
## What is tried before a run

When Capstan reads a base's config.json for the first time, it tries a small model on the CPU, which takes a second or
two. This model has the same kinds of layers, and all settings of the base except for the sizes. Capstan keeps the
result in `~/.cache/capstan`. The small model shows:

- which linear layers the family's own code reads outside their forward pass (Mamba's `dt_proj`, the scores of
  DeepSeek's indexer). These stay in 16 bits and get no adapter. So do layers that transformers keeps in fp32, and
  experts in a form that cannot be packed (DBRX, LongCat, JetMoE). `plan` names them, with their bytes and the reason;
- whether the documents of a packed row give what each gives alone, also with padding after them, and whether weights in
  4 bits, experts included, give what plain weights give. If not, `plan` and `train` refuse the base; use
  `data.packing: false` or `quant.type: none`. If the family's code does not run at small sizes, `plan` says that it was
  not tried, and rows are not packed;
- whether two ranks that share a row compute it as one does (`sharding.sequence_parallel`,
  [long-rows.md](long-rows.md));
- whether a token sees later ones. Such a model is not causal (XLNet, CPM-Ant, XLM), and is refused. So is one whose
  layers get no gradient while its embeddings are frozen (Reformer).

Capstan also refuses models whose layers share weights with other layers (Zamba), lie in several parts (BLT), or take
their keys from another model (drafting models). It refuses heads that are not a plain matrix (Dory), and heads that
compute more than one product from the hidden states (BERT, ModernBERT's decoder).

Some models see or hear and have no separate class for their language model (Qwen-VL, GLM-4V, PaddleOCR-VL, Mllama).
Capstan trains their decoder and output head, which have the whole class's logits on text to the last bit.

The files of GPT-2 and its relatives (`gpt2`, GPT-SW3, `openai-gpt`) hold transposed weights. Their layers are linear
layers here, quantized as bitsandbytes does it, and an adapter has PEFT's `fan_in_fan_out`. Capstan refuses to write
their merged models in NF4 or FP8, and their adapters for llama.cpp.
"""

_EVERY = """\
## Every type

`python -m tests.every_model table.jsonl` tries all types of causal language models that transformers builds, each in
its own process. It compares Capstan with plain transformers and PEFT in fp32. These get weights that the test decodes
itself, and each document alone. The loss, the gradient's norm and the exported adapter's logits must agree within 1e-5,
and the merge to the last bit. Randomness in a family's training (dropout, the jitter of Phi-3.5-MoE's routers) is off.
If plain transformers' own gradient in fp32 differs from that in fp64 by more than 1e-5 (Gemma 3n, 7e-5), ours may
differ by as much.
"""

_WHOLE = """\
The same is done for whole classes, which see or hear beside their language model. The reference is the class that the
base's `architectures` names, given text alone. Logits get the factor and the cap of the whole class. Some classes have
them although their language model has none (Muse-Spark, Granite-Docling), and some lack those of their language model
(Command A Vision). Capstan refuses a class that does more to text than that, or that computes nothing without a picture
or sound.
"""

_SEEING = """\
## Every type that sees

`python -m tests.every_model --images table.jsonl` shows pictures to all types of transformers that take pictures and
text ([pictures.md](pictures.md)). General rules make a tiny base and its processor, without knowing the family. Capstan
compiles three documents (with one picture, with two of other sizes, and with none), trains over them as one packed row,
and exports. The reference is plain transformers and PEFT: each document alone, in fp32, by the class and the processor
that the card of the export loads. The tokens must be equal, and the loss, the gradient's norm and the logits agree
within 1e-5. Another picture must change the logits.
"""

_SPEED = (
    """
## Speed: the forecast beside published runs

`capstan plan` forecasts a step from 30 % of the GPU's peak, until the store has a run that was measured. It counts
experts of mixtures apart: their products, and the bytes that move when they are decoded, read and computed elementwise.
A step takes no less time than its gathers or the host's kernel launches. The table compares the forecast with runs of
other tools, which have kernels of their own, so most forecasts are slower.
""".strip()
    + "\n"
)

_PLANNED = """
run: {name: planned}
model: {base: base}
data: {train: [{path: data.jsonl}], sequence_length: 4096}
train: {steps: 100, micro_batch: 1, activation_checkpointing: all}
"""
_GPU_BYTES = 80 * 10**9
_GPUS = (1, 2, 4, *range(8, 129, 8))


def render() -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            _HEADER,
            _FAMILIES,
            *_family_rows(),
            "",
            _SIZES,
            *_size_rows(),
            "",
            _SPEED,
            *_speed_rows(),
            "",
            _TRIED,
            _EVERY,
            *_types(),
            "",
            _OTHERS,
        ]
    )


def _types() -> Iterator[str]:
    """What became of every type of transformers, as tests/every_model.py has recorded it."""
    found = json.loads(RECORD.read_text())
    whole = found["whole"]
    yield from _section(found, "types of language models", {*whole["trained"], *whole["refused"], *whole["not_built"]})
    yield ""
    yield _WHOLE
    yield from _section(whole, "types of whole classes that were tried", set())
    yield ""
    yield _wrapped(f"transformers made or loaded no small model of these here: {_listed(whole['not_built'])}.")
    yield ""
    yield _SEEING
    seeing = found["images"]
    yield from _section(seeing, "types that were shown pictures", set())
    yield ""
    yield _wrapped(f"transformers made or loaded no small model of these here: {_listed(seeing['not_built'])}.")


def _section(found: dict[str, Any], what: str, elsewhere: set[str]) -> Iterator[str]:
    trained, refused = (
        {kind: said for kind, said in found[key].items() if kind not in elsewhere} for key in ("trained", "refused")
    )
    alone = [kind for kind, status in trained.items() if status == UNPACKED]
    own = f", {len(alone)} of them with each document in a row of its own (`data.packing: false`)" if alone else ""
    yield _wrapped(
        f"With transformers {found['transformers']}, {len(trained)} of the {len(trained) + len(refused)} {what} train"
        f" and are proven{own}. The others are refused."
    )
    yield ""
    yield _wrapped(f"- proven: {_listed([kind for kind in trained if kind not in alone])}{';' if alone else '.'}") + (
        "" if alone else "\n"
    )
    if alone:
        yield _wrapped(f"- proven with `data.packing: false`: {_listed(alone)}.") + "\n"
    yield "| refused | the sentence |"
    yield "|---|---|"
    for sentence in dict.fromkeys(refused.values()):
        cell = sentence.replace("|", r"\|")
        yield f"| {_listed([kind for kind, other in refused.items() if other == sentence])} | {cell} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  " * text.startswith("-"), break_on_hyphens=False)


def _listed(kinds: list[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


def _family_rows() -> Iterator[str]:
    yield "| `model_type` | layers of its tiny base | packing | experts | LoRA on experts | shared rows |"
    yield "|---|---|---|---|---|---|"
    adapted = _cases(test_experts.test_gradients_are_pefts_and_those_of_one_rank_at_any_world_size)
    for kind in sorted(FAMILIES, key=lambda kind: FAMILIES[kind]["model_type"]):
        settings: dict[str, Any] = {"tie_word_embeddings": False, **SIZES, **FAMILIES[kind]}
        name = settings["model_type"]
        layers = list(_layers(settings))
        shared = read_architecture(settings).fails_shared is None
        tested = (kind in test_documents.KINDS, name in EXPERTS and "experts" in layers, kind in adapted, shared)
        cells = [f"`{name}`", ", ".join(layers), *("yes" if has else "" for has in tested)]
        yield f"| {' | '.join(cells)} |"


def _cases(test: Any) -> set[str]:
    """The kinds of bases that a test takes first among its parameters."""
    (cases,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    return {getattr(case, "values", case)[0] for case in cases}  # a case with marks has its values inside


def _layers(settings: dict[str, Any]) -> Iterator[str]:
    """The kinds of layers of a base, in words."""
    config: Any = AutoConfig.for_model(**settings)
    model = read_architecture(settings)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if model.sliding_window else "full_attention"]
    yield from dict.fromkeys(kind.replace("_", " ") for kind in kinds if "attention" in kind)
    mixtures = {part.layer for part in model.parameters if part.kind == "experts"}
    dense = {part.layer for part in model.parameters if part.kind == "linear" and part.layer not in mixtures}
    if mixtures:
        yield "experts"
    if mixtures and dense:
        yield "dense layers"


def _size_rows() -> Iterator[str]:
    yield (
        "| model | parameters | for one token | linear | experts | embedding, head | fewest GPUs | memory of one |"
        " received in a step |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, published in MODELS.items():
        model = read_architecture(published.config)
        every = sum(part.numel for part in model.parameters)
        visited = sum(part.visits * part.numel for part in model.parameters if part.kind != "embedding")
        ends = model.weights("embedding", "head")
        counts = [every, visited, model.weights("linear"), model.weights("experts"), ends]
        gpus, plan = _fewest(published.config)
        cells = [name, *(f"{count / 1e9:,.1f}" for count in counts), str(gpus)]
        cells += [f"{plan.memory_per_gpu.total / 1e9:.1f} GB", f"{plan.traffic_per_step.total / 1e9:,.0f} GB"]
        yield f"| {' | '.join(cells)} |"


def _speed_rows() -> Iterator[str]:
    yield "| run | reported by | tokens/s of a GPU | forecast | of the reported |"
    yield "|---|---|---:|---:|---:|"
    for run in RUNS:
        found = run.forecast()
        yield f"| {run.what} | {run.source} | {run.reported:,.0f} | {found:,.0f} | {found / run.reported:.0%} |"


def _fewest(config: dict[str, Any]) -> tuple[int, Plan]:
    """The smallest number of GPUs that the run fits on, and its plan there."""
    for gpus in _GPUS:
        plan = make_plan(
            parse_config(_PLANNED, [f"train.global_batch={gpus}"]), describe(config), gpus, min(8, gpus), _GPU_BYTES
        )
        if not plan.shortfalls:
            return gpus, plan
    raise AssertionError(plan.shortfalls)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, render, "tests.models_page", "the tables of the tests"))
