"""OFT's linear layer: it rotates its inputs in blocks before the frozen weight (arXiv:2506.19847, section 4)."""

import torch
from torch import Tensor, nn


def rotations(skew: Tensor, block: int) -> Tensor:
    """The rotations (rotations, block, block) of skew-symmetric matrices Q = -Q^T.

    `skew` has the numbers above the diagonal of each Q, (rotations, block * (block - 1) / 2). The rotation is
    Cayley's (I + Q) (I - Q)^-1 with the first terms of the inverse's series, as PEFT has it: I + 2Q + 2Q^2 + 2Q^3 +
    Q^4.
    """
    row, column = torch.triu_indices(block, block, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), block, block)
    upper[:, row, column] = skew
    q = upper - upper.mT
    squared = q @ q
    cubed = squared @ q
    return torch.eye(block, device=skew.device, dtype=skew.dtype) + 2 * (q + squared + cubed) + cubed @ q


class Rotations(nn.Module):
    """Parameter: weight (rotations, block * (block - 1) / 2). It starts as zeros, which rotate nothing."""

    def __init__(self, inputs: int, block: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = block
        self.weight = nn.Parameter(torch.zeros(inputs // block, block * (block - 1) // 2, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., inputs)."""
        blocks = x.to(self.weight.dtype).unflatten(-1, (-1, self.block))
        rotated = torch.einsum("...rk,rkc->...rc", blocks, rotations(self.weight, self.block))
        return rotated.flatten(-2).to(x.dtype)


class RotatedLinear(nn.Module):
    """`y = W (R x) + bias`, where R has blocks along its diagonal. The names are PEFT's."""

    def __init__(self, base_layer: nn.Linear, block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.active = base_layer, True
        self.oft_R = Rotations(base_layer.in_features, block, base_layer.weight.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.base_layer(self.oft_R(x) if self.active else x)
