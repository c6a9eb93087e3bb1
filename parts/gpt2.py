"""GPT-2 in transformers' format: its tokenizer, and its weights in and out of a ClipLM.

    python prepare.py config/coco_clipcap.py    # --tokenizer=gpt2
    python train.py config/coco_clipcap.py      # --init_from=gpt2

Both take a model's name or its folder, and run none of its code. Needs the extras: pip install -r
requirements-clip.txt; a dataset or checkpoint with such a tokenizer needs the package tokenizers.
"""

import contextlib
from collections.abc import Iterator

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
