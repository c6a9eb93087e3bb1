"""parts/export.py: what is exported opens again, here and in transformers alone."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, many, mistake, picture, tiny_gpt2

import metrics
import prepare
import sample
import train
from configurator import Config
from decode import Decoding, generate, load_captioner
from parts import checkpoint, export
from parts.common import UserError
from parts.export import ExportConfig
from sample import SampleConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["sentencepiece", "gpt2"])
def trained(request, tmp_path, monkeypatch, clip, no_java) -> Path:
    """A checkpoint trained on photos: from scratch, without biases, or from a tiny GPT-2."""
    monkeypatch.chdir(tmp_path)
    settings = many(Path(), 16, 8) | {"clip": clip, "vocab_size": 64}
    options = dict(mapper="linear")
    if request.param == "gpt2":
        tiny_gpt2(tmp_path / "gpt2")
        settings |= dict(tokenizer="gpt2", normalize=False)
        options = dict(mapper="mlp", init_from="gpt2", bias=True)
    prepare.main(Config(**settings))
    train.main(Config(**SMALL | settings | options | dict(max_iters=20, eval_interval=20)))
    shutil.rmtree("gpt2", ignore_errors=True)  # a checkpoint needs it no more
    ckpt = Path("out/mine/ckpt.pt")
    content = checkpoint.load(ckpt)
    for value in content["model"].values():  # so that captions differ from image to image
        value += 0.2 * torch.randn_like(value)
    checkpoint.save(ckpt, content)
    return ckpt


def captions_of(model, tokenizer, embeddings) -> list[str]:
    captions = [best for (best,) in generate(model, embeddings, tokenizer, Decoding())]
    texts = [tokenizer.decode(caption.ids) for caption in captions]
    print(sum(c.ended for c in captions), len(set(texts)), len(texts), texts[:3])
    return texts


def test_an_exported_checkpoint_is_the_same(trained):
    export.main(ExportConfig(ckpt=str(trained), to="shared"))
    weights = Path("shared/model.safetensors")
    model, tokenizer, content = load_captioner(trained)
    other, other_tokenizer, other_content = load_captioner(weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.lm_head.weight is other.transformer.wte.weight
    assert other_tokenizer.model == tokenizer.model
    assert other_content["scores"] == content["scores"] and content["scores"]
    embeddings = torch.randn(500, 1, 24)
    ours = captions_of(model, tokenizer, embeddings)
    assert len(set(ours)) > 5
    assert captions_of(other, other_tokenizer, embeddings) == ours
    card = Path("shared/README.md").read_text()
    assert "train 16 images, 16 captions; val 8 images" in card and "n_embd = 32" in card
    assert f"CIDEr {content['scores']['CIDEr']:.4f}\n" in card
    assert f"metrics {content['metrics']}\n" in card and content["metrics"] == metrics.VERSION


def test_sample_captions_with_the_folder(trained, monkeypatch):
    """With neither transformers nor tokenizers, if the tokenizer is sentencepiece's."""
    export.main(ExportConfig(ckpt=str(trained), to="shared"))
    if not Path("data/mine/tokenizer.model").read_bytes().startswith(b"{"):
        for package in ("transformers", "tokenizers", "PIL"):
            monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    for ckpt in (str(trained), "shared"):
        sample.main(SampleConfig(ckpt=ckpt, split="val", device="cpu"))
    theirs, ours = Path("shared/val/predictions.json"), Path("out/mine/val/predictions.json")
    assert json.loads(theirs.read_text()) == json.loads(ours.read_text())


def test_transformers_generates_our_captions(trained):
    """GPT2LMHeadModel.generate, as the folder sets it up, on 256 images."""
    export.main(ExportConfig(ckpt=str(trained), to="shared", gpt2=True))
    model, tokenizer, _ = load_captioner(trained)
    embeddings = torch.randn(256, 1, 24)
    ours = captions_of(model, tokenizer, embeddings)
    assert len(set(ours)) > 5
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained("shared")
    fast = transformers.AutoTokenizer.from_pretrained("shared")
    bos = gpt2.transformer.wte(torch.tensor([fast.bos_token_id])).expand(256, 1, -1)
    ids = gpt2.generate(inputs_embeds=torch.cat((model.project(embeddings), bos), 1))
    assert fast.batch_decode(ids, skip_special_tokens=True) == ours
    for text in ("photo train3", "photo train12"):
        assert fast(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_the_code_of_the_card_captions_a_photo(trained, monkeypatch, capsys):
    """In the folder itself. The encoder's path, as prepare.py got it, was relative to another."""
    content = checkpoint.load(trained)
    shutil.copytree(content["meta"]["encoder"], "my-clip")
    content["meta"]["encoder"] = "my-clip"
    checkpoint.save(trained, content)
    export.main(ExportConfig(ckpt=str(trained), to="shared", gpt2=True))
    for seed in range(3):
        picture(40, 30, seed).save("shared/photo.jpg")
        predictions = f"{seed}.json"
        sample.main(
            SampleConfig(ckpt=str(trained), image=("shared/photo.jpg",), out_json=predictions)
        )
        capsys.readouterr()
        [code] = re.findall(r"```python\nimport.*?```", Path("shared/README.md").read_text(), re.S)
        with monkeypatch.context() as patch:
            patch.chdir("shared")
            exec(code.removeprefix("```python").removesuffix("```"), {})
        [expected] = json.loads(Path(predictions).read_text())
        assert capsys.readouterr().out == expected["caption"] + "\n"


def test_what_cannot_be_exported_or_opened_is_one_clear_line(trained, capfd):
    export.main(ExportConfig(ckpt=str(trained), to="shared"))
    with pytest.raises(UserError, match="shared is not empty: give a new folder"):
        export.main(ExportConfig(ckpt=str(trained), to="shared"))
    content = checkpoint.load(trained)
    checkpoint.save("own.pt", content | {"meta": content["meta"] | {"encoder_kind": ""}})
    with pytest.raises(UserError, match="own.pt: --gpt2 needs pooled embeddings of CLIP"):
        export.main(ExportConfig(ckpt="own.pt", to="new", gpt2=True))
    assert not Path("new").exists()
    weights = Path("shared/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    line = mistake("sample.py", ["--ckpt=shared", "--split=val"], capfd)
    assert line == "shared/model.safetensors is damaged: use another copy\n"
    export.main(ExportConfig(ckpt=str(trained), to="gpt2", gpt2=True))
    line = mistake("sample.py", ["--ckpt=gpt2", "--split=val"], capfd)
    assert line == (  # once: damaged or not a checkpoint: 'sha256'
        "gpt2/model.safetensors is for transformers: give one that was exported without --gpt2\n"
    )
