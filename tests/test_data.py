"""data.py: packing against plain loops, the order of batches, and files that are not as written."""

import io
import json
import os

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import pack_by_loops

import data
import prepare
from data import Order, Split, batches, deal
from parts.common import UserError, read_json, replacing, write_text
from parts.sources import Record


def encoded(split: Split, image: int) -> list[list[int]]:
    """Return an image's captions, encoded anew from the references."""
    return [split.tokenizer.encode(caption) for caption in split.references()[1][image]]


def test_packing_gives_what_plain_loops_give(here):
    split = Split(here / "data/tiny", "train")
    images = np.array([3, 0, 17, 5])
    ours = split.pack(images)
    oracle = pack_by_loops([encoded(split, i) for i in images])
    assert torch.equal(ours["targets"], oracle["targets"])
    assert torch.equal(ours["embeddings"], torch.tensor(split.embeddings[images]))
    width = oracle["tokens"].size(1)
    assert ours["tokens"].size(1) == width
    assert torch.equal(ours["targets_at"], oracle["targets_at"])
    for name in ("tokens", "segments", "positions"):
        a, b = (batch[name].flatten()[batch["targets_at"]] for batch in (ours, oracle))
        assert torch.equal(a, b), name
    is_padding = ours["segments"] == width + 1  # no caption's number, so that none sees it
    assert is_padding.sum() == ours["tokens"].numel() - len(ours["targets"])


def test_every_image_and_caption_is_read_once_per_epoch(here):
    split = Split(here / "data/tiny", "train")
    order = Order(1, split.lengths, 6)
    epoch = range(order.per_epoch)
    assert sorted(np.concatenate([order.batch(step) for step in epoch])) == list(range(24))
    targets = sum(counts["targets"] for _, counts in batches(split, order, epoch))
    assert targets == len(split.tokens)
    captions = split.n_captions.sum()
    assert captions == len(split.caption_start) - 1 == sum(map(len, split.references()[1]))


def test_the_order_is_a_pure_function_of_seed_and_step():
    lengths = np.random.default_rng(0).integers(5, 60, 1000)
    one, two = Order(7, lengths, 10), Order(7, lengths, 10)
    steps = [250, 3, 99, 100, 0, 250]
    assert [one.batch(s).tolist() for s in steps] == [two.batch(s).tolist() for s in steps]
    assert one.batch(0).tolist() != Order(8, lengths, 10).batch(0).tolist()
    assert one.batch(0).tolist() != one.batch(100).tolist()  # the next epoch


def test_rows_of_similar_length_share_a_batch():
    """With lengths like COCO's, less than 6 % of a batch is padding; unsorted, over 20 %."""
    lengths = np.random.default_rng(0).normal(62, 9, 20000).astype(int)

    def padding(batches) -> float:
        real = sum(lengths[images].sum() for images in batches)
        return 1 - real / sum(lengths[images].max() * len(images) for images in batches)

    order = Order(0, lengths, 64)
    assert padding([order.batch(s) for s in range(order.per_epoch)]) < 0.06
    unsorted = np.random.default_rng(1).permutation(20000)[:19968].reshape(-1, 64)
    assert padding(unsorted) > 0.2


@pytest.mark.parametrize("world, micro_steps", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_steps_share_the_same_batch(here, world, micro_steps):
    split = Split(here / "data/tiny", "train")
    order = Order(0, split.lengths, 8)
    (whole,), whole_counts = next(batches(split, order, range(2, 3)))
    shares = [next(batches(split, order, range(2, 3), rank, world, micro_steps))
              for rank in range(world)]  # fmt: skip
    assert all(counts == whole_counts for _, counts in shares)
    targets = torch.cat([batch["targets"] for packed, _ in shares for batch in packed])
    assert sorted(targets.tolist()) == sorted(whole["targets"].tolist())
    images = torch.cat([batch["embeddings"] for packed, _ in shares for batch in packed])
    assert len(images) == 8 and len(images.unique(dim=0)) == 8


def test_batches_start_anywhere_and_stop_early(here):
    split = Split(here / "data/tiny", "train")
    order = Order(0, split.lengths, 8)
    from_start = [b["tokens"] for (b,), _ in batches(split, order, range(5))]
    later = [b["tokens"] for (b,), _ in batches(split, order, range(3, 5))]
    assert all(torch.equal(a, b) for a, b in zip(from_start[3:], later, strict=True))
    stream = batches(split, order, range(10**9))
    next(stream)
    stream.close()  # ends the thread too, or this test would never return


def test_an_error_in_the_thread_reaches_the_loop(here):
    split = Split(here / "data/tiny", "train")
    order = Order(0, split.lengths, 8)
    split.embeddings = split.embeddings[:0]
    with pytest.raises(IndexError):
        list(batches(split, order, range(3)))


@pytest.mark.parametrize(
    "file", ["tokenizer.model", "train.json", "train_embeddings.npy", "train_tokens.npy",
             "train_offsets.npy"]
)  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "truncated", "swapped", "edited"])
def test_a_file_that_is_not_as_written_is_named(here, file, damage):
    folder = here / "data/tiny"
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "swapped":
        other = file.replace("train", "val") if "train" in file else "val.json"
        path.write_bytes((folder / other).read_bytes())
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=f"{file}.*prepare.py"):
        Split(folder, "train")


def test_a_missing_dataset_or_split_says_what_to_do(here):
    with pytest.raises(UserError, match="none/meta.json not found: run `python p.*, or set --data"):
        Split(here / "data/none", "train")
    with pytest.raises(UserError, match="no split `test`; it has: train, val"):
        Split(here / "data/tiny", "test")
    (here / "data/tiny/meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is not valid JSON"):
        Split(here / "data/tiny", "train")
    with pytest.raises(UserError, match="batch_size=9 exceeds the 8"):
        Order(0, np.ones(8, int), 9)


TEXTS = [
    "ผู้ชายกำลังทำอาหาร", "น้ำในแม่น้ำ", "سگ‌ها در پارک می‌دوند", "మార్కెట్‌లో మనుషులు",
    "一只狗在草地上跑，追着球。",
    "a man… running", "½ a pizza™ on a plate", "x² and ﬁsh", "ＦＵＬＬ　width!", "no\u00a0break",
    "e\u0301 is not \u00e9", "\u1112\u1161\u11ab and 한", "👨‍👩‍👧 wave 🇩🇪 ❤️", "\ufdfa",
    "İstanbul", " a",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_back_what_the_user_wrote(text):
    """sentencepiece's own rules took Thai letters apart, dropped the joiners of Persian and Telugu,
    and replaced full-width punctuation, fractions and signs, in captions but not in references."""
    tokenizer = prepare.train_tokenizer([text] * 3, 100)
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip(" ")
    lower = data.Tokenizer(tokenizer.model, lowercase=True)
    assert lower.encode(text) == tokenizer.encode(text.lower())


def test_captions_that_a_tokenizer_changes_are_counted(tmp_path, capsys):
    """By its own rules, if it is the user's, by U+2581, which stands for a space in it, or by a
    character that it has never seen."""
    ours = prepare.train_tokenizer([*TEXTS, "A dog \u2581 dog"], 400)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=400, model_type="bpe",
        bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    theirs = data.Tokenizer(model.getvalue())
    cases = (
        (ours, ["a dog", "½ a pizza"], ""),
        (ours, ["a dog", "Ω is unknown"], "changes 1 captions, first `Ω is unknown` to ` ⁇ "),
        (ours, ["a dog", "a \u2581 dog"], "changes 1 captions, first `a \u2581 dog` to `a   dog`"),
        (theirs, ["a man… running", "a man", "x²"], "changes 2 captions, first `a man… running`"),
    )
    for tokenizer, captions, expected in cases:
        records = [Record(i, f"{i}.png", [c]) for i, c in enumerate(captions)]
        data.write_split(tmp_path, "val", records, tokenizer)
        out = capsys.readouterr().out
        assert f"val: the tokenizer {expected}" in out if expected else not out


def test_references_are_cocos_format_with_the_original_ids(here):
    content = read_json(here / "data/tiny/val.json")
    assert [i["id"] for i in content["images"]] == list(range(24, 32))
    assert {a["image_id"] for a in content["annotations"]} == set(range(24, 32))
    assert all(a.keys() == {"id", "image_id", "caption"} for a in content["annotations"])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file.txt"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(path.parent) == ["file.txt"]
    write_text(path, json.dumps("after"))
    assert read_json(path) == "after"


def test_a_batch_smaller_than_its_micro_batches_is_refused():
    """In self-critical training it was an error of numpy's."""
    with pytest.raises(UserError, match="batch_size=3 is less than 4, the processes x micro-steps"):
        deal(np.arange(3), rank=0, world=2, micro_steps=2)
