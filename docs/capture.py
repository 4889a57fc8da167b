"""Run a recipe in a terminal and write what it shows: `python docs/capture.py` makes the pictures in docs/images.

Needs pyte. The pictures are SVG with a background of their own, so they fit light and dark pages.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

IMAGES = Path(__file__).parent / "images"
CELL, LINE, MARGIN = 8.4, 18, 12
DARK = {"background": "#16181d", "default": "#d8dce4", "green": "#4fb86b", "cyan": "#3bb3c3", "magenta": "#c678dd",
        "red": "#e06c75"}  # fmt: skip
LIGHT = {"background": "#ffffff", "default": "#1f2328", "green": "#1a7f37", "cyan": "#1b7c83", "magenta": "#8250df",
         "red": "#cf222e"}  # fmt: skip
BLOCKS = {mark: part / 8 for part, mark in enumerate("▁▂▃▄▅▆▇█", 1)}
LINES = {"━": (0, 1), "╸": (0, 0.5), "╺": (0.5, 1), "─": (0, 1)}  # where in its cell a line is
SHADES = {"▓": 0.7, "░": 0.35}

Rows = list[list[tuple[str, str, bool]]]
"""Lines of cells: character, colour, bold."""


def record(size: tuple[int, int], seconds: float, command: list[str], folder: Path, keys: str = "") -> list[Rows]:
    """Run `command` in a terminal of columns and lines; return the screen every `seconds`, and at last."""
    screen = pyte.Screen(*size)
    stream, frames = pyte.ByteStream(screen), list[Rows]()
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    due, drawn = time.monotonic() + seconds, False
    while True:
        if select.select([leader], [], [], 0.05)[0]:
            try:
                data = os.read(leader, 65536)
            except OSError:
                break
            if b"\x1b[?1049l" in data and drawn:  # the screen before it goes
                frames.append(_cells(screen))
            drawn = b"\x1b[?1049l" not in data and (drawn or b"\x1b[?1049h" in data)
            stream.feed(data)
        if drawn and time.monotonic() >= due:
            due = time.monotonic() + seconds
            frames.append(_cells(screen))
            if keys:
                os.write(leader, keys[0].encode())
                keys = keys[1:]
    process.wait()
    return frames


def _cells(screen: pyte.Screen) -> Rows:
    return [
        [
            ((cell := screen.buffer[y][x]).data, cell.fg if cell.fg in DARK else "default", cell.bold)
            for x in range(screen.columns)
        ]
        for y in range(screen.lines)
    ]


def _row(cells: list[tuple[str, str, bool]], colours: dict[str, str]) -> str:
    """Return a line as SVG. Blocks and lines are shapes: fonts leave gaps between them."""
    parts, x = [], 0
    for (kind, colour, bold), group in groupby(cells, lambda c: (c[0] if _is_shape(c[0]) else "", c[1], c[2])):
        text, left = "".join(cell[0] for cell in group), x * CELL
        x, fill = x + len(text), colours[colour]
        if kind:
            start, end = LINES.get(kind, (0, 1))
            height = LINE * BLOCKS.get(kind, 1)
            top, height = (LINE / 2, 2.0) if kind in LINES else (LINE - height, height)
            fade = f' opacity="{SHADES.get(kind, 0.4)}"' if kind in SHADES or kind == "─" else ""
            left, width = left + CELL * start, CELL * (len(text) - 1 + end - start)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:g}" width="{width:.1f}" height="{height:g}" fill="{fill}"{fade}/>'
            )
        elif text.strip():
            left += CELL * (len(text) - len(text.lstrip()))
            text, weight = text.strip(), ' font-weight="700"' if bold else ""
            size = f'x="{left:.1f}" textLength="{CELL * len(text):.1f}"'
            parts.append(f'<text {size} y="13" fill="{fill}"{weight}>{escape(text)}</text>')
    return "".join(parts)


def _is_shape(character: str) -> bool:
    return character in BLOCKS or character in LINES or character in SHADES


def picture(frames: list[Rows], seconds: float = 0.7, colours: dict[str, str] = DARK) -> str:
    """Return one frame as an SVG, or several as one that moves. Equal lines of frames are stored once."""
    names: dict[str, str] = {}
    shown = []
    for number, frame in enumerate(frames):
        uses = [
            f'<use href="#{names.setdefault(row, f"r{len(names)}")}" y="{MARGIN + y * LINE}"/>'
            for y, row in enumerate(_row(line, colours) for line in frame)
            if row
        ]
        moves = f' class="f" style="animation-delay:{number * seconds:g}s"' if len(frames) > 1 else ""
        shown.append(f"<g{moves}>{''.join(uses)}</g>")
    width, height = len(frames[0][0]) * CELL + 2 * MARGIN, len(frames[0]) * LINE + 2 * MARGIN
    style = "text{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:14px;white-space:pre}"
    if len(frames) > 1:
        share = 100 / len(frames)
        style += f".f{{visibility:hidden;animation:f {len(frames) * seconds:g}s step-end infinite}}"
        style += f"@keyframes f{{0%{{visibility:visible}}{share:.3f}%{{visibility:hidden}}}}"
    rows = "".join(f'<g id="{name}">{row}</g>' for row, name in names.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"><style>{style}'
        f'</style><defs>{rows}</defs><rect width="100%" height="100%" rx="8" fill="{colours["background"]}"/>'
        f'<g transform="translate({MARGIN} 0)">{"".join(shown)}</g></svg>\n'
    )


def main() -> None:
    """Write the pictures of a run of tiny_cpu."""
    train = [sys.executable, "-m", "popo_lite", "train", "tiny_cpu", "--set", "eval.every=20"]
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        frames = record((80, 24), 1.0, train, Path(folder))
        (IMAGES / "live-80x24.svg").write_text(picture([frames[len(frames) * 3 // 4]]))
        chosen = [frames[index * (len(frames) - 1) // 15] for index in range(16)]
        (IMAGES / "training.svg").write_text(picture(chosen))
        frames = record((200, 60), 1.0, train, Path(folder))
        (IMAGES / "live-200x60.svg").write_text(picture([frames[len(frames) * 3 // 4]]))


if __name__ == "__main__":
    main()
