"""Ray programs over `parakeet_core`: all I/O of the project is here."""

import os

# Ray notices a node that vanishes without notice after 15 to 65 s. Until then each call to its actors fails at once and
# uses up a retry: all five of a shard (`pipeline.LOST_WORKER_RETRIES`) in 9 s, which ends the job. With this pause, a
# lost node costs a shard one or two retries. The settings are here because Ray reads them when it is first imported.
for name in ("RAY_task_actor_unavailable_retry_delay_base_ms", "RAY_task_actor_unavailable_retry_max_delay_ms"):
    os.environ.setdefault(name, "15000")
