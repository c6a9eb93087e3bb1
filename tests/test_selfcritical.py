"""selfcritical.py: gradients against oracles, the reward, any cut of the batch, resume."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    equal,
    finish,
    flags,
    log_of,
    losses,
    mistake,
    start,
    wait,
    wait_for_steps,
    weights,
)

import train
from configurator import Config, ConfigError
from data import Split
from decode import Caption
from model import ClipLM, ModelConfig, loss_sum
from parts import checkpoint
from parts.common import UserError
from parts.device import Device
from selfcritical import SelfCritical

SCST = SMALL | dict(objective="scst", from_scratch=True, scst_samples=3, learning_rate=1e-3)


def critic_of(folder, **changes) -> SelfCritical:
    """A SelfCritical of a small random model in double precision."""
    split = Split(folder, "train")
    torch.manual_seed(0)
    size = ModelConfig(
        vocab_size=len(split.tokenizer), embedding_dim=16, n_prefix=2, n_layer=2, n_head=2,
        n_embd=32, block_size=32, dropout=0.0,
    )  # fmt: skip
    cfg = Config(**SCST | changes)
    return SelfCritical(ClipLM(size).double(), split, cfg, Device("cpu", "float32"))


@pytest.fixture
def critic(here) -> SelfCritical:
    return critic_of(here / "data/tiny", scst_samples=4)


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def log_p(model, embedding, ids: list[int], tokenizer, ended: bool) -> torch.Tensor:
    """The log-probability of one caption in a row of its own, by the plainest way."""
    targets = [*ids, tokenizer.eos]
    n = len(targets)
    logits = model(
        embedding[None], torch.tensor([[tokenizer.bos, *ids]]), torch.ones(1, n, dtype=torch.long),
        torch.arange(n)[None], torch.arange(n),
    )  # fmt: skip
    each = logits.log_softmax(-1)[range(n), targets]
    return each[: len(ids) + ended].sum()


def test_the_gradient_is_that_of_separate_rows(critic):
    """- sum of A log p, one caption after the other; samples that were cut off included."""
    critic.max_len = 20  # of these random captions, some end and some are cut off
    images = np.array([3, 0, 17])
    embeddings = critic.split.embedding(images)
    captions = critic.sample(embeddings, images, step=5)
    assert {len(caption.ids) == 20 for caption in captions} == {True, False}
    rows, counts = critic.rollout(images, step=5)
    packed = gradients(critic.model, loss_sum(critic.model, rows))

    tokenizer = critic.split.tokenizer
    texts = [tokenizer.decode(caption.ids) for caption in captions]
    ended = [len(caption.ids) < 20 for caption in captions]
    rewards = critic.cider.score(np.repeat(images, 4), texts, ended)
    expected, total = 0.0, 0
    for i, caption in enumerate(captions):
        others = [rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        advantage = rewards[i] - sum(others) / 3
        embedding = embeddings[i // 4]
        expected -= advantage * log_p(critic.model, embedding, caption.ids, tokenizer, ended[i])
        total += len(caption.ids) + ended[i]
    for name, gradient in gradients(critic.model, expected).items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-6, atol=1e-6)
    assert (counts["captions"], counts["targets"]) == (12, total)
    assert counts["reward"] == pytest.approx(rewards.sum())
    assert counts["ended"] == sum(ended)


def test_references_that_all_weigh_one_give_the_cross_entropy(critic):
    split, tokenizer = critic.split, critic.split.tokenizer
    images = np.flatnonzero(split.n_captions == 4)[:3]
    _, references = split.references()
    ids = [tokenizer.encode(text) for image in images for text in references[image]]
    captions = [Caption(each, 0.0, [], True) for each in ids]
    rows = critic.pack(split.embedding(images), images, captions, np.ones(12))
    ours = gradients(critic.model, loss_sum(critic.model, rows))
    theirs = gradients(critic.model, loss_sum(critic.model, split.pack(images)))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


def test_references_can_count_beside_the_samples(critic):
    """Their weight multiplies the cross-entropy, and the samples stay as they are."""
    images = np.array([1, 2])
    samples, _ = critic.rollout(images, step=0)
    critic.cfg = Config(**SCST | dict(scst_samples=4, scst_references=0.25))
    both, counts = critic.rollout(images, step=0)
    expected = loss_sum(critic.model, samples)
    expected = expected + 0.25 * loss_sum(critic.model, critic.split.pack(images))
    assert loss_sum(critic.model, both).item() == pytest.approx(expected.item(), rel=1e-6)
    assert counts["targets"] == (samples["weights"] != 0).sum()  # the samples' tokens alone


def test_samples_follow_the_models_own_distribution(here):
    """No temperature, filter or minimum length: captions are empty as often as p says."""
    critic = critic_of(here / "data/tiny", scst_samples=1000)
    image = np.array([4])
    embedding = critic.split.embedding(image)
    p = log_p(critic.model, embedding[0], [], critic.split.tokenizer, True).exp().item()
    critic.max_len = 1
    drawn = [critic.sample(embedding, image, step) for step in range(4)]
    empty = sum(not caption.ids for captions in drawn for caption in captions)
    assert abs(empty - 4000 * p) < 4 * (4000 * p) ** 0.5


def test_a_broken_off_caption_is_worth_less(critic):
    """Elsewhere captions learn to end in "with a": the reward did not see the end."""
    _, references = critic.split.references()
    image = next(i for i, group in enumerate(references) if len(group[0].split()) > 5)
    whole = references[image][0]
    cut = " ".join(whole.split()[:-1])
    scores = critic.cider.score([image] * 3, [whole, whole, cut], [True, False, True])
    assert scores[0] > scores[1] and scores[0] > scores[2]


def test_a_toy_policy_finds_the_best_caption(here):
    """The reward is 1 for one word and 0 for all others."""
    critic = critic_of(here / "data/tiny", scst_samples=8)
    model, tokenizer = critic.model, critic.split.tokenizer
    critic.max_len = 1
    best = tokenizer.decode(tokenizer.encode("dog")[:1])

    class OneWord:
        def score(self, images, texts, ended):
            return np.array([float(text == best) for text in texts])

    critic.cider = OneWord()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mean_rewards = []
    for step in range(60):
        rows, counts = critic.rollout(np.arange(16), step)
        mean_rewards.append(counts["reward"] / counts["captions"])
        optimizer.zero_grad()
        (loss_sum(model, rows) / counts["targets"]).backward()
        optimizer.step()
    assert mean_rewards[0] < 0.1 and mean_rewards[-1] > 0.95


@pytest.mark.parametrize("processes, micro", [(0, 2), (0, 4), (2, 1), (4, 1)])
def test_any_cut_of_the_batch_computes_the_same_update(here, processes, micro):
    train.main(Config(**SCST | dict(out_dir="one")))
    cut = SCST | dict(out_dir="cut", gradient_accumulation_steps=micro)
    if processes:
        finish(start("train.py", *flags(**cut), processes=processes))
    else:
        train.main(Config(**cut))
    assert losses("cut") == pytest.approx(losses("one"), abs=1e-5)
    for figure in ("reward", "reward_spread", "length", "ended", "distinct"):
        one, other = ([r[figure] for r in log_of(out) if "loss" in r] for out in ("one", "cut"))
        assert other == pytest.approx(one, abs=1e-5), figure
    one, other = weights("one/last.pt"), weights("cut/last.pt")
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=2e-4), name
    # AdamW divides by the gradient's size, however small; its mean of the gradients is exact
    one, other = (torch.load(f"{out}/last.pt")["optimizer"]["state"] for out in ("one", "cut"))
    for i, state in one.items():
        assert torch.allclose(state["exp_avg"], other[i]["exp_avg"], rtol=0, atol=1e-5), i


def test_compiled_blocks_change_no_reward(here, monkeypatch):
    """The graphs run uncompiled here, so that no compiler is needed."""
    train.main(Config(**SCST | dict(out_dir="plain")))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train.main(Config(**SCST | dict(out_dir="compiled", compile=True)))
    for figure in ("loss", "reward"):
        plain, compiled = (
            [r[figure] for r in log_of(out) if "loss" in r] for out in ("plain", "compiled")
        )
        assert compiled == pytest.approx(plain, abs=1e-4), figure


def test_a_kill_changes_nothing(here):
    long = SCST | dict(max_iters=60, eval_interval=10, ema=0.9, scst_references=0.1)
    train.main(Config(**long | dict(out_dir="whole")))
    run = start("train.py", *flags(**long | dict(out_dir="parts")))
    wait_for_steps(Path("parts/log.jsonl"), 25, run)
    run.kill()
    wait(run)
    train.main(Config(**long | dict(out_dir="parts", resume=True)))
    assert equal("whole", "parts")


def test_it_begins_with_a_checkpoint_and_its_score(here, capfd):
    """The first evaluation is the starting checkpoint's, and ckpt.pt is never worse than it."""
    train.main(Config(**SMALL | dict(max_iters=100, eval_interval=100)))
    before = log_of("out/tiny")[-1]
    begin = SMALL | dict(objective="scst", init_from="out/tiny/ckpt.pt", dropout=0.3)
    train.main(Config(**begin | dict(learning_rate=1e-3)))
    rows = log_of("out/tiny_scst")
    assert rows[0]["step"] == 0 and rows[0]["CIDEr"] == before["CIDEr"]
    assert rows[0]["val_loss"] == before["val_loss"]
    assert [row["lr"] for row in rows if "lr" in row][2:] == [1e-3] * 10  # after the warmup
    assert "reward: CIDEr-D" in capfd.readouterr().out
    best = torch.load("out/tiny_scst/ckpt.pt", weights_only=True)["scores"]["CIDEr"]
    assert best == max(row["CIDEr"] for row in rows if "CIDEr" in row) >= before["CIDEr"]


def test_a_checkpoint_that_does_not_fit_is_refused(here):
    train.main(Config(**SMALL | dict(max_iters=1, eval_interval=1)))
    cfg = SMALL | dict(objective="scst", init_from="out/tiny/ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is of another architecture: n_embd was 32, is 64"):
        train.main(Config(**cfg | dict(n_embd=64)))
    with pytest.raises(UserError, match="none.pt not found"):
        train.main(Config(**cfg | dict(init_from="none.pt")))
    content = torch.load("out/tiny/ckpt.pt", weights_only=True)
    content["meta"]["files"]["tokenizer.model"]["sha256"] = "another"
    checkpoint.save(Path("other.pt"), content)
    with pytest.raises(UserError, match="other.pt was trained on another dataset: tokenizer.model"):
        train.main(Config(**cfg | dict(init_from="other.pt")))
    assert not Path("out/tiny_scst").exists()


def test_a_constant_learning_rate_may_be_below_min_lr():
    """`--learning_rate=1e-5` beside config/shapes_scst.py was refused for the min_lr of shapes.py,
    to which nothing decays."""
    scst = dict(dataset="x", objective="scst", from_scratch=True)
    scst |= dict(learning_rate=1e-5, min_lr=2e-5)
    assert train.learning_rate(300, Config(**scst)) == 1e-5
    with pytest.raises(ConfigError, match="min_lr: expected at most learning_rate=1e-05"):
        Config(**scst, lr_decay_iters=100)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--objective=scst"], "init_from: expected a checkpoint to begin with"),
        (["--objective=scst", "--from_scratch", "--scst_samples=1"], "scst_samples: expected 2 <="),
        (["--objective=rl"], "objective: expected one of xe scst"),
    ],
)
def test_mistakes_are_one_line(here, capfd, args, says):
    assert says in mistake("train.py", [*flags(), *args], capfd)
