"""Which concepts does a thought encode? Sections 5.3 and 5.4 of the paper, for ProsQA.

After k thoughts the model has to answer. The first concept that it then names is the node its
search has reached, so the probability of each concept's name is the value of that node.
"""

from nanococonut.data.prosqa import parse_question
from nanococonut.inference.engine import Engine


def concept_probabilities(engine: Engine, question: str, n_thoughts: int) -> dict[str, float]:
    """Map each concept of a question in sentences to the probability of its name.

    The name follows n_thoughts thoughts, <eot> (if the method has it) and the word "Every" (unless
    the model reads compact examples). Its probability is the product over its tokens. Raise
    UserError if the text is not a ProsQA question or does not fit in block_size.
    """
    words = {word for edge in parse_question(question).edges for word in edge}
    names = sorted(word for word in words if word[0].islower())
    mark = "Every" if engine.config.render == "sentences" else ""
    [log_p] = engine.choose([question], [names], n_thoughts, mark=mark)
    return dict(zip(names, log_p.exp().tolist(), strict=True))
