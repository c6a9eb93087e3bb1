"""COCO captions (Karpathy's split), pooled CLIP ViT-B/32 embeddings.

    python prepare.py config/coco.py
    torchrun --nproc_per_node=8 train.py config/coco.py
    python sample.py --ckpt out/coco/ckpt.pt --split test --method beam

113,287 training images with five captions each. Not yet run: optimizer and schedule are those that
won on Flickr8k (LOG.md). Published for pooled features and a decoder trained from scratch: CIDEr
.953 after cross-entropy training (model zoo of github.com/ruotianluo/self-critical.pytorch).
"""

dataset = "coco"
source = "karpathy"
captions = "downloads/coco/dataset_coco.json"
images = "downloads/coco"
downloads = [
    "http://images.cocodataset.org/zips/train2014.zip downloads/coco/train2014 ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    "http://images.cocodataset.org/zips/val2014.zip downloads/coco/val2014 fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    "http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip downloads/coco/dataset_coco.json",
]
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
max_iters = 8840  # 20 epochs of 442 steps
optimizer = "muon"
learning_rate = 1e-3
lr_decay = "linear"
min_lr = 1e-5
warmup_iters = 500
label_smoothing = 0.1
ema = 0.999
eval_interval = 442
eval_images = 5000
