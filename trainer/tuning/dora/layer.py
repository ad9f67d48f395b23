"""DoRA's linear layer (arXiv:2402.09353): each row of W + scaling * B @ A is scaled to a learnt length.

Every forward pass computes the lengths of the rows again. The backward pass takes them as constants (section 4.3), as
in PEFT. They need the whole W, A and B at once, so ZeRO-3 must gather the base layer's parameters with this module's.
"""

import math

import torch
from torch import Tensor, nn

from trainer.model.held.layers import weight_of

# Avoids a division by zero for a row of zeros.
_TINY = torch.finfo(torch.float32).tiny


class DoraLinear(nn.Module):
    """`y = lora_magnitude_vector / norm * (W + scaling * B @ A) x + bias`, norm the row lengths of W + scaling * B @ A.

    Parameters: lora_A (rank, inputs), lora_B (outputs, rank), lora_magnitude_vector (outputs,). It starts as the base
    layer: B is zero and the magnitude is the norm. Dropout is on the inputs of the whole change to the base layer, as
        in PEFT, which costs a second product with W.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        """`base_layer`'s parameters must be whole. A is drawn from the CPU's generator, as PEFT draws it."""
        super().__init__()
        device, outputs = base_layer.weight.device, base_layer.out_features
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, dropout
        self.active = True
        down = nn.init.kaiming_uniform_(torch.empty(rank, base_layer.in_features), a=math.sqrt(5))
        self.lora_A = nn.Parameter(down.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))
        self.lora_magnitude_vector = nn.Parameter(self._row_norms())

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        result = self.base_layer(x)
        if not self.active:
            return result
        dropping, bias = self.training and self.dropout > 0, self.base_layer.bias
        if dropping:
            x = nn.functional.dropout(x, self.dropout)
        base = self.base_layer(x) if dropping else result
        if bias is not None:
            base = base - bias
        low_rank = nn.functional.linear(self.scaling * nn.functional.linear(x, self.lora_A), self.lora_B)
        adapted = self.lora_magnitude_vector / self._row_norms() * (base + low_rank)
        if dropping:
            return adapted + (result - base)
        return adapted if bias is None else adapted + bias

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """(outputs,), rounded to the magnitude's type, so that their quotient is exactly 1 at the start.

        |W + sBA|^2 = |W|^2 + 2s <W A^T, B> + s^2 <B (A A^T), B>, row by row, so no other tensor of W's size is made.
        """
        weight = weight_of(self.base_layer)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        down, up = self.lora_A.float(), self.lora_B.float()
        crossed = (weight @ self.lora_A.T).float()  # (outputs, rank)
        squares += self.scaling * ((2 * crossed + self.scaling * up @ (down @ down.T)) * up).sum(1)
        return squares.clamp_min_(_TINY).sqrt_().to(self.lora_A.dtype)
