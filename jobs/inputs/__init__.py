"""Any input layout -> plan rows: a folder, a manifest, tars or Parquet files become one stream of rows.

Knows nothing of shards, and decodes no audio.
"""
