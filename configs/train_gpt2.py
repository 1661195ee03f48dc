# GPT-2 124M from scratch on OpenWebText, two GPUs to a model on a box of eight (dp 4 x tp 2):
# $ python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train_tp.py configs/train_gpt2.py --tp=2
# A model this small fits one GPU: --tp=1 is the faster way to train it, larger tp the way to see what tp costs.

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens an iteration, whatever tp and dp (dp must divide 40).
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all.
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
