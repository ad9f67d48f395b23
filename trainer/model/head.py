"""The output head and token-summed cross entropy, without ever holding the logits of a whole row.

The head is frozen, so the gradient with respect to the hidden states can be computed chunk by chunk in the forward
pass: no recomputation, and ZeRO-3 gathers the head once a micro-batch instead of once a chunk and pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
"""The label of a position that predicts nothing (cross entropy's `ignore_index`)."""
_CHUNK_BYTES = 2**28  # of fp32 logits


class LossHead(nn.Linear):
    """The output head: logits without labels, the summed loss with them.

    With `softcap` c every logit z is c * tanh(z / c), as in Gemma 2.
    """

    softcap: float | None = None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (..., T, H).

        Without labels: logits (..., T, V). With labels (..., T), -100 where there is no target: the sum over targets of
        -log p(label), a () fp32 tensor in nats, which is 0 with a zero gradient for a row without targets.
        """
        if labels is None:
            logits = super().forward(hidden)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        wanted = labels != IGNORE
        return _FrozenCrossEntropy.apply(hidden[wanted], self.weight, labels[wanted], self.softcap)  # type: ignore[no-any-return]


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        """hidden (N, H), weight (V, H), targets (N,) -> () fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for begin in range(0, hidden.shape[0], size):
            part = slice(begin, begin + size)
            logits = (hidden[part] @ weight.T).float()  # (n, V)
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits.div_(softcap))
                logits, slope = bent * softcap, bent.square_().neg_().add_(1)
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            target = targets[part].unsqueeze(-1)
            total += (log_normalizer - logits.gather(-1, target)).sum()
            if grad is not None:
                # d(-log softmax[target]) / d logits = softmax - one_hot(target)
                probabilities = logits.sub_(log_normalizer).exp_()
                probabilities.scatter_add_(-1, target, torch.full_like(target, -1, dtype=torch.float32))
                if slope is not None:
                    probabilities *= slope
                grad[part] = probabilities.to(weight.dtype) @ weight
        ctx.grad = grad
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        # In fp32 first: the scale (1 / targets) can be too small for the product's rounding in bf16 to be harmless.
        return (ctx.grad.float() * grad_output).to(ctx.grad.dtype), None, None, None
