"""COCO with all 50 tokens of CLIP ViT-B/32, class token and 7 x 7 patches; over config/coco.py.

    python prepare.py config/coco.py config/coco_grid.py
    torchrun --nproc_per_node=8 train.py config/coco.py config/coco_grid.py
    python sample.py --ckpt out/coco_grid/ckpt.pt --split test --method beam

8.7 GB of embeddings, memory-mapped. Not yet run. Published for grid features and a transformer
trained from scratch: CIDEr 1.13 after cross-entropy training (model zoo of
github.com/ruotianluo/self-critical.pytorch).
"""

dataset = "coco_grid"
features = "grid"
mapper = "linear"
block_size = 128
