"""Questions asked while a model trains: greedy answers on packed batches."""

import numpy as np
import torch

from fastllava.batch import ImageSpec
from fastllava.data.conversation import prompt
from fastllava.data.templates import template
from fastllava.train.samples import Answers, Prompt, greedy


def test_greedy_answers_end_at_the_end_token_and_are_each_picture_s_own():
    class Spells:
        """A model that says how bright its picture is, then </s>."""

        def __init__(self, tokenizer, spec):
            self.tokenizer, self.spec = tokenizer, spec

        def parameters(self):
            return iter([torch.zeros(1)])

        def logits(self, batch, rows):
            logits = torch.zeros(len(batch.token_ids), 10)
            for i, end in enumerate(batch.cu_seqlens[1:].tolist()):
                bright = int(batch.pixels[i].float().mean()) % 7 + 3
                already = batch.token_ids[end - 1] == bright
                logits[end - 1, 2 if already else bright] = 1.0
            return logits[rows]

    class Words:
        bos_id, eos_id, unk_id = 1, 2, 0
        literals = frozenset()

        def encode_parts(self, parts, continues=False):
            return [9 for _ in parts], [1 for _ in parts]

        def control(self, literal):
            return {"</s>": 2}.get(literal)

        def decode(self, ids):
            return " ".join(str(i) for i in ids if i != 2)

    spec = ImageSpec(2, 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tokenizer, form = Words(), template("v1")
    prompts = [Prompt(prompt(form, "?", True, tokenizer), (np.full((3, 2, 2), i, np.uint8),)) for i in range(5)]
    answers = Answers(tokenizer, form)
    new = greedy(Spells(tokenizer, spec), prompts, answers.ended, 8, 2048)
    assert [answers.text(ids) for ids in new] == ["3", "4", "5", "6", "7"]
