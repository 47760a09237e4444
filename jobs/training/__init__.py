"""The fine-tuning job behind `jobs.finetune`: texts and audio -> labelled batches -> steps -> checkpoints and a model.

Ray runs `data.py` as tasks and `loop.py` as workers. Knows nothing of how an input is laid out or a text transcribed.
"""
