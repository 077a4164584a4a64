"""
Numbers for people: sizes in bytes, and tables of text.
"""


def size(n, digits=1):
    """Bytes n as text in powers of ten, with that many digits after the point: 1536 -> "1.5 kB"."""
    if n < 999.5:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 999.5:
            break
    return f"{n:,.{digits}f} {unit}"


def table(rows, markdown=False):
    """Rows (lists of cells, str) as lines of text: the first column to the left, the others to the right.

    markdown: cells between bars, and a line of --- under the first row, which is the header.
    """
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
