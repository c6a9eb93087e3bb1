"""Decoding: greedy, sampling and beam search over the model's key/value cache.

    captions = generate(model, embeddings, tokenizer, Decoding(method="beam", beams=5))
    captions[i][0].ids                                  # the best caption of image i

The prefix of an image is computed once and shared by its samples or beams; every step feeds one
token a row; rows that have ended leave the batch, so that work follows the captions still being
written. What an image gets does not depend on what else is in its batch.
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
    """How captions are chosen. Lengths are in tokens: a prompt's count, the end token does not."""

    method: str = "greedy"  # greedy, sample or beam
    n_best: int = 1  # captions an image: its best beams, or independent samples
    beams: int = 5  # beam: hypotheses kept per image
    length_penalty: float = 0.0  # beam: a hypothesis scores log p / length ** length_penalty
    temperature: float = 1.0  # sample: below 1 sharpens, above 1 flattens
    top_k: int = 0  # sample: only from the k likeliest tokens, 0 = all
    top_p: float = 1.0  # sample: only from the likeliest that together reach p (Holtzman 2020)
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
        need(0 < self.temperature < math.inf, f"temperature={self.temperature} is not above 0")
        need(0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]")
        need(self.top_k >= 0, f"top_k={self.top_k} is negative")
        need(self.no_repeat_ngram >= 0, f"no_repeat_ngram={self.no_repeat_ngram} is negative")
        need(0 <= self.min_len <= self.max_len, f"min_len={self.min_len} is not in 0..max_len")
        need(self.max_len >= 1, f"max_len={self.max_len} is not positive")


class Caption(NamedTuple):
    """A caption's token ids, prompt included, bos and eos not; `logprob` is that of what follows
    the prompt, the end token included if it was reached, under the model as it is (no temperature,
    no filter); `logprobs` is each token's share."""

    ids: list[int]
    logprob: float
    logprobs: list[float]


# ---------------------------------------------------------------------------------------------
# What may come next


def forbid(logits, written, ids, cfg: Decoding):
    """Logits (N, V) with -inf where a token may not follow `written`, (N, t) ids after bos."""
    t = written.size(1)
    logits[:, [ids.pad, ids.bos, ids.unk]] = -math.inf
    if t < cfg.min_len:
        logits[:, ids.eos] = -math.inf
    n = cfg.no_repeat_ngram
    if n and t >= n:
        grams = written.unfold(1, n, 1)  # (N, t - n + 1, n)
        seen = (grams[..., :-1] == written[:, None, t - n + 1 :]).all(-1)  # same n - 1 before?
        rows, at = seen.nonzero(as_tuple=True)
        logits[rows, grams[rows, at, -1]] = -math.inf
    return logits


def draw(logits, uniform, cfg: Decoding):
    """One token id (N,) a row, by its uniform number (N,) in [0, 1): the inverse of the CDF.

    Temperature comes first, then the filters, then the draw.
    """
    p, order = torch.softmax(logits.float() / cfg.temperature, -1).sort(-1, descending=True)
    if cfg.top_k:
        p[:, cfg.top_k :] = 0
    if cfg.top_p < 1:  # the token that crosses top_p stays
        before = p.cumsum(-1) - p
        p[before >= cfg.top_p * p.sum(-1, keepdim=True)] = 0
    cdf = p.double().cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    last = (p > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the last that may be
    return order.gather(-1, torch.minimum(place, last))[:, 0]


def start(model, prefix, rows: int, ids, prompt: list[int], device):
    """Feeds bos and the prompt: logits (rows, V) of what follows, the cache, and the ids so far."""
    written = torch.tensor(prompt, dtype=torch.long, device=device).expand(rows, -1)  # (rows, t)
    cache = None
    for position, token in enumerate([ids.bos, *prompt]):
        tokens = torch.full((rows,), token, dtype=torch.long, device=device)
        logits, cache = model.step(tokens, position, prefix, cache)
    return logits, cache, written


def take(pairs, rows):
    """The given rows of each layer's (k, v)."""
    return [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in pairs]


# ---------------------------------------------------------------------------------------------
# One token after the other: greedy and sampling


def follow(model, embeddings, ids, cfg: Decoding, prompt: list[int], numbers) -> list:
    device, n = embeddings.device, cfg.n_best
    prefix = model.prefill(embeddings)
    logits, cache, written = start(model, prefix, len(embeddings), ids, prompt, device)
    row = torch.arange(len(embeddings), device=device).repeat_interleave(n)  # N = B * n
    prefix, cache, written, logits = take(prefix, row), take(cache, row), written[row], logits[row]
    if cfg.method == "sample":  # an image's draws depend on the seed and its number alone
        generators = [torch.Generator().manual_seed(cfg.seed * 1_000_003 + i) for i in numbers]
        draws = [torch.rand(n, cfg.max_len, generator=g) for g in generators]
        uniform = torch.cat(draws).to(device, torch.float64)
    alive = torch.arange(len(row), device=device)  # which of the N rows are still in the batch
    result = torch.full((len(row), cfg.max_len), ids.pad, device=device)
    result[:, : len(prompt)] = written
    scores = torch.zeros(len(row), cfg.max_len, device=device)  # log p of each token
    for t in range(len(prompt), cfg.max_len):
        logp = torch.log_softmax(logits.float(), -1)
        allowed = forbid(logits, written, ids, cfg)
        if cfg.method == "sample":
            token = draw(allowed, uniform[alive, t], cfg)
        else:
            token = allowed.argmax(-1)
        scores[alive, t] = logp.gather(-1, token[:, None])[:, 0]
        result[alive, t] = token
        written = torch.cat((written, token[:, None]), 1)
        on = (token != ids.eos).nonzero()[:, 0]
        if len(on) < len(token):
            if not len(on):
                break
            alive, token, written = alive[on], token[on], written[on]
            prefix, cache = take(prefix, on), take(cache, on)
        if t + 1 < cfg.max_len:
            logits, cache = model.step(token, t + 1, prefix, cache)
    found = [
        as_caption(r, s, ids, len(prompt))
        for r, s in zip(result.tolist(), scores.tolist(), strict=True)
    ]
    return [found[i : i + n] for i in range(0, len(found), n)]


def as_caption(row: list[int], scores: list[float], ids, prompt: int) -> Caption:
    """A row of ids, up to eos or padding, with the scores of what follows the prompt."""
    length = next((i for i, token in enumerate(row) if token in (ids.eos, ids.pad)), len(row))
    scores = scores[prompt : length + (length < len(row) and row[length] == ids.eos)]
    return Caption(row[:length], sum(scores), scores)


# ---------------------------------------------------------------------------------------------
# Beam search


def beam_search(model, embeddings, ids, cfg: Decoding, prompt: list[int]) -> list:
    """The `n_best` hypotheses of each image, best first.

    At every step each image's K beams are extended by every token, and the 2K likeliest
    extensions looked at: of the first K, those that end become results; of all, the K best that
    go on become the new beams. 2K, since at most K of them end. An image is done when no beam
    can still enter its n_best results: log p only falls as a caption grows.
    """
    device, K, B = embeddings.device, cfg.beams, len(embeddings)
    prefix = model.prefill(embeddings)
    logits, cache, written = start(model, prefix, B, ids, prompt, device)
    V = logits.size(-1)
    total = torch.zeros(B, 1, device=device)  # (G, K) log p of each beam; at first one an image
    shares = torch.zeros(B, len(prompt), device=device)  # (G * K, t) the same, token by token
    alive = torch.arange(B, device=device)  # the G images still in the batch
    best = torch.full((B, cfg.n_best), -math.inf, device=device)  # results: scores,
    best_ids = torch.full((B, cfg.n_best, cfg.max_len), ids.pad, device=device)  # ids with eos,
    best_shares = torch.zeros(B, cfg.n_best, cfg.max_len, device=device)  # log p of each id
    penalty = cfg.length_penalty

    def keep(score, rows, shares) -> None:
        """Merges new results (G, k), of `rows` and `shares` (G, k, t), into the best ones."""
        pad = (0, cfg.max_len - rows.size(-1))
        rows, shares = (torch.nn.functional.pad(x, pad, value=v) for x, v in
                        ((rows, ids.pad), (shares, 0.0)))  # fmt: skip
        score, at = torch.cat((best[alive], score), 1).topk(cfg.n_best, 1)
        best[alive] = score
        for old, new in ((best_ids, rows), (best_shares, shares)):
            both = torch.cat((old[alive], new), 1)
            old[alive] = both.gather(1, at[..., None].expand(-1, -1, both.size(-1)))

    for t in range(len(prompt), cfg.max_len):
        G, width = total.shape
        logp = torch.log_softmax(logits.float(), -1)  # (G * width, V)
        allowed = forbid(logp, written, ids, cfg)
        ranked = (total[..., None] + allowed.view(G, width, V)).flatten(1)
        total, flat = ranked.topk(min(2 * K, ranked.size(1)), 1)  # (G, 2K)
        parent = flat // V + torch.arange(G, device=device)[:, None] * width  # rows of the batch
        token = flat % V
        rows = torch.cat((written[parent], token[..., None]), -1)  # (G, 2K, t + 1)
        share = allowed.flatten()[parent * V + token]  # log p of the newest token
        told = torch.cat((shares[parent], share[..., None]), -1)
        length = (t + 1 - len(prompt)) ** penalty  # tokens after the prompt, eos included

        ends = token == ids.eos
        score = (total / length).masked_fill(~ends, -math.inf)[:, :K]
        keep(score, rows[:, :K], told[:, :K])
        total, at = total.masked_fill(ends, -math.inf).topk(K, 1)  # (G, K), best first
        if t + 1 == cfg.max_len:  # cut off where they are
            pick = at[..., None].expand(-1, -1, t + 1)
            keep(total / length, rows.gather(1, pick), told.gather(1, pick))
            break
        longest = max(length, (cfg.max_len - len(prompt)) ** penalty)
        on = (total[:, 0] / longest > best[alive, -1]).nonzero()[:, 0]  # may a beam still enter?
        if not len(on):
            break
        if len(on) < G:
            alive, total, at = alive[on], total[on], at[on]
            rows, told, parent, token = rows[on], told[on], parent[on], token[on]
            prefix = take(prefix, on)
        pick = at[..., None].expand(-1, -1, t + 1)
        written, shares = rows.gather(1, pick).flatten(0, 1), told.gather(1, pick).flatten(0, 1)
        cache = take(cache, parent.gather(1, at).flatten())
        logits, cache = model.step(written[:, -1], t + 1, prefix, cache)
    return [
        [
            as_caption(r, s, ids, len(prompt))
            for r, s, p in zip(*image, strict=True)
            if p > -math.inf
        ]
        for image in zip(best_ids.tolist(), best_shares.tolist(), best.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model, embeddings, tokenizer, cfg: Decoding, prompt: str = "", numbers=None
) -> list[list[Caption]]:
    """The captions of each image: a list of `n_best` for each row of `embeddings`.

    Args:
        model: anything with `prefill` and `step` as ClipLM has them, in eval mode.
        embeddings: (B, n_positions, D).
        tokenizer: with ids `pad bos eos unk` and `encode`.
        prompt: text that each caption continues.
        numbers: a number for each image, on which its random draws depend; by default its place.

    Raises UserError where prompt or lengths do not fit the model's block.
    """
    ids = tokenizer.encode(prompt) if prompt else []
    room = model.cfg.block_size - model.cfg.prefix_length
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
    return follow(model, embeddings, tokenizer, cfg, ids, numbers or range(len(embeddings)))
