"""GPT-2 in: its tokenizer and weights, from a tiny random one in transformers' format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RunsCode, many, mistake, tiny_gpt2, weights

import prepare
import train
from configurator import Config
from data import Split, Tokenizer
from model import ClipLM, ModelConfig
from parts.common import UserError
from parts.gpt2 import load_decoder, read_tokenizer

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402


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
    shutil.copy(gpt2 / "config.json", own)  # without the tokenizer's files, it has an empty one
    refused("own does not keep every text, as gpt2's byte-level BPE does", own)
    words = transformers.BertTokenizer(vocab={"[UNK]": 0, "a": 1, "b": 2}, eos_token="b")
    words.save_pretrained(own)
    refused("own does not keep every text", own)


# ---------------------------------------------------------------------------------------------
# The weights

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True)
TRAINING = SIZES | dict(n_prefix=3, mapper="mlp", batch_size=8, max_iters=6, learning_rate=1e-2,
                        min_lr=1e-3, warmup_iters=2, eval_interval=3, dropout=0.1, device="cpu",
                        dtype="float32")  # fmt: skip


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("layers", [1, 12])
def test_the_logits_are_gpt2s(tmp_path, layers):
    """GPT2LMHeadModel, fed our prefix and tokens as `inputs_embeds`, and our packed rows. The
    published weights of `gpt2` take the same path, but could not be had here."""
    theirs = tiny_gpt2(tmp_path / "gpt2", layers)
    V, P = vocabulary(tmp_path / "gpt2"), 3
    sizes = SIZES | dict(n_layer=layers, n_prefix=P, embedding_dim=12, vocab_size=V + 2)
    model = ClipLM(ModelConfig(**sizes)).eval()
    mapper = {name: value.clone() for name, value in model.mapper.state_dict().items()}
    load_decoder(model, str(tmp_path / "gpt2"))
    assert all(torch.equal(value, mapper[k]) for k, value in model.mapper.state_dict().items())
    chance = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 1, 12, generator=chance)
    captions = torch.randint(0, V, (2, 3, 9), generator=chance)  # two images, three captions each
    prefix = model.project(embeddings).repeat_interleave(3, 0)
    tokens = captions.flatten(0, 1)
    inputs = torch.cat((prefix, theirs.transformer.wte(tokens)), 1)
    expected = theirs(inputs_embeds=inputs).logits[:, P:].flatten(0, 1)
    rows = captions.flatten(1)
    segments = torch.arange(27).div(9, rounding_mode="floor").add(1).expand_as(rows)
    positions = torch.arange(27).remainder(9).expand_as(rows)
    with torch.no_grad():
        logits = model(embeddings, rows, segments, positions, torch.arange(54))
    assert expected.std() > 0.1
    assert torch.allclose(logits[:, :V], expected, rtol=0, atol=1e-5)
    mean = logits[:, :V].mean(1)  # bos and pad begin as the mean of all tokens
    assert torch.allclose(logits[:, V:], mean[:, None].expand(-1, 2), atol=1e-5)


def test_training_begins_with_it_and_needs_it_no_more(mine, gpt2, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(gpt2, folder)
    cfg = mine | TRAINING | dict(init_from=str(folder))
    train.main(Config(**cfg | dict(out_dir="whole")))
    train.main(Config(**cfg | dict(out_dir="halves", max_iters=3, lr_decay_iters=6)))
    shutil.rmtree(folder)  # the run has its own copy
    train.main(Config(**cfg | dict(out_dir="halves", lr_decay_iters=6, resume=True)))
    whole, halves = weights("whole/last.pt"), weights("halves/last.pt")
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    log = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    scored = [row["val_loss"] for row in log if "val_loss" in row]
    assert len(scored) == 3 and scored[-1] < scored[0]  # the first before the first step


def test_a_frozen_decoder_keeps_its_weights(mine, gpt2):
    cfg = mine | TRAINING | dict(init_from=str(gpt2), freeze_decoder=True)
    train.main(Config(**cfg | dict(max_iters=3, lr_decay_iters=6)))
    train.main(Config(**cfg | dict(lr_decay_iters=6, resume=True)))
    torch.manual_seed(Config.seed)
    vocab_size = vocabulary(gpt2) + 2
    sizes = SIZES | dict(n_prefix=3, mapper="mlp", embedding_dim=24, vocab_size=vocab_size)
    before = ClipLM(ModelConfig(**sizes))
    load_decoder(before, str(gpt2))
    after = weights("out/mine/last.pt")
    for name, value in before.state_dict().items():
        assert torch.equal(value, after[name]) == (not name.startswith("mapper")), name


def test_weights_that_do_not_fit_are_one_clear_line(mine, gpt2, tmp_path, capfd):
    def refused(**changes) -> str:
        settings = mine | TRAINING | dict(init_from=str(folder)) | changes
        return mistake("train.py", [f"--{k}={v}" for k, v in settings.items()], capfd)

    folder = gpt2
    assert "n_layer is 2, not 3, bias is True, not False" in refused(n_layer=3, bias=False)
    assert "n_positions is 48, not 64: config/coco_clipcap.py fits gpt2" in refused(block_size=64)
    prepare.main(Config(**mine | dict(dataset="learned", tokenizer="", vocab_size=64)))
    assert f"gpt2: vocab_size is {vocabulary(gpt2)}, not " in refused(dataset="learned")
    assert "the decoder's weights with freeze_decoder" in refused(init_from="", freeze_decoder=True)

    folder = tmp_path / "other"
    shutil.copytree(gpt2, folder)
    settings = folder / "config.json"
    changed(settings, activation_function="relu", tie_word_embeddings=False)
    assert "other: activation_function is relu, not gelu_new, tie_word_emb" in refused()
    changed(settings, model_type="opt", auto_map={"AutoModelForCausalLM": "theirs.Model"})
    assert "other: model_type is opt, not gpt2" in refused()
    shutil.copy(gpt2 / "config.json", settings)
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused()
    torch.save({"transformer.wte.weight": RunsCode()}, folder / "pytorch_model.bin")
    assert "other holds more than weights: not loaded" in refused()
    assert not Path("executed").exists()
    lacking = load_file(gpt2 / "model.safetensors")
    del lacking["transformer.h.1.ln_2.bias"]
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    assert "other lacks weights: transformer.h.1.ln_2.bias" in refused()
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "other could not be loaded: " in refused()
    settings.unlink()
    assert "other: model_type is unknown, not gpt2" in refused()
