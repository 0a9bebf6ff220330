"""What the page and the Markdown file both say."""

from __future__ import annotations

from fewbits.measure.compare.candidates import Advice, Comparison
from fewbits.measure.compare.choosing import gigabytes


def title(found: Comparison) -> str:
    return f"{found.original.name}: which format to take"


def headline(answer: Advice) -> str:
    return f"Take {answer.take}." if answer.take else "None can be recommended."


def how(found: Comparison) -> list[tuple[str, str]]:
    """What a reader needs to judge the figures, and to repeat them."""
    s, machine = found.settings, found.circumstances["machine"]
    quality = next((c.quality for c in found.candidates if c.quality), {}) or {}
    original = (found.circumstances["models"] or [{}])[0]
    text = found.circumstances["text"]
    out = [("model", f"{found.model}, {found.architecture}, {found.parameters / 1e6:.1f} M parameters, "
                     f"{gigabytes(found.original.nbytes)}, SHA-256 {original.get('sha256')}"),
           ("text", f"{text['name']}, SHA-256 {text['sha256']}: {quality.get('tokens', 0)} tokens in chunks of "
                    f"{s['context']}"),
           ("quantizing", _quantizing(found))]
    if any(c.speed for c in found.candidates):
        out.append(("speed", f"a prompt of {s['prompt']} tokens, {s['generate']} generated, one at a time, median of "
                             f"{s['repeats']}; all formats in turn"))
    threads = s["threads"] or machine.get("threads")
    out += [("machine", f"{machine.get('processor')}, {machine.get('cores')} cores, {threads} threads, "
                        f"{gigabytes(machine.get('memory_bytes') or 0)} of memory, "
                        f"{machine.get('gpu') or 'no graphics processor'}, {machine.get('system')}"),
            ("versions", ", ".join(f"{k} {v}" for k, v in found.circumstances["versions"].items())),
            ("date", found.date)]
    return out


def _quantizing(found: Comparison) -> str:
    s = found.settings
    text = f"calibrated on {s['calibration']}" if s["calibration"] else "calibration as each recipe has it by default"
    return f"solver {s['solver']}, {text}" if s["solver"] else text


def notes(found: Comparison) -> list[str]:
    """What is not as asked, or not there, each with its format."""
    out = []
    for c in found.candidates:
        for what, why in (("not measured", c.reason), ("speed not measured", c.speed_reason),
                          ("tasks not measured", c.tasks_reason), ("weights not compared", c.layers_reason)):
            if why:
                out.append(f"{c.name}: {what}: {why}")
        out += [f"{c.name}: {note}" for note in c.notes]
    return out
