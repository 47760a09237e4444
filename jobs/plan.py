"""The dry run: `python -m jobs.plan`, or `python -m jobs.transcribe --dry-run`. Reads headers, writes nothing."""

import sys
from collections.abc import Sequence

import tyro

from jobs.command_line import exit_status
from jobs.config import InputConfig
from jobs.inputs.scan import scan_input
from jobs.planning.description import describe_plan
from jobs.planning.planned_items import PlannedItems
from jobs.planning.shards import plan_shards


def dry_run(config: InputConfig, planned: PlannedItems | None = None) -> int:
    """Print what the job would do; returns the exit status.

    Args:
        planned: what is already planned for the output (`jobs.planning.item_digests.planned_items`).

    Raises:
        ConfigError: the input cannot be used, or holds nothing.
    """
    with (
        scan_input(config.reading()) as scan,
        plan_shards(scan.batches(), config.planning(scan.storage), planned) as plan,
    ):
        if not len(plan.facts) and not planned:
            raise scan.no_items(config.input)
        report = describe_plan(plan, scan, config.rtfx, config.gpu_hour_price, config.gpus)
    print("\n".join(report.lines()))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: dry_run(tyro.cli(InputConfig, args=arguments, prog="python -m jobs.plan")))


if __name__ == "__main__":
    sys.exit(main())
