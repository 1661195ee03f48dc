# The small GPT of docs/fewer_syncs.md: large enough to have something to lose, small enough for two CPU cores (half an hour).
# $ python data/shakespeare_char/prepare.py
# $ torchrun --standalone --nproc_per_node=2 train_tp.py configs/fewer_syncs.py --tp=1 --dtype=bfloat16

out_dir = "out/fewer-syncs"
eval_interval = 250
eval_iters = 40
log_interval = 50
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 128  # characters

n_layer = 6
n_head = 6
n_embd = 192
bias = True
dropout = 0.1

learning_rate = 2e-3
min_lr = 1e-4
max_iters = 3500
lr_decay_iters = 3500
warmup_iters = 100
beta2 = 0.99
