"""Files on local disks and in object stores: connections, retries, atomic writes, and one boundary for their errors.

Knows nothing of audio, plans, tables or Ray.
"""
