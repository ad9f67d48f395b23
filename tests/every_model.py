"""Tries every type of model that predicts tokens and that transformers builds, language models alone and those that see
or hear as well, each in a process of its own: a release script.

    python -m tests.every_model TABLE [TYPE ...]      writes one JSON line a type to TABLE; those of this commit there are kept
    python -m tests.every_model TABLE --shapes        does the same for some types in shapes that real bases have
    python -m tests.every_model --record TABLE        writes what became of each type to tests/every_model.json, for docs/models.md
    python -m tests.every_model --images TABLE [...]  shows the types that take pictures rows with some (tests/every_seeing.py)
    python -m tests.every_model --videos TABLE [...]  shows the types that take videos rows with some (tests/every_watching.py)
    python -m tests.every_model --sounds TABLE [...]  has the types that take sounds hear some (tests/every_hearing.py)

A tiny base of the type is written as transformers writes it, trained over, exported and merged by the product, and the
same is done by plain transformers and PEFT, in the class that the base's `architectures` name: over weights that the decoder of tests/nf4.py makes, in fp32, each document
alone. The reference shares no code with the product but the list of weights that are packed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from tests.dist.launch import RankFailed, launch
from tests.experts import multiply_expert_by_expert
from tests.material import byte_tokenizer, commit, make_data, make_policy
from tests.nf4 import dequantized
from trainer.base.describe.trial.small import small_settings
from trainer.config import parse_config
from trainer.errors import ConfigError

RECORD = Path(__file__).with_suffix(".json")
PROVEN, UNPACKED, REFUSED, NOT_BUILT = "proven", "proven, unpacked", "refused", "not built"
SECONDS = 240
DOCUMENTS = (5, 23, 36)
"""Tokens of the documents of the row: one is longer than the windows of the tiny bases."""
WITHIN = 1e-5
"""How far the loss, the norm of its gradient and the logits may be off, as a share of themselves."""
# Sizes without which a class of settings that is made without any cannot build a model.
_LACKING: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        for kind in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text")
    },
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_compress_ratio": 2}
    | {"indexer_head_dim": 16, "indexer_budget": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    **{
        kind: {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            | {"mrope_section": [1, 1, 2]}
        }
        for kind in ("glm4v_moe_text", "glm4v_text", "glm46v_text", "glm_ocr_text", "glmga_text")
    },
    "step3p5": {"sliding_window": 16},
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "opt": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},  # as OPT-350M
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
}
_OF_THIS_MACHINE = re.compile("cannot be read|wants a package|has no tensor")
# The modules that whole classes have their language models in.
BY_THE_LAYER = ("layer_types", "mlp_layer_types")
_IN_WHOLE = re.compile("language_model|text_model")
# Settings of the whole class, without which there is none of the type.
_WHOLE: dict[str, dict[str, Any]] = {
    "muse_glimmer": {"out_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 64},
    "kimi_k25": {"projection_hidden_size": 64},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 250, "<image>": 251, "<|visual token 000000|>": 252}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2}
        | {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2}
    },
}
_NESTED = {"num_key_value_heads": 2, "mlp_dim": 48, "head_dim": 16}  # sizes of a tower inside of a tower
# Settings of towers, where a tower of one layer is none of its class.
_TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "molmo2": {
        "vision_config": {"num_hidden_layers": 4, "num_key_value_heads": 2},
        "adapter_config": {"vision_feature_layer": [3, 1], "num_key_value_heads": 2},
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4}},
    "lfm3_vl": {"vision_config": {"num_key_value_heads": 2}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 64}},
    "musicflamingo": {"audio_config": {"model_type": "audioflamingo3_encoder"}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
}
# Types that transformers lists among models of one text from another.
_HEAR = ("audioflamingo3", "musicflamingo")
_WHEREVER_DECODERS = {"is_decoder": True}
SHAPES: dict[str, dict[str, Any]] = {
    "odd heads": {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
    "a vocabulary of 277": {"vocab_size": 277},
    "a tied head": {"tie_word_embeddings": True},
    "a head of its own": {"tie_word_embeddings": False},
    "no padding": {"pad_token_id": None},
    "one layer": {"num_hidden_layers": 1},
}
"""Shapes that real bases have and that the tiny ones have not. A base in one of them is called TYPE/SHAPE here."""
SHAPED = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt2")


def settings_of(kind: str) -> PretrainedConfig:
    """The settings of a tiny base of the type, whose defaults are those of a large model."""
    kind, _, shape = kind.partition("/")
    whole = CONFIG_MAPPING[kind](**_WHOLE.get(kind, {}))
    text = (
        whole
        if type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(whole, "text_config")
        else whole.get_text_config()
    )
    lacking = _LACKING.get(text.model_type, {})
    made: dict[str, Any] = (
        small_settings(text) | {key: value for key, value in _WHEREVER_DECODERS.items() if hasattr(text, key)} | lacking
    )
    shaped = {key: value for key, value in SHAPES.get(shape, {}).items() if hasattr(text, key)}
    if hasattr(text, "qk_rope_head_dim"):  # whose heads of keys are as many as those of queries
        shaped = {key: value for key, value in shaped.items() if key != "head_dim"}  # that of its rotary part
        shaped |= {"num_key_value_heads": shaped["num_attention_heads"]} if "num_attention_heads" in shaped else {}
    if "num_hidden_layers" in shaped:  # lists by layer have one entry less
        shaped |= {key: value[:1] for key, value in made.items() if key in BY_THE_LAYER and isinstance(value, list)}
    made |= shaped
    kind_of: Any = type(text)
    return kind_of(
        **{key: 0.0 if _is_chance(key) and isinstance(value, float) else value for key, value in made.items()}
    )


def _is_chance(key: str) -> bool:
    """Whether a setting says how much a model leaves to chance as it trains: the reference would draw otherwise."""
    return "drop" in key or "jitter" in key


def _whole_settings(kind: str) -> PretrainedConfig:
    """The settings of a tiny model that sees, whose language model is that of `settings_of`."""
    config: Any = CONFIG_MAPPING[kind](**_WHOLE.get(kind, {}))
    text = config.get_text_config()
    parts = {key: value for key, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    sizes = {
        "depth": 1,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "num_heads": 2,
        "attention_heads": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "embed_dim": 32, "out_hidden_size": 64}
    towers: dict[str, dict[str, Any]] = {
        key: {name: size for name, size in sizes.items() if hasattr(part, name)}
        for key, part in parts.items()
        if part is not text
    }
    for key, nested in ((key, vars(part)) for key, part in parts.items() if part is not text):
        inner = {name: part for name, part in nested.items() if isinstance(part, PretrainedConfig)}
        towers[key] |= {
            name: {size: value for size, value in {**sizes, **_NESTED}.items() if hasattr(part, size)}
            for name, part in inner.items()
        }
    for key, settings in _TOWERS.get(kind, {}).items():
        towers[key] = {**towers[key], **settings}
    (own,) = (key for key, part in parts.items() if part is text)
    return type(config)(**{**_WHOLE.get(kind, {}), own: settings_of(kind).to_dict()}, **towers)


def _is_whole(kind: str) -> bool:
    """Whether people load the type by a class that sees or hears beside its language model."""
    if "/" in kind:
        return False
    config = CONFIG_MAPPING[kind](**_WHOLE.get(kind, {}))
    known = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or kind in _HEAR
    return known and config.get_text_config() is not config


def every_kind() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *_HEAR})


def write_base(kind: str, folder: Path) -> None:
    """A random base of the type in bf16, no two of whose values are alike by chance."""
    torch.manual_seed(11)
    if not _is_whole(kind):
        model: Any = AutoModelForCausalLM.from_config(settings_of(kind), dtype=torch.float32)
    else:
        made_by = AutoModelForSeq2SeqLM if kind in _HEAR else AutoModelForMultimodalLM
        model = made_by.from_config(_whole_settings(kind), dtype=torch.float32)
    strict = model._keep_in_fp32_modules_strict or ()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if not value.is_floating_point():
                continue
            if value.ndim == 1 or value.min() == value.max():
                value.add_(0.1 * torch.randn_like(value))
            elif value.std() < 0.05:
                value.mul_(0.08 / value.std())
            if not any(part in name for part in strict):
                value.data = value.data.bfloat16()
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if kind.endswith("/no padding"):
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def row() -> tuple[Tensor, list[Tensor]]:
    """(1, T) int64, and its documents (1, n) each."""
    tokens = torch.arange(sum(DOCUMENTS)).mul(37).remainder(251).add(3)[None]
    return tokens, list(tokens.split(list(DOCUMENTS), dim=1))


def tried(kind: str, folder: str) -> dict[str, Any]:
    """What becomes of one type; a mistake of ours is a traceback."""
    torch.set_num_threads(1)
    base, here = Path(folder) / "base", Path(folder)
    try:
        write_base(kind, base)
    except Exception as error:
        return _by_config_alone(kind, base) or {
            "status": NOT_BUILT,
            "reason": f"{type(error).__name__}: {str(error)[:300]}",
        }
    try:
        return _proven(kind, base, here)
    except ConfigError as refused:
        return {"status": REFUSED, "reason": str(refused)}
    except Exception as error:
        return {
            "status": "crashed",
            "reason": f"{type(error).__name__}: {str(error)[:300]}",
            "trace": traceback.format_exc()[-2500:],
        }


def _by_config_alone(kind: str, base: Path) -> dict[str, Any] | None:
    """The refusal of a type by the config.json that transformers writes for it; None where that is none."""
    from trainer.base.find.locate import describe_base
    from trainer.config import Model

    CONFIG_MAPPING[kind.partition("/")[0]]().save_pretrained(base)
    try:
        describe_base(Model(base=str(base)))
    except ConfigError as refused:
        return {"status": REFUSED, "reason": str(refused)}
    return None


def _proven(kind: str, base: Path, folder: Path) -> dict[str, Any]:
    from tests.dist.assembled import assemble_run
    from trainer.export.write.adapter import export_adapter
    from trainer.export.write.merged import export_merged
    from trainer.plan.resolve import resolve
    from trainer.state.checkpoint.checkpoints import load_partitions
    from trainer.state.checkpoint.manifest import read_manifest
    from trainer.state.optimizer import MASTER
    from trainer.store.store import open_store

    make_data(folder / "train.jsonl")
    tree = {
        "run": {"name": "run", "store": str(folder / "store"), "seed": 3},
        "model": {"base": str(base), "dtype": "fp32"},
        "tuning": {"rank": 4, "alpha": 16},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 64,
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch": 1},
        "sharding": {"deepspeed": str(make_policy(folder / "policy.json"))},
    }
    config = parse_config(json.dumps(tree))
    ways_out = {"data.packing": "false", "train.activation_checkpointing": "none"}
    try:
        resolve(config)
    except ConfigError as refused:
        named = [f"{key}={value}" for key, value in ways_out.items() if key in str(refused)]
        if not named:
            raise
        config = parse_config(json.dumps(tree), named)
        resolve(config)
    packing = config.data.packing
    run = open_store(config.run.store).sub("run")
    commit(run, config)
    ours = assemble_run(config)
    partitions = ours.engine.partitions()
    load_partitions(run, read_manifest(run, 4), partitions, states=(MASTER,))
    ours.engine.refresh(0)
    logits = ours.engine.logits(row()[1][1])
    total, norm = 0.0, 0.0
    for batch in _batches(packing):
        loss = ours.engine.loss(batch)
        total += float(loss)
        ours.engine.backward(loss, last=batch.documents == (0,))
    norm = ours.engine.step(0.0)
    export_adapter(run, open_store(str(folder / "adapter")))
    export_merged(run, open_store(str(folder / "merged")))
    architecture = ours.resolved.base.architecture
    packed = set(architecture.quantizable())
    adapted = {
        name.removesuffix(".lora_A.default.weight")
        for name, _ in ours.engine.model.named_parameters()
        if "lora_A" in name
    }
    found = _reference(base, folder / "adapter", packed)
    merged = _merge_differs(base, folder)
    off = {
        "loss": abs(total - found["loss"]) / abs(found["loss"]),
        "grad_norm": abs(norm - found["grad_norm"]) / found["grad_norm"],
        "logits": float((logits - found["logits"]).abs().max() / found["logits"].abs().max()),
        "effect": float((found["logits"] - found["without"]).abs().max() / found["logits"].abs().max()),
    }
    within = {"loss": WITHIN, "logits": WITHIN, "grad_norm": WITHIN}
    if off["grad_norm"] > WITHIN:
        # Where fp32 itself is not so near to fp64 in plain transformers, it cannot be asked of us.
        with suppress(RuntimeError):  # a family whose code computes parts in fp32 has no gradient in fp64
            exact = _reference(base, folder / "adapter", packed, torch.float64)["grad_norm"]
            within["grad_norm"] = off["rounding"] = abs(found["grad_norm"] - exact) / exact
            off["from_fp64"] = abs(norm - exact) / exact
    good = all(off[key] <= most for key, most in within.items()) and off["effect"] > 1e-3 and not merged
    status = (PROVEN if packing else UNPACKED) if good else "wrong"
    layers = sum(part.numel for part in architecture.parameters if part.layer is not None)
    share = sum(part.numel for part in architecture.parameters if part.name in packed) / max(1, layers)
    whole = sorted(f"{name} ({why})" for name, why in architecture.whole())
    return {
        "status": status,
        **off,
        "merged_differs": merged[:3],
        "packed_share": share,
        "adapted": len(adapted),
        "whole": whole,
    }


def _batches(packing: bool) -> Iterator[Any]:
    """The documents as one packed row, or each in one of its own; the last one is that of documents == (0,)."""
    from trainer.model.micro_batch import MicroBatch, ModelInput, Segments

    documents = row()[1]
    parts = [documents] if packing else [[document] for document in documents]
    for left, part in zip(reversed(range(len(parts))), parts, strict=True):
        lengths = [document.shape[1] for document in part]
        labels = torch.cat([nn.functional.pad(document[:, 1:], (0, 1), value=-100) for document in part], dim=1)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].int()
        given = ModelInput.of(torch.cat(part, dim=1).int(), positions, Segments.of_documents(lengths))
        yield MicroBatch(given, labels.int(), sum(lengths), sum(lengths) - len(lengths), documents=(left,))


def _plain(base: Path) -> Any:
    """The base as people load it: by the class in its config.json. In transformers 5.24 Llama 4's asks the output of its
    language model for a field that it has not, and predicts nothing."""
    MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]
    multiply_expert_by_expert()
    name = (AutoConfig.from_pretrained(base).architectures or [""])[0]
    return getattr(transformers, name).from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def _in_whole(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight that the language model calls `name`, among those of the class that people load."""
    if name in parameters:
        return parameters[name]
    (found,) = (other for other in parameters if other.endswith(name.partition(".")[2]) and _IN_WHOLE.search(other))
    return parameters[found]


def _reference(base: Path, adapter: Path, packed: set[str], computed: torch.dtype = torch.float32) -> dict[str, Any]:
    from peft import PeftModel

    plain = _plain(base)
    parameters, modules = dict(plain.named_parameters()), dict(plain.named_modules())
    with torch.no_grad():
        for name in packed:
            value, path = _in_whole(parameters, name), name.removesuffix(".weight")
            if value.ndim == 2 and isinstance(modules.get(path), Conv1D):
                value.data = dequantized(value.data.t().contiguous()).t().contiguous()
                continue
            matrices = value.data if value.ndim == 3 else value.data[None]
            value.data = torch.stack([dequantized(matrix.contiguous()) for matrix in matrices]).view_as(value)
    model: Any = PeftModel.from_pretrained(plain, str(adapter), is_trainable=True, autocast_adapter_dtype=False)
    model.to(computed).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    total: Any = 0.0
    for document in row()[1]:
        try:
            logits = model(input_ids=document, use_cache=False).logits.to(computed)
        except ValueError as error:
            if "when training" not in str(error):
                raise
            model.eval()  # a class that asks for the kinds of tokens as it trains, which text alone has no need of
            logits = model(input_ids=document, use_cache=False).logits.to(computed)
        total = total + nn.functional.cross_entropy(logits[0, :-1], document[0, 1:], reduction="sum")
    total.backward()
    learning = [value.grad for value in model.parameters() if value.grad is not None]
    norm = torch.stack([grad.double().norm() for grad in learning]).norm()
    model.eval()
    with torch.no_grad():
        document = row()[1][1]
        found = model(input_ids=document, use_cache=False).logits.float()
        with model.disable_adapter():
            without = model(input_ids=document, use_cache=False).logits.float()
    return {"loss": float(total), "grad_norm": float(norm), "logits": found, "without": without}


def _merge_differs(base: Path, folder: Path) -> list[str]:
    """The weights of the merged model that are not PEFT's own merge, rounded to the type they are stored in."""
    from peft import PeftModel
    from safetensors.torch import load_file

    def stored(place: Path) -> dict[str, Tensor]:
        return {name: value for file in sorted(place.glob("*.safetensors")) for name, value in load_file(file).items()}

    plain = _plain(base)
    first = {name: value.clone() for name, value in plain.state_dict().items()}
    expected = PeftModel.from_pretrained(plain, str(folder / "adapter")).merge_and_unload().state_dict()
    found = _plain(folder / "merged").state_dict()
    before, after = stored(base), stored(folder / "merged")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    # An adapted weight is rounded to the 16 bits that it is stored in; any other is as it was, in whatever type.
    rounded = {
        name: value if torch.equal(value, first[name]) else value.bfloat16().float() for name, value in expected.items()
    }
    wrong = [name for name, value in found.items() if not torch.equal(value, rounded[name])]
    return [*wrong, *([] if changed else ["nothing has changed"])]


def main(table: Path, kinds: list[str], look: Callable[..., Any] = tried, seconds: float = SECONDS) -> None:
    commit = _commit()
    rows = map(json.loads, table.read_text().splitlines() if table.exists() else [])
    done = {found["kind"] for found in rows if found.get("commit") == commit}
    for kind in kinds:
        if kind in done:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="capstan-model-") as folder:
            try:
                (found,) = launch(1, look, kind, folder, timeout=seconds)
            except RankFailed as failed:
                found = {"status": "crashed", "reason": "the process ended", "trace": str(failed)[-2500:]}
        found = {"kind": kind, **found, "seconds": round(time.monotonic() - started, 1), "commit": commit}
        with table.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print({key: value for key, value in found.items() if key != "trace"}, flush=True)


def record_files(table: Path, section: str) -> None:
    """Write the types that take pictures, videos or sounds, as a table has them, to their section of `RECORD`. Others
    stay as they are there."""
    rows: dict[str, Any] = {found["kind"]: found for found in map(json.loads, table.read_text().splitlines())}
    known = (PROVEN, UNPACKED, REFUSED, NOT_BUILT)
    if open_ones := [kind for kind, found in rows.items() if found["status"] not in known]:
        sys.exit(f"{table}: is open for {open_ones}")
    kept = json.loads(RECORD.read_text())
    found = _section(rows)
    known = _added(kept[section], found) if section in kept else found
    RECORD.write_text(json.dumps({**kept, section: known}, indent=1) + "\n")


def record(table: Path) -> None:
    """Write the types of a table to `RECORD`: language models, of which it must have all, and the whole classes that
    see or hear as well."""
    rows: dict[str, Any] = {found["kind"]: found for found in map(json.loads, table.read_text().splitlines())}
    kept, whole = json.loads(RECORD.read_text()), {kind for kind in rows if _is_whole(kind)}
    open_ones = [kind for kind, found in rows.items() if found["status"] not in (PROVEN, UNPACKED, REFUSED, NOT_BUILT)]
    of_types = {kind for kind in rows if "/" not in kind} - whole
    missing = {kind for kind in every_kind() if not _is_whole(kind)} - of_types if of_types else set[str]()
    if missing or open_ones:
        sys.exit(f"{table}: lacks {sorted(missing)}, and is open for {open_ones}")
    shaped = {kind: found for kind, found in rows.items() if "/" in kind}
    if alone := {kind: found for kind, found in rows.items() if kind not in whole | shaped.keys()}:
        kept = {**kept, **_section(alone)}
    if whole:
        kept["whole"] = _added(kept["whole"], _section({kind: rows[kind] for kind in whole}))
    if shaped:
        kept["shapes"] = _section(shaped)
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def _added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A section of the record with types that were tried later, each of which replaces what was known of it."""
    new = {*found["trained"], *found["refused"], *found["not_built"]}
    kept = {key: {kind: was for kind, was in before[key].items() if kind not in new} for key in ("trained", "refused")}
    return {
        "transformers": found["transformers"],
        "commit": ", ".join(sorted({*before["commit"].split(", "), *found["commit"].split(", ")})),
        **{key: dict(sorted({**kept[key], **found[key]}.items())) for key in kept},
        "not_built": sorted({*(kind for kind in before["not_built"] if kind not in new), *found["not_built"]}),
    }


def _section(rows: Mapping[str, Any]) -> dict[str, Any]:
    """A refusal for settings that transformers itself cannot build, or for a package of this machine, tells nothing of
    a type."""
    here = [kind for kind, found in rows.items() if _OF_THIS_MACHINE.search(found.get("reason", ""))]
    ordered = sorted((kind, {**found, "status": NOT_BUILT} if kind in here else found) for kind, found in rows.items())
    return {
        "transformers": transformers.__version__,
        "commit": ", ".join(sorted({found["commit"] for found in rows.values()})),
        "trained": {kind: found["status"] for kind, found in ordered if found["status"] in (PROVEN, UNPACKED)},
        "refused": {kind: _clause(found["reason"]) for kind, found in ordered if found["status"] == REFUSED},
        "not_built": [kind for kind, found in ordered if found["status"] == NOT_BUILT],
    }


def _clause(reason: str) -> str:
    """A refusal without the place and the type of the base that was tried."""
    reason = re.sub(r" (with|of) /\S*", r" \1 it", reason.replace("\n", " "))
    said = re.sub(r"^model\.base: /\S* is an? \S+ model, ", "It is ", reason)
    return re.sub(r"^model\.base: /\S* ", "It ", said).replace("It is which", "It").replace("It is whose", "Its")


def _commit() -> str:
    """The commit of the working tree, marked where it was changed."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    arguments = sys.argv[1:]
    shown = next((name for name in ("images", "videos", "sounds") if f"--{name}" in arguments), "")
    is_recorded, is_shaped = "--record" in arguments, "--shapes" in arguments
    given, *named = [word for word in arguments if not word.startswith("--")]
    if is_recorded:
        if shown:
            record_files(Path(given), shown)
        else:
            record(Path(given))
    elif shown == "videos":
        from tests import every_watching

        main(Path(given), named or every_watching.every_kind(), every_watching.tried, every_watching.SECONDS)
    elif shown == "images":
        from tests import every_seeing

        main(Path(given), named or every_seeing.every_kind(), every_seeing.tried, every_seeing.SECONDS)
    elif shown == "sounds":
        from tests import every_hearing

        main(Path(given), named or every_hearing.every_kind(), every_hearing.tried, every_hearing.SECONDS)
    else:
        shapes = [f"{kind}/{shape}" for shape in SHAPES for kind in SHAPED]
        main(Path(given), shapes if is_shaped else named or every_kind())
