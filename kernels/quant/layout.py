"""Where the parts of one expert's record lie. Plain numbers: no torch here, so the cache may know it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

RECORD_ALIGNMENT = 4096  # bytes; what O_DIRECT and DMA want
SECTION_ALIGNMENT = 64  # bytes; one cache line, one AVX-512 register


@dataclass(frozen=True, slots=True)
class Section:
    """One array inside a record: `dtype` is a torch dtype's name, `offset` in bytes from the record's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The sections of a record of one format for experts of one shape; `nbytes` is a multiple of 4 KiB."""

    format: str
    hidden_size: int
    intermediate_size: int
    sections: tuple[Section, ...]
    nbytes: int

    def __getitem__(self, name: str) -> Section:
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)


_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


def build_layout(
    format: str, hidden_size: int, intermediate_size: int, arrays: Sequence[tuple[str, str, tuple[int, ...]]]
) -> RecordLayout:
    """Lay (name, dtype, shape) arrays one after the other, each aligned to a cache line."""
    sections = []
    offset = 0
    for name, dtype, shape in arrays:
        nbytes = prod(shape) * _ITEM_NBYTES[dtype]
        sections.append(Section(name, dtype, shape, offset, nbytes))
        offset = _align(offset + nbytes, SECTION_ALIGNMENT)
    return RecordLayout(format, hidden_size, intermediate_size, tuple(sections), _align(offset, RECORD_ALIGNMENT))


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
