"""
Caption metrics equal to the COCO toolkit's, without Java; METEOR where Java is there.

$ python metrics.py predictions.json references.json           # COCO results and annotations
$ python metrics.py predictions.csv references.json            # our own CSV
$ python metrics.py predictions.json references.json --java    # tokens and METEOR by the toolkit
$ python metrics.py predictions.json references.json --df train.json   # document frequencies

The last line is JSON. Figures are fractions, as the toolkit prints them (CIDEr-D is 0 to 10).
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sacrebleu

VERSION = "1.1"  # of the figures: raised whenever a change here can move one
NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR")

# -----------------------------------------------------------------------------
# tokens: what the toolkit's PTBTokenizer 3.4.1 leaves once it has dropped punctuation

# Java takes the longest match of its hundred-odd rules; here the first match wins, so the order of
# the rules matters. Whatever none matches is dropped: quotes, commas, lone . ? ! : ; - and
# characters that Java does not know. Bounds such as {1,60} keep the time linear.
_L = r"[^\W\d_]"  # a letter of any script
_MARKS = (  # accents and vowel signs that are characters of their own; as far as Java knows them
    r"\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a"
    r"\u064b-\u065e\u0670\u06d6-\u06dd\u06df-\u06e8\u06ea-\u06ed\u070f-\u07f3\u0900-\u0903"
    r"\u093c-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u09e3\u0a01-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd"
    r"\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd\u1885-\u1886"
)
_RUN = rf"[^\W_][\w{_MARKS}]*"  # letters, digits, marks
_ABBREVIATION, _CAPITALISED, _BEFORE_NUMBER = (  # they keep their period: always, or only if …
    words.replace(" ", "|")
    for words in (
        "adm ala? alex apr ariz assn attys? aug ave bancorp bhd blvd brig bros calif capt cf cmdr "
        "comdr col? colo conn corp cos cpl ct dak dec dept det drs? ed[.]d elec esq est etc ext "
        "feb fla fri ft ga gen govs? hon inc ind intl jan jos jr jul jun kans? ky lieut lt ltd maj "
        "mar md messrs mfg mich minn mo mon mont mrs? ms mt natl neb nev nov oct okla penn ph "
        "ph[.]d pfc plc pres profs? ptys? pvt rd reps? rev rt sens? sept? seq sgt spc sq sr ste? "
        "supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo",
        "Ark Az Bldg Cie Del Ill La Mass Miss Ore Pa Tex Wash",
        "art ca figs? nos? op pp prop",
    )
)
_RULES = [
    r"https?://[^\s<>|()\"]{1,500}[^\s<>|().!?,{}\"-]",
    r"(?:www\.(?:[\w-]{1,60}\.){1,5}[a-z]{2,4}|(?:[^\W_][\w-]{0,60}\.){1,5}(?:com|net|org|edu))\b"
    r"(?:/[\w./?=&%~-]*\w)?",
    r"[a-z0-9][\w.+-]{0,60}@[\w-]{1,60}(?:\.[\w-]{1,60})*",
    r"[@#][a-z_]\w*|</?[a-z][^\s<>]*>|&(?:amp|lt|gt|quot);",  # names, <unk>, entities
    r"'t(?=is|was)|'n(?:'|\b)|(?<!\w)'(?:em|cause|till?|[2-9]0s|\d\d)(?![\w'])",  # 'tis
    rf"(?<!')'(?:s|m|d|re|ve|ll)(?!{_L})|n['`]t(?!{_L})|{_L}*(?!n){_L}(?=n['`]t)",  # do n't
    r"(?:can(?=not)|gon(?=na)|got(?=ta)|wan(?=na)|gim(?=me)|lem(?=me))(?=[a-z]{2,3}\b(?![-']\w))",
    r"ol'|somethin'|c'mon|e'er|ev'ry|li'l|nor'easter|s'mores|[jy]'(?=[^\W\d_]{2})",
    rf"(?!\w+'(?:s|m|d|re|ve|ll)\b)(?:(?-i:[A-HJ-XZn])'{_L}{{2,}}"  # O'Neill
    rf"|{_L}+[aeiouy]'(?:[aeiou]|(?-i:[A-Z])){_L}*)",  # ho'ohu
    rf"{_L}(?:\.{_L})+\.(?:(?!{_L})|(?=-\w))(?:-\w+)*|[a-z]\.(?!{_L})",  # u.s.a. and initials
    rf"(?:{_ABBREVIATION}|(?-i:{_CAPITALISED}))\.(?!{_L})|(?:{_BEFORE_NUMBER})\.(?=\s*\d)",
    rf"{_L}\w*(?:[.!?]{_L}\w*)+(?:-\w+)*(?:\.(?=[,;:]))?",  # a space forgotten: ground.one
    r"\d*(?:[.,]\d+)+(?:-\w+)+|[-+]?\d*(?:(?<!\.)[.,:]\d+)+|(?<!\w)-\d+|\+\d+",  # 11:20
    r"(?:\d+-)?[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}",  # stop/arret 24/7
    r"(?-i:[A-Z]+(?:(?:&(?:amp;)?[A-Z]+)+|\$))",  # AT&T US$
    rf"(?:[dol]')?{_RUN}(?:-(?:[dol]')?{_RUN})*(?:\.(?=[,;:]))?",  # a word; t-shirt; o'clock
    r"[;:=][-o*']?(?-i:[()DPpdO\\{@|\[\]])(?!\w)",  # smileys
    r"[!?]{2,}|-{5,}|\*+|_+|[]$#%&+=/\\<>@^|~(){}[¡-©¬®-º¼-¿×÷€\u2190-\u2bff"
    r"\u055a-\u055f\u0589\u05be\u05c0\u05c3\u05f3\u05f4،؛؞؟٪٭۔।॥฿‚„-‣‰-‸※‾-⁂⁄\u2100-\u214f、。〒・"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65￠￡￥￦]",  # kept: of other scripts
]
_TOKEN = re.compile("|".join(_RULES), re.IGNORECASE)
_CHUNK = re.compile(rf"(?:\b(?:{_BEFORE_NUMBER})\.\s+(?=\d))?\S+", re.IGNORECASE)
_ASCII = str.maketrans("‘’‛–—―", "`'`   ")
_RENAMED = {
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "",
}  # fmt: skip


def tokenize(caption: str) -> list[str]:
    """The lower-case tokens of a caption, as the toolkit's Java tokenizer would leave them."""
    return [token for chunk in _CHUNK.findall(caption) for token in _tokenize_chunk(chunk)]


@functools.lru_cache(maxsize=1 << 16)  # captions repeat their words
def _tokenize_chunk(chunk: str) -> tuple[str, ...]:
    tokens = _TOKEN.findall(chunk.translate(_ASCII))
    text = " ".join(_RENAMED.get(token, token) for token in tokens).replace("&amp;", "&").lower()
    return tuple(text.replace("(", "-lrb-").replace(")", "-rrb-").split())


# -----------------------------------------------------------------------------
# the metrics, on token strings: tokens joined by single spaces, "" for an empty caption


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple:
    """BLEU-1…4, unsmoothed (Papineni et al. 2002): of the corpus (4,), of each of N images (N, 4).

    sacrebleu counts; the last step is the toolkit's, whose 1e-15 and 1e-9 stand in for zeros.
    """
    # effective_order only silences a warning: the counts are the same
    counter = sacrebleu.BLEU(
        tokenize="none", force=True, smooth_method="none", effective_order=True
    )
    stats = [
        counter.sentence_score(hypothesis, list(group))
        for hypothesis, group in zip(hypotheses, references, strict=True)
    ]
    correct = np.array([s.counts for s in stats], float)  # (N, 4)
    total = np.array([s.totals for s in stats], float)  # (N, 4)
    lengths = np.array([(s.sys_len, s.ref_len) for s in stats], float)  # (N, 2)

    def combine(correct: np.ndarray, total: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        precision = (correct + 1e-15) / (total + 1e-9)
        ratio = (lengths[..., :1] + 1e-15) / (lengths[..., 1:] + 1e-9)
        brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
        return precision.cumprod(axis=-1) ** (1 / np.arange(1, 5)) * brevity

    return combine(correct.sum(0), total.sum(0), lengths.sum(0)), combine(correct, total, lengths)


def rouge_l(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2
) -> np.ndarray:
    """ROUGE-L of N images, (N,): F of the best precision and the best recall (Lin 2004)."""
    scores = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
        words = hypothesis.split(" ")  # as the toolkit splits: an empty caption is one empty word
        where: dict[str, int] = {}  # word → bits of its positions
        for i, word in enumerate(words):
            where[word] = where.get(word, 0) | 1 << i
        full = (1 << len(words)) - 1
        precision = recall = 0.0
        for reference in group:
            others = reference.split(" ")
            row = full  # of the longest-common-subsequence table: 0 bits are steps (Hyyrö 2004)
            for word in others:
                if match := row & where.get(word, 0):
                    row = (row + match | row - match) & full
            lcs = len(words) - row.bit_count()
            precision, recall = max(precision, lcs / len(words)), max(recall, lcs / len(others))
        f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if recall else 0.0
        scores.append(f)
    return np.array(scores)


_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
_END = "\n"  # the end token: no caption can hold it as a word


@functools.lru_cache(maxsize=1 << 17)
def _word_key(word: str) -> int:
    """64 bits that stand for a word, the same in every process (Python's hash() is not)."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _ngrams(captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The M n-grams of some captions, n = 1…4: caption, n - 1, and a 64-bit key, each (M,).

    Among ten million distinct n-grams, two share a key with probability 3e-6.
    """
    lengths = [len(words) for words in captions]
    caption = np.repeat(np.arange(len(captions)), lengths)  # (T,)
    key = words = np.fromiter(
        map(_word_key, itertools.chain.from_iterable(captions)), np.uint64, len(caption)
    )
    found = []
    for n in range(4):
        if n:
            key = key[:-1] * _MIX + words[n:]
        start = caption[: len(key)]
        inside = start == caption[n:]  # or the n-gram runs on into the next caption
        found.append((start[inside], np.full(inside.sum(), n), key[inside]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _pair(key: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Keys of n-grams within their image or caption."""
    return key * _MIX + owner.astype(np.uint64)


def _lookup(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where M keys stand in a sorted table, and whether they do, each (M,)."""
    if not len(table):  # every reference is empty
        table = np.zeros(1, np.uint64)
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys


class CiderD:
    """CIDEr-D against fixed references (Vedantam et al. 2015): n = 1…4, clipped, σ = 6, × 10.

    Document frequencies and reference vectors are computed once, from the captions of N images;
    `score` then takes microseconds a caption, for validation or as a reward. Frequencies can come
    from `document_frequencies` instead: another reference set, or a CiderD to share with. With
    `end_token` the end counts as a word, so that a reward sees "a dog with a" break off.
    `tokenize=str.split` takes captions that are tokens already.
    Raises ValueError where an image has no references, or end tokens do not match.
    """

    SIGMA = 6.0

    def __init__(
        self, references: Sequence[Sequence[str]], end_token: bool = False,
        document_frequencies=None, tokenize=tokenize,
    ):  # fmt: skip
        self.end, self.tokenize = [_END] * end_token, tokenize
        self.counts = np.array([len(group) for group in references], np.int64)  # (N,), at most R
        if not self.counts.size or not self.counts.all():
            bare = f"image {self.counts.argmin()}" if self.counts.size else "the whole set"
            raise ValueError(f"CIDEr-D: {bare} has no references: give at least one for each image")
        N, R = len(self.counts), self.counts.max()
        image = np.repeat(np.arange(N), self.counts)  # of each caption
        slot = np.concatenate([np.arange(n) for n in self.counts])  # its place in the image
        captions = [self.tokenize(c) + self.end for group in references for c in group]
        self.lengths = np.zeros((N, R))
        self.lengths[image, slot] = self._lengths(captions)

        caption, order, gram = _ngrams(captions)
        self.pairs, first, inverse = np.unique(  # (E,): the distinct n-grams of each image
            _pair(gram, image[caption]), return_index=True, return_inverse=True
        )
        tf = np.bincount(inverse * R + slot[caption], minlength=len(first) * R).reshape(-1, R)
        self.tf = tf.astype(np.min_scalar_type(tf.max(initial=0)))  # (E, R): COCO's E is 17 million
        gram, order, image = gram[first], order[first], image[caption[first]]  # (E,)

        if document_frequencies is None:
            self.grams, where, df = np.unique(gram, return_inverse=True, return_counts=True)
            self.idf, self.images = np.log(N) - np.log(np.append(df, 1)), N  # df in images
            idf = self.idf[where]
        else:
            other = document_frequencies
            if not isinstance(other, CiderD):
                other = CiderD(other, end_token, tokenize=tokenize)
            if other.end != self.end:
                raise ValueError("CIDEr-D: frequencies with and without the end token do not mix")
            self.grams, self.idf, self.images = other.grams, other.idf, other.images
            idf = self._idf(gram)
        row = image * 4 + order
        squares = [np.bincount(row, (self.tf[:, r] * idf) ** 2, N * 4) for r in range(R)]
        self.norms = np.sqrt(squares).reshape(R, N, 4).transpose(1, 0, 2)  # (N, R, 4)

    @staticmethod
    def _lengths(captions: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([max(0, len(words) - 1) for words in captions])  # bigrams, as the toolkit

    def _idf(self, gram: np.ndarray) -> np.ndarray:
        index, known = _lookup(self.grams, gram)
        return self.idf[np.where(known, index, -1)]  # the last is that of an n-gram never seen

    def score(self, images: Sequence[int], captions: Sequence[str]) -> np.ndarray:
        """CIDEr-D of B captions, (B,), 0 to 10: images[b] is an index into `references`."""
        images, B = np.asarray(images, np.int64), len(captions)  # (B,)
        if len(images) != B:
            raise ValueError(f"CIDEr-D: {B} captions, {len(images)} images: give as many of each")
        words = [self.tokenize(c) + self.end for c in captions]
        caption, order, gram = _ngrams(words)
        _, first, tf = np.unique(_pair(gram, caption), return_index=True, return_counts=True)
        caption, order, gram = caption[first], order[first], gram[first]  # (M,), as tf
        row, idf = caption * 4 + order, self._idf(gram)
        norm = np.sqrt(np.bincount(row, (tf * idf) ** 2, B * 4)).reshape(B, 1, 4)

        index, known = _lookup(self.pairs, _pair(gram, images[caption]))
        row, tf, idf, ref_tf = row[known], tf[known], idf[known], self.tf[index[known]]
        dots = [np.bincount(row, np.minimum(tf, t) * t * idf**2, B * 4) for t in ref_tf.T]
        dots = np.array(dots, float).reshape(len(dots), B, 4).transpose(1, 0, 2)  # (B, R, 4)
        scale = norm * self.norms[images]
        cosine = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
        delta = self._lengths(words)[:, None] - self.lengths[images]  # (B, R)
        penalty = np.exp(-(delta**2) / (2 * self.SIGMA**2))
        return 10 * (cosine.mean(2) * penalty).sum(1) / self.counts[images]


# -----------------------------------------------------------------------------
# the toolkit's Java programs, where they are installed


def java_missing() -> str | None:
    """None where the toolkit's Java programs can run; otherwise one line on how to get them."""
    missing = [] if shutil.which("java") else ["java"]
    missing += [] if importlib.util.find_spec("pycocoevalcap") else ["pycocoevalcap"]
    if not missing:
        return None
    install = "install a Java runtime (8 or later) and `pip install -r requirements-coco.txt`"
    return f"METEOR and --java need {' and '.join(missing)}: {install}"


def java_tokenize(captions: Sequence[str]) -> list[str]:
    """Token strings of captions by the toolkit's PTBTokenizer, in one run of Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Java also ends a line at \r or U+2028, which would shift every later caption by one, and half
    # a surrogate pair cannot be encoded
    lines = [" ".join(c.encode("utf-8", "ignore").decode().split()) for c in captions]
    tokens = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if len(tokens) != len(captions):
        raise ValueError(f"Java tokenized {len(tokens)} of {len(captions)} captions: see above")
    return [tokens[i][0] for i in range(len(captions))]


def java_meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple:
    """METEOR 1.5 of token strings (Denkowski and Lavie 2014): the jar's aggregate, each image's."""
    from pycocoevalcap.meteor.meteor import Meteor

    groups, meteor = {i: list(group) for i, group in enumerate(references)}, Meteor()
    try:
        return meteor.compute_score(groups, {i: [h] for i, h in enumerate(hypotheses)})
    finally:
        if meteor.lock.locked():  # after Ctrl-C; its __del__ would wait for the lock for ever
            meteor.lock.release()


# -----------------------------------------------------------------------------
# all of them


def score(
    hypotheses: Mapping, references: Mapping, *,
    java: bool = False, meteor: bool = False, document_frequencies=None,
) -> tuple[dict[str, float | None], dict]:  # fmt: skip
    """Scores of {id: caption} against {id: captions}: ({name: x} of the corpus, {id: {name: x}}).

    Names are the toolkit's, in NAMES. `references` may hold more images than are scored. CIDEr's
    document frequencies come from all of them, so that a part of a split is scored like the whole,
    or else from `document_frequencies`: another {id: captions}, or a CiderD. `java` tokenizes with
    the toolkit's program; `meteor` runs its METEOR, else None for the corpus and absent per image.
    Raises ValueError where there is nothing to score, no reference, or no Java though asked for.
    """
    if (java or meteor) and (missing := java_missing()):
        raise ValueError(missing)
    references = {i: group for i, group in references.items() if group}
    if unknown := [i for i in hypotheses if i not in references]:
        raise ValueError(f"{len(unknown)} captions lack references ({_some(unknown)}): give them")
    if not hypotheses:
        raise ValueError("there are no captions to score")

    def tokenized(groups: Iterable[Sequence[str]]) -> list[list[str]]:
        groups = list(groups)
        flat = [caption for group in groups for caption in group]
        tokens = iter(java_tokenize(flat) if java else [" ".join(tokenize(c)) for c in flat])
        return [[next(tokens) for _ in group] for group in groups]

    captions = [caption for (caption,) in tokenized([c] for c in hypotheses.values())]
    groups = tokenized(references.values())
    index = {i: n for n, i in enumerate(references)}
    images = [index[i] for i in hypotheses]
    scored = [groups[n] for n in images]
    if isinstance(document_frequencies, Mapping):
        document_frequencies = tokenized(document_frequencies.values())
    compiled = CiderD(groups, document_frequencies=document_frequencies, tokenize=str.split)

    bleus, bleu_columns = bleu(captions, scored)
    rouge, cider = rouge_l(captions, scored), compiled.score(images, captions)
    corpus = [*bleus, rouge.mean(), cider.mean()]
    columns = [*bleu_columns.T, rouge, cider]
    if meteor:
        aggregate, each = java_meteor(captions, scored)
        corpus, columns = [*corpus, aggregate], [*columns, each]

    def named(row: Iterable) -> dict[str, float]:
        return dict(zip(NAMES, map(float, row), strict=False))  # METEOR, the last, may be absent

    per_image = map(named, zip(*columns, strict=True))
    return dict.fromkeys(NAMES) | named(corpus), dict(zip(hypotheses, per_image, strict=True))


def signature(
    hypotheses: Mapping, references: Mapping, *,
    java: bool = False, meteor: bool = False, document_frequencies=None,
) -> str:  # fmt: skip
    """How `score` computes, given the same arguments: scores of unlike signatures don't compare."""
    counts = {len(references[i]) for i in hypotheses}
    df = f"references({sum(map(bool, references.values()))})"
    if document_frequencies is not None:
        other = document_frequencies
        df = f"given({other.images if isinstance(other, CiderD) else len(other)})"
    return "|".join([
        f"nanocaption:{VERSION}",
        f"tok:{'ptb-java' if java else 'ptb-regex'}",
        f"refs:{min(counts)}" + f"-{max(counts)}" * (len(counts) > 1),  # of each image
        f"df:{df}",  # the images that document frequencies count
        f"bleu:sacrebleu-{sacrebleu.__version__}",
        "cider:D",
        f"meteor:{'1.5-java' if meteor else 'no'}",
    ])  # fmt: skip


# -----------------------------------------------------------------------------
# the command


def _some(items: Sequence) -> str:
    return "for example " + ", ".join(map(repr, items[:3]))


def _read(path: str) -> list[dict]:
    """The rows of COCO annotations, COCO results or our CSV: dicts with image_id and caption."""
    if not Path(path).is_file():
        raise ValueError(f"{path} not found: give predictions, then references")
    is_csv = Path(path).suffix == ".csv"
    limit = csv.field_size_limit(2**31 - 1)  # the default ends a caption at 131,072 characters
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, ""))) if is_csv else json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        kind = "CSV" if is_csv else "JSON"
        raise ValueError(f"{path} is not {kind} in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if isinstance(rows, dict):
        rows = rows.get("annotations")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no captions: give COCO results, annotations or our CSV")
    for n, row in enumerate(rows):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise ValueError(f"{path}: entry {n} lacks image_id or caption: {str(row)[:60]}")
        if not isinstance(row["image_id"], int | str):
            raise ValueError(f"{path}: entry {n}: image_id is no number or text: {str(row)[:60]}")
    return rows


def read_references(path: str) -> tuple[dict, int]:
    """{id: captions} of a COCO annotation file, and how many were left out for not being text."""
    rows = _read(path)
    references: dict = {}
    for row in rows:
        if isinstance(row["caption"], str):
            references.setdefault(row["image_id"], []).append(row["caption"])
    return references, len(rows) - sum(map(len, references.values()))


def read_predictions(path: str, references: Mapping) -> tuple[dict, dict[str, int]]:
    """{id: caption} of COCO results or our CSV, and counts of what was found.

    What is not text is scored as an empty caption. Raises ValueError where an id comes twice or is
    not among the references.
    """
    by_name = {str(i): i for i in references}  # a CSV has "42" for the references' 42
    hypotheses: dict = {}
    twice, unknown, not_text = [], [], 0
    for row in _read(path):
        i = by_name.get(str(row["image_id"]))
        if i is None:
            unknown.append(row["image_id"])
        elif i in hypotheses:
            twice.append(i)
        else:
            hypotheses[i] = row["caption"] if isinstance(row["caption"], str) else ""
            not_text += not isinstance(row["caption"], str)
    if twice or unknown:
        wrong = [f"{len(twice)} duplicates ({_some(twice)})"] if twice else []
        wrong += [f"{len(unknown)} without references ({_some(unknown)})"] if unknown else []
        raise ValueError(
            f"{path}: {' and '.join(wrong)} of {len(hypotheses) + len(twice) + len(unknown)} "
            "predictions: give one caption per image, and the references of the same images"
        )
    return hypotheses, {
        "images": len(hypotheses),
        "references": sum(len(references[i]) for i in hypotheses),
        "duplicates": 0,
        "predictions_without_references": 0,
        "references_without_predictions": len(references) - len(hypotheses),
        "empty_captions": sum(not tokenize(caption) for caption in hypotheses.values()) - not_text,
        "not_text": not_text,
    }


def _line(message: str) -> str:
    """One line, whatever it quotes: control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line, as everywhere: no usage above it
        self.exit(2, f"{self.prog}: {_line(message)}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _Parser(description="BLEU, ROUGE-L, CIDEr-D, METEOR of captions")
    parser.add_argument("predictions", help="COCO results (.json) or our CSV, one caption an image")
    parser.add_argument("references", help="COCO annotations (.json), of at least these images")
    parser.add_argument("--java", action="store_true", help="tokenize with the toolkit's program")
    parser.add_argument(
        "--df", default="references", metavar="references|scored|FILE",
        help="where CIDEr counts document frequencies: in all of the references (the default), in "
        "those of the scored images (the toolkit's way), or in another annotation file",
    )  # fmt: skip
    args = parser.parse_args(argv)
    missing = java_missing()
    options = {"java": args.java, "meteor": missing is None}
    try:
        references, left_out = read_references(args.references)
        hypotheses, counts = read_predictions(args.predictions, references)
        if args.df == "scored":
            options["document_frequencies"] = {i: references[i] for i in hypotheses}
        elif args.df != "references":
            options["document_frequencies"], _ = read_references(args.df)
        corpus, _ = score(hypotheses, references, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"metrics.py: {_line(str(error))}") from None
    counts["references_not_text"] = left_out

    for name, value in corpus.items():
        print(f"{name:<8} {value:8.4f}" if value is not None else f"{name:<8}        – {missing}")
    for name, count in counts.items():
        if count:
            print(f"{count:>8,} {name.replace('_', ' ')}")
    if len(references) > len(hypotheses) and args.df == "references":
        print(
            f"CIDEr counts document frequencies in all {len(references):,} reference images; the "
            f"toolkit would in the {len(hypotheses):,} scored ones: --df scored"
        )
    how = signature(hypotheses, references, **options)
    print(json.dumps(corpus | {"signature": how, "counts": counts}))


if __name__ == "__main__":
    main()
