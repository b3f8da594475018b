"""Reads what tests and reports need of a 64-bit little-endian ELF file, without binutils."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DYNAMIC, _DYNAMIC_SYMBOLS, _VERSION_NEEDS, _VERSION_TABLE = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF
_NEEDED = 1


class Section(NamedTuple):
    """A section's name, type, content and the index of the section that it refers to."""

    name: str
    kind: int
    content: bytes
    link: int


class Import(NamedTuple):
    """A symbol that another library must have; the library and the version are empty if any will do."""

    name: str
    library: str
    version: str


class Elf:
    """An object file or a shared library."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path.name}: expected a 64-bit little-endian ELF file")
        (table,) = struct.unpack_from("<Q", data, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
        # Section header: name, type, flags, address, offset, size, link, ...
        headers = [struct.unpack_from("<IIQQQQI", data, table + i * entry_size) for i in range(count)]
        names = data[headers[names_index][4] :]
        self.sections = [
            Section(_string(names, name), kind, data[offset : offset + size], link)
            for name, kind, _, _, offset, size, link in headers
        ]

    def content(self, name: str) -> bytes:
        """What the section of that name holds; nothing if there is none."""
        return b"".join(section.content for section in self.sections if section.name == name)

    def needed(self) -> list[str]:
        """The libraries that it names as needed (DT_NEEDED)."""
        return [
            _string(self._strings(section), value)
            for section in self._of_kind(_DYNAMIC)
            for tag, value in struct.iter_unpack("<qQ", section.content)
            if tag == _NEEDED
        ]

    def imports(self) -> list[Import]:
        """Its undefined dynamic symbols."""
        versions = self._needed_versions()
        table = [
            index & 0x7FFF
            for section in self._of_kind(_VERSION_TABLE)
            for (index,) in struct.iter_unpack("<H", section.content)
        ]
        found = []
        for section in self._of_kind(_DYNAMIC_SYMBOLS):
            strings = self._strings(section)
            for i, (name, _, _, home, _, _) in enumerate(struct.iter_unpack("<IBBHQQ", section.content)):
                if i > 0 and home == 0:
                    library, version = versions.get(table[i] if table else 0, ("", ""))
                    found.append(Import(_string(strings, name), library, version))
        return found

    def _needed_versions(self) -> dict[int, tuple[str, str]]:
        """(library, version) by the index that the version table uses."""
        versions = {}
        for section in self._of_kind(_VERSION_NEEDS):
            strings, position, more = self._strings(section), 0, len(section.content)
            while more:
                _, count, library, first, more = struct.unpack_from("<HHIII", section.content, position)
                entry = position + first
                for _ in range(count):
                    _, _, index, name, step = struct.unpack_from("<IHHII", section.content, entry)
                    versions[index] = (_string(strings, library), _string(strings, name))
                    entry += step
                position += more
        return versions

    def _of_kind(self, kind: int) -> Iterator[Section]:
        return (section for section in self.sections if section.kind == kind)

    def _strings(self, section: Section) -> bytes:
        return self.sections[section.link].content


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
