"""Servers of models: requests to a vLLM server through its OpenAI-compatible API, and which servers take an adapter.

The standard library alone makes the requests. A request asks for the log-probabilities of given tokens, and of some
tokens that the server draws.

By their documented rules, these servers take an exported adapter beside its base:

vLLM: vllm/config/lora.py (`MaxLoRARanks`) gives the ranks. vllm/lora/peft_helper.py covers DoRA, modules_to_save, and
ranks and alphas by module, which it reads as PEFT does. docs.vllm.ai, features/lora, covers experts: each matrix has a
name of its own (`layout=vllm`), unless the server takes both layouts or the base's files hold stacks.

SGLang: python/sglang/srt/lora/lora_config.py and lora_manager.py (`validate_new_adapter`) ask for one rank and one
alpha, no DoRA, and no tokens that the base lacks. docs.sglang.ai, advanced_features/lora, lists the modules.

Both servers read only LoRA, including rsLoRA's scaling, and nothing beside its two matrices.
"""

import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple, TypeVar

from trainer.config import Config
from trainer.config.objective import HEADS
from trainer.errors import NOT_JSON, CapstanError, ConfigError, shown

T = TypeVar("T")

_SECONDS = 600.0  # for one answer: a server may compile its kernels for the first
_HEALTH_SECONDS = 5.0
_PAUSES = (2.0, 10.0, 30.0)  # in seconds, between the attempts of a request: a server may be restarting
_LONGEST_REASON = 300
_ROUNDING = 1e-3  # nats above 0 that a certain token may have
_LONGEST_ANSWER = 2**30  # bytes; log-probabilities of the likeliest tokens of a long document take some MB


_CHAT = "/v1/chat/completions"
_ONE_BY_ONE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ PLACES[part['type']] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""A chat template that adds nothing to the parts of a message."""
_TAKES_NO_FILES = re.compile(r"[^\s\"]+ is not a multimodal model|At most \d+ \w+\(s\) may be provided[^.\"]*")


# An option of vLLM -> what a request with files brings, and the server takes with this option alone.
_TRUST = {
    "--trust-request-chat-template": "a template",
    "--trust-request-mm-kwargs": "the rate of a video's frames",
}


class Answer(NamedTuple):
    """The log p of each prompt token but the first, in nats. `drawn` tokens follow the prompt, with their log p."""

    log_p: list[float]
    drawn: list[int]
    drawn_log_p: list[float]


class Pictured(NamedTuple):
    """A prompt of `tokens`, of which those in `spans` stand for pictures, or files of other modalities.

    `parts` has its texts and its files as OpenAI's parts of content. By the type of a part, `places` has the text that
    stands for a file before the processor makes more of it. `beside` are more fields of a request with these parts."""

    tokens: list[int]
    spans: list[range]
    parts: list[dict[str, Any]]
    places: Mapping[str, str]
    beside: Mapping[str, Any]


class NotServed(CapstanError):
    """The server knows no such model, or no such request."""


class Refused(CapstanError):
    """The server does not accept a request, such as a prompt that is too long for it."""


@dataclass(frozen=True)
class CompletionsServer:
    """The `model` at `url`, such as http://127.0.0.1:8000. `setting` is the setting that named the URL."""

    setting: str
    url: str
    model: str

    @classmethod
    def find(cls, setting: str, given: str, name: str = "") -> "CompletionsServer":
        """Find the server at the URL that `setting` gives.

        Its model is the one that is named after a # in the URL, else the one called `name`, else its only one.

        Raises:
            ConfigError: nothing answers there, or it serves none of these.
            CapstanError: it answers with an error.
        """
        url, _, wanted = given.partition("#")
        url = _root(url)
        if "@" in url or "?" in url:
            raise ConfigError(
                f"{setting}: the URL holds a password or a query, which would be printed and kept. Give it without."
            )
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{setting}: {shown(given)} is no URL of a server. Example: http://127.0.0.1:8000.")
        models = list(cls(setting, url, "")._models())
        chosen = wanted or (name if name in models else models[0] if len(models) == 1 else None)
        if chosen is None or chosen not in models:
            what = f"no model called {shown(wanted or name)}"
            raise ConfigError(
                f"{setting}: {url} serves {what}; it has {', '.join(models) or 'none'}. Name one behind a #:"
                f" {url}#{models[0] if models else 'NAME'}."
            )
        return cls(setting, url, chosen)

    @classmethod
    def of_adapters(cls, setting: str, url: str) -> "CompletionsServer":
        """Return the server at the URL for requests that each name a model. This asks the server nothing."""
        return cls(setting, _root(url), "")

    def ask(self, prompt: list[int] | Pictured, draws: int) -> Answer:
        """Return the server's answer to a prompt.

        Raises `CapstanError` if it gives none, or one without log-probabilities.
        """
        wanted = {"prompt_logprobs": 0, "logprobs": 0, "return_token_ids": True}
        drawing = {"max_tokens": draws, "temperature": 1.0, "seed": 0}
        tokens = _tokens(prompt)
        return self._complete(prompt, lambda choices: _answer(choices[0], tokens), **drawing, **wanted)

    def likeliest(self, tokens: list[int], top: int) -> list[dict[int, float]]:
        """Return the server's `top` likeliest tokens at the place of each of these tokens but the first.

        They are token numbers, the likeliest first. Raises as `ask`.
        """
        return self._complete(
            tokens, lambda choices: _places(choices[0], tokens, top), max_tokens=1, prompt_logprobs=top
        )

    def ranked(self, prompt: list[int] | Pictured) -> list[tuple[float, bool]]:
        """Return the log p of each of the tokens but the first, and whether it is the likeliest there.

        Raises as `ask`.
        """
        tokens = _tokens(prompt)
        return self._complete(prompt, lambda choices: _ranked(choices[0], tokens), max_tokens=1, prompt_logprobs=1)

    def card(self) -> dict[str, Any]:
        """Return what the server says of the model.

        For an adapter `parent` is the name of its base. Raises as `ask`.
        """
        return self._models().get(self.model, {})

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of `text` by the server's tokenizer. Raises as `ask`."""
        asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self._read("/tokenize", asked, lambda found: list(found["tokens"]))

    def has(self, model: str) -> bool:
        """Return whether the server knows a model of this name, or finds one. Raises as `ask`.

        trainer/evaluate/rollout/published.py finds models by name.
        """
        try:
            replace(self, model=model).tokens_of("a")
        except NotServed:
            return False
        return True

    def load(self, name: str, folder: str) -> None:
        """Have the server load the adapter in the folder, which it sees, under this name. Raises as `ask`."""
        self._read("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, None)

    def unload(self, name: str) -> None:
        """Have the server drop the adapter. Raises as `ask`."""
        self._read("/v1/unload_lora_adapter", {"lora_name": name}, None)

    def sample(self, model: str, tokens: list[int], **sampling: Any) -> list[tuple[list[int], list[float]]]:
        """Return answers of the model with this name to a prompt of these tokens. Raises as `ask`.

        An answer has its tokens, and the log p of each token before the temperature.
        """
        wanted = {"logprobs": 0, "return_token_ids": True, **sampling}
        return self._complete(tokens, lambda choices: [_drawn(choice) for choice in choices], model, **wanted)

    def written(self, model: str, prompt: list[int] | Pictured, **sampling: Any) -> Iterator[list[int]]:
        """Yield the tokens of an answer to a prompt, some at a time, as the server draws them.

        A server that does not stream tells them all at the end. Raises as `ask`.
        """
        path, asked = self._request(prompt, model, n=1, stream=True, return_token_ids=True, **sampling)
        with self._asked(path, asked) as answer:
            if answer.headers.get_content_type() == "text/event-stream":
                lines = iter(partial(answer.readline, _LONGEST_ANSWER), b"")
                events = (line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:"))
                parts = (event for event in events if event != b"[DONE]")
            else:
                parts = iter([answer.read(_LONGEST_ANSWER)])
            if isinstance(prompt, Pictured):  # the first part has the tokens of the prompt, and may have no other
                yield self._found(path, next(parts, b""), partial(self._first_part, prompt))
            for part in parts:
                yield self._found(path, part, lambda found: _token_ids(found["choices"][0]))

    def _models(self) -> dict[str, Any]:
        """Return what the server says of each of its models, by their names."""
        return self._read("/v1/models", None, lambda found: {one["id"]: one for one in found["data"]})

    def _complete(self, prompt: list[int] | Pictured, read: Any, model: str = "", **options: Any) -> Any:
        """Return what `read` finds in the choices of the server's answer to a prompt.

        If another `model` is named, that one answers.
        """
        path, asked = self._request(prompt, model or self.model, **options)
        if not isinstance(prompt, Pictured):
            return self._read(path, asked, lambda found: read(found["choices"]))
        return self._read(path, asked, lambda found: read(self._as_completions(found, prompt)))

    def _request(self, prompt: list[int] | Pictured, model: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request to the model.

        A list of tokens carries no picture, so a prompt with pictures is a message. The request brings the template, by
        which the server puts the parts one after the other.
        """
        asked: dict[str, Any] = {"model": model, **options}
        if not isinstance(prompt, Pictured):
            return "/v1/completions", {**asked, "prompt": prompt}
        asked |= {"messages": [{"role": "user", "content": prompt.parts}], "add_generation_prompt": False}
        template = _ONE_BY_ONE.replace("PLACES", json.dumps(dict(prompt.places)))
        asked |= {"chat_template": template, "return_token_ids": True, **prompt.beside}
        return _CHAT, asked | ({"logprobs": True} if "logprobs" in options else {})

    def _check_tokens(self, found: Any, prompt: Pictured) -> None:
        if found["prompt_token_ids"] != prompt.tokens:
            raise CapstanError(
                f"{self.setting}: {self.url} makes other tokens of a text with files"
                f" ({len(found['prompt_token_ids'])}) than the run ({len(prompt.tokens)}). Start it with the base of"
                " the run, its tokenizer and its processor."
            )

    def _first_part(self, prompt: Pictured, found: Any) -> list[int]:
        self._check_tokens(found, prompt)
        (choice,) = found["choices"]
        return _token_ids(choice) if "token_ids" in choice else []

    def _as_completions(self, found: Any, prompt: Pictured) -> list[dict[str, Any]]:
        """The choices of a chat in the form of those of completions."""
        self._check_tokens(found, prompt)
        choices = list[dict[str, Any]]()
        for choice in found["choices"]:
            drawn = [one["logprob"] for one in (choice["logprobs"] or {}).get("content", [])]
            of_tokens = {"token_ids": choice["token_ids"], "logprobs": {"token_logprobs": drawn}}
            choices.append({**of_tokens, "prompt_logprobs": found["prompt_logprobs"]})
        return choices

    def _read(self, path: str, body: Any, read: Any) -> Any:
        """Return what `read` finds in the JSON of an answer. Without `read` the answer is plain text."""
        with self._asked(path, body) as answer:
            text = answer.read(_LONGEST_ANSWER)
        return read and self._found(path, text, read)

    @contextmanager
    def _asked(self, path: str, body: Any) -> Iterator[HTTPResponse]:
        """The server's answer to a request. A failure in the block, which reads it, is one of the server's."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:_LONGEST_REASON].strip()
            if path == _CHAT and (option := next((one for one in _TRUST if one in reason), None)):
                raise ConfigError(
                    f"{self.setting}: {self.url} does not take {_TRUST[option]} with a request, and this text needs it."
                    f" Start vLLM with {option}."
                ) from error
            if path == _CHAT and (found := _TAKES_NO_FILES.search(reason)):
                raise ConfigError(
                    f"{self.setting}: the model at {self.url} takes no such files as a text has, or fewer"
                    f" ({found[0]}). Start vLLM with the run's base and its processor, and with a --limit-mm-per-prompt"
                    " of at least the files of a text."
                ) from error
            # A request to load an adapter also gets 400, for instance if it is loaded already. That does not refuse a
            # prompt.
            refused = error.code == 400 and path in ("/v1/completions", _CHAT)
            kind = NotServed if error.code == 404 else Refused if refused else CapstanError
            raise kind(
                f"{self.setting}: {self.url} answered {error.code} to {path}: {reason or 'no reason'}. Its log says"
                " more."
            ) from error
        except (OSError, HTTPException) as error:
            raise ConfigError(
                f"{self.setting}: {self.url} does not answer ({getattr(error, 'reason', error)}). Start the server, or"
                " give the URL of one that runs."
            ) from error

    def _found(self, path: str, text: bytes, read: Any) -> Any:
        """Return what `read` finds in the JSON of an answer."""
        try:
            return read(json.loads(text))
        except (*NOT_JSON, LookupError, TypeError) as error:
            raise CapstanError(
                f"{self.setting}: {self.url} answered {path} without what vLLM gives (models, prompt_logprobs,"
                f" token_ids): {text[:80]!r}. Give a vLLM."
            ) from error


def again(request: Callable[[], T], between: Callable[[], object] = lambda: None) -> T:
    """Return the result of a request to a server that may be restarting.

    The request is tried a few times; `between` runs between the attempts.
    """
    for pause in _PAUSES:
        try:
            return request()
        except Refused:
            raise
        except CapstanError:
            time.sleep(pause)
            with suppress(CapstanError):
                between()
    return request()


def is_healthy(url: str) -> bool:
    """Return whether the server at the URL says that it can answer."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_HEALTH_SECONDS) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False


def refuse_head(config: Config) -> None:
    """Raise `ConfigError` for a run whose head predicts no next tokens: a server is asked for these alone."""
    if config.objective.name in HEADS:
        raise ConfigError(
            f"--server: objective.name: {config.objective.name} has a head that gives no next tokens. Leave --server"
            " out."
        )


def refuse_reader_of_prompts(reads_prompts: bool) -> None:
    """Raise `ConfigError` for a base that reads prompts in both directions: it would read the answer so, too."""
    if reads_prompts:
        raise ConfigError(
            "--server: this base reads everything before an answer in both directions, and a request to a server"
            " cannot say where the answer begins. Leave --server out."
        )


def _tokens(prompt: list[int] | Pictured) -> list[int]:
    return prompt.tokens if isinstance(prompt, Pictured) else prompt


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _places(choice: Any, tokens: list[int], top: int) -> list[dict[int, float]]:
    places = choice["prompt_logprobs"][1:]
    found = list[dict[int, float]]()
    for place, _ in zip(places, tokens[1:], strict=True):
        # The token at that place is among them, even if it is not one of the likeliest.
        ranked = sorted(place.items(), key=lambda item: -item[1]["logprob"])[:top]
        found.append({int(token): _log_p(given["logprob"]) for token, given in ranked})
    return found


def _ranked(choice: Any, tokens: list[int]) -> list[tuple[float, bool]]:
    found = list[tuple[float, bool]]()
    for place, token in zip(choice["prompt_logprobs"][1:], tokens[1:], strict=True):
        log_p = _log_p(place[str(token)]["logprob"])
        found.append((log_p, log_p >= max(given["logprob"] for given in place.values())))
    return found


def _drawn(choice: Any) -> tuple[list[int], list[float]]:
    drawn, values = _token_ids(choice), choice["logprobs"]["token_logprobs"]
    if not drawn or len(drawn) != len(values):
        raise ValueError("no tokens were drawn, or not each has a log-probability")
    return drawn, [_log_p(value) for value in values]


def _token_ids(choice: Any) -> list[int]:
    drawn = choice["token_ids"]
    if type(drawn) is not list or not all(type(token) is int and token >= 0 for token in drawn):
        raise ValueError("these are no numbers of tokens")
    return drawn


def _answer(choice: Any, tokens: list[int]) -> Answer:
    return Answer([log_p for log_p, _ in _ranked(choice, tokens)], *_drawn(choice))


def _log_p(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found) or found > _ROUNDING:
        raise ValueError(f"{found} is no log-probability")  # a server may be set to return logits instead
    return found


VLLM, SGLANG = "vLLM", "SGLang"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_USUAL_RANK = 16
_MATRIX = re.compile(r"\.lora_[AB]\.weight$")
_STACK = re.compile(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$")
_AS_ONE_MATRIX = (  # `packed_modules_mapping` of vLLM's models
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def computed_with(weight: str) -> list[str]:
    """Return the weights of the linear layers that vLLM and SGLang compute as one matrix with this one, without it."""
    path, _, leaf = weight.removesuffix(".weight").rpartition(".")
    others = next((together for together in _AS_ONE_MATRIX if leaf in together), ())
    return [f"{path}.{other}.weight" for other in others if other != leaf]


def adapter_refusals(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the reasons, each a clause, for which each server refuses this adapter.

    The adapter is given by its `settings` (adapter_config.json) and its tensors. A server that takes it has no reasons.
    """
    tensors = list(names)
    both = list(_of_both(settings, tensors))
    return {VLLM: [*both, *_of_vllm(settings, tensors)], SGLANG: [*both, *_of_sglang(settings, tensors)]}


def _of_both(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    if settings.get("peft_type") != "LORA":
        yield f"it loads LoRA adapters, and this is {settings.get('peft_type', 'none of PEFT')}"
        return
    if settings.get("use_dora"):
        yield "it has no DoRA"
    if saved := settings.get("modules_to_save"):
        yield f"it takes no whole modules (modules_to_save: {', '.join(saved)})"
    if settings.get("trainable_token_indices"):
        yield "it takes no rows of new tokens (trainable_token_indices)"
    if settings.get("bias", "none") != "none":
        yield f"it takes no biases (bias: {settings['bias']})"
    known = "modules_to_save", "trainable_token"
    others = [name for name in names if not _MATRIX.search(name) and not any(part in name for part in known)]
    if others and not settings.get("use_dora"):
        yield f"it reads matrices A and B alone, and there is {others[0]}"


def _of_vllm(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    if (rank := _largest_rank(settings)) > VLLM_RANKS[-1]:
        yield f"its largest rank is {VLLM_RANKS[-1]}, and this has {rank}"
    if any(_STACK.search(name) for name in names):
        yield (
            "it wants each expert's matrices by their own names where the base's files have them so: export with"
            " layout=vllm, or start it with --enable-mixed-moe-lora-format and load the adapter with is_3d_lora_weight"
        )


TOWERS_IGNORED = (
    "vLLM ignores what the tower (encoder and projector) has learnt (vllm#23796) unless it is started with"
    " --enable-tower-connector-lora, so there it is another model."
)


def _largest_rank(settings: Mapping[str, Any]) -> int:
    return max(settings.get("r", 0), *(settings.get("rank_pattern") or {}).values(), 0)


def _of_sglang(settings: Mapping[str, Any], names: list[str]) -> Iterable[str]:
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if any(value != settings.get(usual) for value in (settings.get(field) or {}).values()):
            yield f"it knows one {usual} for all modules ({field})"
    if any(_STACK.search(name) for name in names):
        yield "it wants each expert's matrices by their own names: export with layout=vllm"


def remarks(settings: Mapping[str, Any], found: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each server that would refuse, and one with the option that vLLM needs to take the adapter."""
    lines = [f"{server} would refuse it beside its base: {'; '.join(why)}." for server, why in found.items() if why]
    rank = _largest_rank(settings)
    if not found[VLLM] and rank > _VLLM_USUAL_RANK:
        lines.append(f"vLLM takes it with --max-lora-rank {next(size for size in VLLM_RANKS if size >= rank)}.")
    if any(found.values()) and settings.get("task_type", "CAUSAL_LM") == "CAUSAL_LM":
        lines.append("Every server takes the merged model: --format merged.")
    return lines
