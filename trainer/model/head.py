"""The output head and token-summed cross entropy, which never hold the logits of a whole row.

Where the head is frozen, the gradient with respect to the hidden states is computed chunk by chunk in the forward pass:
no recomputation, and ZeRO-3 gathers the head once a micro-batch instead of once a chunk and pass. Where it learns, tied
to the embedding or not, the backward pass makes the logits of each chunk again and sums the weight's gradient over them
in fp32. Where only the rows of some tokens learn, these are a small matrix of their own beside the frozen head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.model.divergence import Distillation, Divergence, Taught, TopK, likeliest
from trainer.processes.accelerator import is_accelerator

IGNORE = -100
"""The label of a position that predicts nothing (cross entropy's `ignore_index`)."""
_CHUNK_BYTES = 2**28  # of logits, were they in fp32
_CHUNK_ROWS = 512  # a chunk has a multiple of this many targets, as many as kernels of products take at once or twice
# So many bytes of logits are in fp32 at one time. A core's cache holds them, and on a GPU they are worth a kernel's
# launch.
_BLOCK_BYTES, _BLOCK_BYTES_ON_GPU = 2**22, 2**26


class LossTerms(NamedTuple):
    """The terms of a target's loss beside its -log p. Both are computed within the chunks of logits, forward and
    backward.

    label_smoothing: e, the share of the loss that is the mean of -log p over the vocabulary
        (arXiv:1512.00567, section 7).
    z_loss: w, a summand of w * log(Z)^2 with Z the sum of exp over the logits (PaLM, arXiv:2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


_PLAIN = LossTerms()


class Goal(NamedTuple):
    """The inputs of the loss of some targets: their `labels` (targets,) int64, and the `terms` beside -log p or a
    teacher.
    """

    labels: Tensor
    terms: LossTerms = _PLAIN
    distillation: Distillation | None = None

    def part(self, place: slice) -> "Goal":
        distillation = None if self.distillation is None else self.distillation.part(place)
        return Goal(self.labels[place], self.terms, distillation)


class Rows(NamedTuple):
    """Learnt rows of the head: the rows `ids` (N,) int64 of a head with `vocabulary` rows are those of `matrix` (N, H).
    They include all rows that the head's own weight lacks.
    """

    matrix: Tensor
    ids: Tensor
    vocabulary: int


class LossHead(nn.Linear):
    """The output head: logits without labels, the summed loss with them.

    A logit z is `factor` / `divisor` times the product with the weight, as in Cohere's models and Granite. With
    `softcap` c it is then c * tanh(z / c), as in Gemma 2.
    """

    factor = divisor = 1.0
    softcap: float | None = None
    trainable_tokens_delta: nn.Parameter  # PEFT's name
    _ids: Tensor
    _start: Tensor
    _vocabulary: int | None = None

    def learn(self, ids: Tensor, tokens: nn.Parameter, start: Tensor) -> None:
        """Use `tokens` (N, H) as the rows `ids` (N,) int64, or `start` if `active` is off. V is then the larger
        vocabulary.
        """
        self.trainable_tokens_delta, self.active = tokens, True
        self._ids, self._start = nn.Buffer(ids, persistent=False), nn.Buffer(start, persistent=False)
        self._vocabulary = max(self.out_features, int(ids.max()) + 1)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._vocabulary or self.out_features

    @property
    def _rows(self) -> Rows | None:
        if self._vocabulary is None:
            return None
        return Rows(self.trainable_tokens_delta if self.active else self._start, self._ids, self._vocabulary)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        per_target: bool = False,
        terms: LossTerms = _PLAIN,
        ranked: bool = False,
        distillation: Distillation | None = None,
        top: TopK | None = None,
    ) -> Tensor:
        """hidden (..., T, H).

        Without labels: logits (..., T, V). With labels (..., T), -100 where there is no target: the sum over targets of
        -log p(label) with the further `terms`, or of the loss by `distillation`, a () fp32 tensor in nats, which is 0
        with a zero gradient for a row without targets; or, `per_target`, the summands, (targets,), in the order of the
        labels; or, `ranked`, without a gradient (targets, 2): -log p, and 1 where no token is likelier, else 0; or,
        with `top`, what a teacher says of each, (targets, 2 k + 1): its likeliest tokens, whose numbers are whole in
        fp32, and `Taught.log_p`. `places` (targets,) int64 are those of the labels of targets, from the first of all
        on: a caller that knows them on the host spares it to wait for the device.
        """
        rows = self._rows
        if labels is None:
            logits = self.scaled(_logits(hidden, self.weight, rows, self.bias))
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        if places is None:
            places = (labels.flatten() != IGNORE).nonzero()[:, 0]
        wanted = hidden.flatten(0, -2).index_select(0, places)
        goal = Goal(labels.flatten().index_select(0, places), terms, distillation)
        if ranked:
            found = [block.ranked() for block in self._each_block(wanted, goal)]
            return torch.cat([wanted.new_empty(0, 2, dtype=torch.float32), *found])
        if top is not None:
            found = [
                torch.cat([ids, log_p], 1)
                for ids, log_p in (block.likeliest(top) for block in self._each_block(wanted, goal))
            ]
            return torch.cat([wanted.new_empty(0, 2 * top.k + 1, dtype=torch.float32), *found])
        given = wanted, self.weight, self.bias, goal, self
        if rows is None and self.weight.requires_grad:
            nats: Tensor = _LearningCrossEntropy.apply(*given)  # type: ignore[assignment]
        else:
            matrix = None if rows is None else rows.matrix
            nats = _FrozenCrossEntropy.apply(*given, rows, matrix, torch.is_grad_enabled())  # type: ignore[assignment]
        return nats if per_target else nats.sum()

    def _each_block(self, wanted: Tensor, goal: Goal) -> Iterator["_Block"]:
        for part in _parts(wanted, self.weight):
            logits = _logits(wanted[part], self.weight, self._rows, self.bias)
            yield from (block for _, block in _blocks(logits, goal.part(part), self))

    def scaled(self, logits: Tensor) -> Tensor:
        """The logits of products, scaled as the base scales them; or the gradients of products from those of logits."""
        logits = logits if self.factor == 1 else logits * self.factor
        return logits if self.divisor == 1 else logits / self.divisor


class _FrozenCrossEntropy(torch.autograd.Function):
    """A frozen head, of which some `rows` may learn. `matrix` is that of the rows, passed once more for its gradient.
    `learns` says whether autograd records, which torch switches off inside `forward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        goal: Goal,
        head: LossHead,
        rows: Rows | None,
        matrix: Tensor | None,
        learns: bool,
    ) -> Tensor:
        """hidden (N, H), weight (V, H), bias (V,), a goal of N targets -> (N,) fp32, the nats of each target.

        Gradients are kept for the backward pass: of `hidden`, and of the logits of `rows`, (N, rows).
        """
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        learns = learns and any(ctx.needs_input_grad)
        grad = torch.empty_like(hidden) if learns else None
        of_rows = None if rows is None else hidden.new_empty(len(hidden), len(rows.matrix))
        for part in _parts(hidden, weight):
            logits = _logits(hidden[part], weight, rows, bias)
            nats[part] = _nats(logits, goal.part(part), head, turn_into_gradient=learns)
            if grad is not None and rows is not None and of_rows is not None:
                of_rows[part] = logits[:, rows.ids]
                own = logits.index_fill_(1, rows.ids, 0)[:, : len(weight)]
                grad[part] = own @ weight + of_rows[part] @ rows.matrix
            elif grad is not None:
                grad[part] = logits @ weight
        ctx.save_for_backward(None if rows is None else hidden, grad, of_rows)
        return nats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, grad, of_rows = ctx.saved_tensors
        # In fp32 first, because the scale (1 / targets) can be so small that rounding the product in bf16 would do
        # harm.
        grad, of_rows = (
            None if part is None else (part.float() * grad_output[:, None]).to(part.dtype) for part in (grad, of_rows)
        )
        return grad, None, None, None, None, None, None if of_rows is None else of_rows.T @ hidden, None


class _LearningCrossEntropy(torch.autograd.Function):
    """Keeps the module, never the gathered weight, which ZeRO-3 gathers again before the module's backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        goal: Goal,
        head: LossHead,
    ) -> Tensor:
        """hidden (N, H), weight (V, H), bias (V,), a goal of N targets -> (N,) fp32, the nats of each target."""
        ctx.save_for_backward(hidden)
        ctx.head, ctx.goal = head, goal
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in _parts(hidden, weight):
            nats[part] = _nats(_logits(hidden[part], weight, None, bias), goal.part(part), head)
        return nats

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (hidden,), weight = ctx.saved_tensors, ctx.head.weight.detach()
        bias, grad = ctx.head.bias, torch.empty_like(hidden)
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _parts(hidden, weight):
            logits, scale = _logits(hidden[part], weight, None, bias), grad_output[part, None]
            for place, block in _blocks(logits, ctx.goal.part(part), ctx.head):
                logits[place] = block.gradient().mul_(scale[place])
            grad[part] = logits @ weight
            weight_grad += logits.T @ hidden[part]
            if bias_grad is not None:
                bias_grad += logits.sum(0)
        return (
            grad,
            weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, rows: Rows | None, bias: Tensor | None) -> Tensor:
    """hidden (..., H), weight (V, H), bias (V,) -> (..., V), or as many as `rows` say; a row beyond the weight's has no
    bias.
    """
    logits = nn.functional.linear(hidden, weight, bias)
    if rows is None:
        return logits
    more = nn.functional.pad(bias, (0, rows.vocabulary - len(bias)))[rows.ids] if bias is not None else None
    if rows.vocabulary > len(weight):
        logits = nn.functional.pad(logits, (0, rows.vocabulary - len(weight)))
    return logits.index_copy_(-1, rows.ids, nn.functional.linear(hidden, rows.matrix, more))


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the N rows of `hidden`; the logits of one slice are made at a time."""
    size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]) // _CHUNK_ROWS) * _CHUNK_ROWS
    for begin in range(0, len(hidden), size):
        yield slice(begin, begin + size)


def _nats(logits: Tensor, goal: Goal, head: LossHead, *, turn_into_gradient: bool = False) -> Tensor:
    """The nats of each target, (n,) fp32, from logits (n, V). Its gradient may overwrite the logits, which nobody else
    needs.
    """
    nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for place, block in _blocks(logits, goal, head):
        nats[place] = block.nats()
        if turn_into_gradient:
            logits[place] = block.gradient()
    return nats


def _blocks(logits: Tensor, goal: Goal, head: LossHead) -> Iterator[tuple[slice, "_Block"]]:
    """Blocks of rows of logits (n, V), as many rows as are in fp32 at one time, and the function that computes on them.
    A row does not depend on others.
    """
    size = max(1, (_BLOCK_BYTES_ON_GPU if is_accelerator(logits.device) else _BLOCK_BYTES) // (4 * logits.shape[1]))
    for begin in range(0, len(logits), size):
        place = slice(begin, begin + size)
        yield place, _Block(logits[place], goal.part(place), head)


class _Block:
    """The logits of n targets as products gave them, (n, V), in fp32."""

    def __init__(self, products: Tensor, goal: Goal, head: LossHead) -> None:
        logits = head.scaled(products.float())
        self._head, self._slope = head, None
        softcap = head.softcap
        if softcap is not None:
            bent = torch.tanh(logits.div_(softcap))
            logits, self._slope = bent * softcap, bent.square_().neg_().add_(1)
        self._logits, self._target, self._terms = logits, goal.labels.unsqueeze(-1), goal.terms
        self._log_normalizer = logits.logsumexp(-1, keepdim=True)
        self._taught = None if goal.distillation is None else Divergence(logits, goal.distillation)

    def nats(self) -> Tensor:
        """-log p of each target, with the further terms, or the loss by the teacher, (n,) fp32."""
        smoothing, z_loss = self._terms
        nats = self._log_normalizer - self._logits.gather(-1, self._target)
        if smoothing:
            uniform = self._log_normalizer - self._logits.mean(-1, keepdim=True)
            nats = nats.lerp(uniform, smoothing)
        if z_loss:
            nats = nats + z_loss * self._log_normalizer.square()
        nats = nats.squeeze(-1)
        return nats if self._taught is None else self._taught.nats().lerp(nats, self._taught.given.next_tokens)

    def ranked(self) -> Tensor:
        """(n, 2) fp32: -log p of each target, and whether it is the most likely token."""
        most = self._logits.argmax(-1, keepdim=True) == self._target
        return torch.stack([self.nats(), most.squeeze(-1).float()], dim=1)

    def likeliest(self, top: TopK) -> Taught:
        return likeliest(self._logits, top)

    def gradient(self) -> Tensor:
        """d nats / d products before scale and softcap, (n, V) fp32, in the memory of the logits. Without further terms
        it is softmax - one_hot(target)."""
        smoothing, z_loss = self._terms
        taught = None if self._taught is None else self._taught.gradient()
        slopes = self._logits.sub_(self._log_normalizer).exp_()
        if z_loss:
            slopes.mul_(1 + 2 * z_loss * self._log_normalizer)
        if smoothing:
            slopes.sub_(smoothing / slopes.shape[-1])
        slopes.scatter_add_(-1, self._target, torch.full_like(self._target, smoothing - 1, dtype=torch.float32))
        if self._taught is not None and taught is not None:
            slopes = taught.lerp_(slopes, self._taught.given.next_tokens)
        return self._head.scaled(slopes if self._slope is None else slopes.mul_(self._slope))
