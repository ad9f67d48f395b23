"""Tasks of lm-evaluation-harness on the sharded model or on a served one.

They run as they do with the harness's own transformers model (lm_eval/models/huggingface.py).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trainer.config.paths import local_path
from trainer.data.render.chat_template import chat_template
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate import models
from trainer.evaluate.generation import Sampling
from trainer.evaluate.losses import Continued, Likelihood
from trainer.evaluate.measured import TaskScores
from trainer.evaluate.models import OpenText, Words
from trainer.evaluate.subjects import task_specs

_BOOTSTRAPS = 200  # for standard errors of metrics without a formula
_DEFAULT_LENGTH = 2048  # lm-eval's value for a model that names none

Told = Callable[[int, int], None]


class Answering(Protocol):
    """A model that the harness asks: the ranks' own, or a server's."""

    def likelihoods(self, texts: Sequence[Continued], told: models.Told) -> list[Likelihood]: ...

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: models.Told) -> list[list[int]]: ...


class HarnessLM(TemplateLM):
    """The harness's view of a model that takes texts of up to `longest` tokens.

    `told` gets how many requests of a kind are done, and how many there are.
    """

    def __init__(self, model: Answering, words: Words, longest: int | None, told: Told) -> None:
        super().__init__()
        self._model, self._words, self._told = model, words, told
        self.tokenizer: Any = words.tokenizer
        with suppress(ConfigError):  # tasks without a chat need no template
            self.tokenizer.chat_template = chat_template(words.tokenizer, words.data)
        self.max_length = longest or _DEFAULT_LENGTH
        self.max_gen_toks = 256

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self._words.base.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
        texts = list[Continued]()
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            texts.append(Continued(tokens, len(tokens) - len(continuation)))
        found = self._model.likelihoods(texts, lambda done: self._told(done, len(texts)))
        return [(likelihood.log_p, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owner = list[Any](), list[int]()
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (log_p, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_p
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        answers, groups = [""] * len(requests), dict[Sampling, list[tuple[int, list[str], OpenText]]]()
        for number, request in enumerate(requests):
            context, given = request.args
            settings: Any = normalize_gen_kwargs(given, self.max_gen_toks)
            until, most = handle_stop_sequences(settings.get("until"), eos=end), settings["max_gen_toks"]
            if most >= self.max_length:
                raise ConfigError(
                    f"eval.tasks: a task asks for up to {most} tokens, and the base has positions for"
                    f" {self.max_length}. Lower the task's max_gen_toks."
                )
            tokens = self.tok_encode(context)[-(self.max_length - most) :]
            sampling = Sampling(most, settings.get("temperature") or 0.0, settings.get("top_p") or 1.0)
            groups.setdefault(sampling, []).append((number, until, OpenText(tokens, until)))
        for sampling, group in groups.items():
            texts = [text for _, _, text in group]
            written = self._model.continued(
                texts, sampling, lambda done: self._told(min(done, len(requests)), len(requests))
            )
            for (number, until, _), tokens in zip(group, written, strict=True):
                answers[number] = postprocess_generated_text(self._words.prompter.text(tokens), until, None)
        return answers


def run_tasks(
    model: Answering, words: Words, longest: int | None, names: Sequence[str], *, chat: bool, told: Told
) -> TaskScores:
    """Return the scores of the tasks, by the model as it is now.

    `names` are tasks of the harness, YAML files or folders of them. `chat` asks under the chat template.

    Raises:
        ConfigError: a task does not exist, cannot be read, or its data is not here.
        CapstanError: the server raises it.
    """
    evaluate: Any = simple_evaluate
    # For its bootstraps the harness would fork a pool of processes from this one, which has the threads of a process
    # group.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        found = evaluate(
            HarnessLM(model, words, longest, told),
            tasks=task_specs(names),
            task_manager=TaskManager(
                include_defaults=not all(local_path(name, "eval.tasks").exists() for name in names)
            ),
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=chat,
        )
    except CapstanError:
        raise
    except Exception as error:  # tasks are programs by their authors
        raise ConfigError(f"eval.tasks: {', '.join(names)}: {type(error).__name__}: {error}") from error
    return {task: _scores(metrics) for task, metrics in found["results"].items()}


def _scores(metrics: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the harness's `acc,none` and `acc_stderr,none` as `acc`. A filter is named only if there is one."""
    found = dict[str, tuple[float, float | None]]()
    for key, value in metrics.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr") and isinstance(value, int | float):
            error = metrics.get(f"{name}_stderr,{kind}")
            known = error if isinstance(error, int | float) else None
            found[name if kind == "none" else f"{name},{kind}"] = float(value), known
    return found
