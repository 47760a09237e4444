"""The fine-tuning job (`jobs.finetune`): texts and audio -> labelled batches -> steps -> checkpoints and a model.
Ray runs `data.py` as tasks and `loop.py` as workers. Knows nothing of input layouts or of transcription.
"""
