"""Decoding: greedy, sampling and beam search over the model's key/value cache.

    captions = generate(model, embeddings, tokenizer, Decoding(method="beam", beams=5))
    captions[i][0].ids                                  # the best caption of image i

An image's prefix is computed once and shared by its K samples or beams; a step feeds one token a
row; what has ended leaves the batch, so that work follows the captions still being written. What
an image gets does not depend on what else is in its batch.

Letters, besides model.py's:    G  images still in the batch      L  max_len
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from configurator import UserError

# ---------------------------------------------------------------------------------------------
# Settings and results


@dataclass(frozen=True)
class Decoding:
    """How captions are chosen. Lengths are in tokens; a prompt's count, the end token does not."""

    method: str = "greedy"  # greedy, sample or beam
    n_best: int = 1  # captions an image: its best beams, or independent samples
    beams: int = 5  # beam: hypotheses kept per image
    length_penalty: float = 0.0  # beam: a hypothesis scores log p / length ** length_penalty
    temperature: float = 1.0  # sample: below 1 sharpens, above 1 flattens
    top_k: int = 0  # sample: only from the k likeliest tokens, 0 = all
    top_p: float = 1.0  # sample: only from the likeliest that together reach p
    min_len: int = 1
    max_len: int = 40
    no_repeat_ngram: int = 0  # no n tokens in a row occur twice, 0 = off
    seed: int = 0  # sample: of all draws

    def __post_init__(self):
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise UserError(f"decoding: {what}")

        known = self.method in ("greedy", "sample", "beam")
        need(known, f"method={self.method} is none of greedy, sample (top-k and top-p too), beam")
        need(1 <= self.beams <= 1000, f"beams={self.beams} is not in 1..1000")
        need(1 <= self.n_best <= 1000, f"n_best={self.n_best} is not in 1..1000")
        most = {"greedy": 1, "beam": self.beams}.get(self.method, self.n_best)
        need(self.n_best <= most, f"n_best={self.n_best}, but {self.method} finds only {most}")
        need(abs(self.length_penalty) <= 10, f"length_penalty={self.length_penalty} is beyond 10")
        need(0 < self.temperature < math.inf, f"temperature={self.temperature} is not above 0")
        need(0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]")
        need(self.top_k >= 0, f"top_k={self.top_k} is negative")
        need(self.no_repeat_ngram >= 0, f"no_repeat_ngram={self.no_repeat_ngram} is negative")
        need(self.max_len >= 1, f"max_len={self.max_len} is not positive")
        within = f"min_len={self.min_len} is not in 0..max_len={self.max_len}"
        need(0 <= self.min_len <= self.max_len, within)
        need(0 <= self.seed < 2**32, f"seed={self.seed} is not in 0..2**32 - 1")
        filters = self.temperature, self.top_k, self.top_p
        idle = self.method != "sample" and filters != (1, 0, 1)
        need(not idle, f"temperature, top_k and top_p do nothing to {self.method}: method=sample")
        idle = self.method != "beam" and (self.beams, self.length_penalty) != (5, 0)
        need(not idle, f"beams and length_penalty do nothing to {self.method}: method=beam")


class Caption(NamedTuple):
    """What was found. The probabilities are the model's own, before any temperature or filter."""

    ids: list[int]  # prompt included; bos and eos not
    logprob: float  # of what follows the prompt, eos included unless max_len came before it
    logprobs: list[float]  # each token's share of it


# ---------------------------------------------------------------------------------------------
# What may come next


def forbid(logits, written, ids, cfg: Decoding) -> None:
    """Puts logits (N, V) to -inf where a token may not follow `written`, (N, t) ids after bos."""
    t, n = written.size(1), cfg.no_repeat_ngram
    logits[:, [ids.pad, ids.bos, ids.unk]] = -math.inf
    if n and t >= n:
        grams = written.unfold(1, n, 1)  # (N, t - n + 1, n)
        seen = (grams[..., :-1] == written[:, None, t - n + 1 :]).all(-1)  # same n - 1 before?
        rows, at = seen.nonzero(as_tuple=True)
        logits[rows, grams[rows, at, -1]] = -math.inf
    if t < cfg.min_len:
        others = logits.index_fill(1, torch.tensor(ids.eos, device=logits.device), -math.inf)
        stuck = others.amax(-1, keepdim=True) == -math.inf  # a row that can only end, may
        logits.copy_(torch.where(stuck, logits, others))


def draw(logits, uniform, cfg: Decoding):
    """A token id (N,) for each row of logits, by inverting its distribution at uniform (N,).

    Temperature first, then the filters top-k (Fan et al. 2018, arXiv:1805.04833) and top-p
    (Holtzman et al. 2020, arXiv:1904.09751), then a draw from what is left.
    """
    below = logits - logits.amax(-1, keepdim=True)  # that a temperature near 0 overflows nothing
    p, order = torch.softmax(below / cfg.temperature, -1), None
    if cfg.top_k or cfg.top_p < 1:
        p, order = p.topk(min(cfg.top_k or p.size(1), p.size(1)))  # likeliest first
        before = p.cumsum(-1) - p  # the token that crosses top_p stays
        p[before >= cfg.top_p * p.sum(-1, keepdim=True)] = 0
    cdf = p.to(uniform).cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).to(logits.device)
    return (token if order is None else order.gather(-1, token))[:, 0]


# ---------------------------------------------------------------------------------------------
# What all strategies share


def start(model, embeddings, ids, prompt: list[int], K: int):
    """Feeds prefix, bos and prompt. Returns the prefix, and logits (B, V) and cache after it. With
    one row an image there is nothing to share: the cache begins with the prefix, which is None."""
    prefix, cache = model.prefill(embeddings), None
    if K == 1:
        prefix, cache = None, prefix
    for position, token in enumerate([ids.bos, *prompt]):
        tokens = torch.full((len(embeddings),), token, device=embeddings.device)
        logits, cache = model.step(tokens, position, prefix, cache)
    return prefix, logits, cache


def take(pairs, rows):
    """The given rows of each layer's (k, v)."""
    return pairs and [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in pairs]


def as_captions(written, shares, ids, prompt: list[int]) -> list[Caption]:
    """From rows of L ids, filled up with eos, and the log p of each id."""
    captions = []
    for row, logprobs in zip(written.tolist(), shares.tolist(), strict=True):
        length = row.index(ids.eos) if ids.eos in row else len(row)
        logprobs = logprobs[len(prompt) : length + 1]
        captions.append(Caption(row[:length], math.fsum(logprobs), logprobs))
    return captions


# ---------------------------------------------------------------------------------------------
# One token after the other: greedy and sampling


def follow(model, embeddings, ids, cfg: Decoding, prompt: list[int], numbers) -> list:
    """The greedy caption, or `n_best` independent samples, of each image."""
    device, B, n, L = embeddings.device, len(embeddings), cfg.n_best, cfg.max_len
    N = B * n  # results; what goes to one more, row N, is to be ignored
    written = torch.full((N + 1, L), ids.eos, device=device)
    written[:, : len(prompt)] = torch.tensor(prompt, device=device)
    shares = torch.zeros(N + 1, L, device=device)  # log p of each token
    if cfg.method == "sample":  # an image's draws depend on the seed and on its number alone
        generators = [torch.Generator().manual_seed(cfg.seed * 1_000_003 + i) for i in numbers]
        draws = [torch.rand(n, L, generator=g) for g in generators]
        uniform = torch.cat([*draws, torch.zeros(1, L)]).double()  # (N + 1, L)
        uniform = uniform if device.type == "mps" else uniform.to(device)  # MPS has no float64

    prefix, logits, cache = start(model, embeddings, ids, prompt, n)
    slot = torch.arange(N, device=device).view(B, n)  # (G, K): the result that each row writes
    rows = slot.flatten() // n
    if n > 1:
        logits, cache = logits[rows], take(cache, rows)
    for t in range(len(prompt), L):
        at, logp = slot.flatten(), torch.log_softmax(logits.float(), -1)  # (G * K,), (G * K, V)
        forbid(logp, written[at, :t], ids, cfg)
        if cfg.method == "sample":
            token = draw(logp, uniform[at.to(uniform.device), t], cfg)
        else:
            token = logp.argmax(-1)
        written[at, t] = token
        shares[at, t] = logp.gather(1, token[:, None])[:, 0]

        # -- who goes on: images with a caption unfinished, as many rows each as the busiest needs
        slot = slot.masked_fill(token.view_as(slot) == ids.eos, N)
        on = slot < N
        (G, K), width, images = slot.shape, on.sum(1).amax().item(), on.any(1).nonzero()[:, 0]
        if width == 0 or t + 1 == L:
            break
        if len(images) < G or width < K:
            order = slot[images].argsort(1)[:, :width]  # the finished are last, as N is
            slot = slot[images].gather(1, order)
            rows = (images[:, None] * K + order).flatten()
            token, cache = token[rows], take(cache, rows)
            prefix = take(prefix, images) if len(images) < G else prefix
        logits, cache = model.step(token, t + 1, prefix, cache)
    captions = as_captions(written[:N], shares[:N], ids, prompt)
    return [captions[i : i + n] for i in range(0, N, n)]


# ---------------------------------------------------------------------------------------------
# Beam search


def beam_search(model, embeddings, ids, cfg: Decoding, prompt: list[int]) -> list:
    """The `n_best` hypotheses of each image, best first.

    Each image has K beams, captions begun. A step extends each of them by every token and ranks
    the K * V extensions by log p. Of the first K, those that end are finished; the first K of
    those that go on are the next beams, and 2K are looked at, since no more than K can end. An
    image is done when none of its beams can still be among its n_best: log p only falls as a
    caption grows, so a beam's score is at most what it would be at the longest length.
    """
    device, B, n, L = embeddings.device, len(embeddings), cfg.n_best, cfg.max_len
    best = torch.full((B, n), -math.inf, device=device)  # scores of the finished, best first,
    best_written = torch.full((B, n, L), ids.eos, device=device)  # their ids,
    best_shares = torch.zeros(B, n, L, device=device)  # and log p of each id

    prefix, logits, cache = start(model, embeddings, ids, prompt, cfg.beams)
    alive = torch.arange(B, device=device)  # (G,) the images that are not done
    total = torch.zeros(B, 1, device=device)  # (G, K) log p of each beam; K is 1 at first
    written = torch.full((B, 1, L), ids.eos, device=device)  # (G, K, L)
    written[..., : len(prompt)] = torch.tensor(prompt, device=device)
    shares = torch.zeros(B, 1, L, device=device)  # (G, K, L)
    for t in range(len(prompt), L):
        # -- extend every beam by every token
        (G, K), V = total.shape, logits.size(-1)
        logp = torch.log_softmax(logits.float(), -1)  # (G * K, V)
        forbid(logp, written.flatten(0, 1)[:, :t], ids, cfg)
        logp = logp.view(G, K * V)
        ranked = logp + total.repeat_interleave(V, 1)
        total, flat = ranked.topk(min(2 * cfg.beams, K * V))  # (G, 2K)
        parent, token = flat // V, flat % V
        written, shares = (x.take_along_dim(parent[..., None], 1) for x in (written, shares))
        written[..., t], shares[..., t] = token, logp.gather(1, flat)

        # -- keep the best of those finished: by their end, or cut off at max_len
        over = (token == ids.eos) | (t + 1 == L)
        length, longest = t + 1 - len(prompt), L - len(prompt)  # eos counts here
        score = (total / length**cfg.length_penalty).masked_fill(~over, -math.inf)
        best[alive], at = torch.cat((best[alive], score[:, : cfg.beams]), 1).topk(n)
        for kept, new in ((best_written, written), (best_shares, shares)):
            both = torch.cat((kept[alive], new[:, : cfg.beams]), 1)
            kept[alive] = both.take_along_dim(at[..., None], 1)

        # -- go on with the best of the others, in the images that are not done
        total, at = total.masked_fill(over, -math.inf).topk(min(cfg.beams, total.size(1)))
        bound = total[:, 0] / max(length**cfg.length_penalty, longest**cfg.length_penalty)
        on = (bound > best[alive, -1]).nonzero()[:, 0]
        if not len(on):
            break
        alive, total, at = alive[on], total[on], at[on]
        written, shares = (x[on].take_along_dim(at[..., None], 1) for x in (written, shares))
        rows = on[:, None] * K + parent[on].gather(1, at)  # of the batch that was, (G, K)
        cache, prefix = take(cache, rows.flatten()), take(prefix, on) if len(on) < G else prefix
        logits, cache = model.step(written[..., t].flatten(), t + 1, prefix, cache)
    captions = as_captions(best_written.flatten(0, 1), best_shares.flatten(0, 1), ids, prompt)
    found = (best > -math.inf).sum(1).tolist()  # a small vocabulary may have less than n
    return [captions[i * n : i * n + k] for i, k in enumerate(found)]


# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model, embeddings, tokenizer, cfg: Decoding, prompt: str = "", numbers=None
) -> list[list[Caption]]:
    """The captions of each image: up to `n_best` for each row of `embeddings`, the best first.

    Args:
        model: anything with `prefill` and `step` as ClipLM has them, in eval mode.
        embeddings: (B, n_positions, D).
        tokenizer: with ids `pad bos eos unk` and `encode`.
        prompt: text that each caption continues.
        numbers: a number for each image, on which its draws depend; by default its place.

    Raises UserError where prompt or lengths do not fit the model's block.
    """
    ids = tokenizer.encode(prompt) if prompt else []
    room = model.cfg.block_size - model.cfg.prefix_length
    if tokenizer.unk in ids:
        raise UserError(f"decoding: the prompt `{prompt}` has characters that no caption had")
    if cfg.max_len > room:
        raise UserError(
            f"decoding: max_len={cfg.max_len} exceeds the {room} tokens that block_size leaves"
        )
    if len(ids) >= cfg.max_len:
        raise UserError(
            f"decoding: the prompt has {len(ids)} tokens, max_len={cfg.max_len} leaves none"
        )
    if cfg.method == "beam":
        return beam_search(model, embeddings, tokenizer, cfg, ids)
    numbers = range(len(embeddings)) if numbers is None else numbers
    return follow(model, embeddings, tokenizer, cfg, ids, numbers)
