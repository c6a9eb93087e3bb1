"""GPT-2 in transformers' format: its tokenizer, and its weights in and out of a ClipLM.

    python prepare.py config/coco_clipcap.py    # --tokenizer=gpt2
    python train.py config/coco_clipcap.py      # --init_from=gpt2

Both take a model's name or its folder, and run none of its code. Needs the extras: pip install -r
requirements-clip.txt
"""

from pathlib import Path

import torch

from parts.checkpoint import fill
from parts.common import UserError, extras, or_shipped
from parts.encoder import load_model, loading

# ---------------------------------------------------------------------------------------------
# The tokenizer

BOS, PAD = "<|bos|>", "<|pad|>"  # GPT-2 itself has an end token only
SAMPLE = "A dog's  ball, 犬 🐶"  # a tokenizer must return it unchanged


class BytePairs:
    """A byte-level BPE, with the methods that data.Tokenizer calls on a sentencepiece model.

    It encodes any text, so unk never occurs: its id is pad's.

    Args:
        content: the JSON that `read_tokenizer` returns.
    """

    def __init__(self, content: bytes):
        extras("tokenizers")
        from tokenizers import Tokenizer

        self.bpe = Tokenizer.from_str(content.decode())
        self.bpe.encode_special_tokens = True  # `<|endoftext|>` in a caption is text
        self.bos, self.eos = self.bpe.encode("").ids  # of the template: bos, a text, eos

    def bos_id(self) -> int:
        return self.bos

    def eos_id(self) -> int:
        return self.eos

    def pad_id(self) -> int:
        return self.bpe.token_to_id(PAD)

    unk_id = pad_id

    def get_piece_size(self) -> int:
        return self.bpe.get_vocab_size()

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [text.ids for text in self.bpe.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list) -> str | list[str]:
        if ids and isinstance(ids[0], list):
            return self.bpe.decode_batch(ids)
        return self.bpe.decode(ids)

    def id_to_piece(self, i: int) -> str:
        return self.bpe.decode([i], skip_special_tokens=False).replace(" ", "\u2581")


def read_tokenizer(name: str) -> bytes:
    """Return the JSON of a byte-level BPE, with the tokens bos and pad added.

    Raise UserError if it does not keep every text, or has no end token.
    """
    with loading(f"tokenizer={name}"):
        from tokenizers import processors
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(or_shipped(name), trust_remote_code=False)
        bpe, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
    bpe.no_padding()
    bpe.no_truncation()
    ids = bpe.encode(SAMPLE, add_special_tokens=False).ids
    if bpe.decode(ids) != SAMPLE:  # also one without its files, which transformers makes up
        raise UserError(f"tokenizer={name} does not keep every text, as gpt2's byte-level BPE does")
    if not eos:
        raise UserError(f"tokenizer={name} has no end token: add eos_token to its settings")
    bpe.add_special_tokens([BOS, PAD])
    ends = [(token, bpe.token_to_id(token)) for token in (BOS, eos)]
    bpe.post_processor = processors.TemplateProcessing(f"{BOS} $A {eos}", special_tokens=ends)
    return bpe.to_str().encode()


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a data.Tokenizer as transformers reads it."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    special = {
        f"{name}_token": tokenizer.sp.id_to_piece(getattr(tokenizer, name))
        for name in ("bos", "eos", "pad", "unk")
    }
    if isinstance(tokenizer.sp, BytePairs):
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.sp.bpe, **special)
    else:
        (folder / "tokenizer.model").write_bytes(tokenizer.model)  # sentencepiece, as Llama's
        fast = LlamaTokenizer.from_pretrained(folder, **special)
    fast.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# The weights

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # in GPT-2: (in, out)
# Settings of a GPT2Config that must have their defaults, which model.py builds in.
FIXED = ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
         "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")  # fmt: skip


def load_decoder(model, name: str) -> None:
    """Load GPT-2's weights into a ClipLM's decoder; its mapper stays as it is.

    Positions beyond block_size are cut off. bos and pad, which GPT-2 has not seen, begin as the
    mean of all tokens' embeddings. Raise UserError if the weights do not fit the model.
    """
    cfg, what = model.cfg, f"init_from={name}"
    with loading(what):
        from transformers import GPT2Config

        settings, _ = GPT2Config.get_config_dict(or_shipped(name))
        standard = GPT2Config().to_dict()
        found = standard | {"model_type": "unknown", "bias": True} | settings
        needed = {key: standard[key] for key in FIXED}
        needed |= {key: getattr(cfg, key) for key in ("n_layer", "n_head", "n_embd", "bias")}
        needed["vocab_size"] = cfg.vocab_size - 2
        needed["n_positions"] = max(cfg.block_size, found["n_positions"])
        wrong = [f"{key} is {found[key]}, not {needed[key]}" for key in needed
                 if found[key] != needed[key]]  # fmt: skip
        if wrong:
            raise UserError(f"{what}: {', '.join(wrong)}: config/coco_clipcap.py fits gpt2")
        weights = load_model(name, "GPT2LMHeadModel", what).state_dict()
    for key in weights:
        if key.endswith(TRANSPOSED):
            weights[key] = weights[key].T
    wte = weights["transformer.wte.weight"]  # (V - 2, C)
    wte = torch.cat((wte, wte.mean(0).expand(2, -1)))
    wpe = weights["transformer.wpe.weight"][: cfg.block_size]
    weights |= {"transformer.wpe.weight": wpe, "transformer.wte.weight": wte, "lm_head.weight": wte}
    fill(model, model.state_dict() | weights, what)


def as_gpt2(model):
    """Return a GPT2LMHeadModel with a ClipLM's decoder, its biases zero if that has none."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    cfg, p = model.cfg, model.cfg.dropout
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
            n_layer=cfg.n_layer, n_head=cfg.n_head, activation_function="gelu_new",
            embd_pdrop=p, attn_pdrop=p, resid_pdrop=p, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    weights = model.state_dict()
    for name, value in gpt2.state_dict().items():
        own = weights.get(name, torch.zeros_like(value))  # all weights are there, biases may not be
        value.copy_(own.T if name.endswith(TRANSPOSED) else own)
    weight = model.lm_head.weight
    return gpt2.to(weight.device, weight.dtype).train(model.training)
