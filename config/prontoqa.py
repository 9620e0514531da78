"""The paper's ProntoQA recipe: GPT-2 124M, 9,000 rows of five hops, 50 epochs."""

task = "prontoqa"
init_from = "gpt2"
fallback = "prontoqa_small.py"  # without GPT-2's weights or a GPU for them: a model for any machine

train_examples = 9_000
val_examples = 200
max_hops = 5
c_thought = 1
max_latent_stage = 6  # five hops and the property
epochs_per_stage = 5
epochs = 50
pad_latent_to_max = True

batch_size = 128  # the released code's authors: runs with less failed
micro_batch_size = 32
learning_rate = 1e-4
reset_optimizer = "stage"  # the paper; the released code does it at every epoch
eval_interval = 71  # the paper chooses its checkpoint by validation: every epoch of the last stage
