"""What a model is worth: on held-out text while it trains (`held_out`), on lm-evaluation-harness's tasks afterwards
(`evaluate`, with the model class of `lm`, the task files of `tasks/` and the numbers of `metrics`).
"""
