"""ProsQA at its released size, from random weights: 3 to 6 hops in graphs of 23 nodes.

One hour on one CPU thread: 90 % of the released validation examples, 92 % of depth-matched ones.
docs/LOG.md says what limits it.
"""

tokenizer = "words"  # no download
render = "compact"  # half the tokens of the sentences, the same information

n_layer = 2
n_head = 4
n_embd = 128
block_size = 256  # room for the longest example
dropout = 0.0  # every example is new, so there is no overfitting
wte_init_std = 0.1  # learns faster than 0.02 (docs/LOG.md)
smear = True  # makes the previous word visible without an attention layer

train_examples = 12_800  # 200 steps per epoch
regenerate_each_epoch = True
matched_fraction = 0.4  # examples without the depth shortcut
short_fraction = 0.3  # examples of one or two hops: search starts with near nodes
val_examples = 500
max_latent_stage = 6  # the longest chain
first_stage_epochs = 2
epochs_per_stage = 3
epochs = 50
uniform_prob = 0.3  # these examples sample an earlier stage
advance_at = 0.93  # leave a stage early once its examples are correct

batch_size = 64
micro_batch_size = 64
learning_rate = 2e-3  # embeddings, biases and LayerNorms, by AdamW
muon_learning_rate = 7e-3  # matrices, by Muon: learns in fewer steps (docs/LOG.md)
beta2 = 0.98
grad_clip = 1.0
warmup_steps = 50
decay_fraction = 0.6
reset_optimizer = "never"
eval_interval = 1000
max_new_tokens = 60
