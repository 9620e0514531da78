"""Examples: a question, the reasoning steps to its answer, the answer. Text only, no tokens."""
