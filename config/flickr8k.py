"""Flickr8k."""

dataset = "flickr8k"
source = "karpathy"
lowercase = True
vocab_size = 4096

n_layer = 4
n_head = 4
n_embd = 256
block_size = 64
dropout = 0.2
label_smoothing = 0.1
embedding_noise = 0.01

batch_size = 64
max_iters = 1300
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 100
ema = 0.995
weight_decay = 0.1
eval_interval = 93
eval_images = 1000
