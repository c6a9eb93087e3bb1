"""Decoding: greedy, sampling and beam search over the model's key/value cache.

    model, tokenizer, _ = load_captioner("out/coco/ckpt.pt")
    captions = generate(model, embeddings, tokenizer, Decoding(method="beam", beams=5))
    tokenizer.decode(captions[i][0].ids)                # the best caption of image i

An image's prefix is computed once and shared by its K samples or beams; a step feeds one token
per row. Finished captions leave the batch, except under CUDA graphs, whose shapes are fixed
(parts/graphs.py). An image's captions do not depend on its batch; for samples, pass its own number
in `numbers`.

Letters, besides model.py's:    G  images still in the batch      L  max_len
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from configurator import ConfigError, from_dict, one_of, refuse, within
from data import Meta, Tokenizer
from model import ClipLM, KeyValue, ModelConfig
from parts import checkpoint, graphs
from parts.common import UserError

# ---------------------------------------------------------------------------------------------
# Settings and results


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How captions are chosen. min_len and max_len count a prompt's tokens, too.

    The end token counts towards max_len and the length penalty, but not towards min_len.
    """

    METHODS = "greedy sample beam topk"
    # -- decoding -------------------------------------------------------------------------
    method: str = "greedy"  # greedy, sample (temperature, top-k, top-p), topk or beam
    n_best: int = 1  # captions per image: its best beams, or independent samples
    beams: int = 5  # beam: partial captions kept per image
    length_penalty: float = 0.0  # beam: a caption scores log p / length ** length_penalty
    temperature: float = 1.0  # sample: below 1 sharpens, above 1 flattens
    top_k: int = 0  # sample: only from the k most likely tokens, 0 = all; topk: 0 = 50
    top_p: float = 1.0  # sample: only from the most likely tokens that together reach p
    min_len: int = 1  # minimum caption length in tokens
    max_len: int = 0  # maximum; 0: as long as captions of the data, see default_max_len
    no_repeat_ngram: int = 0  # no sequence of n tokens occurs twice, 0 = off
    seed: int = 0  # of sampling

    def __post_init__(self):
        one_of(self, "method", self.METHODS)
        within(self, "beams n_best", 1, 1000)
        within(self, "length_penalty", -10, 10)
        within(self, "temperature", 0)
        within(self, "top_p", 0, 1)
        within(self, "top_k no_repeat_ngram min_len max_len", 0)
        within(self, "seed", 0, 2**32 - 1)
        for name in ("temperature", "top_p"):
            if getattr(self, name) < 1e-30:  # float32 has nothing below 1e-45
                refuse(name, "a number above 0", 0)
        most = {"greedy": 1, "nearest": 1, "beam": self.beams}.get(self.method, self.n_best)
        if self.n_best > most:
            refuse("n_best", f"at most {most} with --method={self.method}", self.n_best)
        if self.min_len > self.max_len > 0:
            refuse("min_len", f"at most max_len={self.max_len}", self.min_len)
        for methods, names in {
            ("sample", "topk"): ("temperature", "top_k", "top_p"),
            ("beam",): ("beams", "length_penalty"),
        }.items():
            for name in names:
                if self.method not in methods and getattr(self, name) != getattr(Decoding, name):
                    raise ConfigError(f"{name}: does nothing without --method={methods[0]}", name)


class Caption(NamedTuple):
    """A caption. Its probabilities are the model's own, before any temperature or filter."""

    ids: list[int]  # with the prompt, without bos and eos
    logprob: float  # of what follows the prompt, and of eos unless max_len came first
    logprobs: list[float]  # each token's; they sum to logprob
    ended: bool  # by eos; otherwise cut at max_len


def load_captioner(path: str) -> tuple[ClipLM, Tokenizer, dict]:
    """Return the model of a checkpoint, in eval mode, its tokenizer, and the whole content.

    Raises UserError if the file is not a checkpoint or its parts do not fit each other.
    """
    content = checkpoint.load(path)
    meta = from_dict(Meta, content["meta"], f"{path}: meta")
    model_bytes = content["tokenizer"].numpy().tobytes()
    tokenizer = Tokenizer(model_bytes, meta.lowercase, f"the tokenizer in {path}")
    cfg = from_dict(ModelConfig, content["model_config"], f"{path}: model_config")
    if len(tokenizer) != cfg.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} ids, the model {cfg.vocab_size}"
        )
    model = ClipLM(cfg)
    checkpoint.fill(model, content["model"], path)
    return model.eval(), tokenizer, content


def default_max_len(cfg: ModelConfig, longest: int) -> int:
    """Return max_len if none is set: the tokens of the longest caption in the data, but at least
    40, and at most what block_size leaves."""
    return min(max(40, longest), cfg.block_size - cfg.prefix_length)


@torch.inference_mode()
def generate(
    model: ClipLM, embeddings: Tensor, tokenizer: Tokenizer, cfg: Decoding, prompt: str = "",
    numbers=None, longest: int = 0,
) -> list[list[Caption]]:  # fmt: skip
    """Return up to `n_best` captions of each image, best first.

    Args:
        model: anything with `prefill` and `step` as ClipLM has them, in eval mode.
        embeddings: (B, n_positions, D).
        tokenizer: with ids `pad bos eos unk` and `encode`.
        prompt: text that each caption continues.
        numbers: each image's number in its dataset, which seeds its samples together with
            cfg.seed; by default 0 to B - 1.
        longest: the tokens of the longest caption in the data, with its end token: without
            cfg.max_len, captions are cut at default_max_len.

    Raises UserError if the prompt or max_len does not fit the model's block.
    """
    if cfg.method == "topk":
        cfg = replace(cfg, method="sample", top_k=cfg.top_k or 50)
    prompt_ids = tokenizer.encode(prompt) if prompt else []
    room = model.cfg.block_size - model.cfg.prefix_length
    if tokenizer.unk in prompt_ids:
        raise UserError(f"the prompt `{prompt}` contains characters the tokenizer has never seen")
    if cfg.max_len == 0:
        cfg = replace(cfg, max_len=default_max_len(model.cfg, longest))
    if cfg.max_len > room:
        raise UserError(f"max_len={cfg.max_len} exceeds the {room} tokens that block_size leaves")
    if len(prompt_ids) >= cfg.max_len:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, max_len={cfg.max_len} leaves none"
        )
    if embeddings.is_cuda and isinstance(model, ClipLM):
        K = cfg.beams if cfg.method == "beam" else cfg.n_best
        model = graphs.with_graphs(model, embeddings, K, cfg.max_len)
    if cfg.method == "beam":
        return beam_search(model, embeddings, tokenizer, cfg, prompt_ids)
    uniform = None
    if cfg.method == "sample":
        numbers = range(len(embeddings)) if numbers is None else numbers
        uniform = uniform_draws(cfg, numbers, embeddings.device)
    return greedy_or_sample(model, embeddings, tokenizer, cfg, prompt_ids, uniform)


# ---------------------------------------------------------------------------------------------
# One token after the other: greedy and sampling


def greedy_or_sample(
    model, embeddings: Tensor, tokenizer, cfg: Decoding, prompt: list[int], uniform: Tensor | None
) -> list[list[Caption]]:
    """Return the greedy caption, or `n_best` independent samples, of each image.

    uniform: a number in [0, 1) for each token to draw (see uniform_draws); None chooses greedily.
    """
    device = embeddings.device
    B, n, L = len(embeddings), cfg.n_best, cfg.max_len
    N = B * n  # captions; row N below is a bin for the output of finished rows
    is_graphed = isinstance(model, graphs.GraphedDecoder)  # finished rows stay in the batch
    # A GPU's answer is that of the step before: one step too many, but the CPU does not wait.
    all_ended = model.has_ended if is_graphed else bool
    written = torch.full((N + 1, L), tokenizer.eos, device=device)
    written[:, : len(prompt)] = torch.tensor(prompt, device=device)
    logprobs = torch.zeros(N + 1, L, device=device)
    prefix_kv, logits, cache = prefill_prompt(model, embeddings, tokenizer, prompt, K=n)
    caption = torch.arange(N, device=device).view(B, n)  # (G, K): caption of each row, or N
    if n > 1:
        image = caption.flatten() // n  # one row per caption from here on
        logits, cache = logits[image], select_rows(cache, image)
    for t in range(len(prompt), L):
        # -- choose each row's next token
        row = caption.flatten()  # (G * K,)
        logp = torch.log_softmax(logits, dim=-1, dtype=torch.float)  # (G * K, V)
        mask_forbidden(logp, written[row, :t], tokenizer, cfg)
        if uniform is None:
            token = logp.argmax(-1)
        else:
            token = sample_token(logp, uniform[row.to(uniform.device), t], cfg)
        written[row, t] = token
        logprobs[row, t] = logp.gather(1, token[:, None]).squeeze(1)

        # -- drop what is finished
        caption = caption.masked_fill(token.view_as(caption) == tokenizer.eos, N)
        if t + 1 == L or all_ended((caption == N).all()):
            break
        if not is_graphed:
            images, rows, caption = compact(caption, N)
            if rows is not None:
                token, cache = token[rows], select_rows(cache, rows)
            if images is not None:
                prefix_kv = select_rows(prefix_kv, images)
        logits, cache = model.step(token, t + 1, prefix_kv, cache)
    captions = as_captions(written[:N], logprobs[:N], tokenizer, prompt)
    return [captions[i : i + n] for i in range(0, N, n)]


def compact(caption: Tensor, N: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Drop images whose captions are all finished. Of each other image, keep as many rows as the
    image with the most unfinished captions needs.

    caption (G, K) holds the number of the caption that each row writes; N marks a finished one.
    Every image keeps the same number of rows, so a finished row may stay as a filler. With N = 6:

        0 6     keep images 0 and 2,     0
        6 6     their rows 0 and 5       5
        6 5

    Returns the images and the rows to keep (None: all of them), and the new `caption`.
    """
    G, K = caption.shape
    running = caption < N
    width = int(running.sum(1).amax())
    images = running.any(1).nonzero()[:, 0]
    if len(images) == G and width == K:
        return None, None, caption
    order = caption[images].argsort(1)[:, :width]  # finished rows come last: N is the largest
    rows = (images[:, None] * K + order).flatten()
    caption = caption[images].gather(1, order)
    if len(images) == G:
        return None, rows, caption
    return images, rows, caption


def uniform_draws(cfg: Decoding, numbers, device: torch.device) -> Tensor:
    """Return uniform draws (N + 1, L), one per token; row N, the bin's, is zero. They are float64,
    as are the sums of probabilities in sample_token.

    An image's draws depend only on the seed and its entry in `numbers`, not on its batch.
    """
    draws = []
    for number in numbers:
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + number)
        draws.append(torch.rand(cfg.n_best, cfg.max_len, generator=generator))
    draws.append(torch.zeros(1, cfg.max_len))
    uniform = torch.cat(draws).double()
    if device.type == "mps":  # it has no float64
        return uniform
    return uniform.to(device)


def sample_token(logits: Tensor, uniform: Tensor, cfg: Decoding) -> Tensor:
    """Draw a token id (N,) per row of logits by inverse transform sampling at uniform (N,).

    Temperature first, then the filters top-k (Fan et al. 2018, arXiv:1805.04833) and top-p
    (Holtzman et al. 2020, arXiv:1904.09751), then a draw from what is left.
    """
    shifted = logits - logits.amax(-1, keepdim=True)  # a temperature near 0 cannot overflow
    p = torch.softmax(shifted.div_(cfg.temperature), dim=-1)
    order = None
    if cfg.top_k or cfg.top_p < 1:
        k = min(cfg.top_k or p.size(1), p.size(1))
        p, order = p.topk(k)  # the most likely first
        before = p.cumsum(-1) - p  # so that the token that crosses top_p stays
        p[before >= cfg.top_p * p.sum(-1, keepdim=True)] = 0
    cdf = p.to(uniform).cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, target, right=True).to(logits.device)
    if order is not None:
        token = order.gather(-1, token)
    return token[:, 0]


# ---------------------------------------------------------------------------------------------
# Beam search


def beam_search(
    model, embeddings: Tensor, tokenizer, cfg: Decoding, prompt: list[int]
) -> list[list[Caption]]:
    """Return the `n_best` captions of each image, best first.

    Each image has K beams (partial captions). A step extends each beam by every token and ranks
    the K * V extensions by log p. Among the best K, those that end are finished. The best K that
    do not end are the next beams; they are among the best 2K, because each beam has one way to
    end. An image is done when none of its beams can still enter its n_best: log p only falls as a
    caption grows, so log p now, over the largest possible divisor, bounds all later scores.
    """
    device, B, n, L = embeddings.device, len(embeddings), cfg.n_best, cfg.max_len
    is_graphed = isinstance(model, graphs.GraphedDecoder)  # images that are done stay in the batch
    finished = Finished(B, n, L, tokenizer.eos, device)
    prefix_kv, logits, cache = prefill_prompt(model, embeddings, tokenizer, prompt, cfg.beams)
    image = torch.arange(B, device=device)  # (G,) the images that are not done
    total = torch.zeros(B, 1, device=device)  # (G, K) log p of each beam; K is 1 at first
    written = torch.full((B, 1, L), tokenizer.eos, device=device)  # (G, K, L)
    written[..., : len(prompt)] = torch.tensor(prompt, device=device)
    logprobs = torch.zeros_like(written, dtype=torch.float)  # (G, K, L)
    max_length = L - len(prompt)
    for t in range(len(prompt), L):
        # -- extend every beam by every token, and keep the best 2K extensions
        G, K = total.shape
        V = logits.size(-1)
        logp = torch.log_softmax(logits, dim=-1, dtype=torch.float)  # (G * K, V)
        so_far = written[..., :t].flatten(0, 1)
        mask_forbidden(logp, so_far, tokenizer, cfg)
        extended = logp.view(G, K, V) + total[..., None]
        total, extension = extended.flatten(1).topk(min(2 * cfg.beams, K * V))  # (G, 2K)
        parent = extension // V
        token = extension % V
        written = select_beams(written, parent)
        logprobs = select_beams(logprobs, parent)
        written[..., t] = token
        logprobs[..., t] = logp.view(G, K * V).gather(1, extension)

        # -- those of the first K that end, or are cut off at max_len, are finished
        ends = (token == tokenizer.eos) | (t + 1 == L)
        length = t + 1 - len(prompt)  # eos counts
        score = (total / length**cfg.length_penalty).masked_fill(~ends, -math.inf)
        first = slice(cfg.beams)
        finished.add(image, score[:, first], written[:, first], logprobs[:, first])

        # -- the best of the others continue, in the images that are not done
        running = total.masked_fill(ends, -math.inf)
        total, beam = running.topk(min(cfg.beams, running.size(1)))  # (G, K), of the 2K
        largest_divisor = max(length**cfg.length_penalty, max_length**cfg.length_penalty)
        is_open = total[:, 0] / largest_divisor > finished.score[image, -1]
        if is_graphed:
            total = total.masked_fill(~is_open[:, None], -math.inf)  # nothing is added any more
            keep = image
            all_done = t + 1 == L or model.has_ended(~is_open.any())
        else:
            keep = is_open.nonzero()[:, 0]
            all_done = len(keep) == 0
        if all_done:
            break
        if len(keep) < G:
            image, total, beam = image[keep], total[keep], beam[keep]
            written, logprobs, parent = written[keep], logprobs[keep], parent[keep]
            prefix_kv = select_rows(prefix_kv, keep)
        written = select_beams(written, beam)
        logprobs = select_beams(logprobs, beam)
        row = keep[:, None] * K + parent.gather(1, beam)  # (G, K), rows of this step's batch
        cache = select_rows(cache, row.flatten())
        token = written[..., t].flatten()
        logits, cache = model.step(token, t + 1, prefix_kv, cache)
    return finished.captions(tokenizer, prompt)


class Finished:
    """The n best finished captions of each of B images, best first."""

    def __init__(self, B: int, n: int, L: int, eos: int, device):
        self.score = torch.full((B, n), -math.inf, device=device)
        self.written = torch.full((B, n, L), eos, device=device)
        self.logprobs = torch.zeros_like(self.written, dtype=torch.float)

    def add(self, image: Tensor, score: Tensor, written: Tensor, logprobs: Tensor) -> None:
        """Merge in K captions per image (G,). One whose score (G, K) is -inf is ignored."""
        both = torch.cat((self.score[image], score), dim=1)
        self.score[image], index = both.topk(self.score.size(1))
        for kept, new in ((self.written, written), (self.logprobs, logprobs)):
            both = torch.cat((kept[image], new), dim=1)
            kept[image] = select_beams(both, index)

    def captions(self, tokenizer, prompt: list[int]) -> list[list[Caption]]:
        n = self.score.size(1)
        flat = as_captions(
            self.written.flatten(0, 1), self.logprobs.flatten(0, 1), tokenizer, prompt
        )
        counts = (self.score > -math.inf).sum(1).tolist()  # a small vocabulary may have fewer
        return [flat[i * n : i * n + count] for i, count in enumerate(counts)]


# ---------------------------------------------------------------------------------------------
# What all methods share


def prefill_prompt(model, embeddings: Tensor, tokenizer, prompt: list[int], K: int):
    """Feed prefix, bos and prompt. Return prefix_kv, and logits (B, V) and cache after them.

    K rows of an image share its prefix_kv. A single row has nothing to share, so the cache begins
    with the prefix and prefix_kv is None: one fused attention instead of two halves.
    """
    prefix_kv = model.prefill(embeddings)
    cache = None
    if K == 1:
        cache = prefix_kv
        prefix_kv = None
    for position, token in enumerate([tokenizer.bos, *prompt]):
        tokens = torch.full((len(embeddings),), token, device=embeddings.device)
        logits, cache = model.step(tokens, position, prefix_kv, cache)
    return prefix_kv, logits, cache


def mask_forbidden(logits: Tensor, written: Tensor, tokenizer, cfg: Decoding) -> None:
    """Set logits (N, V) to -inf if the token may not follow `written`, (N, t) ids after bos."""
    t, n = written.size(1), cfg.no_repeat_ngram
    for special in (tokenizer.pad, tokenizer.bos, tokenizer.unk):
        logits[:, special] = -math.inf
    if n and t >= n:
        ngrams = written.unfold(1, n, 1)  # (N, t - n + 1, n)
        last = written[:, None, t - n + 1 :]  # (N, 1, n - 1): how the next n-gram begins
        is_repeated = (ngrams[..., :-1] == last).all(-1)
        infinite = torch.where(is_repeated, -math.inf, 0.0).to(logits)
        logits.scatter_add_(1, ngrams[..., -1], infinite)
    if t < cfg.min_len:
        end = logits[:, tokenizer.eos].clone()
        logits[:, tokenizer.eos] = -math.inf
        can_only_end = logits.amax(-1) == -math.inf  # such a row may end
        logits[:, tokenizer.eos] = torch.where(can_only_end, end, -math.inf)


def select_rows(layers: list[KeyValue] | None, rows: Tensor) -> list[KeyValue] | None:
    """Return the given rows of each layer's keys and values."""
    if layers is None:
        return None
    return [tuple(x.index_select(0, rows) for x in layer) for layer in layers]


def select_beams(x: Tensor, index: Tensor) -> Tensor:
    """Return the beams at `index` (G, K') of each image of x (G, K, L)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(2)))


def as_captions(written: Tensor, logprobs: Tensor, tokenizer, prompt: list[int]) -> list[Caption]:
    """Return a Caption for each row of L ids, padded with eos, and the log p of each id."""
    captions = []
    for ids, own in zip(written.tolist(), logprobs.tolist(), strict=True):
        length = ids.index(tokenizer.eos) if tokenizer.eos in ids else len(ids)
        own = own[len(prompt) : length + 1]
        captions.append(Caption(ids[:length], math.fsum(own), own, length < len(ids)))
    return captions
