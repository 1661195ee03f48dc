# A baby GPT that learns to spell like Shakespeare: minutes on one GPU, good for trying things out.
# $ python data/shakespeare_char/prepare.py
# $ torchrun --standalone --nproc_per_node=2 train_tp.py configs/train_shakespeare_char.py
# On a laptop's CPU, make it smaller still: configs/demo.py shows how.

out_dir = "out/shakespeare-char"
eval_interval = 250
eval_iters = 200
log_interval = 10
# It overfits before the end: keep only the weights that did best on the validation split.
always_save_checkpoint = False

wandb_project = "shakespeare-char"
wandb_run_name = "baby-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

# A small network stands a high learning rate, and a small batch (16,384 tokens) a slower second moment.
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99
