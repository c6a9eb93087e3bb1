"""metrics.py against the COCO toolkit (pycocoevalcap and its Java programs) and published scores.

Tests that need the toolkit, Java, or the toolkit's example data (shared/coco_eval next to the
checkout) are skipped if those are absent.
"""

import csv
import gc
import gzip
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from helpers import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from parts.common import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"
COCO = SHARED / "coco_eval"
PREDICTIONS = str(COCO / "captions_val2014_fakecap_results.json")
REFERENCES = str(COCO / "captions_val2014_fakecap_refs.json")
PUNCTUATION = set(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

needs_data = pytest.mark.skipif(not COCO.is_dir(), reason=f"needs the reference data in {COCO}")
needs_java = pytest.mark.skipif(
    metrics.java_missing() is not None, reason=str(metrics.java_missing())
)


# ---------------------------------------------------------------------------------------------
# the published scores


@needs_data
def test_scores_equal_the_toolkits():
    expected = json.loads((COCO / "reference_scores.json").read_text())
    references, _ = metrics.read_references(REFERENCES)
    hypotheses, not_text = metrics.read_predictions(PREDICTIONS, references)
    meteor = metrics.java_missing() is None
    corpus, per_image = metrics.score(hypotheses, references, meteor=meteor)
    assert len(hypotheses) == 1000 and not not_text
    assert sum(len(references[i]) for i in hypotheses) == 5005
    for name in metrics.NAMES[:6] + metrics.NAMES[6:] * meteor:
        assert abs(corpus[name] - expected["corpus"][name]) < 1e-5, name
        off = [abs(per_image[i][name] - expected["per_image"][str(i)][name]) for i in hypotheses]
        assert len(off) == 1000 and max(off) < 1e-4, name


@needs_data
@needs_java
def test_java_tokens_give_the_same_scores():
    references, _ = metrics.read_references(REFERENCES)
    hypotheses, _ = metrics.read_predictions(PREDICTIONS, references)
    assert metrics.score(hypotheses, references) == metrics.score(hypotheses, references, java=True)


# ---------------------------------------------------------------------------------------------
# tokens


def without_punctuation(tokens: str) -> list[str]:
    return [t for t in tokens.split(" ") if t and t not in PUNCTUATION]


@needs_data
@pytest.mark.parametrize("half", [0, 1], ids=["tuned on", "held out"])
def test_tokens_of_coco_equal_javas(half):
    with gzip.open(COCO / "ptb_tokens_20k.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file][half::2]
    wrong = [raw for raw, java in pairs if metrics.tokenize(raw) != without_punctuation(java)]
    assert len(pairs) == 10_000 and len(wrong) <= 10, wrong


@needs_java
@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="needs shared/flickr8k")
def test_tokens_of_flickr8k_equal_javas():
    """The tokenizer's rules were made without these captions."""
    data = json.loads((SHARED / "flickr8k" / "dataset_flickr8k.json").read_text())
    captions = [s["raw"] for image in data["images"] for s in image["sentences"]]
    java = metrics.java_tokenize(captions)
    wrong = [c for c, j in zip(captions, java, strict=True) if " ".join(metrics.tokenize(c)) != j]
    assert len(captions) == 35_000 and len(wrong) <= 35, wrong


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("I can't, it's John's. They'll've gone", "i ca n't it 's john 's they 'll 've gone"),
        ("cannot gonna gotta; 'tis", "can not gon na got ta 't is"),
        ("a T.V. in the U.S.A.", "a t.v. in the u.s.a."),
        (
            "Mr. Smith on Main St. at no. 5, he said no.",
            "mr. smith on main st. at no. 5 he said no",
        ),
        (
            "at 11:20 for $14.99 a t-shirt and/or 1,000",
            "at 11:20 for $ 14.99 a t-shirt and/or 1,000",
        ),
        ("a sign (red) [x] <unk> -- ...", "a sign -lrb- red -rrb- -lsb- x -rsb- <unk>"),
        ('"What?" ‘yes’ “no”; a—b', "what yes no a b"),
        ("", ""),
    ],
)
def test_tokens_by_example(caption, tokens):
    assert metrics.tokenize(caption) == tokens.split()


SCRIPTS = {  # captions, as Java leaves them
    "hindi": ("लाल कुत्ता दौड़ता है।", "लाल कुत्ता दौड़ता है ।"),
    "bengali": ("একটি লাল কুকুর দৌড়াচ্ছে।", "একটি লাল কুকুর দৌড়াচ্ছে ।"),
    "tamil": ("ஒரு சிவப்பு நாய் ஓடுகிறது", "ஒரு சிவப்பு நாய் ஓடுகிறது"),
    "telugu": ("ఎర్ర కుక్క పరుగెత్తుతోంది", "ఎర్ర కుక్క పరుగెత్తుతోంది"),
    "gujarati": ("લાલ કૂતરો દોડે છે", "લાલ કૂતરો દોડે છે"),
    "thai": ("หมาสีแดงวิ่ง บนหญ้า", "หมาสีแดงวิ่ง บนหญ้า"),
    "arabic": ("كَلْبٌ أَحْمَر يجري، هنا", "كَلْبٌ أَحْمَر يجري ، هنا"),
    "hebrew": ("כֶּלֶב אָדֹם רָץ", "כֶּלֶב אָדֹם רָץ"),
    "russian": ("Рыжая соба\u0301ка бежит.", "рыжая соба\u0301ка бежит"),
    "vietnamese": ("Một con chó đang chạy", "một con chó đang chạy"),
    "chinese": ("一只红狗在草地上奔跑。", "一只红狗在草地上奔跑 。"),
    "fullwidth": ("犬（赤）が走る！", "犬 （ 赤 ） が走る ！"),
    "japanese": ("赤い犬が、走っている。", "赤い犬が 、 走っている 。"),
    "korean": ("빨간 개가 풀밭을 달린다.", "빨간 개가 풀밭을 달린다"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_of_many_scripts(script):
    """Combining marks, being characters of their own, once cut Hindi and Thai words to pieces."""
    caption, tokens = SCRIPTS[script]
    assert " ".join(metrics.tokenize(caption)) == tokens


@needs_java
def test_tokens_of_many_scripts_are_javas():
    captions = [caption for caption, _ in SCRIPTS.values()]
    assert metrics.java_tokenize(captions) == [tokens for _, tokens in SCRIPTS.values()]


@needs_java
def test_an_interrupted_meteor_does_not_hang(monkeypatch):
    """pycocoevalcap's destructor waits for the lock that was held when Ctrl-C came."""
    from pycocoevalcap.meteor.meteor import Meteor

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Meteor, "_stat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        metrics.java_meteor(["a dog"], [["a dog"]])
    gc.collect()  # runs the destructor


ODD = [
    "", " ", "\t", "...", "😀 a 👍🏽 b ❤️", "http://a.b/c?d=e#f www.x.com/y me@x.org", "\x00\x07a",
    "a\rb", "a\r\nb", "a\u2028b\u2029c", "a\x85b\x0bc\x0cd", "a\x1cb\x1dc\x1ed", "\ud800 lone",
    "\ufeffbom", "a\u200bb", "مرحبا 你好 नमस्ते", "e\u0301cole", "||| a ||| b", "<a b='c'> &amp;",
    "' '' ` `` ''' \"", "'s n't 'll", "((((", "$$$ ### %%%", "A" * 100_000, "a." * 50_000,
    "a'" * 50_000,
    "n't" * 33_000, "1." * 50_000, "a-" * 50_000, "<a" * 50_000, "a@" * 50_000, "www." * 25_000,
    "no. " * 25_000, "word " * 20_000, "a,b" * 33_000, "\u0301" * 50_000, "http://" * 14_000,
]  # fmt: skip


def test_odd_input_never_raises():
    start = time.process_time()
    for caption in ODD:
        tokens = metrics.tokenize(caption)
        assert all(t and t == t.strip() and not set(t) & set(" \n\r\u2028") for t in tokens)
        corpus, _ = metrics.score({0: caption}, {0: [caption, "a dog"], 1: ["a cat"]})
        assert all(0 <= corpus[name] <= 10 for name in metrics.NAMES[:6])
    assert time.process_time() - start < 30  # each rule is linear in the caption's length


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_is_tokenized(caption):
    assert metrics.tokenize(" ".join(metrics.tokenize(caption))) is not None


@needs_java
def test_odd_input_never_shifts_a_line():
    """A carriage return or U+2028 within a caption once moved every later line of Java."""
    captions = [c for i, odd in enumerate(ODD) for c in (f"marker {i}", odd[:2000])] + ["", ""]
    java = metrics.java_tokenize(captions)
    assert len(java) == len(captions)
    assert java[:-2:2] == [f"marker {i}" for i in range(len(ODD))]
    odd = ["a dog on grass", "", "a\u2028b", "||| x", "a\rb", "a dog on grass"]
    references = {i: ["a dog on the grass", "", "a ||| \r dog"] for i in range(len(odd))}
    _, per_image = metrics.score(dict(enumerate(odd)), references, java=True, meteor=True)
    scores = [per_image[i]["METEOR"] for i in range(len(odd))]
    assert scores[0] == scores[-1] > max(scores[1:-1])


# ---------------------------------------------------------------------------------------------
# the toolkit's Python classes, on random sets

vocabulary = st.sampled_from(["a", "dog", "runs", "on", "the", "red", "grass"])
words = st.lists(vocabulary, max_size=12).map(" ".join)
images = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=7)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(images)
def test_random_sets_score_as_in_the_toolkit(images):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = {}, {}
    for i, (hypothesis, group) in enumerate(images):
        hypotheses[i], references[i] = hypothesis, group
    gts, res = references, {i: [h] for i, h in hypotheses.items()}
    corpus, per_image = metrics.score(hypotheses, references)
    expected, expected_each = Bleu(4).compute_score(gts, res, verbose=0)
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        if name == "CIDEr" and not any(map(any, references.values())):
            continue  # the toolkit fails if there is no reference word at all
        mean, each = scorer.compute_score(gts, res)
        expected, expected_each = [*expected, mean], [*expected_each, each]
    for name, mean, each in zip(metrics.NAMES, expected, expected_each, strict=False):
        assert corpus[name] == pytest.approx(mean, abs=1e-9), name
        ours = [per_image[i][name] for i in hypotheses]
        np.testing.assert_allclose(ours, each, atol=1e-9, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(images)
def test_end_token_is_a_word_at_the_end(images):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    hypotheses, references = zip(*images, strict=True)
    gts = {i: [r + " END" for r in group] for i, group in enumerate(references)}
    _, each = Cider().compute_score(gts, {i: [h + " END"] for i, h in enumerate(hypotheses)})
    compiled = metrics.CiderD(references, end_token=True)
    np.testing.assert_allclose(compiled.score(range(len(images)), hypotheses), each, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(images, st.data())
def test_document_frequencies_of_another_set(images, data):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    one = st.lists(words, min_size=1, max_size=7)
    training = data.draw(st.lists(one, min_size=len(images), max_size=len(images)))
    hypotheses, references = zip(*images, strict=True)
    theirs, counted = CiderScorer(), CiderScorer()
    for hypothesis, group, other in zip(hypotheses, references, training, strict=True):
        theirs += (hypothesis, group)
        counted += ("", other)
    counted.compute_doc_freq()
    theirs.document_frequency = counted.document_frequency
    expected = theirs.compute_cider()
    source = metrics.CiderD(training)
    for frequencies in (source, metrics.CiderD(references, document_frequencies=source)):
        compiled = metrics.CiderD(references, document_frequencies=frequencies)
        ours = compiled.score(range(len(images)), hypotheses)
        np.testing.assert_allclose(ours, expected, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(images)
def test_corpus_bleu_is_sacrebleus(images):
    hypotheses, references = zip(*images, strict=True)
    depth = max(map(len, references))
    padded = [[g[r] if r < len(g) else None for g in references] for r in range(depth)]
    corpus, _ = metrics.bleu(hypotheses, references)
    for n in range(1, 5):
        scorer = sacrebleu.BLEU(
            tokenize="none", force=True, smooth_method="none", max_ngram_order=n
        )
        theirs = scorer.corpus_score(list(hypotheses), padded)
        if all(theirs.counts):  # where sacrebleu gives 0, the toolkit gives something tiny
            assert corpus[n - 1] == pytest.approx(theirs.score / 100, abs=1e-6)


# ---------------------------------------------------------------------------------------------
# the compiled form, and parts of a split

REFS = {
    1: ["a dog runs on the grass", "the brown dog is running"],
    2: ["two cats sleep", "a pair of cats asleep on a sofa", "cats on a sofa"],
    3: ["a man rides a wave"],
}
HYPS = {1: "a dog runs on grass", 2: "two cats on a sofa", 3: "a dog"}


def test_a_part_of_a_split_scores_like_the_whole():
    """One image scored with document frequencies of its own batch has a CIDEr of 0."""
    _, whole = metrics.score(HYPS, REFS)
    assert whole[1]["CIDEr"] > 1
    for i, caption in HYPS.items():
        assert metrics.score({i: caption}, REFS)[1] == {i: pytest.approx(whole[i])}
    compiled = metrics.CiderD(list(REFS.values()))
    together = compiled.score([0, 1, 2, 1, 0], [*HYPS.values(), "", "zebra zebra"])
    np.testing.assert_allclose(together[:3], [whole[i]["CIDEr"] for i in REFS])
    np.testing.assert_allclose(together[3:], 0)
    assert compiled.score([], []).shape == (0,)


def test_the_end_token_punishes_a_caption_that_breaks_off():
    plain, ended = (metrics.CiderD(list(REFS.values()), end_token=end) for end in (False, True))
    whole, broken = "a dog runs on the grass", "a dog runs on the grass with a"
    cost = [np.subtract(*c.score([0, 0], [whole, broken])) for c in (plain, ended)]
    assert cost[1] > cost[0] > 0


@settings(deadline=None, max_examples=50)
@given(images)
def test_agreement_is_the_mean_over_pairs(images):
    """The oracle scores each candidate against each other caption alone."""
    candidates, references = zip(*images, strict=True)
    training = metrics.CiderD(references, tokenize=str.split)

    def alone(candidate, reference):
        pair = metrics.CiderD([[reference]], document_frequencies=training, tokenize=str.split)
        return pair.score([0], [candidate])[0]

    others = references[0]
    expected = [np.mean([alone(c, r) for r in others]) for c in candidates]
    np.testing.assert_allclose(training.agreement(candidates, others), expected, atol=1e-9)
    expected = [
        sum(alone(c, r) for j, r in enumerate(candidates) if j != i) / max(1, len(candidates) - 1)
        for i, c in enumerate(candidates)
    ]
    np.testing.assert_allclose(training.agreement(candidates), expected, atol=1e-9)


def test_diversity_by_hand():
    captions = ["a dog runs", "a dog runs", "a cat sits on a", ""]
    expected = {
        "distinct": 3 / 4, "novel": 2 / 4, "distinct_1": 6 / 11, "distinct_2": 6 / 8,
        "vocabulary": 6, "length": 11 / 4, "bad_endings": 1 / 4,
        "length_std": pytest.approx(np.std([3, 3, 5, 0])),
    }  # fmt: skip
    assert metrics.diversity(captions, ["a dog runs", "the end"]) == expected
    assert metrics.diversity(captions)["novel"] is None
    assert metrics.diversity(captions, captions)["novel"] == 0


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="needs shared/flickr8k")
def test_people_write_few_bad_endings():
    data = json.loads((SHARED / "flickr8k" / "dataset_flickr8k.json").read_text())
    captions = [s["raw"] for image in data["images"][:2000] for s in image["sentences"]]
    (strings,) = metrics.token_strings([captions])
    assert metrics.diversity(strings)["bad_endings"] < 0.003


def test_clip_scores_by_their_formulas():
    image, caption = np.array([1.0, 0.0]), np.array([0.6, 0.8])  # cosine .6
    references = np.array([[0.0, 1.0], [-1.0, 0.0]])  # cosines .8, -.6
    expected = {"CLIPScore": 1.5, "RefCLIPScore": pytest.approx(2.4 / 2.3)}
    assert metrics.clip_score(image, caption, references) == expected
    assert metrics.clip_score(image, caption, []) == {"CLIPScore": 1.5}
    assert metrics.clip_score(-image, caption, references) == dict.fromkeys(expected, 0)


def test_what_cannot_be_scored_raises():
    for hypotheses, references, message in [
        ({}, REFS, "no captions"),
        ({9: "a"}, REFS, "no references for 1 images, for example 9: add them"),
        ({1: "a"}, {1: []}, "no references for 1 images, for example 1: add them"),
    ]:
        with pytest.raises(UserError, match=message):
            metrics.score(hypotheses, references)
    with pytest.raises(UserError, match="image 1 has no references"):
        metrics.CiderD([["a"], []])
    with pytest.raises(UserError, match="no references"):
        metrics.CiderD([])
    with pytest.raises(ValueError, match="2 captions, 1 images"):
        metrics.CiderD([["a"]]).score([0], ["a", "b"])
    with pytest.raises(ValueError, match="end token"):
        metrics.CiderD([["a"]], document_frequencies=metrics.CiderD([["a"]], end_token=True))


def test_the_signature_tells_scores_apart():
    more = {**REFS, 4: ["x"]}
    signatures = {
        metrics.signature(HYPS, REFS),
        metrics.signature(HYPS, more),
        metrics.signature(HYPS, REFS, java=True),
        metrics.signature(HYPS, REFS, meteor=True),
        metrics.signature(HYPS, REFS, tokens="characters"),
        metrics.signature(HYPS, REFS, document_frequencies=metrics.CiderD(list(more.values()))),
        metrics.signature({3: "a"}, REFS),
    }
    assert len(signatures) == 7
    assert "|tok:ptb-regex|refs:1-3|df:references(3)|" in metrics.signature(HYPS, REFS)


# ---------------------------------------------------------------------------------------------
# the command


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def references(tmp_path):
    rows = [{"image_id": i, "caption": c} for i, group in REFS.items() for c in group]
    return write(tmp_path, "references.json", {"images": [], "annotations": rows})


def rows(hypotheses):
    return [{"image_id": i, "caption": c, "logprob": -1.5} for i, c in hypotheses.items()]


def scored(capfd, *args):
    """Return the JSON of the command's last line, and all that it printed."""
    status, out, err = outcome("metrics.py", list(args), capfd)
    assert status == 0, err
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize("separator", ",;\t")
def test_command_scores_json_and_csv_alike(tmp_path, references, capfd, no_java, separator):
    expected, _ = metrics.score(HYPS, REFS)
    from_json, _ = scored(capfd, write(tmp_path, "p.json", rows(HYPS)), references)
    assert {name: from_json[name] for name in metrics.NAMES} == expected
    assert from_json["METEOR"] is None
    assert from_json["signature"] == metrics.signature(HYPS, REFS)

    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        header = ["image_id", "file_name", "caption", "references", "bleu", "rouge_l", "cider"]
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([header, *([i, f"{i}.jpg", c, "", 0, 0, 0] for i, c in HYPS.items())])
    assert scored(capfd, str(tmp_path / "p.csv"), references)[0] == from_json


def test_command_reports_what_the_files_hold(tmp_path, references, capfd, no_java):
    predictions = write(tmp_path, "p.json", rows({1: " ...", "2": None}))
    line, out = scored(capfd, predictions, references)
    assert line["counts"] == {
        "images": 2, "references": 5, "references_without_predictions": 1, "empty_captions": 1,
        "not_text": 1, "references_not_text": 0,
    }  # fmt: skip
    assert "requirements-coco.txt" in out and "--df=scored" in out


def test_command_takes_document_frequencies_from_elsewhere(tmp_path, references, capfd, no_java):
    predictions = write(tmp_path, "p.json", rows({1: HYPS[1], 2: HYPS[2]}))
    part = {i: REFS[i] for i in (1, 2)}
    line, _ = scored(capfd, predictions, references, "--df", "scored")
    assert line["CIDEr"] == metrics.score({1: HYPS[1], 2: HYPS[2]}, part)[0]["CIDEr"]
    assert "df:given(2)" in line["signature"]
    line, _ = scored(capfd, predictions, references, f"--df={references}")
    assert line["CIDEr"] == metrics.score({1: HYPS[1], 2: HYPS[2]}, REFS)[0]["CIDEr"]
    assert "df:given(3)" in line["signature"]


def test_command_reports_diversity(tmp_path, references, capfd, no_java):
    predictions = write(tmp_path, "p.json", rows(HYPS))
    line, out = scored(capfd, predictions, references)
    assert line["diversity"] == metrics.diversity(list(HYPS.values()))
    assert "novel              – give --training" in out
    line, _ = scored(capfd, predictions, references, f"--training={predictions}")
    assert line["diversity"]["novel"] == 0


CHINESE = ["一只红狗在草地上奔跑。", "红色的狗在绿草地上跑", "两只猫在睡觉。", "沙发上睡着两只猫"]


def test_scripts_without_spaces_are_scored_by_characters(tmp_path, capfd, no_java):
    """The toolkit's tokens are whole sentences there, so that every CIDEr is 0."""
    annotations = [{"image_id": i // 2, "caption": c} for i, c in enumerate(CHINESE)]
    references = write(tmp_path, "references.json", {"annotations": annotations})
    predictions = write(tmp_path, "p.json", rows({0: "一只红狗在草地上跑", 1: "两只猫睡着"}))
    line, out = scored(capfd, predictions, references)
    assert line["CIDEr"] == 0 and "in a script without spaces" in out
    line, out = scored(capfd, predictions, references, "--tokens=characters")
    assert line["CIDEr"] > 1 and "without spaces" not in out
    assert "|tok:characters|" in line["signature"] and line["METEOR"] is None
    assert metrics.characters("一只 Dog, หมา。") == [*"一只dogหมา"]
    assert metrics.tokenizer_for([CHINESE[:2], CHINESE[2:], ["a dog"]]) is metrics.characters
    assert metrics.tokenizer_for(REFS.values()) is metrics.tokenize
    assert metrics.CiderD([CHINESE[:2]]).tokenize is metrics.characters
    spaced = [SCRIPTS[s][0] for s in ("hindi", "korean", "arabic", "russian")]
    assert metrics.tokenizer_for([spaced]) is metrics.tokenize
    for script in ("chinese", "japanese", "thai"):
        assert metrics.tokenizer_for([[SCRIPTS[script][0]]]) is metrics.characters


@needs_java
def test_java_tokenizes_the_captions_whose_document_frequencies_count(
    tmp_path, references, capfd, monkeypatch
):
    predictions = write(tmp_path, "p.json", rows(HYPS))
    by_java, _ = scored(capfd, predictions, references, "--java", "--df=scored")
    assert "tok:ptb-java" in by_java["signature"] and by_java["METEOR"] is not None
    monkeypatch.setattr(shutil, "which", lambda name: None)  # METEOR once is enough
    plain, _ = scored(capfd, predictions, references)
    names = [name for name in metrics.NAMES if name != "METEOR"]
    assert [by_java[name] for name in names] == [plain[name] for name in names]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (rows(HYPS) + rows({2: "again"}), "several captions of 1 images, for example '2': give"),
        (rows({**HYPS, 77: "a"}), "no references for 1 images, for example '77': add"),
        ([], "holds no captions"),
        ({"captions": []}, "holds no captions"),
        ([{"image_id": 1}], "entry 0 lacks image_id .* or caption"),
        ([{"image_id": [1], "caption": "a"}], "entry 0 lacks image_id .a number or a string. or"),
        ("[{", "p.json is not valid JSON"),
        (None, "p.json not found"),
    ],
)
def test_command_stops_with_one_clear_line(tmp_path, references, predictions, message, capfd):
    path = str(tmp_path / "p.json")
    if predictions is not None:
        write(tmp_path, "p.json", predictions)
    status, out, err = outcome("metrics.py", [path, references], capfd)
    assert status == 1 and not out
    assert err.startswith(path) and re.search(message, err) and len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"image_id,caption\n1,\xff", b"image_id\n1", b""])
def test_command_stops_at_a_csv_that_is_none(tmp_path, references, content, capfd):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    status, _, err = outcome("metrics.py", [str(path), references], capfd)
    assert status == 1 and err.startswith(f"{path}") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,caption\n3,a\n1,a dog, and a cat", "entry 1 has too many cells: quote captions"),
        ("image_id,caption,caption\n1,a dog,a cat", "caption is there twice: rename one"),
        ("image_id,caption,image_id\n1,a dog,2", "image_id is there twice: rename one"),
    ],
)
def test_command_cuts_and_overwrites_no_caption_of_a_csv(
    tmp_path, references, capfd, content, message
):
    """`a dog, and a cat` was scored as `a dog`; of two captions, the last counted."""
    path = write(tmp_path, "p.csv", content)
    status, out, err = outcome("metrics.py", [path, references], capfd)
    assert status == 1 and not out
    assert err.startswith(f"{path}: {message}") and len(err.splitlines()) == 1


def test_command_knows_a_csv_by_its_suffix_in_capitals(tmp_path, references, capfd, no_java):
    """It was refused as JSON that is not valid."""
    predictions = write(tmp_path, "P.CSV", "image_id,caption\n1,a dog")
    assert scored(capfd, predictions, references)[0]["counts"]["images"] == 1


def test_command_takes_a_caption_of_any_length_from_a_csv(tmp_path, references, capfd, no_java):
    """By default, Python's csv module ends a caption at 131,072 characters."""
    predictions = write(tmp_path, "p.csv", "image_id,caption\n1," + "a" * 200_000)
    assert scored(capfd, predictions, references)[0]["counts"]["images"] == 1


def test_command_without_java_says_how_to_get_it(tmp_path, references, capfd, no_java):
    args = [write(tmp_path, "p.json", rows(HYPS)), references, "--java"]
    status, _, err = outcome("metrics.py", args, capfd)
    assert status == 1 and len(err.splitlines()) == 1
    assert re.search("METEOR and --java need java: install .*requirements-coco", err)
