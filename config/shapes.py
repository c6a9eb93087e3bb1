"""The built-in dataset: scenes of coloured shapes, encoded by the tiny CLIP in assets/.

    make demo                            # all of the following, from scratch, and the install
    python prepare.py config/shapes.py
    python train.py config/shapes.py
    python sample.py --ckpt out/shapes/ckpt.pt --split test --method beam

Training takes four minutes on two cores in bfloat16. Expect facts F1 of .92 to .94 on test and of
.81 to .82 on novel, and CIDEr of 5.0 to 5.1 on test and of 4.3 to 4.4 on novel.
"""

dataset = "shapes"
source = "shapes"
shapes_train = 8000
shapes_eval = 500
clip = "assets/shapes-clip"
features = "pooled"
vocab_size = 512

n_prefix = 4
mapper = "mlp"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 64
max_iters = 1700
learning_rate = 2e-3
min_lr = 2e-5
warmup_iters = 50
eval_interval = 425
eval_images = 250
