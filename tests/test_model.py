"""model.py against its oracles: separate examples, an uncached pass, transformers' GPT-2."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BOS, pack_by_loops

from model import ClipLM, ModelConfig, loss_sum
from parts.device import Dropout, attention
from parts.log import training_flops
from train import compile_parts

TINY = dict(vocab_size=50, embedding_dim=12, n_prefix=3, n_layer=2, n_head=2, n_embd=16,
            block_size=24, dropout=0.0)  # fmt: skip


def tiny(**changes) -> ClipLM:
    """Return a small random model in eval mode."""
    torch.manual_seed(0)
    model = ClipLM(ModelConfig(**(TINY | changes)))
    for p in model.parameters():  # larger than at initialisation, so that mistakes show
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def inputs_of(images: list[list[list[int]]]) -> dict:
    """Return what `ClipLM.forward` takes besides the embeddings: a packed batch without targets."""
    batch = pack_by_loops(images)
    del batch["targets"]
    return batch


def some_images(n: int = 3, features: int = 1) -> tuple[torch.Tensor, list]:
    """Return embeddings (n, features, 12), and each image's one to five captions as ids."""
    rng = np.random.default_rng(0)
    captions = [
        [rng.integers(3, 50, rng.integers(1, 7)).tolist() for _ in range(rng.integers(1, 6))]
        for _ in range(n)
    ]
    return torch.randn(n, features, 12, generator=torch.Generator().manual_seed(1)), captions


@pytest.mark.parametrize("settings", [{}, {"mapper": "mlp"}, {"features": "grid", "n_positions": 5},
                                  {"bias": True, "normalize": False}])  # fmt: skip
def test_packed_loss_and_gradients_are_those_of_separate_examples(settings):
    model = tiny(**settings)
    embeddings, images = some_images(features=settings.get("n_positions", 1))
    packed = loss_sum(model, {"embeddings": embeddings, **pack_by_loops(images)})
    packed.backward()
    packed_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    separate = torch.zeros(())
    for embedding, captions in zip(embeddings, images, strict=True):
        for caption in captions:
            batch = {"embeddings": embedding[None], **pack_by_loops([[caption]])}
            one = loss_sum(model, batch)
            one.backward()
            separate += one.detach()
    assert packed.item() == pytest.approx(separate.item(), rel=1e-5)
    for a, (name, p) in zip(packed_grads, model.named_parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max()), name


def test_nothing_leaks_between_the_captions_of_a_row():
    model = tiny()
    embeddings, _ = some_images(1)
    first, second = [5, 6, 7, 8], [9, 10, 11]
    for changed in ([12, 13, 14], [9, 10, 15]):
        logits = []
        for captions in ([first, second], [first, changed]):
            logits.append(model(embeddings, **inputs_of([captions])))
        assert torch.equal(logits[0][:5], logits[1][:5])  # bit-equal, for bos and four words
        assert not torch.equal(logits[0][5:], logits[1][5:])
    swapped = model(embeddings, **inputs_of([[second, first]]))  # nor does the order matter
    assert torch.allclose(swapped[4:], logits[0][:5], atol=1e-5)


def test_a_caption_sees_its_own_prefix_only():
    model = tiny()
    embeddings, images = some_images(2)
    batch = inputs_of(images)
    n = sum(len(c) + 1 for c in images[0])
    before = model(embeddings, **batch)
    embeddings[1] += 1
    after = model(embeddings, **batch)
    assert torch.equal(before[:n], after[:n])
    assert not torch.isclose(before[n:], after[n:]).all(-1).any()


@pytest.mark.parametrize("beams", [1, 4])
def test_cached_steps_equal_one_uncached_pass(beams):
    """The beams of an image share its prefix, and do not see each other's tokens."""
    model = tiny()
    embeddings, _ = some_images(2)
    captions = torch.randint(3, 50, (2 * beams, 6), generator=torch.Generator().manual_seed(2))
    prefix_kv = model.prefill(embeddings)
    cache, logits = None, []
    for t in range(7):
        tokens = captions[:, t - 1] if t else torch.full((2 * beams,), BOS)
        step, cache = model.step(tokens, t, prefix_kv, cache)
        logits.append(step)
    batch = inputs_of([[caption] for caption in captions.tolist()])
    whole = model(embeddings.repeat_interleave(beams, 0), **batch).view(2 * beams, 7, -1)
    assert torch.allclose(torch.stack(logits, 1), whole, atol=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    layer = Dropout(p)
    x = torch.ones(1000, 999, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    is_dropped = (y == 0).float()
    assert is_dropped.mean().item() == pytest.approx(p, abs=1 / 256 + 1e-3)
    for shift in (1, 2, 8):  # elements that share a draw are independent
        both = (is_dropped[:, shift:] * is_dropped[:, :-shift]).mean().item()
        assert both == pytest.approx(is_dropped.mean().item() ** 2, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=3e-3) and len(y.unique()) == 2
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


def test_attention_with_dropout_equals_the_fused_kernel(monkeypatch):
    """With dropout, a CPU takes another path through attention. If dropout drops nothing, that path
    must give what the fused kernel gives, at padding too."""
    model = tiny(dropout=0.5)
    embeddings, images = some_images()
    batch = {"embeddings": embeddings, **pack_by_loops(images)}
    loss = loss_sum(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)
    other = loss_sum(model.train(), batch)
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(other, list(model.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max())


def test_cudnn_is_left_out_where_its_gradients_may_be_nan(monkeypatch):
    """On an H200, 2 of 200 gradients were not finite: cuDNN's may be NaN if T mod 128 is 64."""
    fused, allowed = F.scaled_dot_product_attention, []

    def spy(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for T in (63, 64, 65, 128, 192):
        x, mask = torch.randn(1, 2, T, 8), torch.ones(T, T, dtype=torch.bool).tril()
        attention(x, x, x, mask, Dropout(0.0))
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert allowed == [True, False, True, True, False]


@pytest.mark.parametrize("T", [64, 65, 192])
def test_gradients_are_finite_where_all_scores_are_low(T):
    """Those of cuDNN were not, in bfloat16, at T = 64 and 192. On a CPU they always were."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 1, 1, T, 64, device=device).bfloat16().unbind(0)
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -960.0  # scores of -120
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]
    y = attention(*inputs, mask, Dropout(0.0))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_graphs_compute_the_same():
    """Of a block and the loss, as train.py compiles them."""
    torch.set_float32_matmul_precision("highest")
    plain, compiled = (tiny(block_size=80, n_layer=1).cuda() for _ in range(2))
    compiled_loss = compile_parts(compiled)
    with torch._inductor.config.patch(compile_threads=1):  # no processes that go on running
        for longest in (40, 60, 50):  # T = 44, 64 and 54
            embeddings, images = some_images(4)
            images[0] = [[5] * longest]
            batch = {"embeddings": embeddings, **pack_by_loops(images)}
            batch["weights"] = torch.rand(len(batch["targets"]))
            batch = {name: x.cuda() for name, x in batch.items()}
            ours = loss_sum(plain, batch, 0.1)
            theirs = loss_sum(compiled, batch, 0.1, compiled_loss)
            assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
            expected = torch.autograd.grad(ours, list(plain.parameters()))
            found = torch.autograd.grad(theirs, list(compiled.parameters()))
            for a, b in zip(expected, found, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max())


def test_the_decoder_is_transformers_gpt2():
    """The same weights in GPT2LMHeadModel, fed our prefix and tokens as `inputs_embeds`."""
    transformers = pytest.importorskip("transformers")
    model = tiny(bias=True)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                activation_function="gelu_new", resid_pdrop=0, embd_pdrop=0,
                                attn_pdrop=0)
    ).eval()  # fmt: skip
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("mapper")}
    for name, value in weights.items():  # GPT-2 keeps its matrices transposed (Conv1D)
        if any(part in name for part in ("c_attn.w", "c_proj.w", "c_fc.w")):
            weights[name] = value.T
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not [m for m in missing if "attn.bias" not in m]
    embeddings, _ = some_images(2)
    captions = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    tokens = F.pad(captions, (1, 0), value=BOS)
    prefix = model.project(embeddings)
    inputs = torch.cat((prefix, model.transformer.wte(tokens)), 1)
    batch = inputs_of([[caption] for caption in captions.tolist()])
    ours = model(embeddings, **batch).view(2, 7, -1)
    assert torch.allclose(ours, theirs(inputs_embeds=inputs).logits[:, 3:], atol=2e-4)


@pytest.mark.parametrize("is_padded", [False, True])
def test_flops_count_what_pytorch_counts(is_padded):
    """PyTorch's own counter also sees attention, and padding if there is any."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(n_embd=64, vocab_size=500)
    embeddings, images = some_images(8)
    if not is_padded:
        images = images[:1] * 8
    batch = pack_by_loops(images)
    real = len(batch["targets"])
    padded = batch["tokens"].numel()
    assert (padded > real) == is_padded
    with FlopCounterMode(display=False) as counter:
        loss_sum(model, {"embeddings": embeddings.requires_grad_(), **batch}).backward()
    least = training_flops(model, 8, real)
    most = training_flops(model, 8, padded)
    assert least <= counter.get_total_flops() <= 1.2 * most
    assert (least < most) == is_padded


def test_model_py_is_short():
    """It is meant to be read: about 300 lines, 320 at most."""
    import model as module

    assert len(Path(module.__file__).read_text().splitlines()) <= 320
