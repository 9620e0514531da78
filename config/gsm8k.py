"""The paper's GSM8k-Aug recipe: GPT-2 124M, 385,620 rows, two thoughts for each step.

Rows come from the hub (a run keeps to the commit it began with; --hub_revision=COMMIT gives the
same to another), or from text lines by --data=FILE --valid_data=FILE. The released code starts from
a CoT checkpoint instead, and has no stage 0:

    python train.py config/gsm8k.py --method=cot --epochs=25 --out_dir=out/gsm8k_cot
    python train.py config/gsm8k.py --init_from=out/gsm8k_cot --first_stage_epochs=0 \
        --epochs=25
"""

task = "gsm8k"
init_from = "gpt2"  # no fallback: grade-school mathematics is not learnt from scratch

c_thought = 2
max_latent_stage = 3  # then one final stage: 39 % of the test rows have more steps
first_stage_epochs = 6
epochs_per_stage = 3
epochs = 50
pad_latent_to_max = True

batch_size = 128
micro_batch_size = 32
learning_rate = 1e-4
reset_optimizer = "stage"
eval_interval = 3013  # every epoch of the last stage
max_new_tokens = 64
