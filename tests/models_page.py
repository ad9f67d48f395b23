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

Capstan has no list of models. From a base's config.json, transformers builds the causal language model without its
weights. Capstan takes the parameters and layers from that model, and transformers' own tables say which tensors in the
base's files make up each parameter. Before Capstan reads any weights, it refuses a model that transformers does not
know, a model with code of its own (`auto_map`), an encoder-decoder model, and a model with attention in both
directions. The message says why.

This page lists the models that were tested, says what well-known sizes need, and shows how to try another model.
[bases.md](bases.md) describes where a base may be and how it is loaded.
"""

_FAMILIES = """\
## Families that were tested

Each family is tested with a tiny base. This base has every kind of layer that the family has. Its weights are random,
and stored as in the published files. Its sizes are not multiples of a quantization block. The tests check:

- **The base**, on 1, 2 and 3 ranks: its packed 4-bit weights equal those of bitsandbytes, byte by byte. Its logits have
  the same bits as those of transformers with the same dequantized weights.
- **Training**, on 2 ranks: LoRA on all linear layers trains for ten steps.
- **The export**: PEFT puts adapters on the same layers as Capstan, and the logits that PEFT computes equal the trained
  model's to the last bit.
- **The merged model**: it equals PEFT's own merge, bit by bit.

There is one exception to the equality of logits: some families with experts have additional layers with the names
`gate_proj`, `up_proj` and `down_proj`, in dense MLPs or shared experts. PEFT 0.21 treats these layers like experts, and
computes the sum of weight and adapter in 16 bits. The sum is rounded, so PEFT's logits differ slightly from the trained
model's.

The columns of the table say what else was tested:

- *packing*: the first document of a packed row is replaced by a different document. The results of the second document
  must stay the same to the last bit, in any kind of layer.
- *experts*: Capstan computes the experts of all families by one function. The values and gradients of this function
  equal those of the family's own code.
- *LoRA on experts*: the gradients equal PEFT's, on any number of ranks.
- *shared rows*: two ranks that share a row (`sharding.sequence_parallel`) compute the same gradients as one rank, in
  fp64. For families without a "yes", `plan` refuses to share rows, and says why.

The stored formats of [bases.md](bases.md) do not depend on the family, and have tests of their own.
"""

_SIZES = """\
## Well-known sizes

Parameters are in billions. "For one token" counts the parameters that take part in computing one token. The plan is for
LoRA of rank 16 on all linear layers over NF4. Documents are packed into rows of 4,096 tokens, and each GPU computes one
row at a time. The machines have eight GPUs with 80 GB each. Every layer is computed again in its backward pass
(`train.activation_checkpointing: all`). "Fewest GPUs" is the smallest number that suffices among 1, 2, 4, 8 and the
multiples of 8. "Memory of one" is what one of these GPUs needs, and "received in a step" is what it receives from other
GPUs. `capstan plan` shows the same for your run.

Kimi-K2 has the architecture `deepseek_v3`, so the table's plan for Kimi-K2 uses this type. But the config.json of
`moonshotai/Kimi-K2-Instruct` names the type `kimi_k2`, which transformers does not know, so Capstan refuses the model.
To train it, download it and write `"model_type": "deepseek_v3"` into its config.json. The message says so, too.
`moonshotai/Kimi-K2.5` is planned and trained under its own name.
"""

_OTHERS = """\
## Another model

```sh
capstan plan my-run.yaml                 # reads config.json alone: the parameters by kind, what the run needs, or why it is refused
capstan smoke my-run.yaml --layers 2     # your base and data through a whole run in small, cut to two layers
```

`capstan smoke` trains a run, kills it, resumes it on a different number of ranks, and exports its adapter. Then it
loads the adapter in plain transformers and PEFT. The loaded model must predict what the trained model predicts.
`--layers` cuts a large base to its first layers. Keep enough layers to have each kind among them. Without a GPU the
command runs on the CPU.
"""

_TRIED = """\
## What is tried before a run

When Capstan reads a base's config.json for the first time, it tries a small model on the CPU, which takes a second or
two. This model has the same kinds of layers and all settings of the base, except for the sizes. Capstan keeps the
result in `~/.cache/capstan`. The trial answers four questions:

- **Which linear layers cannot be quantized?** The family's own code may use a layer's weight outside of the layer's
  forward pass (Mamba's `dt_proj`, the scores of DeepSeek's indexer). Capstan does not quantize such a layer, and gives
  it no adapter. It treats two other kinds of layers in the same way: layers that transformers keeps in fp32, and
  experts that Capstan cannot pack into 4 bits (DBRX, LongCat, JetMoE). `plan` names all these layers, with their bytes
  and the reason.
- **Are the results the same in a packed row and with 4-bit weights?** Each document of a packed row must have the same
  results as if it were alone. Weights in 4 bits, including those of experts, must give the same results as ordinary
  weights with the same values. If one of these results differs, `plan` and `train` refuse the run, and the message
  names the setting that helps: `data.packing: false` or `quant.type: none`. If a family's code does not run at small
  sizes, Capstan cannot try the base. `plan` then says so, and Capstan refuses packed rows (set `data.packing: false`).
- **Can two ranks share a row?** Together they must compute the same as one rank (`sharding.sequence_parallel`,
  [long-rows.md](long-rows.md)).
- **Is the model causal, and can it learn?** A model in which a token sees later tokens is refused (XLNet, CPM-Ant,
  XLM). A model is also refused if its layers get no gradient when its embeddings are frozen (Reformer).

Capstan also refuses the models of this list:

- A model whose layers share weights with other layers (Zamba) is refused.
- A model whose layers are divided among several parts without one main decoder (BLT) is refused.
- A drafting model that takes its keys from another model is refused.
- A model whose head is not a plain matrix (Dory) is refused.
- A model whose head computes more than one matrix product from the hidden states (BERT, ModernBERT's decoder) is
  refused.

Some models take pictures or sound, and have no separate class for their language model (Qwen-VL, GLM-4V, PaddleOCR-VL,
Mllama). Capstan trains their decoder and output head. For a text without pictures or sound, the decoder and the head
compute the same logits as the whole model, to the last bit.

The files of GPT-2 and its relatives (`gpt2`, GPT-SW3, `openai-gpt`) hold transposed weights. Capstan treats the layers
of these models as linear layers, and quantizes them in the same way as bitsandbytes. It writes `fan_in_fan_out` into
the adapters for PEFT. For these models it refuses merged exports in NF4 or FP8, and adapters for llama.cpp.
"""

_EVERY = """\
## Every type

`python -m tests.every_model table.jsonl` tries all types of causal language models that transformers builds, each in
its own process. It compares Capstan with plain transformers and PEFT in fp32. Plain transformers gets dequantized
weights, and computes each document alone. The loss, the gradient's norm and the exported adapter's logits must agree
within 1e-5. The merged weights must agree to the last bit. Randomness in a family's training (dropout, the jitter of
Phi-3.5-MoE's routers) is off. In some families, plain transformers' own rounding is larger than 1e-5. For example,
transformers' gradient norms for Gemma 3n in fp32 and in fp64 differ by 7e-5. For such a family, Capstan's gradient norm
may differ from the norm of plain transformers by at most this rounding.
"""

_WHOLE = """\
`tests.every_model` also tries models that take pictures or sound besides text. The reference is the class that the
base's `architectures` names, which is the class of the whole model. This class gets only text. In some types, the class
of the whole model and the class of its language model scale or cap the logits differently (Muse-Spark, Granite-Docling,
Command A Vision). Capstan computes the logits as the class of the whole model does. Capstan refuses the base if the two
classes differ in anything else, or if the whole model cannot compute text without pictures or sound.
"""

_SEEING = """\
## Every type that sees

`python -m tests.every_model --images table.jsonl` tests all types in transformers that take pictures and text
([pictures.md](pictures.md)). The command makes a tiny base and its processor by rules that are the same for all
families. Capstan compiles three documents: one with a picture, one with two pictures whose sizes differ, and one
without pictures. It trains on one packed row with these documents, or on one row for each document if `plan` asks for
that. Then it exports the adapter.

The reference is plain transformers and PEFT, which compute each document alone in fp32. They use the model class and
the processor that are named in the model card of the export. The tokens must be equal, and the loss, the gradient's
norm and the logits must agree within 1e-5. For some types, plain transformers' own rounding is larger than 1e-5. For
example, transformers' logits for Gemma 3n in fp32 and in fp64 differ by 2e-4. For such a type, Capstan's logits may
differ from the logits of plain transformers in fp64 by at most twice this rounding. The test also checks that a
different picture changes the logits.
"""

_HEARING = """\
## Every type that hears

`python -m tests.every_model --sounds table.jsonl` tests the types that take sounds, in the same way as the [test with
pictures](#every-type-that-sees). One document has one sound, one has two sounds of other lengths, and one has none. If
a processor takes only one sound for each document, the second document has one sound, too. The reference reads the
sound files with its own code.
"""

_WATCHING = """\
## Every type that takes videos

`python -m tests.every_model --videos table.jsonl` tests the types whose processor takes videos, in the same way as the
[test with pictures](#every-type-that-sees). One document has a video of 32 frames, one has a picture and a video, and
one has neither. For the reference, transformers' own reader decodes all frames of the file, and the processor gets them
all. The classes of GLM and SmolVLM take no document with both a picture and a video, so their second document has only
a video.
"""

_SPEED = (
    """
## Speed: the forecast and published runs

`capstan plan` assumes that a step reaches 30 % of the GPU's peak, until the store has a run whose steps were measured.
For experts, `plan` counts the matrix products and also the bytes that the GPU moves. A step takes as long as the
slowest of three things that happen at the same time: the GPU's computation, the gathering of weights, and the host's
launches of kernels. The table compares the forecast speed with the speed of published runs of other tools. The last
column is the forecast speed divided by the published speed. These tools have kernels of their own, so most of their
runs are faster than the forecast.
""".strip()
    + "\n"
)

_NOT_TRIED = "These have no result yet"

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
    yield from _section(
        found, "types of language models were tried", {*whole["trained"], *whole["refused"], *whole["not_built"]}
    )
    yield ""
    yield _WHOLE
    yield from _section(whole, "types of models that take pictures or sound were tried on text", set())
    yield ""
    yield _SEEING
    yield from _section(found["images"], "types were shown pictures", set())
    yield ""
    yield _HEARING
    yield from _section(found["sounds"], "types were tested with sounds", set())
    yield ""
    yield _WATCHING
    yield from _section(found["videos"], "types were tested with videos", set())


def _section(found: dict[str, Any], what: str, elsewhere: set[str]) -> Iterator[str]:
    trained, refused = (
        {kind: said for kind, said in found[key].items() if kind not in elsewhere} for key in ("trained", "refused")
    )
    alone = [kind for kind, status in trained.items() if status == UNPACKED]
    own = f" {len(alone)} of the proven types need each document in a row of its own (`data.packing: false`)."
    yield _wrapped(
        f"With transformers {found['transformers']}, {len(trained) + len(refused)} {what}. {len(trained)} of them train"
        f" and are proven (they passed the comparison), and {len(refused)} are refused.{own if alone else ''}"
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
    if not_built := found.get("not_built"):
        yield ""
        yield _wrapped(f"{_NOT_TRIED}: {_listed(not_built)}.")


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
