"""The paper's ProsQA recipe: GPT-2 124M, 17,886 examples, 50 epochs, one thought per step."""

init_from = "gpt2"
fallback = "prosqa_small.py"  # without GPT-2's weights or a GPU: a model for any machine

train_examples = 17_886  # size of the released training set; --data=FILE trains on that set
c_thought = 1
max_latent_stage = 6  # ProsQA's longest chain
epochs_per_stage = 5
epochs = 50  # 7 stages of 5 epochs, the other 15 in the final stage
pad_latent_to_max = True  # as many thoughts in training as at inference

batch_size = 128  # the released code's authors report that smaller batches failed
# large, as a pass over few sequences takes a GPU as long: about 40 GB by a model of the memory,
# not measured; 32 takes half, and changes roundings and dropout's draws only
micro_batch_size = 64
learning_rate = 1e-4
reset_optimizer = "stage"  # as in the paper; the released code resets it every epoch
eval_interval = 140  # one epoch: the paper selects its checkpoint by validation
