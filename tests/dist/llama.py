"""llama.cpp itself (xllamacpp), which loads what was exported for it, in a process of its own."""

import json
from importlib import import_module
from typing import Any

CONTEXT = 128


def log_probabilities(
    model: str, prompts: list[list[int]], vocabulary: int, word: int, adapter: str | None
) -> list[list[float]]:
    """For each prompt of token ids those of every next token, with the adapter if there is one; `word` is any token
    that is a word. Computed on one thread, with keys and values in fp32."""
    xllamacpp: Any = import_module("xllamacpp")

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = model, CONTEXT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server: Any = xllamacpp.Server(params)
    # The probabilities are those before sampling. A sampled end of text, or a byte that is no character, would hide
    # them.
    asked = {"logit_bias": [[word, 1000.0]], "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
    found: list[list[float]] = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, **asked})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        (token,) = answer["choices"][0]["logprobs"]["content"]
        by_id = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
        found.append([by_id[number] for number in range(vocabulary)])
    return found
