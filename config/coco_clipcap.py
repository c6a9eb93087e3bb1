"""ClipCap (Mokady et al. 2021, arXiv:2111.09734) on COCO: GPT-2 continues a prefix of ten embeddings.

    python prepare.py config/coco_clipcap.py    # needs requirements-clip.txt
    python train.py config/coco_clipcap.py
    python sample.py --ckpt out/coco_clipcap/ckpt.pt --split test --method beam

The paper's setting: CLIP ViT-B/32, an MLP mapper, GPT-2 small trained with it, ten epochs of 40 captions
per step (here 8 images with five captions each), AdamW, learning rate 2e-5 after 5,000 steps of warmup.
The paper reports, on Karpathy's test split: BLEU-4 .3215, METEOR .271, CIDEr 1.0835. Its other mode keeps
GPT-2 as it is and trains a larger mapper, a transformer: CIDEr 1.1308. Here, `--freeze_decoder --dropout=0`
keeps GPT-2 as it is and trains the MLP.

Different here: the mapper has 3,072 hidden units and GELU (3,840 and tanh in their code), its input is
normalised, the learning rate follows a cosine (theirs a line), and captions have a bos and a learned end.

Not yet run: neither GPT-2's published weights nor COCO's images were available where this was written.
The tests take the same path with a tiny random GPT-2 (tests/test_gpt2.py).
"""

dataset = "coco_clipcap"
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
tokenizer = "gpt2"
init_from = "gpt2"

n_prefix = 10
mapper = "mlp"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 128
bias = True
dropout = 0.1

batch_size = 8
max_iters = 141600  # 10 epochs of 14,160 steps
learning_rate = 2e-5
min_lr = 0.0
warmup_iters = 5000
weight_decay = 0.0
beta2 = 0.999
grad_clip = 0.0
eval_interval = 14160
eval_images = 5000
