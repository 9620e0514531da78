"""The paper's GSM8k-Aug recipe: GPT-2 124M, 385,620 examples, two thoughts per step.

The data comes from the Hugging Face hub. A run stays on the commit it started with; pass the same
--hub_revision=COMMIT to another run. Or use text files: --data=FILE --valid_data=FILE.

The released code instead starts from a CoT checkpoint and has no stage 0: epochs 3 to 24 of 25.

    python train.py config/gsm8k.py --method=cot --epochs=25 --out_dir=out/gsm8k_cot
    python train.py config/gsm8k.py --init_from=out/gsm8k_cot --first_stage_epochs=0 \
        --epochs=22
"""

task = "gsm8k"
init_from = "gpt2"  # no fallback: a model cannot learn this mathematics from random weights

c_thought = 2  # two thoughts per step, as in the paper
max_latent_stage = 3  # then the final stage: 39 % of the test examples have more steps
first_stage_epochs = 6  # stage 0 is twice as long as the others
epochs_per_stage = 3
epochs = 50  # 6 + 3 * 3, the other 35 in the final stage
pad_latent_to_max = True  # as many thoughts in training as at inference

batch_size = 128
# large, as a pass over few sequences takes a GPU as long; 32 takes about half of the memory, and
# changes roundings and dropout's draws only
micro_batch_size = 64
learning_rate = 1e-4
reset_optimizer = "stage"  # as in the paper; the released code resets it every epoch
eval_interval = 3013  # one epoch: the paper selects its checkpoint by validation
max_new_tokens = 64
