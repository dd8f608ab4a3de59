"""Prints what lookupffn with the given extras needs, and dependency groups: requirements.py lab --group dev.

For pip to install them while the kernels are built: asked for by the package's name it would build it first.
"""

import re
import sys
import tomllib
from pathlib import Path

FILE = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
OWN = re.compile(r"lookupffn\[([\w,-]+)\]$")


def of_extra(name):
    for requirement in FILE["project"]["optional-dependencies"][name]:
        if own := OWN.match(requirement):
            for other in own[1].split(","):
                yield from of_extra(other)
        else:
            yield requirement


extras, groups = sys.argv[1:], []
while "--group" in extras:
    i = extras.index("--group")
    groups += extras[i + 1 : i + 2]
    del extras[i : i + 2]
found = [*FILE["project"]["dependencies"], *(r for name in extras for r in of_extra(name))]
found += [r for name in groups for r in FILE["dependency-groups"][name]]
print(*dict.fromkeys(found), sep="\n")
