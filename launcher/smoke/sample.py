"""The material of a smoke run, made on the spot: chat data, a tokenizer and a small base model. Nothing is downloaded.

The data is the documentation of the running Python's standard library, as questions and answers. The base is an
ordinary Hugging Face directory of the Llama architecture. It is trained for some seconds on the library's source code,
so it knows something and still has something to learn.

This file runs as a process of its own, because it imports torch, and hundreds of stdlib modules:

    python -m launcher.smoke.sample DIR [key=value ...]

It prints the sample as one JSON object, and begins what a run with these settings needs in the store that stdin names.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.smoke.small import config_of_sample, made_once, write_rows
from trainer.base.find.check import check_weights
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.prepare import prepare
from trainer.run.background import say
from trainer.store.store import open_run_store

# Importing these opens a window or a browser, prints, or loads a test suite. distutils is what setuptools makes of it.
# The last four are known by another name: os and os.path.
_SKIPPED_MODULES = {"antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}
_SKIPPED_MODULES |= {"distutils", "posix", "posixpath", "genericpath", "ntpath"}
# A module's public objects say that they come from these, besides the module itself and its C twin `_module`.
_IMPLEMENTED_IN = {"os": ("posix",), "os.path": ("posixpath", "genericpath")}
SHORTEST, LONGEST = 20, 1200  # characters of an answer
_EVAL_SHARE = 32


def pairs() -> list[tuple[str, str]]:
    """Return (question, answer) for every documented public name of the standard library, sorted by name.

    An answer occurs once: a docstring that several names share (by inheritance or re-export) goes to the first of them.
    """
    names = {name for name in sys.stdlib_module_names if not name.startswith("_")} - _SKIPPED_MODULES
    found: dict[str, str] = {}
    # Old modules warn when they are imported or looked at, and some print.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for root in sorted(names | {"os.path"}):
            for module_name, module in _modules(root):
                for name, thing in _public(module_name, module):
                    if docstring := _docstring(thing):
                        found.setdefault(docstring, name)
    return sorted((f"What does {name} do?", docstring) for docstring, name in found.items())


def split(all_pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (train, held out), by a hash of the question: a pair stays on its side when others come or go."""
    train, held_out = [], []
    for pair in all_pairs:
        digest = hashlib.sha256(pair[0].encode()).digest()
        (held_out if digest[0] % _EVAL_SHARE == 0 else train).append(pair)
    return train, held_out


def _modules(name: str) -> Iterator[tuple[str, ModuleType]]:
    """Yield (name, module) of the module and the public ones inside it, as far as this machine can import them."""
    try:
        module = importlib.import_module(name)
    except Exception:
        return  # it belongs to another operating system, or to a library that this Python was built without
    yield name, module
    for folder in getattr(module, "__path__", []):
        for path in sorted(Path(folder).iterdir()):
            inner = path.stem if path.suffix == ".py" else path.name if (path / "__init__.py").exists() else ""
            if inner.isidentifier() and not inner.startswith("_") and inner not in ("test", "tests"):
                yield from _modules(f"{name}.{inner}")


def _public(module_name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, object) of the public functions and classes that the module defines, and of their methods."""
    homes = (module_name, f"_{module_name}", *_IMPLEMENTED_IN.get(module_name, ()))
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        if getattr(thing, "__module__", None) not in homes:
            continue
        yield f"{module_name}.{name}", thing
        if inspect.isclass(thing):
            for member, method in sorted(vars(thing).items()):
                if not member.startswith("_") and (inspect.isroutine(method) or isinstance(method, property)):
                    yield f"{module_name}.{name}.{member}", method


def _docstring(thing: Any) -> str:
    """Return the cleaned docstring, cut at a paragraph when long; empty when there is none worth learning."""
    raw = getattr(thing, "__doc__", None)
    if not isinstance(raw, str):
        return ""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(raw).splitlines()).strip()
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition("\n\n")[0] or text[:LONGEST].rpartition("\n")[0]
    # An address in memory (`<object at 0x7f...>`) differs from process to process.
    return text if len(text) >= SHORTEST and " at 0x" not in text else ""


def source_files() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def source_code(path: Path) -> str:
    """Return a module without its docstrings. A base that has read the code still has to learn to explain it."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


_SHARDS = 4
_LONGEST_CODE = 20_000  # characters of a module

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Sizes:
    """How large the sample is. `batch` is in rows, `sequence_length` in tokens."""

    vocabulary: int = 2048
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    steps: int = 24
    batch: int = 2
    sequence_length: int = 128


@dataclass(frozen=True)
class Material:
    """Where the material lies (absolute paths), and what it is. Losses are in nats a token."""

    base: str
    train: list[str]
    eval: list[str]
    loss_before: float
    loss_after: float
    dtype: str  # to train in on this machine's CPU


def make_sample(
    directory: Path, sizes: Sizes | None = None, report: Callable[[str], None] = lambda line: None
) -> Material:
    """Make what is missing under `directory`. `sample.json` is written last, and says that the sample is complete.

    The same Python and sizes give the same data and tokenizer, and on the same machine the same base.
    """
    sizes = sizes or Sizes()
    directory = directory.absolute()
    made_with = {
        "directory": str(directory),
        "python": sys.version,
        "sizes": asdict(sizes),
        "fields": [field.name for field in fields(Material)],
    }
    return Material(**made_once(directory, made_with, lambda: asdict(_made(directory, sizes, report)), report))


def _made(directory: Path, sizes: Sizes, report: Callable[[str], None]) -> Material:
    train, held_out = split(pairs())
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    train_files = [
        write_rows(data / f"train-{shard:05d}.jsonl", _chat(train[shard::_SHARDS])) for shard in range(_SHARDS)
    ]
    eval_file = write_rows(data / "eval.jsonl", _chat(held_out))
    report(f"data: {len(train):,} + {len(held_out):,} question-answer pairs")
    base = directory / "base"
    report(f"tokenizer: {_make_tokenizer(base, train, sizes.vocabulary):,} tokens")
    parameters, loss_before, loss_after = _make_base(base, sizes)
    report(f"base: {parameters:,} parameters, loss {loss_before:.2f} -> {loss_after:.2f} nats")
    return Material(str(base), train_files, [eval_file], loss_before, loss_after, fast_dtype())


# --- the data


def _chat(rows: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for question, answer in rows:
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# --- the tokenizer


def _make_tokenizer(base: Path, rows: list[tuple[str, str]], vocabulary: int) -> int:
    """Train a sentencepiece BPE model and write it the way Llama's is: `tokenizer.model` and its fast twin.

    Returns the number of tokens, special ones included.
    """
    import sentencepiece

    base.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for row in rows for text in row for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        # The text comes back as it was: no Unicode folding, no lost indentation, no space before the first word.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=LONGEST * 4,
        num_threads=2,
        minloglevel=2,
    )
    (base / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = _fast_tokenizer(model.getvalue())
    tokenizer.save_pretrained(base)
    return len(tokenizer)


def _fast_tokenizer(model: bytes) -> Any:
    """Return the same tokenizer in the `tokenizers` library, which gives offsets into the text."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    proto = ModelProto.FromString(model)
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, pieces)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- the base model


def fast_dtype() -> str:
    """Return fp32 on a CPU without instructions for products in bf16, which then take ten times as long."""
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def _make_base(base: Path, sizes: Sizes) -> tuple[int, float, float]:
    """Train a small Llama on the library's source code and write it in bf16.

    Returns (parameters, mean loss of the first and of the last tenth of the steps).
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    losses = _pretrain(model, _tokens(tokenizer, source_files(), sizes), sizes)

    model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # There are several files and an index, as in every large model.
    model.save_pretrained(base, max_shard_size=f"{max(1, parameters * 2 // 3 // 1000)}KB")
    tenth = max(1, len(losses) // 10)
    return parameters, sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def _tokens(tokenizer: Any, files: list[Path], sizes: Sizes) -> Any:
    """Return (steps, batch, sequence_length + 1) int64: the modules in a seeded order, as much as the steps read."""
    import torch

    needed = sizes.steps * sizes.batch * (sizes.sequence_length + 1)
    stream: list[int] = []
    while len(stream) < needed:
        for index in torch.randperm(len(files)).tolist():
            stream += tokenizer.encode(source_code(files[index])[:_LONGEST_CODE], add_special_tokens=False)
            if len(stream) >= needed:
                break
    return torch.tensor(stream[:needed]).view(sizes.steps, sizes.batch, sizes.sequence_length + 1)


def share_of_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: it rises over a tenth of the steps, and falls over the rest."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _pretrain(model: Any, batches: Any, sizes: Sizes) -> list[float]:
    """Train on `batches`. Returns the loss of each step, in nats a token."""
    import torch

    def loss_of(step: int) -> Any:
        batch = batches[step]
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return descend(model, loss_of, sizes.steps, lr=3e-3, betas=(0.9, 0.95))


def descend(
    model: Any, loss_of: Callable[[int], Any], steps: int, *, lr: float, betas: tuple[float, float]
) -> list[float]:
    """Run AdamW for `steps` steps with a linear warm-up and decay. Returns the loss of each step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
    losses = list[float]()
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def begin_runs(config: Config) -> None:
    """Find out what `plan` asks of the base, and compile what the runs read.

    Both results are stored. Otherwise each of these processes would have to load PyTorch for it, which this one has
    done.
    """
    base = resolve_base(config.model)
    check_weights(base, config.model)
    prepare(config, base, open_run_store(config))


def _main() -> None:
    directory, *overrides = sys.argv[1:]
    # OpenMP's threads spin at barriers by default. On cores that other processes use too, that is 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported libraries print to stdout, which belongs to the sample.
    with contextlib.redirect_stdout(sys.stderr):
        sample = make_sample(Path(directory), report=say)
        begin_runs(config_of_sample(sample.base, sample.train, sample.dtype, overrides, sys.stdin.read()))
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    _main()
