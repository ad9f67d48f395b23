"""Predictions of llama.cpp itself (xllamacpp), in a process of its own: it brings its own threads and its own log.

python -m trainer.export.gguf.predictions QUESTION.json ANSWER.npy
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import CapstanError, ConfigError
from trainer.processes import children

_LLAMA_CPP = "xllamacpp"
_CERTAIN = 1000.0


@dataclass(frozen=True)
class LlamaCppQuestion:
    """A `model` in GGUF, the `adapter` beside it if there is one, and texts as tokens of a `vocabulary`."""

    model: str
    texts: list[list[int]]
    vocabulary: int
    adapter: str | None = None


def next_tokens(question: LlamaCppQuestion, folder: Path) -> NDArray[np.float32]:
    """Return (texts, vocabulary) log-probabilities of the token after each text. `folder` takes two small files.

    Raises:
        ConfigError: llama.cpp is not installed.
        CapstanError: it cannot load the model, or does not return a whole distribution.
    """
    if find_spec(_LLAMA_CPP) is None:
        raise ConfigError("--verify asks llama.cpp itself here. Install it: pip install 'capstan-llm[gguf]'.")
    asked, answer = folder / "question.json", folder / "answer.npy"
    asked.write_text(json.dumps(asdict(question)))
    done = children.run([sys.executable, "-m", __name__, str(asked), str(answer)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise CapstanError(f"llama.cpp could not predict with {question.model}; what it said is above.")
    return np.load(answer)


def _answers(question: LlamaCppQuestion) -> Iterator[list[float]]:
    """Yield the distributions before any sampling, by one server, on the CPU, with keys and values in fp32."""
    llama: Any = import_module(_LLAMA_CPP)
    params: Any = llama.CommonParams()
    params.model.path, params.n_parallel, params.n_gpu_layers = question.model, 1, 0
    params.n_ctx = max(map(len, question.texts)) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    params.warmup = False
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if question.adapter is not None:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(question.adapter, 1.0)]
    server: Any = llama.Server(params)
    # The answer must be a token that is text. An end of text, or a part of a character, would have no probabilities
    # beside it.
    words = [token for token, _ in Counter(token for text in question.texts for token in text).most_common()]
    for text in question.texts:
        yield _distribution(server, text, words, question.vocabulary)


def _distribution(server: Any, text: Sequence[int], words: Sequence[int], vocabulary: int) -> list[float]:
    for word in words:
        asked = {"logit_bias": [[word, _CERTAIN]], "n_predict": 1, "n_probs": vocabulary, "cache_prompt": True}
        answer = server.handle_completions({"prompt": list(text), **asked})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for token in (answer["choices"][0].get("logprobs") or {}).get("content") or []:
            told = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
            if told.keys() >= set(range(vocabulary)):
                return [told[number] for number in range(vocabulary)]
    raise CapstanError(f"llama.cpp tells no probabilities of all {vocabulary:,} tokens.")


def main() -> None:
    asked, answer = sys.argv[1:]
    question = LlamaCppQuestion(**json.loads(Path(asked).read_text()))
    np.save(answer, np.array(list(_answers(question)), dtype=np.float32))


if __name__ == "__main__":
    main()
