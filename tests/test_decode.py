"""Decoding: each strategy against a plain recomputation, brute force, statistics, or GPT-2's own.

The models are random, with weights so large that no two tokens are nearly as likely, and in double
precision, so that which batch a row is in cannot turn a tie.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from bench import Recomputing, as_gpt2, their_captions
from decode import Decoding, generate, mask_forbidden, sample_token
from model import ClipLM, ModelConfig
from parts import graphs
from parts.common import UserError

PAD, BOS, EOS, UNK = range(4)
IDS = SimpleNamespace(
    pad=PAD, bos=BOS, eos=EOS, unk=UNK, encode=lambda text: [int(word) for word in text.split()]
)
STRATEGIES = {
    "greedy": Decoding(),
    "blocked": Decoding(no_repeat_ngram=2, min_len=6),
    "sample": Decoding(method="sample", seed=3),
    "filtered": Decoding(method="sample", temperature=0.8, top_k=6, top_p=0.9, n_best=3),
    "beam": Decoding(method="beam", n_best=3),
    "penalty": Decoding(method="beam", beams=4, n_best=4, length_penalty=1.0, no_repeat_ngram=3),
    "short": Decoding(method="beam", beams=3, length_penalty=-0.5, min_len=2),
}
STRATEGIES = {name: replace(cfg, max_len=14) for name, cfg in STRATEGIES.items()}
each_strategy = pytest.mark.parametrize("cfg", STRATEGIES.values(), ids=STRATEGIES)


def peaked(seed: int = 4, vocab_size: int = 12, **settings) -> ClipLM:
    """A small model with opinions: its captions differ by image and end at different lengths."""
    size = dict(embedding_dim=8, n_prefix=3, n_layer=2, n_head=2, n_embd=16, block_size=24)
    torch.manual_seed(seed)
    model = ClipLM(ModelConfig(vocab_size=vocab_size, dropout=0.0, **(size | settings)))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1.0 if name.startswith("transformer.w") else 0.6)
    return model.double().eval()


def images(n: int, seed: int = 0, **settings):
    shape = settings.get("n_positions", 1), settings.get("embedding_dim", 8)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recomputed(model, embedding, ids: list[int]):
    """log p (t + 1, V) of what follows each beginning of `ids`, from a forward pass over them."""
    tokens = torch.tensor([[BOS, *ids]])
    where = torch.arange(tokens.size(1))
    logits = model(embedding[None], tokens, torch.ones_like(tokens), where[None], where)
    return torch.log_softmax(logits, -1)


def assert_same(found, wanted):
    """The same captions, and log-probabilities to rounding (they are kept in single precision)."""
    assert [[c.ids for c in image] for image in found] == [
        [c.ids for c in image] for image in wanted
    ]
    for a, b in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


# ---------------------------------------------------------------------------------------------
# The cache, and the batch


@each_strategy
@pytest.mark.parametrize("grid", [False, True], ids=["pooled", "grid"])
def test_cached_is_uncached(cfg, grid):
    settings = dict(features="grid", n_positions=5, mapper="mlp", bias=True) if grid else {}
    model, embeddings = peaked(**settings), images(9, **settings)
    found = generate(model, embeddings, IDS, cfg)
    assert_same(found, generate(Recomputing(model), embeddings, IDS, cfg))
    lengths = [len(c.ids) for image in found for c in image]
    assert min(lengths) < max(lengths)  # some left the batch before others


@each_strategy
def test_logprobs_are_those_of_a_forward_pass(cfg):
    model, embeddings = peaked(), images(6)
    for embedding, found in zip(embeddings, generate(model, embeddings, IDS, cfg), strict=True):
        assert len(found) == cfg.n_best
        for c in found:
            written = (c.ids + [EOS])[: cfg.max_len]
            logp = recomputed(model, embedding, c.ids)
            wanted = [logp[t, token].item() for t, token in enumerate(written)]
            assert c.logprobs == pytest.approx(wanted, abs=1e-5)
            assert c.logprob == pytest.approx(sum(wanted), abs=1e-4)


@each_strategy
def test_an_image_gets_the_same_in_any_company(cfg):
    model, embeddings = peaked(), images(11)
    together = generate(model, embeddings, IDS, cfg)
    for size in (1, 4):
        parts = [range(i, min(i + size, 11)) for i in range(0, 11, size)]
        found = [generate(model, embeddings[list(p)], IDS, cfg, numbers=p) for p in parts]
        assert_same([image for part in found for image in part], together)
    order = [7, 3, 10, 0, 5]
    found = generate(model, embeddings[order], IDS, cfg, numbers=order)
    assert_same(found, [together[i] for i in order])


# ---------------------------------------------------------------------------------------------
# Greedy and beam search


@pytest.mark.parametrize("options", [{}, {"min_len": 5}, {"no_repeat_ngram": 2}])
def test_one_beam_is_greedy(options):
    model, embeddings = peaked(), images(20)
    greedy = generate(model, embeddings, IDS, Decoding(max_len=20, **options))
    beam = Decoding(method="beam", beams=1, max_len=20, **options)
    assert_same(generate(model, embeddings, IDS, beam), greedy)
    for embedding, (caption,) in zip(embeddings, greedy, strict=True) if not options else ():
        logp = recomputed(model, embedding, caption.ids)
        logp[:, [PAD, BOS, UNK]] = -math.inf
        logp[0, EOS] = -math.inf  # min_len is 1
        assert logp.argmax(-1).tolist()[:20] == (caption.ids + [EOS])[:20]


def every_caption(model, embedding, cfg: Decoding, prompt: list[int]):
    """(score, ids) of every caption there is, best first."""
    words, found = range(4, model.cfg.vocab_size), []
    for n in range(max(cfg.min_len, len(prompt)) - len(prompt), cfg.max_len - len(prompt) + 1):
        for tail in itertools.product(words, repeat=n):
            ids = [*prompt, *tail]
            written = (ids + [EOS])[: cfg.max_len]
            if len(written) == len(prompt):
                continue
            logp = recomputed(model, embedding, ids)
            total = sum(logp[t, written[t]].item() for t in range(len(prompt), len(written)))
            found.append((total / (len(written) - len(prompt)) ** cfg.length_penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("prompt, min_len", [("", 0), ("", 2), ("5", 0)])
def test_a_beam_as_wide_as_the_space_finds_the_best_of_all(penalty, prompt, min_len):
    model, embeddings = peaked(vocab_size=7), images(4)
    cfg = Decoding(
        method="beam", beams=200, n_best=12, length_penalty=penalty, min_len=min_len, max_len=4
    )
    for embedding, found in zip(
        embeddings, generate(model, embeddings, IDS, cfg, prompt), strict=True
    ):
        wanted = every_caption(model, embedding, cfg, IDS.encode(prompt))[:12]
        assert [c.ids for c in found] == [ids for _, ids in wanted]
        after = [len(c.logprobs) ** penalty for c in found]
        scores = [c.logprob / n for c, n in zip(found, after, strict=True)]
        assert scores == pytest.approx([score for score, _ in wanted], abs=1e-5)


def test_a_space_smaller_than_n_best_gives_what_there_is():
    cfg = Decoding(method="beam", beams=20, n_best=20, max_len=2, min_len=0)
    for found in generate(peaked(vocab_size=6), images(3), IDS, cfg):
        assert len(found) == len({tuple(c.ids) for c in found}) == 1 + 2 + 4


def plain_beam_search(model, embedding, cfg: Decoding) -> list[tuple[float, list[int]]]:
    """Beam search without a batch, a cache, or an early stop: (score, ids), best first."""
    beams, finished = [(0.0, [])], []
    for t in range(cfg.max_len):
        extended = []
        for total, ids in beams:
            logp = recomputed(model, embedding, ids)[-1:]
            mask_forbidden(logp, torch.tensor([ids], dtype=torch.long), IDS, cfg)
            extended += [(total + x, [*ids, i]) for i, x in enumerate(logp[0].tolist())]
        extended.sort(reverse=True)
        for total, ids in extended[: cfg.beams]:
            if ids[-1] == EOS or t + 1 == cfg.max_len:
                score = total / len(ids) ** cfg.length_penalty
                finished.append((score, [i for i in ids if i != EOS]))
        beams = [(total, ids) for total, ids in extended if ids[-1] != EOS][: cfg.beams]
    return sorted(finished, reverse=True)[: cfg.n_best]


@pytest.mark.parametrize("name", ["beam", "penalty", "short"])
@pytest.mark.parametrize("seed", [0, 4])
def test_the_early_stop_loses_nothing(name, seed):
    cfg, model, embeddings = STRATEGIES[name], peaked(seed), images(8)
    for embedding, found in zip(embeddings, generate(model, embeddings, IDS, cfg), strict=True):
        wanted = plain_beam_search(model, embedding, cfg)
        assert [c.ids for c in found] == [ids for _, ids in wanted]


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_work_follows_the_captions_still_written(method):
    rows, model = [], peaked()
    step = model.step

    def counted(tokens, *rest):
        rows.append(len(tokens))
        return step(tokens, *rest)

    model.step = counted
    n = 1 if method == "greedy" else 3
    beams = 3 if method == "beam" else 5
    cfg = Decoding(method=method, n_best=n, beams=beams, max_len=20, seed=1)
    found = generate(model, images(16), IDS, cfg)
    if method != "beam":
        on = [[sum(len(c.ids) >= t for c in each) for each in found] for t in range(1, cfg.max_len)]
        longer = [sum(k > 0 for k in at) * max(at) for at in on]  # as wide as the busiest image
        assert rows == [16, *[n for n in longer if n]]
    assert rows[0] == 16 and rows[1] == 16 * n and rows[-1] < rows[1] / 2
    assert rows[1:] == sorted(rows[1:], reverse=True)


# ---------------------------------------------------------------------------------------------
# What a GPU repeats as a CUDA graph, here without the graph


def fixed(model, B: int, cfg: Decoding) -> graphs.GraphedDecoder:
    K = cfg.beams if cfg.method == "beam" else cfg.n_best
    decoder = graphs.GraphedDecoder(model, B, K, cfg.max_len, graph=False)
    decoder.load(model)
    return decoder


@each_strategy
@pytest.mark.parametrize("prompt", ["", "5", "5 9 5"])
@pytest.mark.parametrize("grid", [False, True], ids=["pooled", "grid"])
def test_fixed_rows_decode_the_same(cfg, prompt, grid):
    settings = dict(features="grid", n_positions=5, mapper="mlp", bias=True) if grid else {}
    model = peaked(**settings)
    decoder = fixed(model, 9, cfg)
    for seed in (0, 1):  # nothing of the batch before is left
        embeddings = images(9, seed, **settings)
        wanted = generate(model, embeddings, IDS, cfg, prompt)
        assert_same(generate(decoder, embeddings, IDS, cfg, prompt), wanted)


@each_strategy
def test_fixed_rows_take_the_weights_of_now(cfg):
    """Those of before gave no numbers. What nothing sees counts 0 times, and 0 * nan is nan."""
    model, embeddings = peaked(), images(6)
    broken = peaked()
    broken.transformer.wpe.weight.data.fill_(math.nan)
    decoder = fixed(broken, 6, cfg)
    with torch.inference_mode():
        decoder.prefill(embeddings)
        decoder.step(torch.full((6,), BOS), 0, None, None)
    assert decoder.kv.isnan().any()
    decoder.load(model)
    found = generate(decoder, embeddings, IDS, cfg)
    assert_same(found, generate(model, embeddings, IDS, cfg))


def test_a_copy_has_the_precision_of_autocast():
    model, embeddings, cfg = peaked(vocab_size=30).float(), images(12), Decoding(max_len=14)
    with torch.autocast("cpu", torch.bfloat16):
        decoder = fixed(model, 12, cfg)
        found, wanted = (generate(m, embeddings, IDS, cfg) for m in (decoder, model))
    kept = decoder.model.transformer
    assert {kept.wte.weight.dtype, kept.ln_f.weight.dtype} == {torch.float}
    assert {decoder.model.lm_head.weight.dtype, decoder.kv.dtype} == {torch.bfloat16}
    same = [a.ids == b.ids for (a,), (b,) in zip(found, wanted, strict=True)]
    assert sum(same) >= 10


class CountsReads(TorchDispatchMode):
    """Counts what makes a GPU's host wait: values that it reads, or that shapes depend on."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "item")

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function._overloadpacket.__name__ in self.NAMES
        return function(*args, **(kwargs or {}))


@each_strategy
def test_fixed_rows_read_one_flag_per_step(cfg):
    """The flag of the step before, which a GPU has by then. Each read of a newer value, or a list
    of ids as an index, would have the GPU wait for the host."""
    steps = []
    decoder = fixed(peaked(), 9, cfg)
    decoder.run_step = lambda: (steps.append(1), decoder.decode())
    with CountsReads() as count:
        generate(decoder, images(9), IDS, cfg)
    assert 0 < count.reads <= len(steps)


def test_a_cpu_decodes_without_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "with_graphs", None)
    assert len(generate(peaked(), images(2), IDS, Decoding(max_len=8))) == 2


def test_self_critical_training_makes_each_graph_once(monkeypatch):
    """`bench.py scst` made each again in each turn: a step's, and the usual way's two."""
    made, GraphedDecoder = [], graphs.GraphedDecoder

    def make(model, B, K, max_len):
        made.append((B, K))
        return GraphedDecoder(model, B, K, max_len, graph=False)

    monkeypatch.setattr(graphs, "GraphedDecoder", make)
    model = peaked()
    for B, K in 2 * [(4, 5), (4, 1), (20, 1)]:
        graphs.with_graphs(model, images(B), K, 8)
    assert made == [(4, 5), (4, 1), (20, 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_strategy
def test_a_graph_decodes_the_same(cfg, monkeypatch):
    model, embeddings = peaked().cuda(), images(9).cuda()
    found = [generate(model, embeddings, IDS, cfg) for _ in range(2)]
    assert len(graphs.DECODERS[model]) == 1
    monkeypatch.setattr(graphs, "MOST_ROWS", 0)
    for each in found:
        assert_same(each, generate(model, embeddings, IDS, cfg))


# ---------------------------------------------------------------------------------------------
# Sampling


def test_topk_is_sampling_from_the_50_most_likely():
    """The original system had it as a method of its own."""
    model, embeddings = peaked(vocab_size=200), images(8)
    for top_k in (0, 3):
        topk = Decoding(method="topk", top_k=top_k, max_len=14)
        same = Decoding(method="sample", top_k=top_k or 50, max_len=14)
        assert generate(model, embeddings, IDS, topk) == generate(model, embeddings, IDS, same)
    assert generate(model, embeddings, IDS, replace(topk, seed=1, temperature=0.5, n_best=2))


def test_the_default_limit_holds_the_longest_caption_of_the_data():
    """Captions were cut at 40 tokens, whatever the data had."""
    model = peaked(block_size=100)
    room = 100 - model.cfg.prefix_length
    for longest, limit in ((0, 40), (30, 40), (60, 60), (500, room)):
        cut = generate(model, images(3), IDS, Decoding(min_len=limit), longest=longest)
        assert [(len(c.ids), len(c.logprobs), c.ended) for (c,) in cut] == [
            (limit, limit, False)
        ] * 3
    ended = [c for (c,) in generate(model, images(8), IDS, Decoding()) if c.ended]
    assert ended and all(len(c.logprobs) == len(c.ids) + 1 for c in ended)


def test_one_seed_repeats_two_seeds_differ():
    model, embeddings, cfg = peaked(), images(8), Decoding(method="sample", n_best=2, max_len=14)
    first = generate(model, embeddings, IDS, cfg)
    assert generate(model, embeddings, IDS, cfg) == first
    assert generate(model, embeddings, IDS, replace(cfg, seed=1)) != first
    assert any(a.ids != b.ids for a, b in first)  # the samples of an image are independent
    same = images(1).expand(8, -1, -1)
    found = {tuple(image[0].ids) for image in generate(model, same, IDS, cfg)}
    assert len(found) > 1  # and so are those of two images that look alike


def test_more_samples_begin_with_the_same():
    model, embeddings, cfg = peaked(), images(5), Decoding(method="sample", max_len=14)
    one, three = (generate(model, embeddings, IDS, replace(cfg, n_best=n)) for n in (1, 3))
    assert_same([image[:1] for image in three], one)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"temperature": 0.6}, {"top_k": 3},
     {"temperature": 2.5, "top_p": 0.8}, {"temperature": 4.0, "top_k": 6, "top_p": 0.7}],
    ids=str,
)  # fmt: skip
def test_sampled_frequencies_fit_the_distribution(options):
    """Of 20,000 first two tokens: temperature first, then top-k, then top-p of what is left."""
    model, embedding = peaked(0), images(1)[0]
    cfg = Decoding(method="sample", min_len=0, max_len=2, n_best=1000, **options)
    found = generate(model, embedding.expand(20, 1, 8), IDS, cfg)

    def following(ids):
        logits = recomputed(model, embedding, ids)[-1]
        logits[[PAD, BOS, UNK]] = -math.inf
        p = torch.softmax(logits / cfg.temperature, 0).tolist()
        ranked = sorted(range(len(p)), key=lambda i: -p[i])[: cfg.top_k or None]
        kept, whole = {}, sum(p[i] for i in ranked)
        for i in ranked:
            if sum(kept.values()) < cfg.top_p * whole:
                kept[i] = p[i]
        return {i: x / sum(kept.values()) for i, x in kept.items() if x > 0}

    expected = {}
    for first, p in following([]).items():
        for second, q in following([first]).items() if first != EOS else [(None, 1.0)]:
            ids = [i for i in (first, second) if i not in (EOS, None)]
            expected[tuple(ids)] = p * q
    counts = dict.fromkeys(expected, 0)
    for image in found:
        for caption in image:
            counts[tuple(caption.ids)] += 1  # a KeyError: drawn, but cannot be
    often = [c for c in expected if expected[c] * 20_000 >= 5]
    rest = [c for c in expected if c not in often]
    seen = [counts[c] for c in often] + [sum(counts[c] for c in rest)]
    wanted = [20_000 * expected[c] for c in often] + [20_000 * sum(expected[c] for c in rest)]
    if not rest:
        seen, wanted = seen[:-1], wanted[:-1]
    assert len(often) >= 3
    assert chisquare(seen, [w * sum(seen) / sum(wanted) for w in wanted]).pvalue > 1e-3


def test_a_draw_inverts_the_distribution():
    logits = torch.tensor([[0.1, 0.5, 0.0, 0.4]]).log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001, 1 - 2**-24], dtype=torch.float64)
    assert sample_token(logits, uniform, Decoding(method="sample")).tolist() == [0, 0, 1, 1, 3, 3]
    kept = Decoding(method="sample", top_k=2)  # the most likely first: 5/9 and 4/9
    assert sample_token(logits, uniform, kept).tolist() == [1, 1, 1, 3, 3, 3]
    kept = Decoding(method="sample", top_p=0.45)  # the first alone reaches it
    assert sample_token(logits, uniform, kept).tolist() == [1] * 6


def test_filters_that_keep_one_token_are_greedy():
    model, embeddings = peaked(), images(8)
    greedy = generate(model, embeddings, IDS, Decoding(max_len=14))
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        cfg = Decoding(method="sample", max_len=14, **options)
        assert_same(generate(model, embeddings, IDS, cfg), greedy)


# ---------------------------------------------------------------------------------------------
# Prompts, lengths, n-grams


@each_strategy
def test_captions_continue_the_prompt(cfg):
    model, embeddings = peaked(), images(6)
    for image in generate(model, embeddings, IDS, cfg, prompt="5 9 5"):
        for c in image:
            assert c.ids[:3] == [5, 9, 5]
            assert len(c.logprobs) == len((c.ids + [EOS])[: cfg.max_len]) - 3


def test_a_prompt_that_greedy_would_write_changes_nothing():
    model, embeddings, cfg = peaked(), images(8), Decoding(max_len=14)
    for embedding, (free,) in zip(embeddings, generate(model, embeddings, IDS, cfg), strict=True):
        begun = " ".join(map(str, free.ids[:-1]))
        ((c,),) = generate(model, embedding[None], IDS, cfg, begun)
        assert c.ids == free.ids
        assert c.logprobs == pytest.approx(free.logprobs[len(free.ids) - 1 :], abs=1e-5)


@each_strategy
@pytest.mark.parametrize("low, high", [(0, 3), (5, 5), (4, 9), (21, 21)])
def test_lengths_are_kept(cfg, low, high):
    cfg = replace(cfg, min_len=low, max_len=high, no_repeat_ngram=0)
    found = generate(peaked(), images(10), IDS, cfg)
    assert all(low <= len(c.ids) <= high for image in found for c in image)
    special = {PAD, BOS, EOS, UNK}
    assert not any(special & set(c.ids) for image in found for c in image)


@each_strategy
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_occurs_twice(cfg, n):
    cfg = replace(cfg, no_repeat_ngram=n, max_len=18)
    prompt = "4 5 6 7"
    for image in generate(peaked(), images(10), IDS, cfg, prompt):
        for c in image:
            grams = list(zip(*(c.ids[i:] for i in range(n)), strict=False))
            assert len(grams) == len(set(grams))


def test_where_only_the_end_is_left_min_len_yields():
    """Eight words, none twice, but ten asked for: NaN and pad came out before."""
    for cfg in STRATEGIES.values():
        cfg = replace(cfg, no_repeat_ngram=1, min_len=10)
        for image in generate(peaked(), images(3), IDS, cfg):
            assert image and all(sorted(c.ids) == list(range(4, 12)) for c in image)


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "settings, says",
    [({"method": "top_k"}, "method: expected one of greedy sample beam topk, got `top_k`"),
     ({"method": "beam", "beams": 0}, "beams: expected 1 <= beams <= 1000, got `0`"),
     ({"method": "sample", "top_p": 0.0}, "top_p: expected a number above 0, got `0`"),
     ({"method": "sample", "top_p": 1.5}, "top_p: expected 0 <= top_p <= 1, got `1.5`"),
     ({"method": "sample", "top_p": math.nan}, "top_p: expected 0 <= top_p <= 1, got `nan`"),
     ({"method": "sample", "top_k": -1}, "top_k: expected 0 <= top_k"),
     ({"method": "sample", "temperature": 0.0}, "temperature: expected a number above 0"),
     ({"method": "sample", "temperature": 1e-50}, "temperature: expected a number above 0"),
     ({"method": "sample", "top_p": 1e-50}, "top_p: expected a number above 0, got `0`"),
     ({"method": "sample", "temperature": -1.0}, "temperature: expected 0 <= temperature"),
     ({"method": "sample", "temperature": math.inf}, "temperature: expected 0 <= temperature"),
     ({"method": "sample", "n_best": 0}, "n_best: expected 1 <= n_best"),
     ({"method": "sample", "seed": -1}, "seed: expected 0 <= seed"),
     ({"method": "beam", "length_penalty": math.nan}, "length_penalty: expected -10 <="),
     ({"n_best": 2}, "n_best: expected at most 1 with --method=greedy, got `2`"),
     ({"method": "beam", "beams": 3, "n_best": 4}, "n_best: expected at most 3 with --method=beam"),
     ({"max_len": -1}, "max_len: expected 0 <= max_len"),
     ({"min_len": 8, "max_len": 7}, "min_len: expected at most max_len=7, got `8`"),
     ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected 0 <= no_repeat_ngram"),
     ({"top_p": 0.9}, "top_p: does nothing without --method=sample"),
     ({"length_penalty": 1.0}, "length_penalty: does nothing without --method=beam"),
     ({"method": "beam", "temperature": 0.5}, "temperature: does nothing without --method=sample")],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_one_clear_line(settings, says):
    with pytest.raises(UserError) as error:
        Decoding(**settings)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_the_block_is_one_clear_line():
    model, embeddings = peaked(), images(1)  # a block of 24, 3 of them prefix
    with pytest.raises(UserError, match="max_len=22 exceeds the 21 tokens that block_size"):
        generate(model, embeddings, IDS, Decoding(max_len=22))
    with pytest.raises(UserError, match="min_len: expected at most max_len=21"):
        generate(model, embeddings, IDS, Decoding(min_len=30))
    assert generate(model, embeddings, IDS, Decoding()) == generate(
        model, embeddings, IDS, Decoding(max_len=21)
    )
    with pytest.raises(UserError, match="prompt has 6 tokens, max_len=6 leaves none"):
        generate(model, embeddings, IDS, Decoding(max_len=6), prompt="4 5 6 7 8 9")
    generate(model, embeddings, IDS, Decoding(max_len=21), prompt="4 " * 20)


# ---------------------------------------------------------------------------------------------
# GPT-2's own decoding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"min_len": 4, "no_repeat_ngram": 2}, {"length_penalty": 0.6}], ids=str
)
def test_transformers_finds_the_same(bias, options):
    """`GPT2LMHeadModel.generate` with the same weights: greedy, and beam search of width 5."""
    pytest.importorskip("transformers")
    plain = peaked(6, vocab_size=40)
    model = peaked(6, vocab_size=40, bias=bias)
    model.load_state_dict(plain.state_dict(), strict=False)
    for name, p in model.named_parameters():
        if p.dim() == 1 and name not in plain.state_dict():
            torch.nn.init.normal_(p, std=0.1)
    gpt2, embeddings = as_gpt2(model), images(40)
    for method in ("greedy", "beam") if "length_penalty" not in options else ("beam",):
        cfg = Decoding(method=method, max_len=20, **options)
        ours = [found[0].ids for found in generate(model, embeddings, IDS, cfg)]
        assert their_captions(gpt2, model, embeddings, IDS, cfg) == ours
        assert len({len(ids) for ids in ours}) > 3
