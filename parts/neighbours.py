"""The nearest training images, and CLIP's embeddings of images and captions, to compare them.

Captions borrowed from neighbours and chosen by consensus are the floor that a captioner has to
beat (Devlin et al. 2015, arXiv:1505.04467). The same captions re-rank a captioner's own n-best.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parts.common import UserError
from parts.encoder import BadImage, Encoder, read_image

BLOCK = 8192  # rows of training embeddings read at a time


class Neighbours:
    """Finds the training images nearest to an image, by the cosine of their embeddings.

    Args:
        embeddings: (images, n_positions, D) float16, memory-mapped; their means are kept.
        count: how many neighbours an image has.
    """

    def __init__(self, embeddings: np.ndarray, count: int):
        self.count = min(count, len(embeddings))
        blocks = (embeddings[i : i + BLOCK] for i in range(0, len(embeddings), BLOCK))
        self.means = torch.cat([normalized_mean(torch.tensor(block)) for block in blocks])

    def __call__(self, embeddings: Tensor) -> list[list[int]]:
        """Return the neighbours of images (B, n_positions, D), as their numbers, nearest first."""
        similarity = normalized_mean(embeddings.cpu()) @ self.means.T  # (B, images)
        return similarity.topk(self.count).indices.tolist()


def normalized_mean(embeddings: Tensor) -> Tensor:
    """Return each image's mean embedding, (B, D), of length 1, from (B, n_positions, D)."""
    return F.normalize(embeddings.float().mean(1), dim=-1)


class ImageText:
    """CLIP or SigLIP as a judge of captions. Raise UserError if neither made the embeddings.

    Args:
        meta: the data.Meta of the embeddings.
        name: the encoder's name or folder; empty: as in `meta`.
    """

    PREFIX = "A photo depicts "  # before every caption, as in Hessel et al. 2021

    def __init__(self, meta, name: str, device: torch.device):
        if not meta.encoder:
            raise UserError("CLIP cannot judge captions of embeddings that no CLIP made")
        self.encoder = Encoder(name or meta.encoder, device=device, text=True)
        self.is_pooled = meta.features == "pooled"
        if self.is_pooled and self.encoder.embedding_dim != meta.embedding_dim:
            raise UserError(f"{self.encoder.name} did not make these embeddings: set --clip")

    def images(self, embeddings: Tensor, paths: Sequence[str]) -> np.ndarray:
        """Return images as (B, D), of length 1: the embeddings if pooled, else from the files."""
        if not self.is_pooled:
            try:
                embeddings = self.encoder([read_image(path) for path in paths])
            except BadImage as error:
                raise UserError(f"CLIP needs the image files ({error}): set --images") from None
        return F.normalize(embeddings[:, 0].float(), dim=-1).cpu().numpy()

    def texts(self, groups: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return groups of captions as (captions, D) each, of length 1."""
        texts = [self.PREFIX + caption for group in groups for caption in group]
        embeddings = F.normalize(self.encoder.encode_text(texts), dim=-1).numpy()
        return np.split(embeddings, np.cumsum([len(group) for group in groups])[:-1])
