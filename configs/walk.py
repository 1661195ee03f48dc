# The tiny model of docs/tensor_parallelism.md: 25 heads, as gpt2-xl has, and a text that every clone has.
# $ python data/shakespeare_char/prepare.py --input=LICENSE --out=out/licence
# $ torchrun --standalone --nproc_per_node=2 train_tp.py configs/walk.py --device=cpu

out_dir = "out/walk"
overwrite = True
eval_interval = 3
eval_iters = 1

data_dir = "out"
dataset = "licence"
gradient_accumulation_steps = 1
batch_size = 4
block_size = 32  # characters

n_layer = 2
n_head = 25
n_embd = 100
bias = True

learning_rate = 1e-3
max_iters = 3
