"""Which nodes do the thoughts hold? The values of the paper's sections 5.3 and 5.4, for ProsQA.

After k thoughts the model is made to speak, and the next step's first concept is the node it has
come to: the probability of each concept's name is that node's value.
"""

import torch

from nanococonut.batch import build_prompt
from nanococonut.curriculum import Curriculum
from nanococonut.data.prosqa import compact_question, parse_question
from nanococonut.inference.steps import decode_step, latent_step, prefill
from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer


@torch.no_grad()
def concept_probabilities(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    question: str,
    render: str,
    n_thoughts: int,
) -> dict[str, float]:
    """Every concept of a question in sentences -> its name's probability after n_thoughts, the
    product over the name's tokens.

    Behind the thoughts stand <eot> (where the method has it) and "Every"; the compact rendering has
    no such word. All names are asked at once, one in each row of a batch. UserError where the text
    is no ProsQA question or does not fit into block_size.
    """
    words = {word for edge in parse_question(question).edges for word in edge}
    names = sorted(word for word in words if word[0].islower())
    compact = render == "compact"
    asked = tokenizer.encode(compact_question(question) if compact else question + "\n")
    prefix, n_thoughts, opening = build_prompt(curriculum, asked, n_thoughts, tokenizer)
    opening = opening if compact else [*opening, *tokenizer.encode("Every")]
    said = [tokenizer.encode(" " + name) for name in names]
    longest = max(map(len, said))
    capacity = len(prefix) + n_thoughts + len(opening) + longest - 1  # the last is asked only
    if capacity > model.config.block_size:
        raise UserError(
            f"a question of {len(prefix)} tokens with {n_thoughts} thoughts does not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk a shorter question or use fewer "
            "thoughts."
        )
    device = model.wte.weight.device
    cache = model.new_cache(len(names), capacity)
    idx = torch.tensor([prefix] * len(names), device=device)
    state = prefill(model, cache, idx, torch.full((len(names),), len(prefix), device=device))
    for _ in range(n_thoughts):
        state = latent_step(model, cache, state)
    for given in opening:
        state = decode_step(model, cache, torch.full_like(idx[:, 0], given), state)
    log_p = torch.zeros(len(names), device=device)
    for i in range(longest):
        token = torch.tensor([s[i] if i < len(s) else 0 for s in said], device=device)  # (B,)
        of_all = model.head(state.hidden).float().log_softmax(-1)  # (B, V)
        left = torch.tensor([i < len(s) for s in said], device=device)
        log_p += torch.where(left, of_all.gather(1, token[:, None])[:, 0], 0.0)
        if i + 1 < longest:
            state = decode_step(model, cache, token, state)
    return dict(zip(names, log_p.exp().tolist(), strict=True))
