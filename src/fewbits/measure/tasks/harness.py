"""A model of ours as lm-evaluation-harness sees it: `--model fewbits --model_args pretrained=PATH`.

Texts become tokens as in the harness's own Transformers backend, so that what differs is the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.scoring import Decoded, scorer
from fewbits.measure.tasks.endings import Likelihood, endings
from fewbits.runtime.build import tokenizer_of
from fewbits.runtime.eager import Eager
from fewbits.text.sampling import Sampler, Sampling

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts), context, ending


@register_model("fewbits")
class FewbitsLM(TemplateLM):
    """`pretrained` is a path in any format, a hub id, or a loaded model."""

    def __init__(self, pretrained: str | Path | Checkpoint | Any, kernel: str | None = None,
                 batch_size: int | str | None = None, max_batch_size: int | None = None, device: str | None = None,
                 on: str | None = None):
        """It computes on the CPU, or `on` a device. Batches and `device` mean nothing here: the harness's command names
        "cuda:0" wherever it runs. The endings of a context are a batch.

        Raises:
            FewbitsError: nothing readable there.
        """
        super().__init__()
        self._scorer = scorer(pretrained, kernel, on)
        self.checkpoint, self._endings = self._scorer.checkpoint, endings(self._scorer)
        self.tokenizer = tokenizer_of(self.checkpoint)
        self._engine: Any = self._scorer.model if isinstance(self._scorer, Decoded) else None

    @property
    def engine(self) -> Any:
        """Sequences of tokens."""
        if self._engine is None:
            self._engine = Eager(self._scorer.model)  # type: ignore[attr-defined]
        return self._engine

    @property
    def native(self) -> bool:
        return isinstance(self._scorer, Decoded)

    # texts and tokens -------------------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        return int(self.engine.context)

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        named = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **named))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                      add_generation_prompt=add_generation_prompt,
                                                      continue_final_message=not add_generation_prompt))

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each ending after its context."""
        return self.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
                                  disable_tqdm=True)

    # what the harness asks for ----------------------------------------------------------------------------------------
    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[Likelihood]:
        together: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, ending) in enumerate(requests):
            together.setdefault(self._fitting(context, ending), []).append(i)
        found: list[Likelihood] = [(0.0, False)] * len(requests)
        for shared, members in tqdm(together.items(), desc="contexts", disable=disable_tqdm):
            likelihoods = self._endings.likelihoods(shared, [requests[i][2] for i in members])
            for i, one in zip(members, likelihoods, strict=True):
                found[i] = one
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def _fitting(self, context: list[int], ending: list[int]) -> tuple[int, ...]:
        """What is left of the context where both are longer than the model's; the last token is never fed."""
        most = self.max_length + 1 - len(ending)
        if not ending or most < 1:
            raise FewbitsError(f"an ending of {len(ending)} tokens, the model's context is {self.max_length}")
        return tuple(context[-most:])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (r.args for r in requests):
            windows = utils.get_rolling_token_windows(token_list=self.tok_encode(text), context_len=1,
                                                      prefix_token=self.prefix_token_id, max_seq_len=self.max_length)
            parts: list[Request] = [(None, *utils.make_disjoint_window(w)) for w in windows]
            found.append(sum(one for one, _ in self._loglikelihood_tokens(parts, disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for text, settings in tqdm([r.args for r in requests], desc="texts", disable=disable_tqdm):
            found.append(self._generate(text, settings))
            self.cache_hook.add_partial("generate_until", (text, settings), found[-1])
        return found

    def _generate(self, text: str, settings: dict[str, Any]) -> str:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        stops = handle_stop_sequences(asked.pop("until", None), self.tokenizer.decode(self.eot_token_id))
        most, sampled = asked.pop("max_gen_toks"), asked.pop("do_sample")
        known = {"temperature", "top_k", "top_p", "min_p"}
        if wrong := asked.keys() - known:
            raise FewbitsError(f"generation setting {sorted(wrong)[0]!r} is not known",
                               f"there are {', '.join(sorted(known))}, until, do_sample, max_gen_toks")
        if most >= self.max_length:
            raise FewbitsError(f"{most} tokens to generate, the model's context is {self.max_length}")
        sampler = Sampler(Sampling(**asked if sampled else {}), self.engine.vocabulary)
        ids = self.tok_encode(text)[most - self.max_length:]
        sequence = self.engine.sequence(len(ids) + most)
        out: list[int] = []
        row, written = sequence.append(ids)[-1], ""
        while len(out) < most and (token := sampler.pick(row, [*ids, *out])) != self.eot_token_id:
            out.append(token)
            written = str(self.tokenizer.decode(out, skip_special_tokens=True))
            if any(stop and stop in written for stop in stops):
                break
            row = sequence.append([token])[-1]
        return str(postprocess_generated_text(written, stops, None))
