"""COCO captions (Karpathy's split), pooled CLIP ViT-B/32 embeddings.

    python prepare.py config/coco.py
    torchrun --nproc_per_node=8 train.py config/coco.py
    python sample.py --ckpt out/coco/ckpt.pt --split test --method beam

113,287 training images, five captions each. Not measured here: it was never run on a GPU. Published
for pooled features and a decoder trained from scratch: CIDEr .95 after cross-entropy.
"""

dataset = "coco"
source = "karpathy"
captions = "downloads/coco/dataset_coco.json"
images = "downloads/coco"
clip = "openai/clip-vit-base-patch32"
features = "pooled"
lowercase = True
vocab_size = 8192

n_prefix = 10
mapper = "mlp"
n_layer = 6
n_head = 8
n_embd = 512
block_size = 96
dropout = 0.1

batch_size = 256
max_iters = 9000  # 20 epochs of 442 steps
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 500
label_smoothing = 0.1
ema = 0.999
eval_interval = 442
eval_images = 5000
