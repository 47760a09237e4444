"""Plan rows -> shards: new items, unique ids, lengths that are known or estimated, and plans on storage.

A pure function of listing and options. Knows nothing of the model, of the table or of Ray.
"""
