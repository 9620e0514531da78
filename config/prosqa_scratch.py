r"""ProsQA at its released size, from random weights: 3 to 6 hops in graphs of 23 nodes.

In addition to the paper's losses, each thought is labelled with the nodes that the search has
reached. After 22 minutes on two CPU threads, seed 1 answers 99.3 % of the released validation
examples and all of 1,000 chains of 7 and 8 hops. With the paper's losses alone, three seeds answer
96.7 to 97.7 % of these examples and 95.5 to 96.2 % of these chains (with ten thoughts) after an
hour (docs/RESULTS.md):

    python train.py config/prosqa_scratch.py --train_positions=False --thought_labels=none \
        --max_latent_stage=4 --grow_epochs=15 --first_stage_epochs=3 --epochs_per_stage=2 \
        --epochs=70 --uniform_prob=0.8
"""

tokenizer = "words"  # no download
render = "compact"  # half the tokens of the sentences, the same information

n_layer = 2
n_head = 4
n_embd = 128
block_size = 256  # room for the longest example
dropout = 0.0  # every example is new, so there is no overfitting
smear = True  # makes the previous word visible without an attention layer

train_examples = 12_800  # 200 steps per epoch
regenerate_each_epoch = True
grow_epochs = 5  # with half the nodes and hops, search is learned in a third of the steps
matched_fraction = 0.35  # examples without the depth shortcut
short_fraction = 0.2  # examples of one or two hops, because search starts with near nodes
long_fraction = 0.15  # examples of five or six hops, which are rare otherwise
val_examples = 500

thought_labels = "frontier"  # unlike the path, follows from the previous thought (docs/LOG.md)
max_latent_stage = 0  # with these labels the final stage can follow stage 0
final_thoughts = 8  # more than max_hops, so that longer chains can be searched, too
first_stage_epochs = 1
epochs = 24
uniform_prob = 0.1  # fraction of examples at a random stage, from 0 to the current one
advance_at = 0.93  # leave a stage early once its examples are correct

batch_size = 64
micro_batch_size = 64
learning_rate = 2e-3  # embeddings, biases and LayerNorms, by AdamW
muon_learning_rate = 7e-3  # matrices, by Muon: learns in fewer steps (docs/LOG.md)
grad_clip = 1.0
warmup_steps = 50
decay_fraction = 0.6
reset_optimizer = "never"
eval_interval = 400
max_new_tokens = 60
