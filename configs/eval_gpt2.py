# The loss of the pretrained GPT-2 on the training program's own validation batches, without training it:
# $ torchrun --standalone --nproc_per_node=2 train_tp.py configs/eval_gpt2.py
# The larger ones: add --init_from=gpt2-medium, gpt2-large or gpt2-xl. For a text's exact perplexity, see eval_tp.py.

init_from = "gpt2"
eval_only = True
# Many batches: the figure is an average over random windows.
batch_size = 8
eval_iters = 500
