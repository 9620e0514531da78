"""ProsQA with smaller graphs: a 2-layer model from random weights, on any laptop."""

tokenizer = "words"  # no download
render = "compact"  # half the tokens of the sentences, the same information
n_nodes = 13  # before pruning; 11 on average after it
min_hops = 2
max_hops = 3

n_layer = 2
n_head = 2
n_embd = 64
block_size = 160  # room for the longest example
dropout = 0.0  # every example is new, so there is no overfitting
smear = True  # without it the model does not learn to look up edges in the first minutes

train_examples = 6_400  # 100 steps per epoch
regenerate_each_epoch = True
# without matched examples the model learns the depth shortcut first and never learns search
matched_fraction = 0.4
short_fraction = 0.3  # examples of one hop, because search starts with near nodes
val_examples = 500
max_latent_stage = 3  # the longest chain
final_thoughts = 6  # more than the longest chain
first_stage_epochs = 2
epochs_per_stage = 6
epochs = 50
uniform_prob = 0.3  # fraction of examples at a random stage, from 0 to the current one
advance_at = 0.93  # leave a stage early once its examples are correct
icot_tokens = 0.34  # per epoch: 2 tokens in a stage of 6 epochs, as fast as Coconut

batch_size = 64
micro_batch_size = 64
learning_rate = 2e-3  # embeddings, biases and LayerNorms, by AdamW
muon_learning_rate = 7e-3  # matrices, by Muon: learns in fewer steps (docs/LOG.md)
grad_clip = 1.0
warmup_steps = 50
decay_fraction = 0.6
reset_optimizer = "never"
max_new_tokens = 40
