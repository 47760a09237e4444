"""The transcript table and the folder it lies in: its schema, its parts, their commit, and which model it belongs to.

Knows nothing of how a transcript is made, nor of Ray.
"""
