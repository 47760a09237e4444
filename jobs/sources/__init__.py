"""Sources by their URL: which ones an input may name, and how each is opened or fetched.

Knows nothing of layouts: neither how an input lists its sources nor what is inside a container.
"""
