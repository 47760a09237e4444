"""The transcript table and the folder it lies in: its schema, its parts and their commit, and whose output it is.

Knows nothing of how a transcript is made, and of Ray.
"""
