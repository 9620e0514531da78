"""The paper's ProntoQA recipe: GPT-2 124M, 9,000 examples of five hops, 50 epochs."""

task = "prontoqa"
init_from = "gpt2"
fallback = "prontoqa_small.py"  # trained instead if GPT-2's weights or a GPU are missing

train_examples = 9_000  # as in the paper
val_examples = 200
max_hops = 5
c_thought = 1
max_latent_stage = 6  # five hops and the property
epochs_per_stage = 5
epochs = 50  # 7 stages of 5 epochs, then 15 more in the final stage
pad_latent_to_max = True  # as many thoughts in training as at inference

batch_size = 128  # the released code's authors report that smaller batches failed
# large, since a GPU takes almost as long for fewer sequences. A lower value needs less memory; it
# changes only rounding and dropout masks
micro_batch_size = 64
learning_rate = 1e-4
reset_optimizer = "stage"  # as in the paper; the released code resets it every epoch
eval_interval = 71  # one epoch: the paper selects its checkpoint by validation
