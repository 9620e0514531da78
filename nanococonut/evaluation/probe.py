"""Which concepts does a thought encode? Sections 5.3 and 5.4 of the paper, for ProsQA.

After k thoughts the model has to answer. The first concept that it then names is the node its
search has reached, so the probability of each concept's name is the value of that node.
"""

import torch

from nanococonut.batch import build_prompt
from nanococonut.data.prosqa import parse_question
from nanococonut.inference.engine import Engine
from nanococonut.inference.steps import decode_step, latent_step, prefill
from nanococonut.runtime.errors import UserError


@torch.no_grad()
def concept_probabilities(engine: Engine, question: str, n_thoughts: int) -> dict[str, float]:
    """Map each concept of a question in sentences to the probability of its name.

    The name follows n_thoughts thoughts, <eot> (if the method has it) and the word "Every" (unless
    the model reads compact examples). Its probability is the product over its tokens. Raise
    UserError if the text is not a ProsQA question or does not fit in block_size.
    """
    model, tokenizer = engine.model, engine.tokenizer
    words = {word for edge in parse_question(question).edges for word in edge}
    names = sorted(word for word in words if word[0].islower())
    prompt = tokenizer.encode(engine.render(question))
    prefix, n_thoughts, forced = build_prompt(engine.curriculum, prompt, n_thoughts, tokenizer)
    if engine.config.render == "sentences":
        forced = [*forced, *tokenizer.encode("Every")]
    name_tokens = [tokenizer.encode(" " + name) for name in names]
    longest = max(map(len, name_tokens))
    # the last token of a name is scored, not appended
    capacity = len(prefix) + n_thoughts + len(forced) + longest - 1
    if capacity > model.config.block_size:
        raise UserError(
            f"a question of {len(prefix)} tokens with {n_thoughts} thoughts does not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk a shorter question or use fewer "
            "thoughts."
        )
    B, device = len(names), model.wte.weight.device  # one sequence per name
    cache = model.new_cache(B, capacity)
    idx = torch.tensor([prefix] * B, device=device)
    state = prefill(model, cache, idx, torch.full((B,), len(prefix), device=device))
    for _ in range(n_thoughts):
        state = latent_step(model, cache, state)
    for token_id in forced:
        state = decode_step(model, cache, torch.full_like(idx[:, 0], token_id), state)
    log_p = torch.zeros(B, device=device)
    for i in range(longest):
        token = torch.tensor(
            [t[i] if i < len(t) else 0 for t in name_tokens], device=device
        )  # (B,)
        mask = torch.tensor([i < len(t) for t in name_tokens], device=device)
        logits = model.head(state.hidden).float()  # (B, V)
        log_p += torch.where(mask, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], 0.0)
        if i + 1 < longest:
            state = decode_step(model, cache, token, state)
    return dict(zip(names, log_p.exp().tolist(), strict=True))
