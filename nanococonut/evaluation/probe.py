"""Which concepts does a thought encode? Sections 5.3 and 5.4 of the paper, for ProsQA.

After k thoughts the model has to answer. The first concept that it then names is the node its
search has reached, so the probability of each concept's name is the value of that node.
"""

from nanococonut.batch import build_prompt
from nanococonut.data.prosqa import parse_question
from nanococonut.inference.engine import Engine
from nanococonut.inference.steps import Branch
from nanococonut.runtime.errors import UserError


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
    # the last token of a name is scored, not appended
    n_positions = len(prefix) + n_thoughts + len(forced) + max(map(len, name_tokens)) - 1
    if n_positions > model.config.block_size:
        raise UserError(
            f"a question of {len(prefix)} tokens with {n_thoughts} thoughts does not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk a shorter question or use fewer "
            "thoughts."
        )
    branch = Branch(model, [prefix], n_thoughts, forced, [name_tokens])
    branch.think(n_thoughts)
    return dict(zip(names, branch.answer()[0].exp().tolist(), strict=True))
