"""How a text is cut into words before the merging: `tokenizer.ggml.pre` names a list of regular expressions.

Each expression cuts what those before it have left whole; what no match covers is a piece of its own.  Names and
expressions are llama.cpp's, which has them from the models' own tokenizer files.
"""

from __future__ import annotations

from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""Of ASCII letters alone, as llama.cpp has it: a long s is another letter."""

_QWEN2 = (
    _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT4O = (  # a word begins with its capitals; of the 26 letters alone, as llama.cpp has it
    r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])*((?=\p{L})[^A-Z])+" + _SHORT + "?"
    r"|[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])+((?=\p{L})[^A-Z])*" + _SHORT + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name stands for.

    Attributes
    ----------
    expressions : tuple of str
    ignore_merges : bool
        A word that is a token is taken whole, whatever the merges would make of it.
    add_bos : bool
        Whether texts begin with a BOS where the metadata does not say.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


DEFAULT = "default"
"""What a file without the key gets: rarely what the model was trained with."""

_KINDS = {
    PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): (DEFAULT,),
    PreTokenizer((_GPT2,)): ("gpt-2", "gpt2"),
    PreTokenizer((_QWEN2,)): ("qwen2", "deepseek-r1-qwen", "megrez"),
    PreTokenizer((_QWEN35,)): ("qwen35",),
    PreTokenizer((_LLAMA3,)): ("glm4", "chatglm-bpe"),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "minimax-m2"),
    PreTokenizer(_DEEPSEEK3): ("deepseek-v3", "joyai-llm"),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): ("llama-bpe", "llama3", "llama-v3"),
}
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names}
"""By `tokenizer.ggml.pre`."""
