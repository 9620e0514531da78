"""The paper's ProsQA recipe: GPT-2 124M, 17,886 rows, 50 epochs, one thought for each step.

Everything not said here is TrainConfig's default, which is the same recipe.
"""

init_from = "gpt2"
fallback = "prosqa_small.py"  # without GPT-2's weights or a GPU for them: a model for any machine

train_examples = 17_886  # the released training set's size; --data=FILE trains on the real one
c_thought = 1
max_latent_stage = 6  # ProsQA's longest chain
epochs_per_stage = 5
epochs = 50  # 7 stages of 5, the rest in the final one
pad_latent_to_max = True

batch_size = 128  # the released code's authors: runs with less failed
micro_batch_size = 32
learning_rate = 1e-4
reset_optimizer = "stage"  # the paper; the released code does it at every epoch
eval_interval = 140  # the paper chooses its checkpoint by validation: every epoch of the last stage
