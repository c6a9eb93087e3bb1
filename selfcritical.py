"""Self-critical training: the model's own captions, weighted by how good they are.

Cross-entropy teaches which word comes next in a reference. Self-critical training rewards whole
captions, by CIDEr (Rennie et al. 2017, arXiv:1612.00563). The model samples K captions of each
image. Those that score above the others become more likely, and the rest less likely:

    reward      r_k = CIDEr-D of caption k against the image's references
    advantage   A_k = r_k - mean of the other K - 1 rewards (Luo 2020, arXiv:2003.09971;
                Rennie et al. subtract the reward of the greedy caption)
    loss        - sum of A_k log p(caption k) / number of sampled tokens, over the global batch

The K samples of an image are one packed row, as its references are in cross-entropy training. So
the gradient comes from the very same forward pass, with a weight for each target.

Details that are easy to get wrong:
- The reward counts the end token as a word. Without it, captions learn to break off after "with
  a". A caption that was cut off at the longest length has no end.
- No dropout, temperature or filter, neither in sampling nor in the gradient: p is the model's own.
  (Sampling never draws pad, bos or unk, to which a trained model gives almost nothing.)
- Document frequencies come from all training references, never from a batch.
"""

from collections.abc import Iterator

import numpy as np
import torch

from data import Order, Split, deal, pack_rows
from decode import Caption, Decoding, default_max_len, generate
from metrics import VERSION, CiderD
from model import ClipLM
from parts.device import Device


class SelfCritical:
    """Makes training batches of sampled captions, in place of `data.batches`.

    Args:
        model: the model that is trained; without dropout.
        split: the training images and their references.
        cfg: settings of the run (configurator.Config): scst_samples, scst_references, seed.
    """

    def __init__(self, model: ClipLM, split: Split, cfg, device: Device):
        self.model, self.split, self.cfg, self.device = model, split, cfg, device
        # A packed row also holds a sample's last token, which decoding never feeds.
        room = model.cfg.block_size - model.cfg.prefix_length - 1
        self.max_len = min(default_max_len(model.cfg, split.meta.longest_caption), room)
        _, references = split.references()
        self.cider = CiderD(references, end_token=True)

    def batches(self, order: Order, steps: range) -> Iterator[tuple[list[dict], dict]]:
        """Yield, for each step, this rank's micro-batches and the counts of the whole batch.

        The micro-batches are those of `data.batches`, plus `weights` (M,). The counts also hold
        sums over all captions (reward, length, …), whose means are logged. A sample depends only on
        the seed, the step and its image, so that any number of ranks draws the same captions.
        """
        device, micro_steps = self.device, self.cfg.gradient_accumulation_steps
        for step in steps:
            images = order.batch(step)
            dealt = deal(images, device.rank, device.world, micro_steps)
            rollouts = [self.rollout(own, step) for own in dealt]
            names = rollouts[0][1]
            own = [sum(counts[name] for _, counts in rollouts) for name in names]
            counts = dict(zip(names, device.sum(*own), strict=True))
            yield [rows for rows, _ in rollouts], {"images": len(images), **counts}

    def signature(self) -> str:
        """Return how captions are rewarded. Rewards compare if they share it."""
        return (
            f"reward: CIDEr-D with the end token, {len(self.split)} images' document frequencies, "
            f"{self.cfg.scst_samples} samples, metrics {VERSION}"
        )

    def rollout(self, images: np.ndarray, step: int) -> tuple[dict, dict]:
        """Sample captions of the images. Return packed rows, with weights, and their counts."""
        K = self.cfg.scst_samples
        embeddings = self.split.embedding(images)
        captions = self.sample(embeddings, images, step)
        texts = [self.split.tokenizer.decode(caption.ids) for caption in captions]
        ended = np.array([caption.ended for caption in captions])
        rewards = self.cider.score(np.repeat(images, K), texts, ended).reshape(-1, K)
        # r - mean of the others = (r - mean of all) * K / (K - 1)
        advantages = (rewards - rewards.mean(1, keepdims=True)) * K / (K - 1)
        rows = self.pack(embeddings, images, captions, advantages.ravel())
        lengths = np.array([len(caption.ids) for caption in captions])
        distinct = sum(len(set(texts[i : i + K])) for i in range(0, len(texts), K))
        return rows, {
            "captions": len(captions),
            "targets": int((lengths + ended).sum()),
            "reward": rewards.sum(),
            "reward_spread": K * rewards.std(1).sum(),  # within an image
            "length": int(lengths.sum()),
            "ended": int(ended.sum()),
            "distinct": distinct,
        }

    def sample(self, embeddings: torch.Tensor, images: np.ndarray, step: int) -> list[Caption]:
        """Return K captions of each image, end to end, drawn from the model as it is now."""
        (seed,) = np.random.SeedSequence([self.cfg.seed, step]).generate_state(1).tolist()
        decoding = Decoding(
            method="sample", n_best=self.cfg.scst_samples, min_len=0, max_len=self.max_len,
            seed=seed,
        )  # fmt: skip
        with self.device.autocast():
            captions = generate(
                self.model, embeddings.to(self.device.torch_device), self.split.tokenizer,
                decoding, numbers=images.tolist(),
            )  # fmt: skip
        return [caption for group in captions for caption in group]

    def pack(
        self, embeddings: torch.Tensor, images: np.ndarray, captions: list[Caption],
        advantages: np.ndarray,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return one packed row per image: its samples, then its references if they count.

        A target's weight is the advantage of its caption, or `scst_references`. The end of a
        caption that was cut off weighs nothing: it was not drawn.
        """
        tokenizer, K = self.split.tokenizer, self.cfg.scst_samples
        tokens, weights, lengths = [], [], []
        for row, image in enumerate(images):
            before = len(tokens)
            for i in range(row * K, (row + 1) * K):
                ids = captions[i].ids
                tokens += [tokenizer.bos, *ids]
                weights += [advantages[i]] * len(ids) + [advantages[i] * captions[i].ended]
            if self.cfg.scst_references:
                references = self.split.caption_tokens(image).tolist()
                tokens += references
                weights += [self.cfg.scst_references] * len(references)
            lengths.append(len(tokens) - before)
        packed = pack_rows(np.array(tokens), np.array(lengths), tokenizer)
        weights = torch.from_numpy(np.array(weights, np.float32))
        return {"embeddings": embeddings, **packed, "weights": weights}
