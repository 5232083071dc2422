"""Which tokens are control tokens, which end a generation: by type, by metadata and, as converters err, by text.

The texts and the rules are llama.cpp's (llama-vocab.cpp), so that a file stops here where it stops there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""`tokenizer.ggml.token_type` of tokens that are text of their own, not byte-level pieces."""

_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "< EOT >", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
))  # fmt: skip
"""End a generation and are control tokens, whatever their type says."""

_FILL_IN_THE_MIDDLE = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
"""Role -> texts: the first that the vocabulary has is a control token, unless metadata names another."""

_MIDDLE_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_END_ROLES = ("eos", "eot", "eom", *_MIDDLE_ENDS)
ROLES = ("eos", "eot", "eom", *_FILL_IN_THE_MIDDLE)
"""Metadata names a token for each: `tokenizer.ggml.ROLE_token_id`."""

_PRINTED = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
"""Of gpt-oss: part of what it says."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Of a vocabulary.

    Attributes
    ----------
    control : frozenset of int
        Not printed, and read in a text only where special tokens are asked for.
    user_defined : frozenset of int
        Printed, and always cut out of a text.
    ends : frozenset of int
        End a generation.
    mistyped : list of int
        Ends that the file does not call control tokens.
    """

    control: frozenset[int]
    user_defined: frozenset[int]
    ends: frozenset[int]
    mistyped: list[int]


def special_tokens(
    tokens: Sequence[str], types: Sequence[int], first: Mapping[str, int], named: Mapping[str, int]
) -> SpecialTokens:
    """Sort out a vocabulary.

    Parameters
    ----------
    tokens, types : sequences
        Texts and `tokenizer.ggml.token_type`, alike in length.
    first : mapping of str to int
        The first token of each text.
    named : mapping of str to int
        Role -> token, where the metadata names one.
    """
    control = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)}
    user_defined = {i for i, kind in enumerate(types) if kind == USER_DEFINED}
    ends = {i for i, text in enumerate(tokens) if text in _ENDS}
    mistyped = sorted(ends - control)
    control |= ends
    middle = {role: named.get(role, _first_of(texts, first)) for role, texts in _FILL_IN_THE_MIDDLE.items()}
    control.update(token for role, token in middle.items() if token is not None and role not in named)
    ends.update(token for role in _MIDDLE_ENDS if (token := middle[role]) is not None)
    ends.update(named[role] for role in _END_ROLES if role in named)

    printed = {i for text in _PRINTED if (i := first.get(text)) is not None}
    texts = {tokens[i]: i for i in ends}
    calls = "<|call|>" in texts or "<|calls|>" in texts
    # of gpt-oss and solar-open, whose answers have several parts: <|end|> ends one of them
    if calls and "<|end|>" in texts and ("<|return|>" in texts or "<|flush|>" in texts):
        printed.add(texts["<|end|>"])
        ends.remove(texts["<|end|>"])
    if "<|tool_response>" in texts and "</s>" in texts:  # of gemma4: plain text there
        control.remove(texts["</s>"])
        ends.remove(texts["</s>"])
    control -= printed
    user_defined = (user_defined | printed) - control
    return SpecialTokens(frozenset(control), frozenset(user_defined), frozenset(ends), mistyped)


def _first_of(texts: Iterable[str], first: Mapping[str, int]) -> int | None:
    return next((first[text] for text in texts if text in first), None)
