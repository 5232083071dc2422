"""How a text is cut into words before the merging: `tokenizer.ggml.pre` names a list of regular expressions.

Each expression cuts what those before it have left whole; what no match covers is a piece of its own.  Names and
expressions are llama.cpp's, which has them from the models' own tokenizer files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_NEWER = (
    r"\u0897\u1b4e\u1b4f\u1b7f\u1c89\u1c8a\u2427-\u2429\u31e4\u31e5\ua7cb-\ua7cd\ua7da-\ua7dc\x{105c0}-\x{105f3}"
    r"\x{10d40}-\x{10d8f}\x{10ec2}-\x{10efc}\x{11380}-\x{113e2}\x{116d0}-\x{116e3}\x{11bc0}-\x{11bf9}\x{11f5a}"
    r"\x{13460}-\x{143fa}\x{16100}-\x{16139}\x{16d40}-\x{16d79}\x{18cff}\x{1cc00}-\x{1ceb3}\x{1e5d0}-\x{1e5ff}"
    r"\x{1f8b2}-\x{1f8c1}\x{1fa89}-\x{1fa8f}\x{1fabe}\x{1fac6}\x{1fadc}-\x{1fadf}\x{1fae9}\x{1fbcb}-\x{1fbef}"
)
"""Characters of Unicode 16: those whom package tokenizers has in a category, llama.cpp (Unicode 15.1) in none."""

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

_IDEOGRAPHS = r"[\u4e00-\u9fa5[\u0800-\u4e00&&\S]\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    r"\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    r"\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    r"\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    r"\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    r"\uff41-\uff5a\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",  # a blank is none of a class, for llama.cpp
    r"\s+\z",
    _IDEOGRAPHS,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")

_HAN = (  # blocks, whatever their characters are
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\x{20000}-\x{2a6df}\x{2a700}-\x{2b81f}\x{2b820}-\x{2ebef}"
    r"\x{2f800}-\x{2fa1f}"
)
_KIMI = (
    rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_SHORT}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    PreTokenizer((_LLAMA3,)): ("chatglm-bpe",),
    PreTokenizer((_LLAMA3,), ignore_merges=True): ("glm4",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "minimax-m2"),
    PreTokenizer(_DEEPSEEK_LLM): ("deepseek-llm",),
    PreTokenizer(_DEEPSEEK_CODER): ("deepseek-coder",),
    PreTokenizer(_DEEPSEEK3): ("deepseek-v3", "joyai-llm"),
    PreTokenizer((_KIMI,)): ("kimi-k2",),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): ("llama-bpe", "llama3", "llama-v3"),
}


def as_llama_cpp(expression: str) -> str:
    """With categories that have no newer characters."""
    return re.sub(r"\\p\{\w\}", lambda category: f"[{category[0]}&&[^{_NEWER}]]", expression)


PRE_TOKENIZERS = {
    name: replace(kind, expressions=tuple(as_llama_cpp(expression) for expression in kind.expressions))
    for kind, names in _KINDS.items()
    for name in names
}
"""By `tokenizer.ggml.pre`."""
