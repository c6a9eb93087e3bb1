"""The model: a frozen image embedding, projected to a prefix, continued by a causal decoder.

    model = ClipLM(ModelConfig(vocab_size=8192))
    logits = model(embeddings, tokens, segments, positions, targets_at)  # training: packed rows
    prefix_kv = model.prefill(embeddings)                                # decoding:
    logits, cache = model.step(tokens, position, prefix_kv, cache)       # one token per row

The idea is ClipCap's (Mokady et al. 2021, arXiv:2111.09734). The decoder is GPT-2's (Radford et
al. 2019), under the names that nanoGPT gave its parts, so that weights map one to one.

Letters in the shape comments:
    B  images in a batch                    nh  attention heads
    R  captions of an image                 hs  size of a head, C / nh
    P  prefix embeddings of an image        V   vocabulary size
    S  caption tokens in a packed row       D   width of an image embedding
    T  positions in a row, P + S            K   beams or samples of an image
    C  channels, the width of the decoder   N   rows that decode together, B * K
    t  tokens decoded so far                M   target tokens in a batch
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parts.device import Dropout, attention

KeyValue = tuple[Tensor, Tensor]  # of one layer; a cache is a list of them, one per layer


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. A checkpoint carries it."""

    vocab_size: int = 8192  # V
    features: str = "pooled"  # pooled: one embedding per image; grid: one per patch
    embedding_dim: int = 512  # D
    n_positions: int = 1  # embeddings of an image: 1 if pooled
    n_prefix: int = 10  # P for pooled features; grid features have P = n_positions
    normalize: bool = True  # scale each embedding to the same length, as CLIP compares them
    mapper: str = "linear"  # from embedding to prefix: linear or mlp
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512  # C
    block_size: int = 128  # longest prefix + caption
    dropout: float = 0.1
    bias: bool = False  # in the decoder's linear layers and layer norms

    @property
    def is_grid(self) -> bool:
        return self.features == "grid"

    @property
    def prefix_length(self) -> int:  # P
        return self.n_positions if self.is_grid else self.n_prefix


# ---------------------------------------------------------------------------------------------
# The parts of the decoder


class Attention(nn.Module):
    """Multi-head attention: over whole rows in `forward`, one new token per row in `step`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.attn_dropout = Dropout(cfg.dropout)
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)  # q, k, v in one
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.resid_dropout = Dropout(cfg.dropout)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, nh, T, hs)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge_heads(self, y: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, KeyValue]:
        """Attend within rows x (B, T, C). Return (B, T, C), and all keys and values."""
        q, k, v = self.split_heads(x)
        y = attention(q, k, v, mask, self.attn_dropout)
        return self.merge_heads(y), (k, v)

    def step(
        self, x: Tensor, prefix_kv: KeyValue | None, cache: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Attend from one new token per row, x (N, 1, C), to its cache and the prefix. Return
        (N, 1, C), and the cache that includes this token."""
        q, k, v = self.split_heads(x)  # (N, nh, 1, hs)
        if cache is not None:
            k = torch.cat((cache[0], k), dim=2)  # (N, nh, t, hs)
            v = torch.cat((cache[1], v), dim=2)
        if prefix_kv is None:  # the cache begins with the prefix
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = attend_shared(q, k, v, *prefix_kv)
        return self.merge_heads(y), (k, v)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attend to a prefix that K rows share, and to each row's own past, in one softmax.

    The K beams of an image have the same prefix. Its keys and values (B, nh, P, hs) are kept
    once, not K times; the beams are K queries to them. k, v are (N, nh, t, hs), q (N, nh, 1, hs).
    """
    N, nh, _, hs = q.shape
    B, _, P, _ = prefix_k.shape
    q = q / math.sqrt(hs)
    K = N // B
    queries = q.view(B, K, nh, hs).transpose(1, 2)  # (B, nh, K, hs)
    prefix_scores = queries @ prefix_k.transpose(-2, -1)  # (B, nh, K, P)
    prefix_scores = prefix_scores.transpose(1, 2).reshape(N, nh, 1, P)
    past_scores = q @ k.transpose(-2, -1)  # (N, nh, 1, t)
    weights = F.softmax(torch.cat((prefix_scores, past_scores), dim=-1), dim=-1)
    prefix_weights, past_weights = weights.split((P, k.size(2)), dim=-1)
    y = prefix_weights.view(B, K, nh, P).transpose(1, 2) @ prefix_v  # (B, nh, K, hs)
    return y.transpose(1, 2).reshape(N, nh, 1, hs) + past_weights @ v


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.prefill(x, mask)[0]

    def prefill(self, x: Tensor, mask: Tensor) -> tuple[Tensor, KeyValue]:
        """As `forward`, but return all keys and values too."""
        y, kv = self.attn(self.ln_1(x), mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv

    def step(self, x: Tensor, prefix_kv, cache) -> tuple[Tensor, KeyValue]:
        y, kv = self.attn.step(self.ln_1(x), prefix_kv, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv


# ---------------------------------------------------------------------------------------------
# The full model


class ClipLM(nn.Module):
    """Prefix projection and causal decoder. The head shares its weights with the embeddings."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.n_embd if cfg.is_grid else cfg.n_embd * cfg.n_prefix
        if cfg.mapper == "linear":
            self.mapper = nn.Linear(cfg.embedding_dim, width)
        else:
            hidden = 4 * cfg.n_embd
            self.mapper = nn.Sequential(
                nn.Linear(cfg.embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, width)
            )
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),
                wpe=nn.Embedding(cfg.block_size, cfg.n_embd),
                drop=Dropout(cfg.dropout),
                h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
                ln_f=nn.LayerNorm(cfg.n_embd, bias=cfg.bias),
            )
        )
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: the sum of the residuals keeps its scale
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def project(self, embeddings: Tensor) -> Tensor:
        """Project image embeddings (B, n_positions, D) to prefix embeddings (B, P, C).

        If cfg.normalize, embeddings are scaled to unit RMS (length sqrt(D)), as linear layers
        expect.
        """
        x = embeddings.to(next(self.mapper.parameters()).dtype)
        if self.cfg.normalize:
            x = F.normalize(x, dim=-1) * math.sqrt(x.size(-1))
        x = self.mapper(x)  # (B, 1, P * C) or (B, P, C)
        return x.view(len(x), self.cfg.prefix_length, self.cfg.n_embd)

    def embed_prefix(self, embeddings: Tensor) -> Tensor:
        """Return the prefix as the decoder reads it: projected, with positions 0 to P - 1."""
        return self.project(embeddings) + self.transformer.wpe.weight[: self.cfg.prefix_length]

    # -- training: packed rows ----------------------------------------------------------------

    def embed_rows(
        self, embeddings: Tensor, tokens: Tensor, segments: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's input (B, T, C) and mask (B, 1, T, T) for packed rows.

        A row is [prefix | bos caption 1 | bos caption 2 | ...]. A caption's token sees the whole
        prefix and, causally, its own caption; nothing passes between the captions of a row. The
        prefix is causal too, as in GPT-2.
        """
        prefix = self.embed_prefix(embeddings)  # (B, P, C)
        P = prefix.size(1)
        captions = self.transformer.wte(tokens) + self.transformer.wpe(positions + P)  # (B, S, C)
        x = torch.cat((prefix.to(captions.dtype), captions), dim=1)  # (B, T, C)
        segments = F.pad(segments, (P, 0))  # (B, T): the prefix is segment 0
        same_caption = segments[:, :, None] == segments[:, None, :]
        is_prefix = (segments == 0)[:, None, :]
        mask = (same_caption | is_prefix).tril_()[:, None]  # (B, 1, T, T)
        return self.transformer.drop(x), mask

    def forward(
        self, embeddings: Tensor, tokens: Tensor, segments: Tensor, positions: Tensor,
        targets_at: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return logits (M, V) of packed rows, at the real tokens only.

        Args:
            embeddings: (B, n_positions, D) image embeddings.
            tokens: (B, S) int64 ids, the captions of each image end to end, then padding.
            segments: (B, S) int64, which caption a token belongs to, counted from 1; padding gets
                an id that no caption uses.
            positions: (B, S) int64, a token's position in its own caption, from 0 (bos).
            targets_at: (M,) int64, which of the B * S tokens have a target (the real ones).
        """
        x, mask = self.embed_rows(embeddings, tokens, segments, positions)
        for block in self.transformer.h:
            x = block(x, mask)
        # The head is the most expensive layer, so it runs on real tokens only.
        x = x[:, -tokens.size(1) :].flatten(0, 1).index_select(0, targets_at)  # (M, C)
        return self.lm_head(self.transformer.ln_f(x))

    # -- decoding: one token per row at a time --------------------------------------------------

    def prefill(self, embeddings: Tensor) -> list[KeyValue]:
        """Return the prefix's keys and values: for each layer a pair of (B, nh, P, hs)."""
        x = self.embed_prefix(embeddings)
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril_()
        *blocks, last = self.transformer.h
        prefix_kv = []
        for block in blocks:
            x, kv = block.prefill(x, mask)
            prefix_kv.append(kv)
        _, k, v = last.attn.split_heads(last.ln_1(x))  # nothing reads the last layer's output
        return [*prefix_kv, (k, v)]

    def step(
        self, tokens: Tensor, position: int, prefix_kv: list[KeyValue] | None,
        cache: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:  # fmt: skip
        """Return logits (N, V) of each row's next token, and the cache that includes this one.

        Args:
            tokens: (N,) int64, each row's newest token; the K rows of an image are adjacent.
            position: its position in the caption, from 0 (bos); the same for all rows.
            prefix_kv: from `prefill`, of the N / K images; None if the cache begins with it.
            cache: for each layer (k, v) of the earlier tokens, (N, nh, position, hs); None at bos.
                With one row per image, it may begin with the prefix: (N, nh, P + position, hs).
        """
        wpe = self.transformer.wpe.weight[self.cfg.prefix_length + position]
        x = self.transformer.wte(tokens)[:, None] + wpe  # (N, 1, C)
        none = [None] * self.cfg.n_layer
        layers = zip(self.transformer.h, prefix_kv or none, cache or none, strict=True)
        new_cache = []
        for block, layer_prefix, layer_cache in layers:
            x, kv = block.step(x, layer_prefix, layer_cache)
            new_cache.append(kv)
        return self.lm_head(self.transformer.ln_f(x[:, 0])), new_cache


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Return the cross-entropy, in nats, of logits (M, V): summed over the targets (M,), or their
    weighted sum. Compiled, it needs no copies of the logits in float32."""
    options = {"target": targets, "label_smoothing": label_smoothing}
    if weights is None:
        return F.cross_entropy(logits.float(), reduction="sum", **options)
    return F.cross_entropy(logits.float(), reduction="none", **options) @ weights


def loss_sum(
    model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0,
    cross_entropy=cross_entropy,
) -> Tensor:  # fmt: skip
    """Return the cross-entropy summed over the targets of packed rows, or weighted by the batch's
    `weights` (M,) if there are any. The function `cross_entropy` may be compiled."""
    inputs = dict(batch)
    targets, weights = inputs.pop("targets"), inputs.pop("weights", None)
    return cross_entropy(model(**inputs), targets, weights, label_smoothing)
