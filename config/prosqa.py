"""The paper's ProsQA recipe: GPT-2 124M, 17,886 examples, 50 epochs, one thought per step."""

init_from = "gpt2"
fallback = "prosqa_small.py"  # trained instead if GPT-2's weights or a GPU are missing

train_examples = 17_886  # as in the released training set, which --data=FILE can load
c_thought = 1
max_latent_stage = 6  # ProsQA's longest chain
epochs_per_stage = 5
epochs = 50  # 7 stages of 5 epochs, then 15 more in the final stage
pad_latent_to_max = True  # as many thoughts in training as at inference

batch_size = 128  # the released code's authors report that smaller batches failed
# 227 ms a step and 24 GB on an H200; 32 takes 266 ms and 23 GB, 128 takes 223 ms and 37 GB. The
# value changes only rounding and dropout masks
micro_batch_size = 64
learning_rate = 1e-4
reset_optimizer = "stage"  # as in the paper; the released code resets it every epoch
eval_interval = 140  # one epoch: the paper selects its checkpoint by validation
