"""Numbers as text for people: bytes, seconds, shares, counts."""


def nbytes(n: float) -> str:
    return _scaled(n, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3))) or f"{n:,.0f} B"


def seconds(s: float) -> str:
    return _scaled(s, (("s", 1.0), ("ms", 1e-3))) or (f"{s / 1e-6:,.3g} µs" if s else "0 s")


def share(x: float, digits: int = 1) -> str:
    """0.25 is 25.0 %."""
    return f"{100 * x:.{digits}f} %"


def number(x: float) -> str:
    """To four digits or so, with commas between thousands."""
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:,.4g}" if abs(x) < 1e4 or abs(x) >= 1e15 else f"{x:,.0f}"


def count(n: float) -> str:
    """A number of parameters: 124M."""
    units = (("B", 1e9), ("M", 1e6), ("K", 1e3))
    return next((f"{n / size:,.3g}{unit}" for unit, size in units if n >= size), number(n))


def plural(n: int, one: str) -> str:
    return f"{n} {one}" if n == 1 else f"{n} {one}s"


def _scaled(n: float, units: tuple[tuple[str, float], ...]) -> str:
    """In the largest unit that fits, to three digits; "" if none does."""
    for unit, size in units:
        if n >= size:
            return f"{n / size:,.3g} {unit}" if n < 100 * size else f"{n / size:,.0f} {unit}"
    return ""
