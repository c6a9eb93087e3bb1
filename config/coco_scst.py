"""Self-critical training on COCO. It continues the run of config/coco.py.

    torchrun --nproc_per_node=8 train.py config/coco.py config/coco_scst.py
    python sample.py --ckpt out/coco_scst/ckpt.pt --split test --method beam

Not yet run. The references' weight is what kept captions varied on Flickr8k (LOG.md). Published
for pooled features and a decoder trained from scratch: CIDEr .953 after cross-entropy training,
1.053 after self-critical training (model zoo of github.com/ruotianluo/self-critical.pytorch).
"""

objective = "scst"
init_from = "out/coco/ckpt.pt"
scst_samples = 5
scst_references = 0.1

batch_size = 64
max_iters = 35400  # 20 epochs of 1,770 steps
optimizer = "adamw"
learning_rate = 2e-5
warmup_iters = 0
eval_interval = 1770
