"""Flickr8k: 6,000 training images with five captions each. It trains without a GPU.

    python prepare.py config/flickr8k.py         # downloads images and captions, after asking
    python train.py config/flickr8k.py
    python sample.py --ckpt out/flickr8k/ckpt.pt --split val --method beam

Measured on validation, with embeddings of a MobileNet (not CLIP's): greedy CIDEr .443 to .460, four
seeds on an H200 in bfloat16. LOG.md has the settings that were compared. On two cores without
bfloat16, a step takes .84 s: half an hour plus evaluations. The images are for non-commercial
research.
"""

dataset = "flickr8k"
source = "karpathy"
captions = "downloads/flickr8k/dataset_flickr8k.json"
images = "downloads/flickr8k/Flicker8k_Dataset"
downloads = [
    "http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip downloads/flickr8k/dataset_flickr8k.json",
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip downloads/flickr8k/Flicker8k_Dataset f18a1e2920de5bd84dae7cf08ec78978",
]
clip = "openai/clip-vit-base-patch32"
lowercase = True
vocab_size = 4096

n_layer = 4
n_head = 4
n_embd = 256
block_size = 64
dropout = 0.3
label_smoothing = 0.1
embedding_noise = 0.005

batch_size = 32
max_iters = 2000
optimizer = "muon"
learning_rate = 1e-3
lr_decay = "linear"
min_lr = 1e-5
warmup_iters = 100
ema = 0.999
weight_decay = 0.1
eval_interval = 400
eval_images = 1000
