"""Decoding on a GPU: each step is a CUDA graph, one launch in place of two hundred.

    model = with_graphs(model, embeddings, K, max_len)  # on a GPU, a GraphedDecoder
    prefix_kv = model.prefill(embeddings)               # which decodes as ClipLM does
    logits, cache = model.step(tokens, position, prefix_kv, cache)

A graph repeats the same kernels on the same memory. So all rows stay until the end, keys and
values have a fixed place, and what changes between steps is read from memory: tokens, position,
and what each row sees.

Letters, besides model.py's:    S  slots: places for the keys and values of one position each
"""

import copy
import math
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 2048  # with more, the work itself takes longer than its launch (LOG.md)
MOST_SHARING = 16  # rows per image: each of them passes over the slots of all
KEPT = 3  # decoders per model: of an evaluation's batches, its last one, and sampling


class GraphedDecoder:
    """`prefill` and `step` as ClipLM has them, for B images with K rows each, N = B * K.

    An image has P slots for its prefix, then K for each position, one per row. `bias` (N, S) is 0
    where a row sees a slot, and -inf elsewhere. It is the whole cache as far as a search knows: a
    beam that continues another one takes over what that one sees, and no key or value moves.
    """

    def __init__(self, model, B: int, K: int, max_len: int, graph: bool = True):
        """Take the shapes of a model. Its weights are copied by `load`."""
        self.cfg = model.cfg
        self.B, self.K = B, K
        device = model.lm_head.weight.device
        dtype = dtype_of(model)
        S = self.cfg.prefix_length + K * max_len
        S += -S % 16  # what the attention kernel wants of `bias`
        width = self.cfg.n_embd // self.cfg.n_head
        with torch.inference_mode(False), torch.no_grad():
            self.model = in_precision(model, dtype)
            self.weights = list(self.model.parameters())
            shape = self.cfg.n_layer, 2, B, self.cfg.n_head, S, width
            self.kv = torch.zeros(shape, dtype=dtype, device=device)
            self.bias = torch.zeros(B * K, S, dtype=dtype, device=device)
            shape = B, self.cfg.n_positions, self.cfg.embedding_dim
            self.embeddings = torch.zeros(shape, device=device, dtype=model.lm_head.weight.dtype)
            self.tokens = torch.zeros(B * K, dtype=torch.long, device=device)
            self.position = torch.zeros(1, dtype=torch.long, device=device)
            self.row = torch.arange(K, device=device)
            self.slot = torch.arange(S, device=device)
        self.flags: list[tuple] = []  # on their way to the CPU
        self.run_prefill, self.run_step = self.fill_prefix, self.decode
        if graph:
            self.run_prefill, self.run_step = captured(self.fill_prefix), captured(self.decode)

    def load(self, model) -> None:
        """Take over the weights of a model, which may have been trained since."""
        weights = [*model.parameters(), model.lm_head.weight]  # tied there, not here
        torch._foreach_copy_(self.weights, weights)

    # -- as ClipLM has them ---------------------------------------------------------------------

    def prefill(self, embeddings: Tensor) -> list[tuple[Tensor]]:
        """Begin with the images' embeddings (B, n_positions, D). Return what an image sees."""
        self.flags.clear()
        self.embeddings.copy_(embeddings)
        self.run_prefill()
        return [(self.bias[:: self.K],)]

    def step(self, tokens: Tensor, position: int, prefix_kv, cache):
        """Return logits (N, V) of each row's next token, and what each row sees, this token too.

        Args:
            tokens: (N,) int64, each row's newest token; or (B,), one for all rows of an image, and
                logits and cache are (B, ...) too.
            position: its position in the caption, from 0 (bos).
            prefix_kv: not used.
            cache: what each row saw before this token; None after `prefill`.
        """
        same = self.B * self.K // len(tokens)  # rows with the same token
        self.tokens.view(-1, same).copy_(tokens[:, None])
        if cache is not None:
            ((visible,),) = cache
            self.bias.view(len(tokens), same, -1).copy_(visible[:, None])
        self.position.fill_(position)
        self.run_step()
        return self.logits[::same], [(self.bias[::same],)]

    def has_ended(self, flag: Tensor) -> bool:
        """Queue a flag for reading. Return the flag of the call before, at first False.

        So a search takes one step too many, but the GPU always has a step to do while the CPU
        waits for a flag."""
        event = None
        if flag.is_cuda:
            flag = flag.to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self.flags.append((flag, event))
        if len(self.flags) < 2:
            return False
        flag, event = self.flags.pop(0)
        if event is not None:
            event.synchronize()
        return bool(flag)

    # -- what the graphs hold -------------------------------------------------------------------

    def fill_prefix(self) -> None:
        P = self.cfg.prefix_length
        self.kv.zero_()  # what is not seen counts 0 times, which must not be 0 times NaN
        self.bias.fill_(-math.inf)
        self.bias[:, :P] = 0.0
        prefix_kv = self.model.prefill(self.embeddings)
        for (keys, values), (k, v) in zip(self.kv, prefix_kv, strict=True):
            keys[:, :, :P] = k
            values[:, :, :P] = v

    def decode(self) -> None:
        decoder, P = self.model.transformer, self.cfg.prefix_length
        at = P + self.position * self.K + self.row  # (K,) the slots of this position
        bias = self.bias.view(self.B, 1, self.K, -1)
        bias.masked_fill_(self.slot == at[:, None], 0.0)  # each row sees its own
        x = decoder.wte(self.tokens.view(self.B, self.K)) + decoder.wpe(P + self.position)
        for block, (keys, values) in zip(decoder.h, self.kv, strict=True):
            q, k, v = block.attn.split_heads(block.ln_1(x))  # (B, nh, K, hs)
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
            x = x + block.attn.merge_heads(y)  # (B, K, C)
            x = x + block.mlp(block.ln_2(x))
        self.logits = self.model.lm_head(decoder.ln_f(x)).flatten(0, 1)


def dtype_of(model) -> torch.dtype:
    """Return the precision of matrix products: autocast's, or the weights' own."""
    weight = model.lm_head.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def in_precision(model, dtype: torch.dtype):
    """Return a copy of the model whose decoder has its matrices in `dtype`: what autocast makes of
    them, made once. The embeddings keep their own precision, so that the head is no longer tied."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.lm_head = copy.deepcopy(model.lm_head)
    for module in (*model.transformer.modules(), model.lm_head):
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model


def captured(work):
    """Return a function that does what `work()` does, in one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up, which no graph may hold
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may copy batches meanwhile, or watch over NCCL.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


# ---------------------------------------------------------------------------------------------
# The decoders of each model

DECODERS = weakref.WeakKeyDictionary()  # of each model, by shape; the last one used comes last


def with_graphs(model, embeddings: Tensor, K: int, max_len: int):
    """Return what decodes these images, with K rows each, fastest on a GPU: a GraphedDecoder with
    the weights that the model has now; or the model itself, if there are too many rows."""
    B = len(embeddings)
    if B * K > MOST_ROWS or min(MOST_SHARING, model.cfg.vocab_size) < K:
        return model
    decoders = DECODERS.setdefault(model, {})
    shape = B, K, max_len, dtype_of(model), embeddings.device
    decoder = decoders.pop(shape, None)
    if decoder is None:
        while len(decoders) >= KEPT:
            decoders.pop(next(iter(decoders)))
        decoder = GraphedDecoder(model, B, K, max_len)
    decoders[shape] = decoder
    decoder.load(model)
    return decoder
