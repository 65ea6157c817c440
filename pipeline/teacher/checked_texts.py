"""Which texts of a corpus an engine is compared on.

One idea: conventions that engines get wrong show at the ends, in the shortest and the longest text,
or with images; how much is rounding shows in numbers, so a corpus of titles gives more of them.
"""

from collections.abc import Sequence

from stillroom.pipeline.record import Example

ROWS = 64
"""Positions that are compared at least, where the corpus has them: one title says little, and from
so many on rounding averages out (`rounding.by_chance` is below `TIMES_RMS`). SmolLM2-135M in
bfloat16 on 59 titles, a row each: vLLM is 0.22 nats off (root mean square), transformers itself
0.24; yet of single titles 1 in 23 is off more than thrice what two others are."""
FURTHER = "further"


def choose(examples: Sequence[Example]) -> dict[str, Example]:
    """The shortest and the longest text, and the first with images, by name; where they have few
    rows, further ones from all over the corpus."""
    lengths = {number: len(examples[number].token_ids) for number in range(len(examples))}
    lengths = {number: length for number, length in lengths.items() if length > 1}
    if not lengths:
        return {}
    chosen = {"shortest": examples[min(lengths, key=lengths.__getitem__)]}
    chosen["longest"] = examples[max(lengths, key=lengths.__getitem__)]
    seen = next((example for example in examples if example.images), None)
    chosen |= {} if seen is None else {"with images": seen}
    return chosen | _further(examples, chosen, list(lengths))


def _further(
    examples: Sequence[Example], chosen: dict[str, Example], numbers: list[int]
) -> dict[str, Example]:
    """As many more as make `ROWS` rows, by name; an item has one, that of its last token."""
    found: dict[str, Example] = {}
    taken = {example.example_id for example in chosen.values()}
    rows = sum(example.num_rows for example in chosen.values())
    for number in numbers[:: max(1, len(numbers) // ROWS)]:
        if rows >= ROWS:
            break
        example = examples[number]
        if example.example_id not in taken:
            found[f"{FURTHER} {len(found) + 1}"] = example
            rows += example.num_rows
    return found


def in_order_of_cost(named: tuple[str, Example]) -> tuple[bool, int]:
    """Further texts after the others, each from the shortest on."""
    name, example = named
    return is_further(name), len(example.token_ids)


def without_further(chosen: dict[str, Example]) -> dict[str, Example]:
    """Those that are always compared."""
    return {name: one for name, one in chosen.items() if not is_further(name)}


def is_further(name: str) -> bool:
    """Whether a text of that name is one of those that are compared for their number."""
    return name.startswith(FURTHER)
