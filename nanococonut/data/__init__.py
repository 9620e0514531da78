"""Tasks and their examples: a question, the reasoning steps, the answer. Text only, no tokens."""
