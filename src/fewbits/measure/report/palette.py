"""The colours of the report, each for light and for dark: blue and orange, which all kinds of eyes tell apart.

Nothing is said by colour alone: the frontier is filled and bold too, cells hold their numbers.
"""

from __future__ import annotations

# role -> light, dark
ROLES = {
    "page": ("#ffffff", "#14171c"), "panel": ("#f5f7fa", "#1d2229"), "ink": ("#1c2128", "#e4e8ee"),
    "strong": ("#0b0e12", "#ffffff"), "muted": ("#566070", "#a3adba"), "rule": ("#d6dce4", "#363d48"),
    "link": ("#005ea8", "#7cc0f5"), "accent": ("#0b6aa8", "#58b0ea"), "note": ("#a34700", "#f0a45d"),
    "grid": ("#e6eaf0", "#2a3038"), "axis": ("#8a94a3", "#6f7a88"), "limit": ("#b3641e", "#d99a5b"),
    "leader": ("#8a94a3", "#7d8896"), "frontier": ("#0b6aa8", "#58b0ea"), "other": ("#566070", "#a3adba"),
    "bar": ("#3d8fc9", "#3f8cc4"), "bar-first": ("#8a94a3", "#79838f"), "spread": ("#0b0e12", "#ffffff"),
}
# the heat map from least to most error, and what stands on it
HEAT = (("#f3f8fd", "#1a222c"), ("#dcebf7", "#1b3040"), ("#bfdcf0", "#1c4058"), ("#9bc9e8", "#1b5374"),
        ("#6fb1dc", "#1f6a94"), ("#4795cb", "#3a86b3"), ("#2473ad", "#6aa9cf"), ("#125a93", "#a1cde6"),
        ("#073b69", "#d9eefa"))
DARK_TEXT, LIGHT_TEXT = "#10151b", "#f5f8fb"
ON = tuple((DARK_TEXT if i < 6 else LIGHT_TEXT, LIGHT_TEXT if i < 5 else DARK_TEXT) for i in range(len(HEAT)))


def _theme(which: int) -> dict[str, str]:
    return ({name: pair[which] for name, pair in ROLES.items()} | {f"h{i}": pair[which] for i, pair in enumerate(HEAT)}
            | {f"on-h{i}": pair[which] for i, pair in enumerate(ON)})


LIGHT, DARK = _theme(0), _theme(1)


def variables(theme: dict[str, str]) -> str:
    """CSS custom properties."""
    return ";".join(f"--{name}:{colour}" for name, colour in theme.items())
