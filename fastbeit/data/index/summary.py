"""What `fastbeit index` says of a source: how many images, what 16-bit values they have, what was skipped and why."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastbeit.data.index.members import HIDDEN, Reason
from fastbeit.files import write_whole
from fastbeit.plural import counted

# of what one may have taken for an image that would be used
LIKELY = tuple(
    f".{suffix}"
    for suffix in (
        "jpg jpeg jpe jfif png webp bmp dib tif tiff ppm pgm pbm pnm gif heic heif avif jxl jp2 j2k jpf jpx tga psd "
        "dcm svs exr hdr ico dng cr2 cr3 nef arw orf raf rw2 raw"
    ).split()
)
BROKEN = "truncated", "corrupt", "too large"  # reasons that only images have
EIGHT_BITS = 256


@dataclass(frozen=True)
class Summary:
    """What `build_index` found."""

    num_images: int
    num_classes: int
    skipped: list[Reason]  # path relative to the source, and why; likely images first
    num_wide: int = 0  # images of 16 bits a channel
    levels: tuple[int, int] = (0, 0)  # their least and largest value
    written: dict[Path, int] = field(default_factory=dict)  # how many images are in each index

    def __str__(self) -> str:
        found = counted(self.num_images, "image") + f" in {counted(self.num_classes, 'class')}" * bool(self.num_classes)
        skipped = f"{counted(len(self.skipped), 'file')} skipped" + ":" * bool(self.skipped)
        lines = [f"{found}, {skipped}", *self._groups()]
        if self.num_wide:
            low, high = self.levels
            lines.append(
                f"{counted(self.num_wide, 'image')} of 16 bits: values from {low} to {high}, of which the default, "
                f"data.levels=high_byte, keeps {high // EIGHT_BITS - low // EIGHT_BITS + 1} of 256 grey levels"
            )
        if len(self.written) > 1:
            lines += [f"{path}: {counted(number, 'image')}" for path, number in self.written.items()]
        return "\n".join(lines)

    def _groups(self) -> Iterator[str]:
        """The skipped files by suffix and kind of reason, the likely images first, then the larger groups."""
        groups: dict[tuple[str, str], list[Reason]] = {}
        for name, reason in self.skipped:
            groups.setdefault((suffix_of(name), kind_of(reason)), []).append((name, reason))
        title = ""
        ranked = sorted(groups.items(), key=lambda group: (not is_likely(*group[1][0]), -len(group[1]), group[0]))
        for (suffix, kind), members in ranked:
            heading = "  likely images:" if is_likely(*members[0]) else "  other files:"
            if heading != title:
                yield (title := heading)
            name, reason = members[0]
            one = f"    {name!r}: {reason}"
            yield one if len(members) == 1 else f"    {len(members)} x {suffix}: {kind}, such as {name!r}"


def write_skipped(path: Path, skipped: list[Reason]) -> None:
    """Whole or not at all; `OSError`."""
    # repr, since a name may hold anything
    text = "".join(f"{name!r}: {reason}\n" for name, reason in skipped)
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def sort_skipped(skipped: list[Reason]) -> list[Reason]:
    """Likely images first, else in their order."""
    return sorted(skipped, key=lambda one: not is_likely(*one))


def is_likely(name: str, reason: str) -> bool:
    """Whether a file that was skipped may well be an image."""
    return not reason.startswith(HIDDEN) and (suffix_of(name) in LIKELY or reason.startswith(BROKEN))


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


def kind_of(reason: str) -> str:
    """What many reasons have in common: what stands before the particulars."""
    return reason.partition(":")[0].partition(" (")[0]
