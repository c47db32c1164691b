"""Draw the packages and their imports: ``python docs/images/draw_packages.py [FILE]``, else packages.svg beside it.

Every package stands as low as what it imports allows: above all of that. An arrow to what another way leads to as well
is left out, so that the picture shows the order and not each import.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / "apts_mpi"

# Of a box, between boxes of a row, and between rows.
WIDTH, HEIGHT, GAP, RISE = 92, 26, 18, 62


def package_of(name: str) -> str | None:
    """The package, or file beside the packages, that an imported name belongs to; None for another project's."""
    parts = name.split(".")
    if parts[0] != "apts_mpi":
        return None
    place = ROOT / parts[1] if len(parts) > 1 else ROOT
    return parts[1] if place != ROOT and (place.is_dir() or place.with_suffix(".py").exists()) else "__init__"


def read_imports() -> dict[str, set[str]]:
    """For each package the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        own = found.setdefault(path.relative_to(ROOT).parts[0].removesuffix(".py"), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                own |= {name for alias in node.names if (name := package_of(f"{node.module}.{alias.name}"))}
            elif isinstance(node, ast.Import):
                own |= {name for alias in node.names if (name := package_of(alias.name))}
    return {name: others - {name} for name, others in found.items()}


def reachable(imports: dict[str, set[str]], name: str) -> set[str]:
    """All that a package needs, and what that needs."""
    return imports[name].union(*(reachable(imports, other) for other in imports[name]))


def draw(imports: dict[str, set[str]]) -> str:
    """The picture, as SVG."""
    levels: dict[str, int] = {}
    while len(levels) < len(imports):
        for name, others in imports.items():
            if others <= set(levels):
                levels.setdefault(name, max((levels[other] + 1 for other in others), default=0))
    rows = [sorted(name for name in levels if levels[name] == level) for level in range(max(levels.values()) + 1)]
    width = max(map(len, rows)) * (WIDTH + GAP) + GAP
    height = len(rows) * RISE
    places = {
        name: (width / 2 + (number - (len(row) - 1) / 2) * (WIDTH + GAP), height - (level + 0.5) * RISE)
        for level, row in enumerate(rows)
        for number, name in enumerate(row)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for name, others in sorted(imports.items()):
        x, y = places[name]
        for other in sorted(others):
            if not any(other in reachable(imports, between) for between in others - {other}):
                to_x, to_y = places[other]
                lines.append(
                    f'<path d="M{x:g} {y + HEIGHT / 2:g}C{x:g} {y + RISE / 2 + 6:g} {to_x:g} {to_y - RISE / 2 - 6:g} '
                    f'{to_x:g} {to_y - HEIGHT / 2:g}" fill="none" stroke="#777" marker-end="url(#arrow)"/>'
                )
    for name, (x, y) in sorted(places.items()):
        lines.append(
            f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="4" '
            f'fill="#e8f1f8" stroke="#0072b2"/><text x="{x:g}" y="{y + 4:g}" text-anchor="middle">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("packages.svg")
    file.write_text(draw(read_imports()), encoding="utf-8")
