"""Plan rows -> items with their bytes, and their decoding in a process that may crash.

Knows nothing of how rows became shards, and of the model; of Ray only whether it has started this process again.
"""
