"""Answers to multiple choice: one pass over all endings, beside a pass for each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fewbits

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import tasks


def test_one_pass_is_as_many_passes(shared):
    net = fewbits.load(shared("models/stories260k"))
    context, endings = [5, 9, 300, 17, 44], [[7], [8, 9, 10, 400], [300, 17]]
    for ending, found in zip(endings, tasks.log_likelihoods(net, context, endings), strict=True):
        with torch.inference_mode():
            logits = net(torch.tensor([context + ending])).logits[0].double().log_softmax(-1)
        meant = sum(float(logits[len(context) + i - 1, t]) for i, t in enumerate(ending))
        assert found == pytest.approx(meant, abs=1e-4)


def test_judging():
    asked = [tasks.Question("a", (" x", " xxxx"), 0), tasks.Question("a", (" x", " xxxx"), 1)]
    original = [[-2.0, -4.0], [-2.0, -4.0]]
    found = [[-2.0, -4.0], [-5.0, -4.0]]
    answers = tasks.judge(asked, found, original)
    assert (answers.accuracy, answers.agreement) == (1, 0.5)
    assert (answers.accuracy_norm, answers.agreement_norm) == (0.5, 1)  # -2 against -1 a byte
    assert answers.shift == 0.75


def test_questions_are_read(shared):
    folder = shared("tasks")
    for task, first in (("arc_easy", "Question: "), ("hellaswag", "")):
        asked = tasks.questions(task, folder, 50)
        assert len(asked) == 50 and asked == tasks.questions(task, folder, 50)
        assert all(q.context.startswith(first) and q.endings[q.gold].startswith(" ") for q in asked)
        assert not any("[" in e for q in asked for e in q.endings if task == "hellaswag")
