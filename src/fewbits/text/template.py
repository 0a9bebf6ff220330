"""Chat templates: which one a model has, and a conversation written in it.

They are programs in a file from anywhere: `sandbox` runs them, and bounds what they take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.checkpoint import Checkpoint

LONGEST_SOURCE = 1 << 20  # characters; the longest in use have some 10^4
Json = dict[str, Any]


class Templates:
    """The chat templates of a model by name: "default", and perhaps "tool_use" for conversations with tools."""

    def __init__(self, sources: Mapping[str, str], where: str = "chat template"):
        self.sources, self.where = dict(sources), where

    @staticmethod
    def of(checkpoint: Checkpoint, settings: Json) -> Templates | None:
        """Those that came with a checkpoint whose tokenizer_config.json holds `settings`; None where there are none."""
        found = settings.get("chat_template")
        if "chat_template.jinja" in checkpoint.files:
            found = checkpoint.files["chat_template.jinja"].decode("utf-8", "replace")
        elif found is None and "chat_template.json" in checkpoint.files:
            found = json.loads(checkpoint.files["chat_template.json"]).get("chat_template")
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found}
        elif isinstance(found, str):
            found = {"default": found}
        return Templates(found, f"{checkpoint.path}: chat template") if found else None

    def choose(self, tools: bool = False) -> str:
        """The source of the template for a conversation.

        Raises:
            FewbitsError: there are several, and none is the default.
        """
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            raise FewbitsError(f"{self.where}: none is the default", "there are " + ", ".join(self.sources))
        return self.sources["default"]

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, **values: Any) -> str:
        """A conversation as text; `values` are what else the template may ask for.

        Raises:
            FewbitsError: the template refuses the conversation, fails, or exceeds its bounds.
        """
        from fewbits.text import sandbox

        source = self.choose(bool(tools))
        if len(source) > LONGEST_SOURCE:
            raise FewbitsError(f"{self.where}: {len(source)} characters, at most {LONGEST_SOURCE} are read")
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            template = _compiled(source)
            return sandbox.run(template, messages=plain, tools=tools, documents=None,
                               add_generation_prompt=add_generation_prompt, **values)
        except sandbox.Refused as error:
            raise FewbitsError(f"{self.where}: {error}", "fewbits run --raw goes without it") from None


@cache
def _compiled(source: str) -> Any:
    from fewbits.text import sandbox

    return sandbox.compile(source)
