"""Numbers with their nouns, for messages."""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`, `3 classes`, `4 micro-batches`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"
