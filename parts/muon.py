"""Muon: an optimizer for matrices. Training with it takes fewer steps than with AdamW (LOG.md)."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.AdamW):
    """AdamW, but the steps of the given matrices are orthogonal: no direction outweighs another.

    A few directions make up most of a matrix's gradient, and so of AdamW's steps. Muon takes the
    momentum U S V^T (its singular value decomposition) and steps along U V^T instead (Jordan et
    al. 2024, https://kellerjordan.github.io/posts/muon), scaled to the usual size of AdamW's steps
    (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both.

    torch.optim.Muon computes the same in bfloat16 and one matrix at a time, which takes a CPU
    without bfloat16 ten times as long.

    Args:
        groups: AdamW's parameter groups.
        matrices: those of their parameters, each of two dimensions, that Muon updates instead.
        options: AdamW's.
    """

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict], matrices: list[Tensor], **options):
        taken = set(matrices)
        groups = [g | {"params": [p for p in g["params"] if p not in taken]} for g in groups]
        super().__init__([*groups, {"params": matrices}], **options)

    @torch.no_grad()
    def step(self) -> None:
        *_, group = self.param_groups
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        # As in a fused AdamW, nothing changes if `found_inf` is set to 1.
        finite = 1.0 - getattr(self, "found_inf", torch.zeros(1, device=group["params"][0].device))
        for shape, same in by_shape.items():
            ahead = []
            for p in same:
                if p not in self.state:
                    # AdamW expects a "step" when it loads a state.
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                average = self.state[p]["exp_avg"]
                grad = p.grad.nan_to_num(0.0, 0.0, 0.0)
                average.lerp_(grad, (1 - self.MOMENTUM) * finite)
                ahead.append(grad.lerp(average, self.MOMENTUM))  # Nesterov's momentum
            size = 0.2 * math.sqrt(max(shape)) * group["lr"] * finite
            steps = size * orthogonal(torch.stack(ahead))
            for p, step in zip(same, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"] * finite).sub_(step)
                p.grad = None  # AdamW passes over what has no gradient
        super().step()


def orthogonal(x: Tensor) -> Tensor:
    """Return about U V^T for each matrix U S V^T of x (matrices, m, n): the singular values end
    between .7 and 1.2, not at 1.

    Five Newton-Schulz steps: each applies an odd polynomial to the singular values, which moves
    all that are not 0 towards 1. It takes matrix products only.
    """
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    y = x.bfloat16() if x.device.type == "cuda" else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        a = y @ y.mT
        b = -4.7750 * a + 2.0315 * a @ a
        y = 3.4445 * y + b @ y
    return y.to(x.dtype)
