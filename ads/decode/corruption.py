"""Corrupted results, a control that needs no proxy: the number after an equals sign becomes a wrong one.

Each result is chosen with a probability, by the row's key and the step of its first token. What is sampled
for it is replaced token by token by tokens of as many digits, and decoding goes on from there; how many
tokens a result has is the teacher's choice. What lies within \\boxed{ } is left as it is.
"""

import re

import torch

from ads import chat, sampling

BEFORE_RESULT = re.compile(r"=\s*[-$\\]*\s*$")
OPEN_BOX = re.compile(r"\\boxed\s*\{[^{}]*$")
DIGITS = re.compile(r"(\s*)([0-9]+)$")


class Corruption:
    """What takes the place of a result's tokens; share: the probability that a result is corrupted."""

    def __init__(self, tokenizer, allowed_V, share):
        self.tokenizer, self.share = tokenizer, share
        self.shapes, self.alike = {}, {}  # id -> (what precedes the digits, their number); shape -> ids
        for i in allowed_V.nonzero().flatten().tolist():
            text = chat.response_text(tokenizer, [i], frozenset())
            if found := DIGITS.match(text):
                self.shapes[i] = (found[1], len(found[2]))
                self.alike.setdefault(self.shapes[i], []).append((i, found[2]))

    def corrupt(self, tokens_N, rows):
        """The tokens sampled for the rows of an engine.Decoder (None in parked slots), results replaced."""
        tokens = tokens_N.tolist()
        for k, row in enumerate(rows):
            if row and not row.response and tokens[k] in self.shapes:
                tokens[k] = self.replace([*row.ids, tokens[k]], torch.tensor(row.key))
        return tokens_N.new_tensor(tokens)

    def replace(self, ids, key):
        """The id that takes the place of ids[-1], the newest of a response's; the same where it stays.

        key: the row's, a 0-dimensional int64 tensor on the CPU.
        """
        first = self.first_of_result(ids, key)
        if first is None:
            return ids[-1]
        is_first = first == len(ids) - 1  # this one makes the number a wrong one, and not of fewer digits
        alike = self.alike[self.shapes[ids[-1]]]
        options = [i for i, digits in alike if not is_first or (i != ids[-1] and digits[0] != "0")]
        return options[int(draw(key, len(ids) - 1, 1) * len(options))] if options else ids[-1]

    def first_of_result(self, ids, key):
        """Index of the first token of the result that ids end with; None where that is not corrupted."""
        first = self.first_of_number(ids)
        if first is None or draw(key, first, 0) >= self.share:
            return None
        text = chat.response_text(self.tokenizer, ids[:first], frozenset())
        return first if BEFORE_RESULT.search(text) and not OPEN_BOX.search(text) else None

    def places(self, ids, key):
        """Indices of the tokens of corrupted results in a response that was sampled with this row's key."""
        return [k for k in range(len(ids)) if self.first_of_result(ids[: k + 1], key) is not None]

    def first_of_number(self, ids):
        """Index of the first token of the number that ids end with; None where they end with none."""
        if ids[-1] not in self.shapes:
            return None
        first = len(ids) - 1
        while first and self.shapes[ids[first]][0] == "" and ids[first - 1] in self.shapes:
            first -= 1
        return first


def draw(key, step, which):
    """A number in [0, 1) by (key, step, which), apart from those that tokens are drawn with."""
    bits = sampling.random_bits(key, torch.tensor(step))
    return sampling.uniforms(bits, torch.tensor(which)).item()
