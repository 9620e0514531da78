"""The paper's GSM8k-Aug recipe: GPT-2 124M, 385,620 examples, two thoughts per step.

The data comes from the Hugging Face hub. A resumed run uses the commit it started with. To use that
commit in another run, write its examples to files and pass them. Text files work, too:

    python -m nanococonut.data gsm8k --revision=COMMIT --split=train --out=train.json
    python -m nanococonut.data gsm8k --revision=COMMIT --split=validation --out=valid.json
    python train.py config/gsm8k.py --data=train.json --valid_data=valid.json

The released code starts from a CoT checkpoint instead of stage 0 and trains epochs 3 to 24 of 25:

    python train.py config/gsm8k.py --method=cot --epochs=25 --out_dir=out/gsm8k_cot
    python train.py config/gsm8k.py --init_from=out/gsm8k_cot --first_stage_epochs=0 \
        --epochs=22
"""

task = "gsm8k"
init_from = "gpt2"  # no fallback: a model cannot learn this task from random weights

c_thought = 2  # two thoughts per step, as in the paper
max_latent_stage = 3  # the final stage follows: 39 % of the test examples have more steps
first_stage_epochs = 6  # stage 0 is twice as long as the others
epochs_per_stage = 3
epochs = 50  # 6 + 3 * 3, then 35 in the final stage
pad_latent_to_max = True  # as many thoughts in training as at inference

batch_size = 128
# large, since a GPU takes almost as long for fewer sequences. A lower value needs less memory; it
# changes only rounding and dropout masks
micro_batch_size = 64
learning_rate = 1e-4
reset_optimizer = "stage"  # as in the paper; the released code resets it every epoch
eval_interval = 3013  # one epoch: the paper selects its checkpoint by validation
max_new_tokens = 64
