# Fine-tune GPT-2 XL on Shakespeare. Its 25 heads go onto any number of GPUs up to 25, here 7 + 6 + 6 + 6:
# $ python data/shakespeare/prepare.py
# $ torchrun --standalone --nproc_per_node=4 train_tp.py configs/finetune_shakespeare.py
# Short of memory? Add --activation_checkpointing=True, or start from --init_from=gpt2-large.

init_from = "gpt2-xl"
out_dir = "out/finetune-shakespeare"
dataset = "shakespeare"

eval_interval = 5
eval_iters = 40
# A few steps are enough to overfit: keep only the weights that did best on the validation split.
always_save_checkpoint = False

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens an iteration; the data holds about nine times that.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# Pretrained weights want a small, constant learning rate.
learning_rate = 3e-5
decay_lr = False
