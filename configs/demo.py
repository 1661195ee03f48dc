# The whole thing on a laptop, no GPU and no download: a small character GPT that learns Python's own documentation.
# $ python data/python_docs/prepare.py
# $ torchrun --standalone --nproc_per_node=2 train_tp.py configs/demo.py --device=cpu
# $ torchrun --standalone --nproc_per_node=2 sample_tp.py --device=cpu --out_dir=out/demo --prompt="The "

out_dir = "out/demo"
eval_interval = 250
eval_iters = 10
log_interval = 50

dataset = "python_docs"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # characters

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 1400
lr_decay_iters = 1400
warmup_iters = 50
beta2 = 0.99
