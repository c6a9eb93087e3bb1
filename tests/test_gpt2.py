"""GPT-2 in: its tokenizer and weights, from a tiny random one in transformers' format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import many, tiny_gpt2

import prepare
from configurator import Config
from data import Split, Tokenizer
from parts.common import UserError
from parts.gpt2 import read_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """The folder of a tiny GPT-2, which no test changes."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_gpt2(folder)
    return folder


@pytest.fixture
def mine(tmp_path, monkeypatch, gpt2, clip) -> dict:
    """Prepare photos with captions by GPT-2's tokenizer. Return the settings."""
    monkeypatch.chdir(tmp_path)
    settings = many(Path(), 16, 8) | {"clip": clip, "tokenizer": str(gpt2)}
    prepare.main(Config(**settings))
    return settings


def changed(folder: Path, **settings) -> None:
    """Change settings of a JSON file; None removes one."""
    content = json.loads(folder.read_text()) | settings
    folder.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ---------------------------------------------------------------------------------------------
# The tokenizer

TEXTS = [
    "a dog", " leads with a space", "two  spaces ", "A café in São Paulo", "naïve", "🐶🏽 on a 🛹",
    "x<|endoftext|>y <|bos|><|pad|>", "犬が走る", "e\u0301 is not \u00e9", "don't", "1,000.5 %",
]  # fmt: skip


def test_captions_come_back_byte_for_byte(gpt2):
    tokenizer = Tokenizer(read_tokenizer(str(gpt2)))
    special = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    assert len(special) == 3 and tokenizer.unk == tokenizer.pad
    encoded = tokenizer.encode_all(TEXTS)
    for text, ids in zip(TEXTS, encoded, strict=True):
        assert tokenizer.encode(text) == ids and not special & set(ids)
        assert tokenizer.decode(ids).encode() == text.encode()
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == text
    assert tokenizer.pieces(tokenizer.encode("a dog cat")) == ["a", "▁dog", "▁cat"]
    again = Tokenizer(tokenizer.model, lowercase=True)
    assert again.encode("A Dog") == tokenizer.encode("a dog")


def test_its_ids_are_those_of_transformers(gpt2):
    """The words keep their ids; bos and pad come after them, and no word is like them."""
    theirs = transformers.AutoTokenizer.from_pretrained(gpt2)
    ours = Tokenizer(read_tokenizer(str(gpt2)))
    assert ours.encode_all(TEXTS[:6]) == [theirs(text)["input_ids"] for text in TEXTS[:6]]
    assert (ours.eos, ours.bos, ours.pad) == (theirs.eos_token_id, len(theirs), len(theirs) + 1)
    assert len(ours) == len(theirs) + 2
    theirs.add_special_tokens({"bos_token": "<|bos|>", "pad_token": "<|pad|>"})
    assert theirs.decode([ours.bos, ours.pad]) == "<|bos|><|pad|>"


def test_a_dataset_carries_it(mine, capsys):
    split = Split("data/mine", "train")
    assert split.tokenizer.model == read_tokenizer(mine["tokenizer"])
    assert split.meta.vocab_size == len(split.tokenizer)
    packed = split.pack(np.array([2, 0]))
    texts = [split.tokenizer.decode(row) for row in packed["tokens"].tolist()]
    assert texts == [split.references()[1][i][0] for i in (2, 0)]
    assert split.meta.splits["train"]["unknown_tokens"] == 0
    assert "the tokenizer changes" not in capsys.readouterr().out


def test_tokenizers_that_cannot_serve_are_refused(gpt2, tmp_path):
    def refused(message: str, folder: Path) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_tokenizer(str(folder))
        assert "\n" not in str(caught.value) and not Path(tmp_path / "ran").exists()

    own = tmp_path / "own"
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(own)
    settings = own / "tokenizer_config.json"
    changed(settings, tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    refused("own has no end token", own)
    (own / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass")
    changed(settings, tokenizer_class="T", auto_map={"AutoTokenizer": ["theirs.T", None]})
    changed(own / "tokenizer.json", model={})
    refused("own could not be loaded: .* contains custom code", own)
    shutil.rmtree(own)
    own.mkdir()
    refused("own could not be loaded", own)
    words = transformers.BertTokenizer(vocab={"[UNK]": 0, "a": 1, "b": 2}, eos_token="b")
    words.save_pretrained(own)
    refused("own is not a byte-level BPE", own)
