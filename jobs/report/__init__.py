"""What a run reports: progress lines and events while it works, a receipt at its end, and a page about its table.

Changes nothing in the table. Knows nothing of Ray.
"""
