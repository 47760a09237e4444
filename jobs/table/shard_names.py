"""Sets of shard names in few bytes: 100,000 shards of one plan are a dozen characters."""

from collections.abc import Iterable


def pack_shards(shards: Iterable[str]) -> dict[str, str]:
    """Shard names in few bytes: generation and plan -> ranges of numbers, as in "0-99,102"."""
    numbers: dict[str, list[int]] = {}
    for shard in sorted(shards):  # from a million shards on, this is not the order of their numbers
        generation, number, plan = shard.split("-")
        numbers.setdefault(f"{generation}-{plan}", []).append(int(number))
    return {key: _ranges(sorted(values)) for key, values in numbers.items()}


def _ranges(numbers: list[int]) -> str:
    edges = [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1] + 1]
    spans = zip([0, *edges], [*edges, len(numbers)], strict=True)
    return ",".join(f"{numbers[first]}-{numbers[end - 1]}" for first, end in spans)


def unpack_shards(packed: dict[str, str]) -> set[str]:
    """The shard names that `pack_shards` was given."""
    shards = set()
    for key, ranges in packed.items():
        generation, plan = key.split("-")
        for span in ranges.split(","):
            first, last = span.split("-")
            shards.update(f"{generation}-{number:06d}-{plan}" for number in range(int(first), int(last) + 1))
    return shards
