"""The model card of an export, README.md, in the form that the Hub reads.

It says what the model is, how it was made, how good it is, and how it is loaded. Its first lines are the Hub's metadata
(huggingface.co/docs/hub/model-cards). There `base_model` must be a Hub id, so a base that is a folder is named in the
table alone, and without its path, because the card may be public. The licence is the one that the base's own card
names.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from trainer.base.find.locate import base_files, on_the_hub
from trainer.base.find.media import numbered
from trainer.config import Config
from trainer.config.objective import HEADS
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.order.settings import train_order
from trainer.data.source.hub import repository
from trainer.errors import StorageError, counted
from trainer.run.evaluations import read_evaluation
from trainer.run.folder import store_of
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store
from trainer.tuning.head import WithHead
from trainer.tuning.method import method_of

# In a code snippet this stands for the folder or the repository that the card lies in.
PLACE = "FOLDER"
_HUB_DATA = "hf://"
_PROOF = "## Proof\n\n"
_UNPROVEN = "It was not compared with the trained model (`capstan export --verify`), or that came to no end."
_OPTIM = {"lr", "schedule", "warmup_steps", "warmup_ratio", "name"}


@dataclass(frozen=True)
class CardContent:
    """The parts of a card that the format knows.

    `what` is a sentence. `relation` is the relation to the base, in the Hub's words. `usage` has the lines that load
    the model, in `language`.
    """

    library: str
    what: str
    relation: Literal["adapter", "finetune", "quantized"]
    usage: str = ""
    language: Literal["python", "sh"] = "python"


_TOKENIZER = f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")'


class _Question(NamedTuple):
    """The lines of a snippet that ask a model about a file, and the imports that they need."""

    lines: str
    imports: str = ""
    of_transformers: str = ""


_ASKED = """
parts = [{"type": "KIND"}, {"type": "text", "text": "ASKED"}]
text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
INPUTS
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=100))[0])"""


def _asked(kind: str, question: str, inputs: str) -> str:
    return _ASKED.replace("KIND", kind).replace("ASKED", question).replace("INPUTS", inputs)


_QUESTIONS = {
    "image": _Question(
        _asked(
            "image",
            "What is in the picture?",
            'inputs = processor(text=[text], images=[[Image.open("picture.jpg")]], return_tensors="pt")',
        ),
        imports="from PIL import Image\n",
    ),
    "video": _Question(
        _asked(
            "video",
            "What happens in the video?",
            'frames, metadata = load_video("video.mp4")\n'
            'inputs = processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt")',
        ),
        of_transformers="from transformers.video_utils import load_video\n",
    ),
    "audio": _Question(
        _asked(
            "audio",
            "What can be heard?",
            "rate = processor.feature_extractor.sampling_rate\n"
            'inputs = processor(text=[text], audio=[load_audio("sound.wav", rate)], sampling_rate=rate,'
            ' return_tensors="pt")',
        ),
        of_transformers="from transformers.audio_utils import load_audio\n",
    ),
}
"""By transformers' name of a modality."""


def _question(whole: str, sees: str) -> _Question:
    """Return how a model is asked about a file of the modality `sees`, or of one that its class takes if it takes none
    of these."""
    import transformers

    takes = [
        kind for kind in getattr(getattr(transformers, whole), "input_modalities", ("image",)) if kind in _QUESTIONS
    ]
    return _QUESTIONS[sees if sees in takes or not takes else takes[0]]


def peft_usage(whole: str | None, *, grows: bool = False, sees: str = "") -> str:
    """Return the lines that load a PEFT adapter over its base.

    `whole` is the class of a base that also sees or hears: PEFT's own class for language models does not load it for
    every family. The adapter `grows` the base if it brings rows of new tokens. If it was trained with files of the
    modality `sees`, the lines ask the model about one.
    """
    if whole is None:
        return f"""\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{PLACE}", dtype="auto")
{_TOKENIZER}"""
    if sees:
        question = _question(whole, sees)
        return f"""\
from peft import PeftConfig, PeftModel
{question.imports}from transformers import AutoProcessor, {whole}
{question.of_transformers}
processor = AutoProcessor.from_pretrained("{PLACE}")
trained = PeftConfig.from_pretrained("{PLACE}")
base = {whole}.from_pretrained(trained.base_model_name_or_path, revision=trained.revision or "main", dtype="auto")
model = PeftModel.from_pretrained(base, "{PLACE}")
{question.lines}"""
    grown = "base.resize_token_embeddings(len(tokenizer))\n" if grows else ""
    return f"""\
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, {whole}

{_TOKENIZER}
trained = PeftConfig.from_pretrained("{PLACE}")
base = {whole}.from_pretrained(trained.base_model_name_or_path, revision=trained.revision or "main", dtype="auto")
{grown}model = PeftModel.from_pretrained(base, "{PLACE}")"""


def sees(folder: Store, config: Config, manifest: CheckpointManifest) -> str:
    """Return the modality, by transformers' name, of most of the files that the run was trained with. Empty if its rows
    are text, and "image" if its compiled data is gone."""
    if not ROW_KINDS[config.data.kind].sees:
        return ""
    from trainer.data.dataset.dataset import open_chapter
    from trainer.data.dataset.pictures import sampled_files

    counts = Counter[int]()
    with suppress(StorageError):
        data = open_chapter(store_of(folder), manifest.dataset, 0)
        weights = train_order(config).weights_for([source.tokens for source in data.manifest.sources])
        found = sampled_files(data, weights)
        for number, files in zip(found.entries["modality"].tolist(), found.each, strict=True):
            counts[number] += files
    (number, _), *_ = counts.most_common(1) or [(0, 0)]
    return numbered(number).kind


def head_usage(head: WithHead, *, sees: str = "") -> str:
    """Return the lines that load the base with the `head` of the adapter, and the adapter over it. `sees` is as in
    `peft_usage`."""
    made, reader = head.head.transformers_class, "AutoProcessor" if sees else "AutoTokenizer"
    reads, tokenizer = ("processor", "processor.tokenizer") if sees else ("tokenizer", "tokenizer")
    kind = ', problem_type="multi_label_classification"' if head.head.several else ""
    outputs = f"id2label={dict(enumerate(head.labels))}" if head.labels else f"num_labels={head.outputs}"
    return f"""\
from peft import PeftConfig, PeftModel
from transformers import {", ".join(sorted((made, "AutoConfig", reader)))}

{reads} = {reader}.from_pretrained("{PLACE}")
trained = PeftConfig.from_pretrained("{PLACE}")
place = {{"pretrained_model_name_or_path": trained.base_model_name_or_path, "revision": trained.revision or "main"}}
config = AutoConfig.from_pretrained(**place, {outputs}{kind})
config.get_text_config().pad_token_id = {tokenizer}.pad_token_id
base = {made}.from_pretrained(**place, config=config, dtype="auto")
model = PeftModel.from_pretrained(base, "{PLACE}")"""


def model_usage(whole: str | None, *, sees: str = "") -> str:
    """Return the lines that load a whole model. `whole` and `sees` are as in `peft_usage`."""
    made_of = whole or "AutoModelForCausalLM"
    if sees:
        question = _question(made_of, sees)
        return f"""\
{question.imports}from transformers import AutoProcessor, {made_of}
{question.of_transformers}
processor = AutoProcessor.from_pretrained("{PLACE}")
model = {made_of}.from_pretrained("{PLACE}", dtype="auto")
{question.lines}"""
    return f"""\
from transformers import {", ".join(sorted((made_of, "AutoTokenizer")))}

model = {made_of}.from_pretrained("{PLACE}", dtype="auto")
{_TOKENIZER}"""


def model_card(folder: Store, config: Config, manifest: CheckpointManifest, content: CardContent) -> bytes:
    """Write the model card of the checkpoint of `manifest`. `config` has the settings that it was trained with."""
    usage = f"\n## Use\n\n```{content.language}\n{content.usage}\n```\n" if content.usage else ""
    text = (
        f"---\n{_metadata(config, content).to_yaml()}\n---\n\n# {config.run.name}\n\n{content.what}\n{usage}\n##"
        f" Training\n\n{_table(('', ''), _facts(config, manifest).items())}\n\n##"
        f" Evaluation\n\n{model_card_evaluation(folder, manifest.step)}\n\n"
        f"{_PROOF}{_UNPROVEN}\n\n## Limitations\n\n{_limitations(config)}\n"
    )
    return text.encode()


def with_proof(card: bytes, proof: str | None) -> bytes:
    """Return the card with a sentence on how the export compared with the trained model.

    None removes an earlier sentence.
    """
    before, found, after = card.partition(_PROOF.encode())
    _, end, rest = after.partition(b"\n\n## ")
    said = _UNPROVEN if proof is None else f"It was compared with the trained model: {proof}."
    return before + found + said.encode() + end + rest if found else card


def _metadata(config: Config, content: CardContent) -> ModelCardData:
    base, head = config.model.base, HEADS.get(config.objective.name)
    data = [name for source in config.data.train if (name := repository(source.path)) is not None]
    return ModelCardData(
        library_name=content.library,
        base_model=base if on_the_hub(base) else None,
        base_model_relation=content.relation if on_the_hub(base) else None,
        license=_base_licence(config),
        datasets=data or None,
        pipeline_tag=head.pipeline if head else _pipeline(config, content),
        tags=["capstan", config.tuning.method, config.objective.name],
    )


def _pipeline(config: Config, content: CardContent) -> str:
    """Return the Hub's name of what the model does."""
    if not ROW_KINDS[config.data.kind].sees:
        return "text-generation"
    asked = (kind for kind, question in _QUESTIONS.items() if question.lines in content.usage)
    return f"{next(asked, 'image')}-text-to-text"


def _named(place: str) -> str:
    """Return a base or data as a reader of the card may see it: its Hub id, or only the last part of its path.

    The other parts of a path would tell of the machine or the bucket that it lies on.
    """
    if place.startswith(_HUB_DATA) or on_the_hub(place):
        return place
    return place.rstrip("/").rpartition("/")[2]


def _base_licence(config: Config) -> str | None:
    """Return the licence in the words of the Hub's metadata.

    None if the base has no card, or its card names no licence.
    """
    card = base_files(config.model) / "README.md"
    try:
        data: Any = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return data.license


def _facts(config: Config, manifest: CheckpointManifest) -> dict[str, Any]:
    of_method = {"method", *method_of(config).settings}
    begun: dict[str, str] = {}
    if "start" in manifest.base:  # a checkpoint is shown as NAME@STEP
        begun["begun from"] = _named(re.sub(r"/checkpoints/step-0*(\d+)$", r"@\1", manifest.base["start"]))
    return {
        "base": _named(config.model.base),
        "run": config.run.name,
        "step": manifest.step,
        "evaluation loss": "not evaluated at this step" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}",
        **begun,
        "method": _in_words(config.tuning.model_dump(mode="json", include=of_method, exclude_none=True)),
        "learning rate": _in_words(config.optim.model_dump(mode="json", include=_OPTIM, exclude_none=True)),
        "optimizer": _in_words(manifest.groups),
        "objective": config.objective.name,
        "quantization": _in_words(config.quant.model_dump(mode="json", exclude={"cache"})),
        "computed in": config.model.dtype,
        **({"rotary positions": _in_words(scaling)} if (scaling := config.model.rope_scaling.given) else {}),
        "data": f"{manifest.dataset} ({', '.join(_named(source.path) for source in config.data.train)})",
        "sequence length": manifest.order.get("sequence_length", config.data.sequence_length),
        "global batch": config.train.global_batch,
        "seed": manifest.order.get("seed", config.run.seed),
        "saved": (
            f"{datetime.fromtimestamp(manifest.created, UTC):%Y-%m-%d %H:%M} UTC on"
            f" {counted(manifest.world_size, 'rank')}"
        ),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }


def _in_words(value: Any) -> str:
    """Return settings in words for a reader: `method: lora, r: 8, targets: q_proj and v_proj`."""
    if isinstance(value, Mapping):
        parts = (f"{name}: {_in_words(item)}" for name, item in value.items())
        return ", ".join(parts)
    if isinstance(value, list):
        return " and ".join(map(_in_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def model_card_evaluation(folder: Store, step: int) -> str:
    """Return the tables of what `capstan evaluate` found for this step, before and after the training."""
    found = read_evaluation(folder, step)
    if not found:
        return "It was not evaluated against its base (`capstan evaluate`)."
    tables = {
        ("data set", "loss of the base", "loss", "perplexity of the base", "perplexity"): list(_rows_of_sets(found)),
        ("task", "metric", "base", "this"): [
            (task, metric, _number(of, "base"), _number(of, "adapter"))
            for task, metrics in found.get("tasks", {}).items()
            for metric, of in metrics.items()
        ],
    }
    return "\n\n".join(_table(head, rows) for head, rows in tables.items() if rows) or "Nothing was measured."


def _rows_of_sets(found: Any) -> Iterator[tuple[str, ...]]:
    for name, of in found.get("sets", {}).items():
        shared = isinstance(of, dict) and of.get("trained_on")
        said = f" ({shared} of {of.get('documents')} documents are in the training data)" if shared else ""
        yield (
            f"{name}{said}",
            *(_number(of, side, what) for what in ("loss", "perplexity") for side in ("base", "adapter")),
        )


def _number(found: Any, *path: str) -> str:
    """Return the number at `path` in an evaluation. The evaluation may contain anything, whoever wrote it."""
    value = found
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _table(head: Any, rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def cut_sentence(config: Config) -> str | None:
    """Return a sentence if the run has only the first layers of its base; None if it has all."""
    if config.model.layers is None:
        return None
    return (
        f"It was trained over the first {counted(config.model.layers, 'layer')} of its base alone (model.layers), and"
        " is of no use over the whole base."
    )


def _limitations(config: Config) -> str:
    cut = f" {sentence}" if (sentence := cut_sentence(config)) else ""
    over = f" It was trained over that base {config.quant.held.in_words}." if config.quant.held.packs else ""
    return (
        "It was trained on the data named above, and what is not under Evaluation was not measured: neither safety,"
        " nor bias, nor other languages and tasks than those of the data. It keeps the limits and the licence of its"
        f" base, {_named(config.model.base)}.{over}{cut}"
    )
