"""Ray programs over `parakeet_core`: all I/O of the project is here."""

import os

# A node that goes without a word is noticed by Ray after 15 to 65 s. Until then each call of its actors fails at once
# and uses up a retry: all five of a shard (`pipeline.LOST_WORKER_RETRIES`) in 9 s, and the job with them. With this
# pause a lost node costs a shard one or two. Ray reads it when it is first imported, which is why it stands here.
for name in ("RAY_task_actor_unavailable_retry_delay_base_ms", "RAY_task_actor_unavailable_retry_max_delay_ms"):
    os.environ.setdefault(name, "15000")
