"""Self-critical training on the built-in dataset. It continues the run of config/shapes.py.

    python train.py config/shapes.py config/shapes_scst.py
    python sample.py --ckpt out/shapes_scst/ckpt.pt --split test

It takes 150 steps. After an earlier config/shapes.py (AdamW, other captions), greedy CIDEr on test rose
from 4.64 to 5.19, and facts F1 from .90 to .93.
"""

objective = "scst"
init_from = "out/shapes/ckpt.pt"
scst_samples = 5

batch_size = 32
max_iters = 150
optimizer = "adamw"
learning_rate = 3e-5
warmup_iters = 0
eval_interval = 50
