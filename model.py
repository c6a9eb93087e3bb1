"""The model: a frozen image embedding, projected to a prefix, continued by a causal decoder.

    model = ClipLM(ModelConfig(vocab_size=8192))
    logits = model(embeddings, tokens, segments, positions, where)   # training: packed rows
    prefix = model.prefill(embeddings)                               # decoding:
    logits, cache = model.step(tokens, position, prefix, cache)      # one token a row

The idea is ClipCap's (Mokady et al. 2021, arXiv:2111.09734); the decoder is GPT-2's (Radford et
al. 2019), under the names that nanoGPT gave its parts, so that weights map one to one.

Letters in the shape comments:
    B  images of a batch                    nh  attention heads
    R  captions of an image                 hs  size of a head, C / nh
    P  prefix embeddings of an image        V   vocabulary
    S  caption tokens of a packed row       D   width of an image embedding
    T  positions of a row, P + S            K   beams of an image
    C  channels, the width of the decoder   N   rows that decode together, B * K
    t  tokens decoded so far                M   target tokens of a batch
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. A checkpoint carries it."""

    vocab_size: int = 8192  # V
    features: str = "pooled"  # pooled: one embedding an image; grid: one a patch
    embedding_dim: int = 512  # D
    n_positions: int = 1  # embeddings an image has: 1 if pooled
    n_prefix: int = 10  # P, for pooled features; grid features have P = n_positions
    normalize: bool = True  # scale each embedding to one length, as CLIP compares them
    mapper: str = "linear"  # from embedding to prefix: linear or mlp
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512  # C
    block_size: int = 128  # longest prefix + caption
    dropout: float = 0.1
    bias: bool = False  # in the decoder's linear layers and layer norms

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.n_prefix if self.features == "pooled" else self.n_positions


# ---------------------------------------------------------------------------------------------
# The parts


class Dropout(nn.Module):
    """Dropout. Drawing the random numbers takes a CPU a tenth of a training step (LOG.md), so there
    one draw of 64 bits serves eight places, with p rounded up to 1/256."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not (self.training and self.p):
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        drop = min(255, math.ceil(256 * self.p))
        draws = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= drop
        return x * kept.to(x.dtype).mul_(256 / (256 - drop))


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.attn_dropout = Dropout(cfg.dropout)
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)  # q, k, v in one
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.resid_dropout = Dropout(cfg.dropout)

    def heads(self, x):
        """q, k and v of x."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, nh, T, hs)

    def merge(self, y):
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)

    def forward(self, x, mask):
        """x (B, T, C) -> (B, T, C), and the keys and values of every position."""
        q, k, v = self.heads(x)
        p = self.attn_dropout.p if self.training else 0.0
        if x.device.type != "cpu" or (not p and q.dtype == torch.float32):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:  # here the fused kernel is slower than the three lines that it stands for (LOG.md)
            scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, T)
            weights = F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
            y = self.attn_dropout(weights) @ v
        return self.merge(y), (k, v)

    def step(self, x, prefix, cache):
        """One new token a row, x (N, 1, C), that sees its own past and, if given, a prefix.

        The K rows of an image share the prefix's keys and values, which lie once in memory: to
        the prefix they are K queries of one image. Own past and prefix meet in the softmax.
        """
        q, k, v = self.heads(x)  # (N, nh, 1, hs)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (N, nh, t, hs)
        if prefix is None:
            return self.merge(F.scaled_dot_product_attention(q, k, v)), (k, v)
        (N, nh, _, hs), (B, P) = q.shape, (prefix[0].size(0), prefix[0].size(2))
        q = q / math.sqrt(hs)
        beams = q.view(B, N // B, nh, hs).transpose(1, 2)  # (B, nh, K, hs)
        seen = beams @ prefix[0].transpose(-2, -1)  # (B, nh, K, P)
        seen = seen.transpose(1, 2).reshape(N, nh, 1, P)
        scores = torch.cat((seen, q @ k.transpose(-2, -1)), -1)  # (N, nh, 1, P + t)
        seen, own = F.softmax(scores, dim=-1).split((P, k.size(2)), -1)
        y = seen.view(B, N // B, nh, P).transpose(1, 2) @ prefix[1]  # (B, nh, K, hs)
        y = y.transpose(1, 2).reshape(N, nh, 1, hs) + own @ v
        return self.merge(y), (k, v)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x, mask):
        y, kv = self.attn(self.ln_1(x), mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv

    def step(self, x, prefix, cache):
        y, kv = self.attn.step(self.ln_1(x), prefix, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv


# ---------------------------------------------------------------------------------------------
# The whole


class ClipLM(nn.Module):
    """Prefix projection and causal decoder. The head's weights are the token embeddings'."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.n_embd * (cfg.n_prefix if cfg.features == "pooled" else 1)
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
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: the residual's sum keeps its scale
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer))

    def _init(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def prefix(self, embeddings):
        """Image embeddings (B, n_positions, D), any float type -> prefix embeddings (B, P, C)."""
        x = self.project(embeddings)
        return x + self.transformer.wpe.weight[: x.size(1)]

    def project(self, embeddings):
        """The prefix without its positions.

        The one place where embeddings are normalised, in training and in use alike: to numbers of
        size 1 (a vector of length sqrt(D)), as linear layers expect them.
        """
        x = embeddings.to(next(self.mapper.parameters()).dtype)
        if self.cfg.normalize:
            x = F.normalize(x, dim=-1) * math.sqrt(x.size(-1))
        x = self.mapper(x)  # (B, 1, P * C) or (B, P, C)
        return x.view(len(x), self.cfg.prefix_length, self.cfg.n_embd)

    # -- training: packed rows ----------------------------------------------------------------

    def hidden(self, embeddings, tokens, segments, positions):
        """The decoder's last hidden states (B, T, C) of packed rows.

        A row is [prefix | bos caption 1 | bos caption 2 | ...]. A caption's token sees the whole
        prefix and, causally, its own caption; nothing passes between the captions of a row.

        Args:
            embeddings: (B, n_positions, D) image embeddings.
            tokens: (B, S) int64 ids, the captions of each image end to end, then padding.
            segments: (B, S) int64, which caption a token belongs to, counted from 1; padding has
                a number of its own.
            positions: (B, S) int64, a token's place in its own caption, from 0 (bos).
        """
        prefix = self.prefix(embeddings)  # (B, P, C)
        B, P, _ = prefix.shape
        captions = self.transformer.wte(tokens) + self.transformer.wpe(positions + P)  # (B, S, C)
        x = self.transformer.drop(torch.cat((prefix.to(captions.dtype), captions), 1))  # (B, T, C)
        segments = F.pad(segments, (P, 0))  # (B, T): the prefix is segment 0
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same | (segments == 0)[:, None, :]).tril_()[:, None]  # (B, 1, T, T)
        for block in self.transformer.h:
            x, _ = block(x, mask)
        return x

    def forward(self, embeddings, tokens, segments, positions, where):
        """Logits (M, V) at the places `where`, (M,) int64 into the rows' B * S caption tokens.

        The head is the dearest layer; it sees no prefix, no padding.
        """
        x = self.hidden(embeddings, tokens, segments, positions)
        x = x[:, -tokens.size(1) :].flatten(0, 1)[where]  # (M, C)
        return self.lm_head(self.transformer.ln_f(x))

    # -- decoding: one token a row at a time --------------------------------------------------

    def prefill(self, embeddings):
        """The prefix's keys and values: for each layer a pair of (B, nh, P, hs)."""
        x = self.transformer.drop(self.prefix(embeddings))
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril_()
        *blocks, last = self.transformer.h
        prefix = []
        for block in blocks:
            x, kv = block(x, mask)
            prefix.append(kv)
        prefix.append(last.attn.heads(last.ln_1(x))[1:])  # nothing reads its output
        return prefix

    def step(self, tokens, position: int, prefix, cache=None):
        """Logits (N, V) of each row's next token, and the cache that includes this one.

        Args:
            tokens: (N,) int64, each row's newest token; rows n K .. n K + K - 1 are of image n.
            position: its place in the caption, from 0 (bos); the same for all rows.
            prefix: from `prefill`, of the N / K images; None where it is the cache's beginning.
            cache: for each layer the pair (k, v), (N, nh, position, hs), of the tokens before;
                None at bos. It may begin with the prefix where no two rows share one.
        """
        at = position + self.cfg.prefix_length
        x = self.transformer.wte(tokens)[:, None] + self.transformer.wpe.weight[at]  # (N, 1, C)
        x, new = self.transformer.drop(x), []
        for i, block in enumerate(self.transformer.h):
            x, kv = block.step(x, prefix and prefix[i], cache and cache[i])
            new.append(kv)
        return self.lm_head(self.transformer.ln_f(x[:, 0])), new

    # -- for the optimizer and the log --------------------------------------------------------

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for AdamW: matrices decay; biases and layer norms do not."""
        params = list(self.parameters())
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    def flops(self, images: int, tokens: int, targets: int) -> float:
        """Floating-point operations of one training step that the task needs.

        Six for each weight that a position passes through (two forward, four backward; Kaplan et
        al. 2020, arXiv:2001.08361), for the prefix of each image and each real caption token.
        Attention's own few per cent and padding are left out, so MFU is not flattered.
        """
        cfg = self.cfg
        block = 12 * cfg.n_embd**2 * cfg.n_layer
        mapper = sum(p.numel() for p in self.mapper.parameters() if p.dim() == 2)
        places = images * cfg.prefix_length + tokens
        per_image = mapper * (1 if cfg.features == "pooled" else cfg.n_positions)
        return 6.0 * (block * places + per_image * images + cfg.vocab_size * cfg.n_embd * targets)
