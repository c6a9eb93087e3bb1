"""GPT-2 in transformers' format: its tokenizer, and its weights in and out of a ClipLM.

    python prepare.py config/coco_clipcap.py    # --tokenizer=gpt2
    python train.py config/coco_clipcap.py      # --init_from=gpt2

Both take a model's name or its folder, and run none of its code. Needs the extras: pip install -r
requirements-clip.txt; a dataset or checkpoint with such a tokenizer needs the package tokenizers.
"""

import contextlib
from collections.abc import Iterator

import torch

from parts.checkpoint import fill
from parts.common import UserError, or_shipped
from parts.encoder import BROKEN, extras

BOS, PAD = "<|bos|>", "<|pad|>"  # GPT-2 itself has an end token only

# ---------------------------------------------------------------------------------------------
# The tokenizer


class BytePairs:
    """A byte-level BPE, with the methods that data.Tokenizer calls on a sentencepiece model.

    Every text has tokens, so none is unknown: the id of unk is that of pad.

    Args:
        content: the JSON of the package tokenizers, as `read_tokenizer` returns it.
    """

    def __init__(self, content: bytes):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            need = "pip install -r requirements-clip.txt"
            raise UserError(f"tokenizers is missing: {need}") from None
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
        return self.bpe.decode([i]).replace(" ", "\u2581")


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what transformers raises while it loads `what` into a UserError."""
    extras()
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except (*BROKEN, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{what} could not be loaded: {reason}") from None


def read_tokenizer(name: str) -> bytes:
    """Return the JSON of a byte-level BPE, with the tokens bos and pad added.

    Raise UserError if it is of another kind or has no end token.
    """
    with loading(f"tokenizer={name}"):
        from tokenizers import decoders, models, processors
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(or_shipped(name), trust_remote_code=False)
        bpe = tokenizer.backend_tokenizer
    if not (isinstance(bpe.model, models.BPE) and isinstance(bpe.decoder, decoders.ByteLevel)):
        raise UserError(f"tokenizer={name} is not a byte-level BPE, such as gpt2's")
    if not tokenizer.eos_token:
        raise UserError(f"tokenizer={name} has no end token: add eos_token to its settings")
    bpe.no_padding()
    bpe.no_truncation()
    bpe.add_special_tokens([BOS, PAD])
    ends = [(token, bpe.token_to_id(token)) for token in (BOS, tokenizer.eos_token)]
    template = f"{BOS} $A {tokenizer.eos_token}"
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return bpe.to_str().encode()


# ---------------------------------------------------------------------------------------------
# The weights

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # in GPT-2, (in, out)
# What a GPT2Config may change, and model.py does not.
FIXED = ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
         "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")  # fmt: skip


def load_decoder(model, name: str) -> None:
    """Load GPT-2's weights into a ClipLM's decoder; its mapper stays as it is.

    Positions beyond block_size are cut off. bos and pad, which GPT-2 has not seen, begin as the
    mean of all tokens' embeddings. Raise UserError if the weights do not fit the model.
    """
    with loading(f"init_from={name}"):
        from transformers import GPT2Config, GPT2LMHeadModel

        settings, _ = GPT2Config.get_config_dict(or_shipped(name))
        check_architecture(model.cfg, name, GPT2Config().to_dict(), settings)
        gpt2, info = GPT2LMHeadModel.from_pretrained(
            or_shipped(name), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"init_from={name} lacks weights: {', '.join(missing[:3])}")
    weights = model.state_dict()
    for key, value in gpt2.state_dict().items():
        weights[key] = value.T if key.endswith(TRANSPOSED) else value
    wpe, wte = weights["transformer.wpe.weight"], weights["transformer.wte.weight"]  # (T, C) (V, C)
    new = wte.mean(0).expand(model.cfg.vocab_size - len(wte), -1)
    weights["transformer.wpe.weight"] = wpe[: model.cfg.block_size]
    weights["transformer.wte.weight"] = torch.cat((wte, new))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    fill(model, weights, f"init_from={name}")


def check_architecture(cfg, name: str, standard: dict, settings: dict) -> None:
    """Raise UserError unless GPT-2 with these settings fits a ModelConfig and model.py's code.

    Args:
        standard: the defaults of GPT2Config.
        settings: those of config.json.
    """
    if "auto_map" in settings:
        raise UserError(f"init_from={name} needs code of its own, which is not run")
    found = standard | {"model_type": None} | settings | {"bias": True}
    needed = {key: standard[key] for key in FIXED}
    needed |= {key: getattr(cfg, key) for key in ("n_layer", "n_head", "n_embd", "bias")}
    wrong = [f"{key} is {found[key]}, not {needed[key]}" for key in needed
             if found[key] != needed[key]]  # fmt: skip
    if wrong:
        raise UserError(f"init_from={name} is of another architecture: {', '.join(wrong)}")
    if cfg.block_size > found["n_positions"]:
        raise UserError(
            f"block_size={cfg.block_size} exceeds the {found['n_positions']} positions of {name}"
        )
    if cfg.vocab_size - found["vocab_size"] not in (0, 2):  # 2: without bos and pad
        raise UserError(
            f"init_from={name} has {found['vocab_size']} tokens, the dataset's tokenizer "
            f"{cfg.vocab_size}: prepare the dataset with --tokenizer={name}"
        )
