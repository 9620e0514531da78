"""ProsQA with smaller graphs, learnt from scratch by a 2-layer model on any laptop."""

tokenizer = "words"  # needs no download
render = "compact"  # half the tokens of the sentences, and nothing lost
n_nodes = 13  # before pruning; 11 on average after
min_hops = 2
max_hops = 3

n_layer = 2
n_head = 2
n_embd = 64
block_size = 160
dropout = 0.0  # every row is new: there is nothing to overfit
wte_init_std = 0.1
smear = True  # without it the edge look-up is not learnt in the first minutes

train_examples = 6_400  # a hundred steps
regenerate_each_epoch = True
matched_fraction = 0.4  # without them the depth shortcut is learnt first, and search never
short_fraction = 0.3
val_examples = 500
c_thought = 1
max_latent_stage = 3  # the longest chain
final_thoughts = 6
first_stage_epochs = 2
epochs_per_stage = 6
epochs = 50
uniform_prob = 0.3
advance_at = 0.93
icot_tokens = 0.34  # a step is two tokens and a stage six epochs: iCoT removes as fast as Coconut

batch_size = 64
micro_batch_size = 64
learning_rate = 2e-3
muon_learning_rate = 7e-3
beta2 = 0.98
grad_clip = 1.0
warmup_steps = 50
decay_fraction = 0.6
reset_optimizer = "never"
max_new_tokens = 40
