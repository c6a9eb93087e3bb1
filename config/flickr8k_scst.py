"""Self-critical training on Flickr8k. It continues the run of config/flickr8k.py.

    python train.py config/flickr8k.py config/flickr8k_scst.py
    python sample.py --ckpt out/flickr8k_scst/ckpt.pt --split val

Not yet measured in full. 6,000 images are few: the reward on training images rises long after
that of validation images has stopped, so that ckpt.pt, the best of all evaluations, is what counts.
"""

objective = "scst"
init_from = "out/flickr8k/ckpt.pt"
scst_samples = 5

batch_size = 16
max_iters = 600
learning_rate = 5e-5
warmup_iters = 0
eval_interval = 50
