"""Answers that follow a grammar: which tokens may come next, as package llguidance (extra `grammar`) finds out."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_io.errors import UsageError
from fomoe_io.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

HINT = "pip install 'fomoe_io[grammar]'"

MOST_CHARACTERS = 1 << 16
"""Of a grammar, whose converter takes time that grows faster than its text."""
MOST_RULES = 1000
MOST_SOURCE_CHARACTERS = 1 << 17
"""Of what is compiled, schemas of all tools among it: a few seconds at worst."""
MOST_LEXER_STATES = 1 << 15
"""Of one answer's grammar, at up to 2 KiB each."""
MOST_REASON_CHARACTERS = 300
MOST_NUMBER = 1 << 62
"""Of a schema."""

FORBIDDEN = np.float32(-1e35)
"""A logit that no bias and no penalty brings back; finite, so that sums stay numbers."""

_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
"""Between the parts of a JSON text, as llama.cpp has it: a model can't go on with blanks for ever."""

_ESCAPED = re.compile(r"\\(?:x([89a-fA-F][0-9a-fA-F])|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer has to look like.

    Attributes
    ----------
    rule : str
        The right-hand side of a rule in Lark's syntax, as llguidance has it.
    rules : str
        Those that it refers to.
    grammars : mapping of str to str
        Whole grammars that it refers to, as @name.
    """

    rule: str
    rules: str = ""
    grammars: Mapping[str, str] = field(default_factory=dict)

    def source(self) -> str:
        """What llguidance compiles."""
        lark = f"%llguidance {{}}\nstart: {self.rule}\n{self.rules}"
        parts = {"answer": lark, **self.grammars}
        return json.dumps({"grammars": [{"name": name, "lark_grammar": text} for name, text in parts.items()]})


# ---- forms ----


def quoted(text: str) -> str:
    """A text as a literal of a rule."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any] | bool, *, is_lenient: bool = False) -> str:
    """A rule's right-hand side for JSON of a schema; a lenient one leaves out what can't be kept to.

    Raises
    ------
    UsageError
        A number in it is too large: near the least of 64 bits the package ends the process.
    """
    _check_numbers(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    options = {"whitespace_pattern": _WHITESPACE, "lenient": is_lenient, "coerce_one_of": True}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _check_numbers(value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_numbers(inner)
    elif isinstance(value, int | float) and not abs(value) < MOST_NUMBER:
        raise UsageError(f"the schema has the number {value}, at most {MOST_NUMBER - 1} is supported")


def json_form(schema: Mapping[str, Any]) -> Form:
    """JSON of a schema; an empty one: any value."""
    return Form(json_rule(schema))


def grammar_form(text: str) -> Form:
    """Of a grammar in llama.cpp's GBNF, or in Lark's syntax with a rule `start`.

    Raises
    ------
    UsageError
        It is neither, or too long.
    """
    if len(text) > MOST_CHARACTERS or text.count("::=") > MOST_RULES:
        raise UsageError(f"the grammar is longer than {MOST_CHARACTERS} characters or {MOST_RULES} rules")
    _package()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(_ESCAPED.sub(_character, text))
    except Exception as error:  # the package raises bare Exception
        raise UsageError(f"the grammar is wrong: {_reason(str(error))}") from None
    return Form("@given", grammars={"given": lark})


def _character(match: re.Match[str]) -> str:
    """An escaped character as itself, where it means nothing in a grammar: the package's converter drops zeros."""
    code = int(next(filter(None, match.groups())), 16)
    return chr(code) if 0x80 <= code < 0xD800 or 0xE000 <= code <= 0x10FFFF else match[0]


def after_thoughts(form: Form, begin: str, end: str, *, plain: str = "", has_begun: bool) -> Form:
    """The form, with free thoughts before it.

    Parameters
    ----------
    form : Form
    begin, end : str
        What stands around thoughts.
    plain : str
        What an answer begins with, with and without thoughts.
    has_begun : bool
        The prompt ends with `begin`: there are thoughts.
    """
    thoughts = "thoughts" if has_begun else f"({quoted(begin)} thoughts)?"
    rule = f"{thoughts} {quoted(plain)} body" if plain else f"{thoughts} BLANKS body"
    rules = f"thoughts[lazy]: /(.|\\n)*/ {quoted(end)}\nBLANKS: /[ \\n]*/\nbody: {form.rule}\n{form.rules}"
    return Form(rule, rules, form.grammars)


# ---- compiled ----


class Constraint:
    """Where one answer stands in its grammar.

    Parameters
    ----------
    matcher : llguidance.LLMatcher
    vocabulary : int
        Logits that there are.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_over(self) -> bool:
        """Whether nothing but an end may come."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy in which no token has a chance that the grammar does not let come next.

        Raises
        ------
        UsageError
            The grammar has come to be too much to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        may = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(bool)
        return np.where(may, logits, FORBIDDEN)

    def advance(self, token: int) -> None:
        """A token was chosen.

        Raises
        ------
        UsageError
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the grammar can't be followed any further: {_reason(self._matcher.get_error())}")


class Grammar:
    """A compiled form.  Made by :meth:`Grammars.compiled`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def start(self) -> Constraint:
        """For an answer."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary)


class Grammars:
    """Compiles forms for a vocabulary, which is prepared once and when it is first needed: 2 s and 50 MiB if large.

    Parameters
    ----------
    tokenizer : Tokenizer
    vocabulary : int
        Logits that the model has, which may be more than tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._prepared: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def compiled(self, form: Form) -> Grammar:
        """From any thread.

        Raises
        ------
        UsageError
            It is wrong, asks for what can't be constrained, or is too much; or the package is missing.
        """
        llguidance = _package()
        source = form.source()
        if len(source) > MOST_SOURCE_CHARACTERS:
            raise UsageError(f"the schemas have {len(source)} characters, at most {MOST_SOURCE_CHARACTERS}")
        with self._lock:
            if self._prepared is None:
                self._prepared = self._prepare()
        limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=MOST_LEXER_STATES)
        matcher = llguidance.LLMatcher(self._prepared, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise UsageError(f"the grammar is wrong: {_reason(matcher.get_error())}")
        return Grammar(matcher, self._vocabulary)

    def _prepare(self) -> llguidance.LLTokenizer:
        """Control tokens match no text: they can't stand in an answer, beside those that end it."""
        llguidance = _package()
        words = _Words(self._tokenizer, self._vocabulary)
        ends = [token for token in sorted(self._tokenizer.eog_ids) if token < self._vocabulary]
        if not ends:
            raise UsageError("the model has no token that ends an answer: none can be told to follow a grammar")
        wrapper = llguidance.TokenizerWrapper(words)
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocabulary, eos_token=ends, slices=[])


class _Words:
    """A vocabulary as the package wants it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        ids = range(min(tokenizer.vocab_size, vocabulary))
        ends = tokenizer.eog_ids
        self.special_token_ids = [token for token in ids if token in ends or not tokenizer.decode_bytes(token)]
        self.tokens = [tokenizer.decode_bytes(token, special=True) for token in ids]
        self.tokens += [b""] * (vocabulary - len(self.tokens))
        self.eos_token_id = min(ends, default=0)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def check_package() -> None:
    """UsageError that says how to install the package, where it is missing."""
    _package()


def _package() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise UsageError("grammars and JSON schemas need package llguidance, which is missing", hint=HINT) from None
    return llguidance


def _reason(message: str) -> str:
    """The part of the package's message that is about what was given."""
    first = next((line for line in message.splitlines() if line.strip()), "no reason is known")
    first = re.sub(r"^(at )?\d+\(\d+\): ", "", first.strip())
    return first.removeprefix("failed to compile JSON schema: ")[:MOST_REASON_CHARACTERS]
