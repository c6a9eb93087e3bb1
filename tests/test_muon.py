import pytest
import torch
from helpers import SMALL

import train
from configurator import Config
from parts.common import UserError
from parts.muon import Muon, orthogonal


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Two matrices of one shape, a wide one, an embedding and a vector, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in ((48, 16), (48, 16), (16, 64), (30, 16), (16,)):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        made.append(p)
    return made


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 100, 30), (1, 30, 100)])
def test_orthogonal_keeps_directions_and_makes_lengths_equal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonal(x) @ vt.mT  # diagonal, if the directions are the same
    lengths = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(lengths)).abs().max() < 1e-4
    large = lengths[s > s.amax(1, keepdim=True) / 50]
    assert large.min() > 0.65 and large.max() < 1.25


def test_steps_equal_torchs_muon_and_adamw():
    """torch.optim.Muon computes in bfloat16, so its steps differ by a hundredth."""
    ours, theirs = parameters(), parameters()
    options = dict(lr=0.01, weight_decay=0.1)
    muon = Muon([{"params": ours}], ours[:3], betas=(0.9, 0.95), fused=True, **options)
    peers = [
        torch.optim.Muon(theirs[:3], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(theirs[3:], betas=(0.9, 0.95), fused=True, **options),
    ]
    for turn in range(4):
        gradients = [p.grad for p in parameters(turn)]
        for p, q, gradient in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        before = [p.detach().clone() for p in ours]
        muon.step()
        for peer in peers:
            peer.step()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            moved = (p - before[i]).norm()
            tolerance = 0.02 if i < 3 else 1e-6
            assert moved > 0 and (p - q).norm() < tolerance * moved * (turn + 1)


def test_a_step_that_is_not_finite_changes_nothing():
    params = parameters()
    muon = Muon([{"params": params}], params[:3], lr=0.01, fused=True)
    for broken in (0.0, 1.0):
        before = [p.detach().clone() for p in params]
        averages = {p: state["exp_avg"].clone() for p, state in muon.state.items()}
        for p, q in zip(params, parameters(), strict=True):
            p.grad = q.grad
        if broken:
            params[0].grad[0, 0] = torch.nan
            params[1].grad[0, 0] = torch.inf
        muon.found_inf = torch.tensor(broken)
        muon.step()
        unchanged = [torch.equal(p, q) for p, q in zip(params, before, strict=True)]
        assert unchanged == [bool(broken)] * 5
    assert all(torch.equal(muon.state[p]["exp_avg"], old) for p, old in averages.items())


def test_training_with_muon_resumes_bit_equal(here, capfd):
    settings = SMALL | dict(optimizer="muon", lr_decay="linear", max_iters=8, eval_interval=4)
    train.main(Config(**settings))
    whole = torch.load("out/tiny/last.pt", weights_only=True)
    train.main(Config(**settings | dict(max_iters=4, lr_decay_iters=8, out_dir="out/half")))
    train.main(Config(**settings | dict(out_dir="out/half", resume=True)))
    half = torch.load("out/half/last.pt", weights_only=True)
    for name, weight in whole["model"].items():
        assert torch.equal(weight, half["model"][name]), name
    with pytest.raises(UserError, match="written with --optimizer=muon"):
        train.main(Config(**settings | dict(out_dir="out/half", resume=True, optimizer="adamw")))


def test_the_linear_schedule_is_constant_then_straight():
    cfg = Config(dataset="x", lr_decay="linear", learning_rate=1.0, min_lr=0.0, warmup_iters=10,
                 max_iters=110)  # fmt: skip
    rates = [train.learning_rate(step, cfg) for step in (9, 10, 60, 85, 110)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])
