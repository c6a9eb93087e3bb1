"""Score captions as the COCO toolkit does, without Java, and add METEOR if Java is installed.

    python metrics.py predictions.json references.json         # COCO results and annotations
    python metrics.py predictions.csv references.json          # our own CSV
    python metrics.py predictions.json references.json --java  # the toolkit's tokenizer
    python metrics.py predictions.json references.json --df=train.json  # document frequencies
    python metrics.py predictions.json references.json --training=train.json  # novel captions
    python metrics.py predictions.json references.json --tokens=characters  # Chinese, Thai, …

The last line is JSON. Scores are fractions, as the toolkit prints them (CIDEr-D is 0 to 10).
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import csv
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sacrebleu

from configurator import configure, one_of
from parts.common import UserError, csv_reader, read_json, run

VERSION = "1.1"  # of the scores: raised whenever a change here can move one
NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR")

# ---------------------------------------------------------------------------------------------
# The metrics. A caption is a string of tokens with single spaces between them, or empty.


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple:
    """Return BLEU-1…4 of the corpus, (4,), and of each image, (images, 4).

    Unsmoothed (Papineni et al. 2002). sacrebleu counts; the last step is the toolkit's, whose
    1e-15 and 1e-9 stand in for zeros.
    """
    # effective_order only silences a warning: the counts are the same
    options = {"tokenize": "none", "force": True, "smooth_method": "none", "effective_order": True}
    counter = sacrebleu.BLEU(**options)
    stats = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
        s = counter.sentence_score(hypothesis, list(group))
        stats.append([*s.counts, *s.totals, s.sys_len, s.ref_len])
    stats = np.array([np.sum(stats, 0), *stats], float)  # (1 + images, 10), the corpus first
    precision = (stats[:, :4] + 1e-15) / (stats[:, 4:8] + 1e-9)
    ratio = (stats[:, 8:9] + 1e-15) / (stats[:, 9:] + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    scores = precision.cumprod(1) ** (1 / np.arange(1, 5)) * brevity  # (1 + images, 4)
    return scores[0], scores[1:]


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return ROUGE-L of each image, (images,): F of the best precision and recall (Lin 2004)."""
    beta = 1.2  # recall counts more than precision
    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True)):
        words = hypothesis.split(" ")  # as the toolkit splits: an empty caption is one empty word
        positions: dict[str, int] = {}  # word -> a bit for each of its positions
        for position, word in enumerate(words):
            positions[word] = positions.get(word, 0) | 1 << position
        full = (1 << len(words)) - 1
        precision = recall = 0.0
        for reference in group:
            reference_words = reference.split(" ")
            row = full  # of the longest-common-subsequence table: 0 bits are steps (Hyyrö 2004)
            for word in reference_words:
                if match := row & positions.get(word, 0):
                    row = (row + match | row - match) & full
            lcs = len(words) - row.bit_count()
            precision = max(precision, lcs / len(words))
            recall = max(recall, lcs / len(reference_words))
        if recall:
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
LAST = np.uint64(2**64 - 1)  # the last key of each table; stands for keys that are not in it
END = "\n"  # the end token: no caption can contain it as a word


@functools.lru_cache(maxsize=1 << 17)
def word_key(word: str) -> int:
    """Return 64 bits that stand for a word, in every process the same (hash() differs)."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def ngram_keys(captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all n-grams of the captions, n = 1…4: caption, n - 1 and 64-bit key, each (ngrams,).

    Among ten million distinct n-grams, two share a key with probability 3e-6.
    """
    lengths = [len(words) for words in captions]
    caption = np.repeat(np.arange(len(captions)), lengths)  # (words,)
    all_words = itertools.chain.from_iterable(captions)
    key = words = np.fromiter(map(word_key, all_words), np.uint64, len(caption))
    parts = []
    for n in range(4):
        if n:
            key = key[:-1] * MULTIPLIER + words[n:]
        first = caption[: len(key)]
        inside = first == caption[n:]  # else the n-gram runs on into the next caption
        parts.append((first[inside], np.full(inside.sum(), n), key[inside]))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def look_up(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the index of each key in a sorted table that ends in LAST; -1 if it is not there."""
    order = keys.argsort()  # sorted keys are found in half the time
    index = np.empty(len(keys), np.int64)
    index[order] = np.searchsorted(table, keys[order])
    return np.where(table[index] == keys, index, -1)


def nonzero(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what table.nonzero() does, in a fifth of its time."""
    return np.unravel_index(np.flatnonzero(table != 0), table.shape)


class CiderD:
    """CIDEr-D against fixed references (Vedantam et al. 2015): n = 1…4, clipped, σ = 6, times 10.

    Document frequencies and reference vectors are computed once, from the captions of each image;
    `score` then takes microseconds per caption, for validation or as a reward.

    `end_token` counts the end as a word, so that a reward sees "a dog with a" break off. If given,
    the frequencies are those of another CiderD, `document_frequencies`. With `tokenize=str.split`,
    captions are strings of tokens; by default, `tokenizer_for` tells how to tokenize them. Raise
    UserError if an image has no references, ValueError if only one of the two CiderDs counts the
    end.
    """

    def __init__(
        self, references: Sequence[Sequence[str]], end_token: bool = False,
        document_frequencies: "CiderD | None" = None, tokenize: Callable | None = None,
    ):  # fmt: skip
        self.end = [END] * end_token
        self.counts = np.array([len(group) for group in references], np.int64)  # (images,)
        if not len(references):
            raise UserError("CIDEr-D: there are no references")
        if not self.counts.all():
            raise UserError(f"CIDEr-D: image {self.counts.argmin()} has no references: add some")
        self.tokenize = tokenize or tokenizer_for(references)
        n_images = len(references)
        most = self.counts.max()  # references of an image
        image = np.repeat(np.arange(n_images), self.counts)  # of each caption
        slot = np.concatenate([np.arange(n) for n in self.counts])  # of a caption in its image
        words = [[*self.tokenize(c), *self.end] for group in references for c in group]
        self.lengths = np.zeros((n_images, most))  # at least 1: the toolkit counts bigrams
        self.lengths[image, slot] = [max(1, len(w)) for w in words]

        caption, order, gram = ngram_keys(words)
        pairs = gram * MULTIPLIER + image[caption].astype(np.uint64)  # of n-gram and image
        pairs, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        self.pairs = np.append(pairs, LAST)
        tf = np.bincount(inverse * most + slot[caption], minlength=len(self.pairs) * most)
        small = np.min_scalar_type(tf.max())  # COCO has 17 million pairs
        self.tf = tf.reshape(-1, most).astype(small)  # (pairs + 1, most); the last row is 0
        gram = gram[first]
        row = image[caption[first]] * 4 + order[first]

        self.frequencies = self
        if document_frequencies is None:
            grams, known, df = np.unique(gram, return_inverse=True, return_counts=True)
            self.grams = np.append(grams, LAST)
            self.idf = np.log(n_images) - np.log(np.append(df, 1))  # the last: of unseen n-grams
        elif document_frequencies.end != self.end:
            raise ValueError("CIDEr-D: frequencies with and without the end token do not mix")
        else:
            self.frequencies = document_frequencies.frequencies
            known = look_up(self.frequencies.grams, gram)
        idf = self.frequencies.idf[known]
        pair, slot = nonzero(self.tf[:-1])
        squares = (self.tf[pair, slot] * idf[pair]) ** 2
        squares = np.bincount(row[pair] * most + slot, squares, n_images * 4 * most)
        self.norms = np.sqrt(squares).reshape(n_images, 4, most)

    def score(
        self, images: Sequence[int], captions: Sequence[str], ended: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Return CIDEr-D of each caption, (captions,), from 0 to 10.

        images[i] is an index into the references: the image that captions[i] describes. ended[i]
        tells whether captions[i] has an end to count, or was cut off; by default, all have.
        """
        images = np.asarray(images, np.int64)
        n = len(captions)
        if len(images) != n:
            raise ValueError(f"CIDEr-D: {n} captions, {len(images)} images: give as many of each")
        if ended is None:
            ended = [True] * n
        ends = [self.end if end else [] for end in ended]
        words = [[*self.tokenize(c), *end] for c, end in zip(captions, ends, strict=True)]
        caption, order, gram = ngram_keys(words)
        pairs = gram * MULTIPLIER + caption.astype(np.uint64)
        _, first, tf = np.unique(pairs, return_index=True, return_counts=True)
        caption = caption[first]
        gram = gram[first]
        row = caption * 4 + order[first]
        idf = self.frequencies.idf[look_up(self.frequencies.grams, gram)]
        norm = np.sqrt(np.bincount(row, (tf * idf) ** 2, n * 4)).reshape(n, 4, 1)

        pairs = gram * MULTIPLIER + images[caption].astype(np.uint64)
        reference_tf = self.tf[look_up(self.pairs, pairs)]  # (ngrams, most)
        most = reference_tf.shape[1]
        i, slot = nonzero(reference_tf)  # a few: most n-grams are in few references
        t = reference_tf[i, slot]
        products = np.minimum(tf[i], t) * t * idf[i] ** 2
        dots = np.bincount(row[i] * most + slot, products, n * 4 * most).reshape(n, 4, most)
        scale = norm * self.norms[images]  # (captions, 4, most), as dots
        cosine = np.divide(dots, scale, out=np.zeros(dots.shape), where=scale > 0)
        lengths = np.array([max(1, len(w)) for w in words])
        delta = lengths[:, None] - self.lengths[images]  # (captions, most)
        penalty = np.exp(-(delta**2) / (2 * 6.0**2))
        return 10 * (cosine.mean(1) * penalty).sum(1) / self.counts[images]

    def agreement(
        self, candidates: Sequence[str], references: Sequence[str] | None = None
    ) -> np.ndarray:
        """Return the mean CIDEr-D of each candidate against `references`, (candidates,).

        If None, against the other candidates: minimum Bayes risk (Kumar & Byrne 2004,
        aclanthology.org/N04-1022). Document frequencies are those of this CiderD.
        """
        n = len(candidates)
        group = [references or candidates]
        others = CiderD(group, bool(self.end), self.frequencies, self.tokenize)
        scores = others.score([0] * n, candidates)
        if references is None:
            # without the score against itself: 10, less for a caption shorter than four words
            own = 2.5 * (others.norms[0] > 0).sum(0)
            scores = (n * scores - own) / max(1, n - 1)
        return scores


# Articles, conjunctions, prepositions and the like that end fewer than one in 1,000 of the captions
# that people wrote for Flickr8k. Others ("down", "outside") do end captions.
BAD_ENDINGS = frozenset(
    "a an the his its their this that these those some every and or but nor as than because if "
    "while when where which who about after against among at before between beside for from in "
    "into like near of onto through to toward towards under upon with without is are".split()
)


def diversity(captions: Sequence[str], training: Iterable[str] = ()) -> dict[str, float | None]:
    """Return how varied captions are (van Miltenburg et al. 2018, aclanthology.org/C18-1147).

    distinct      share of different captions
    novel         share that is not among the training captions; None without them
    distinct_1    different words / all words; distinct_2 is the same of pairs of words (Li et al.
                  2016, arXiv:1510.03055). Like vocabulary, comparable for the same images only
    vocabulary    number of different words
    length        mean number of words; length_std is their standard deviation
    bad_endings   share that ends in one of BAD_ENDINGS (Guo et al. 2018, arXiv:1809.06227)
    """
    split = [caption.split() for caption in captions]
    words = list(itertools.chain.from_iterable(split))
    pairs = [pair for own in split for pair in itertools.pairwise(own)]
    lengths = list(map(len, split))
    known = set(training)
    return {
        "distinct": len(set(captions)) / len(captions),
        "novel": float(np.mean([c not in known for c in captions])) if known else None,
        "distinct_1": len(set(words)) / max(1, len(words)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "vocabulary": len(set(words)),
        "length": float(np.mean(lengths)),
        "length_std": float(np.std(lengths)),
        "bad_endings": float(np.mean([not BAD_ENDINGS.isdisjoint(own[-1:]) for own in split])),
    }


def clip_score(image: np.ndarray, caption: np.ndarray, references: np.ndarray) -> dict:
    """Return CLIPScore and, if there are references, RefCLIPScore of a caption.

    image (D,), caption (D,) and references (R, D) are embeddings by one CLIP, of length 1 (Hessel
    et al. 2021, arXiv:2104.08718).
    """
    scores = {"CLIPScore": 2.5 * max(0.0, float(image @ caption))}
    if len(references):
        pair = scores["CLIPScore"], max(0.0, float((references @ caption).max()))
        scores["RefCLIPScore"] = 2 * math.prod(pair) / max(1e-12, sum(pair))  # harmonic mean
    return scores


# ---------------------------------------------------------------------------------------------
# All metrics together; METEOR and `java` need the toolkit's Java programs


def java_missing(tokens: str = "words") -> str | None:
    """Return None if the toolkit's Java programs can run, else one line on what they need."""
    if tokens == "characters":
        return "METEOR and --java count words: leave out --tokens=characters"
    package = importlib.util.find_spec("pycocoevalcap")
    needed = {"java": shutil.which("java"), "pycocoevalcap": package}
    missing = " and ".join(name for name, place in needed.items() if not place)
    if not missing:
        return None
    install = "install a Java runtime (8 or later) and `pip install -r requirements-coco.txt`"
    return f"METEOR and --java need {missing}: {install}"


def java_tokenize(captions: Sequence[str]) -> list[str]:
    """Return the token strings of captions by the toolkit's PTBTokenizer, in one run of Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Java also ends a line at \r or U+2028, which would shift every later caption by one, and half
    # a surrogate pair cannot be encoded
    lines = [" ".join(c.encode("utf-8", "ignore").decode().split()) for c in captions]
    tokens = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if len(tokens) != len(captions):
        raise UserError(f"Java tokenized {len(tokens)} of {len(captions)} captions: see above")
    return [tokens[i][0] for i in range(len(captions))]


def java_meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple:
    """Return METEOR 1.5 (Denkowski and Lavie 2014): the jar's aggregate, and each image's."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    groups = {i: list(group) for i, group in enumerate(references)}
    try:
        return meteor.compute_score(groups, {i: [h] for i, h in enumerate(hypotheses)})
    finally:
        if meteor.lock.locked():  # after Ctrl-C; its __del__ would wait for the lock forever
            meteor.lock.release()


def token_strings(
    groups: Iterable[Sequence[str]], java: bool = False, tokens: str = "words"
) -> list[list[str]]:
    """Return groups of captions as groups of token strings."""
    if not java:
        split = {"words": tokenize, "characters": characters}[tokens]
        return [[" ".join(split(caption)) for caption in group] for group in groups]
    groups = list(groups)
    strings = iter(java_tokenize(list(itertools.chain.from_iterable(groups))))
    return [[next(strings) for _ in group] for group in groups]


def refuse_images(images: list, what: str, mend: str) -> None:
    """Raise UserError if there are any `images`, those at fault."""
    if images:
        raise UserError(f"{what} {len(images)} images, for example {images[0]!r}: {mend}")


def score(
    hypotheses: Mapping, references: Mapping, *, java: bool = False, meteor: bool = False,
    document_frequencies: CiderD | None = None, tokens: str = "words",
) -> tuple[dict[str, float | None], dict]:  # fmt: skip
    """Return the scores of {id: caption} against {id: captions}, by the toolkit's names (NAMES).

    They are {name: score} of the corpus, and {id: {name: score}}. `references` may hold more images
    than are scored: CIDEr's document frequencies come from all of them, so that a part of a split
    is scored like the whole, or else from `document_frequencies`. `java` tokenizes with the
    toolkit's program. `meteor` runs its METEOR; without it, the corpus has None, an image nothing.
    `tokens` is "words" or "characters".
    Raise UserError if a caption has no references, or if there is no caption.
    """
    references = {i: group for i, group in references.items() if group}
    unknown = [i for i in hypotheses if i not in references]
    refuse_images(unknown, "no references for", "add them or drop these captions")
    if not hypotheses:
        raise UserError("there are no captions to score")

    (captions,) = token_strings([hypotheses.values()], java, tokens)
    groups = token_strings(references.values(), java, tokens)
    index = {i: n for n, i in enumerate(references)}
    images = [index[i] for i in hypotheses]
    own = [groups[n] for n in images]
    cider_d = CiderD(groups, document_frequencies=document_frequencies, tokenize=str.split)

    corpus_bleu, bleus = bleu(captions, own)
    rouges = rouge_l(captions, own)
    ciders = cider_d.score(images, captions)
    corpus = [*corpus_bleu, rouges.mean(), ciders.mean()]
    columns = [*bleus.T, rouges, ciders]
    if meteor:
        aggregate, meteors = java_meteor(captions, own)
        corpus.append(aggregate)
        columns.append(meteors)

    table = np.array([corpus, *zip(*columns, strict=True)], float).tolist()
    # METEOR, the last name, may have no column
    named, *per_image = [dict(zip(NAMES, row, strict=False)) for row in table]
    return dict.fromkeys(NAMES) | named, dict(zip(hypotheses, per_image, strict=True))


def signature(
    hypotheses, references, java=False, meteor=False, document_frequencies=None, tokens="words"
) -> str:
    """Return how `score` computes, given the same arguments. Scores compare only if it is equal."""
    counts = {len(references[i]) for i in hypotheses}  # references per image
    refs = "-".join(map(str, sorted({min(counts), max(counts)})))
    df = f"references({sum(map(bool, references.values()))})"  # images whose n-grams are counted
    if document_frequencies is not None:
        df = f"given({len(document_frequencies.frequencies.counts)})"
    tok = {"words": "ptb-regex", "characters": "characters"}[tokens]
    if java:
        tok = "ptb-java"
    version = {True: "1.5-java", False: "no"}[meteor]
    return (
        f"nanocaption:{VERSION}|tok:{tok}|refs:{refs}|df:{df}"
        f"|bleu:sacrebleu-{sacrebleu.__version__}|cider:D|meteor:{version}"
    )


def evaluate(
    hypotheses: Mapping, references: Mapping, training: Iterable[Sequence[str]] = (), **options
) -> tuple[dict, dict]:
    """Return a results line, and the scores of each image, as `score` does with these options.

    The line holds the scores, METEOR's if Java can run, how varied the captions are, and the
    signature. training: token strings of the training captions, which are not novel.
    """
    tokens = options.setdefault("tokens", "words")
    options["meteor"] = java_missing(tokens) is None
    if tokens == "words" and tokenizer_for([hypotheses.values()]) is characters:
        print("captions in a script without spaces are one token each: set --tokens=characters")
    corpus, per_image = score(hypotheses, references, **options)
    (captions,) = token_strings([hypotheses.values()], tokens=tokens)
    varied = diversity(captions, itertools.chain.from_iterable(training))
    how = signature(hypotheses, references, **options)
    return corpus | {"diversity": varied, "signature": how}, per_image


# ---------------------------------------------------------------------------------------------
# Files, and the command


@dataclass(frozen=True)
class MetricsConfig:
    predictions: str  # COCO results (.json) or our CSV, one caption per image
    references: str  # COCO annotations (.json) of at least these images
    java: bool = False  # tokenize with the toolkit's program
    tokens: str = "words"  # words, or characters for scripts without spaces
    training: str = ""  # annotation file of the training captions, which are not novel
    # Where CIDEr counts document frequencies: in all of the references, in those of the scored
    # images (the toolkit's way), or in another annotation file
    df: str = "references"  # references scored <file>

    def __post_init__(self):
        one_of(self, "tokens", "words characters")


def read_captions(path: str) -> list[dict]:
    """Return the rows of COCO annotations, COCO results or our CSV. A caption may be any value."""
    if Path(path).suffix.lower() == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv_reader(csv.DictReader, file)
                columns = reader.fieldnames or []
                rows = list(reader)
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is not CSV in UTF-8: {error}") from None
        for name in ("image_id", "caption"):
            if columns.count(name) > 1:
                raise UserError(f"{path}: {name} is there twice: rename one")
    else:
        rows = read_json(path)
    if isinstance(rows, dict):
        rows = rows.get("annotations")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no captions: give COCO results, annotations or our CSV")
    for n, row in enumerate(rows):
        named = isinstance(row, dict) and isinstance(row.get("image_id"), int | str)
        if not named or "caption" not in row:
            lacks = "lacks image_id (a number or a string) or caption"
            raise UserError(f"{path}: entry {n} {lacks}: {str(row)[:60]}")
        if None in row:  # where csv puts what the header has no name for
            raise UserError(f"{path}: entry {n} has too many cells: quote captions with commas")
    return rows


def read_references(path: str) -> tuple[dict, int]:
    """Return {id: captions} of COCO annotations, and how many captions were left out: not text."""
    rows = read_captions(path)
    references: dict = {}
    for row in rows:
        if isinstance(row["caption"], str):
            references.setdefault(row["image_id"], []).append(row["caption"])
    return references, len(rows) - sum(map(len, references.values()))


def read_predictions(path: str, references: Mapping) -> tuple[dict, int]:
    """Return {id: caption} of COCO results or our CSV, and how many captions are not text.

    Those are scored as empty. Raise UserError if an image has several captions or no references.
    """
    by_name = {str(i): i for i in references}  # a CSV has "42" for the references' 42
    rows = read_captions(path)
    counts = Counter(str(row["image_id"]) for row in rows)
    twice = [name for name, count in counts.items() if count > 1]
    refuse_images(twice, f"{path}: several captions of", "give one per image")
    unknown = [name for name in counts if name not in by_name]
    refuse_images(unknown, f"{path}: no references for", "add them or drop these captions")
    hypotheses = {by_name[str(row["image_id"])]: row["caption"] for row in rows}
    not_text = [i for i, caption in hypotheses.items() if not isinstance(caption, str)]
    return hypotheses | dict.fromkeys(not_text, ""), len(not_text)


def main(cfg: MetricsConfig) -> None:
    missing = java_missing(cfg.tokens)
    if cfg.java and missing:
        raise UserError(missing)
    references, references_not_text = read_references(cfg.references)
    hypotheses, not_text = read_predictions(cfg.predictions, references)
    training = []
    if cfg.training:
        known, _ = read_references(cfg.training)
        training = token_strings(known.values(), tokens=cfg.tokens)
    frequencies = None
    if cfg.df != "references":
        counted = {i: references[i] for i in hypotheses}
        if cfg.df != "scored":
            counted, _ = read_references(cfg.df)
        groups = token_strings(counted.values(), cfg.java, cfg.tokens)
        frequencies = CiderD(groups, tokenize=str.split)
    options = {"java": cfg.java, "tokens": cfg.tokens, "document_frequencies": frequencies}
    line, _ = evaluate(hypotheses, references, training, **options)
    (captions,) = token_strings([hypotheses.values()], tokens=cfg.tokens)
    counts = {
        "images": len(hypotheses),
        "references": sum(len(references[i]) for i in hypotheses),
        "references_without_predictions": len(references) - len(hypotheses),
        "empty_captions": captions.count("") - not_text,
        "not_text": not_text,
        "references_not_text": references_not_text,
    }

    shown = {name: line[name] for name in NAMES} | line["diversity"]
    absent = {"METEOR": missing, "novel": "give --training=annotations.json"}
    for name, value in shown.items():
        figure = f"       – {absent[name]}" if value is None else f"{value:8.4f}"
        print(f"{name:<11} {figure}")
    for name, count in counts.items():
        if count:
            print(f"{count:>8,} {name.replace('_', ' ')}")
    if len(references) > len(hypotheses) and cfg.df == "references":
        print("CIDEr's document frequencies are of all references; the toolkit's: --df=scored")
    print(json.dumps(line | {"counts": counts}))


# ---------------------------------------------------------------------------------------------
# Tokens: those of the toolkit's PTBTokenizer 3.4.1, after it has dropped punctuation
#
# Java takes the longest match of its hundred-odd rules; here the first match wins, so the order of
# the rules matters. Whatever none matches is dropped: quotes, commas, lone . ? ! : ; - and
# characters that Java does not know. Bounds such as {1,60} keep the time linear.
L = r"[^\W\d_]"  # a letter of any script
MARKS = (  # accents and vowel signs that are characters of their own; as far as Java knows them
    r"\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a"
    r"\u064b-\u065e\u0670\u06d6-\u06dd\u06df-\u06e8\u06ea-\u06ed\u070f-\u07f3\u0900-\u0903"
    r"\u093c-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u09e3\u0a01-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd"
    r"\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd\u1885-\u1886"
)
RUN = rf"[^\W_][\w{MARKS}]*"  # letters, digits, marks
ABBREVIATION = (  # these keep their period: always, …
    "adm ala? alex apr ariz assn attys? aug ave bancorp bhd blvd brig bros calif capt cf cmdr "
    "comdr col? colo conn corp cos cpl ct dak dec dept det drs? ed[.]d elec esq est etc ext "
    "feb fla fri ft ga gen govs? hon inc ind intl jan jos jr jul jun kans? ky lieut lt ltd maj "
    "mar md messrs mfg mich minn mo mon mont mrs? ms mt natl neb nev nov oct okla penn ph "
    "ph[.]d pfc plc pres profs? ptys? pvt rd reps? rev rt sens? sept? seq sgt spc sq sr ste? "
    "supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"
).replace(" ", "|")
# … if capitalised, and before a number
CAPITALISED = "Ark|Az|Bldg|Cie|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
BEFORE_NUMBER = "art|ca|figs?|nos?|op|pp|prop"
RULES = [
    r"https?://[^\s<>|()\"]{1,500}[^\s<>|().!?,{}\"-]",
    r"(?:www\.(?:[\w-]{1,60}\.){1,5}[a-z]{2,4}|(?:[^\W_][\w-]{0,60}\.){1,5}(?:com|net|org|edu))\b"
    r"(?:/[\w./?=&%~-]*\w)?",
    r"[a-z0-9][\w.+-]{0,60}@[\w-]{1,60}(?:\.[\w-]{1,60})*",
    r"[@#][a-z_]\w*|</?[a-z][^\s<>]*>|&(?:amp|lt|gt|quot);",  # names, <unk>, entities
    r"'t(?=is|was)|'n(?:'|\b)|(?<!\w)'(?:em|cause|till?|[2-9]0s|\d\d)(?![\w'])",  # 'tis
    rf"(?<!')'(?:s|m|d|re|ve|ll)(?!{L})|n['`]t(?!{L})|{L}*(?!n){L}(?=n['`]t)",  # do n't
    r"(?:can(?=not)|gon(?=na)|got(?=ta)|wan(?=na)|gim(?=me)|lem(?=me))(?=[a-z]{2,3}\b(?![-']\w))",
    r"ol'|somethin'|c'mon|e'er|ev'ry|li'l|nor'easter|s'mores|[jy]'(?=[^\W\d_]{2})",
    rf"(?!\w+'(?:s|m|d|re|ve|ll)\b)(?:(?-i:[A-HJ-XZn])'{L}{{2,}}"  # O'Neill
    rf"|{L}+[aeiouy]'(?:[aeiou]|(?-i:[A-Z])){L}*)",  # ho'ohu
    rf"{L}(?:\.{L})+\.(?:(?!{L})|(?=-\w))(?:-\w+)*|[a-z]\.(?!{L})",  # u.s.a. and initials
    rf"(?:{ABBREVIATION}|(?-i:{CAPITALISED}))\.(?!{L})|(?:{BEFORE_NUMBER})\.(?=\s*\d)",
    rf"{L}\w*(?:[.!?]{L}\w*)+(?:-\w+)*(?:\.(?=[,;:]))?",  # a space forgotten: ground.one
    r"\d*(?:[.,]\d+)+(?:-\w+)+|[-+]?\d*(?:(?<!\.)[.,:]\d+)+|(?<!\w)-\d+|\+\d+",  # 11:20
    r"(?:\d+-)?[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}",  # stop/arret 24/7
    r"(?-i:[A-Z]+(?:(?:&(?:amp;)?[A-Z]+)+|\$))",  # AT&T US$
    rf"(?:[dol]')?{RUN}(?:-(?:[dol]')?{RUN})*(?:\.(?=[,;:]))?",  # a word; t-shirt; o'clock
    r"[;:=][-o*']?(?-i:[()DPpdO\\{@|\[\]])(?!\w)",  # smileys
    r"[!?]{2,}|-{5,}|\*+|_+|[]$#%&+=/\\<>@^|~(){}[¡-©¬®-º¼-¿×÷€\u2190-\u2bff"
    r"\u055a-\u055f\u0589\u05be\u05c0\u05c3\u05f3\u05f4،؛؞؟٪٭۔।॥฿‚„-‣‰-‸※‾-⁂⁄\u2100-\u214f、。〒・"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65￠￡￥￦]",  # kept: of other scripts
]
TOKEN = re.compile("|".join(RULES), re.IGNORECASE)
CHUNK = re.compile(rf"(?:\b(?:{BEFORE_NUMBER})\.\s+(?=\d))?\S+", re.IGNORECASE)
ASCII = str.maketrans("‘’‛–—―", "`'`   ")
RENAMED = {
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "",
}  # fmt: skip


def tokenize(caption: str) -> list[str]:
    """Return the lower-case tokens of a caption, as the toolkit's Java tokenizer leaves them."""
    return [token for chunk in CHUNK.findall(caption) for token in tokenize_chunk(chunk)]


# Thai and Lao, Burmese, Khmer, kana, Han
SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def tokenizer_for(groups: Iterable[Iterable[str]]):
    """Return `characters` if most captions are in a script without spaces, else `tokenize`."""
    captions = itertools.chain.from_iterable(groups)
    spaceless = np.mean([bool(SPACELESS.search(caption)) for caption in captions])
    return characters if spaceless > 0.5 else tokenize


def characters(caption: str) -> list[str]:
    """Return the letters, marks and digits of a caption, in lower case."""
    return [c for c in caption.lower() if unicodedata.category(c)[0] in "LMN"]


@functools.lru_cache(maxsize=1 << 16)  # captions repeat their words
def tokenize_chunk(chunk: str) -> tuple[str, ...]:
    tokens = TOKEN.findall(chunk.translate(ASCII))
    text = " ".join(RENAMED.get(token, token) for token in tokens).replace("&amp;", "&").lower()
    return tuple(text.replace("(", "-lrb-").replace(")", "-rrb-").split())


if __name__ == "__main__":
    words = {"positional": "predictions references"}
    run(lambda: main(configure(MetricsConfig, sys.argv[1:], __doc__, **words)))
