"""What a run tells people: lines while it works, the receipt and the events at its end, and a page about its table.

Changes nothing in the table. Knows nothing of Ray.
"""
