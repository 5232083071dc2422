"""Files whose tokenizer keys are of another type, through the commands: one line, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.cli import run
from fomoe_io.text.tokenizer import Tokenizer
from layout_tool import main as layout
from tests.tiny_model import Tiny, write_tiny

KEYS = ["tokens", "merges", "token_type", "eos_token_id", "eot_token_id", "eom_token_id", "pre", "model"]
VALUES: dict[str, Any] = {
    "number": 7, "bool": True, "float": 0.5, "nan": float("nan"), "text": "text", "numbers": [1, 2], "floats": [0.5],
    "texts": ["a", "b"], "long": list(range(3000)),
}  # fmt: skip


def with_key(path: Path, key: str, value: Any) -> Path:
    """The model, with one key changed and all else copied."""
    reader = gguf.GGUFReader(path)
    changed = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(changed, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (key, "general.architecture"):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {int: writer.add_uint32, bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changed


@pytest.mark.parametrize("key", [*(f"tokenizer.ggml.{key}" for key in KEYS), "tokenizer.chat_template"])
def test_keys_of_another_type(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", Tiny(architecture="qwen3moe", layers=1), 3)
    right = {"eos_token_id": "number", "eot_token_id": "number", "eom_token_id": "number", "merges": "texts"}
    for name, value in VALUES.items():
        changed = with_key(model, key, value)
        code = run.main([str(changed), "-p", "x", "-n", "1", "-c", "64", "-q"])
        err = capsys.readouterr().err
        if name == right.get(key.rpartition(".")[2]) or (key.endswith("template") and name == "text"):
            assert code == 0 and err == ""
        else:
            assert code == 1 and err.startswith("fomoe-run: ")
            assert [line[:7] for line in err.splitlines()[1:]] in ([], ["  fix: "])
        assert layout.main(["inspect", str(changed)]) in (0, 1)
        capsys.readouterr()


def test_a_vocabulary_beyond_the_embeddings_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", Tiny(architecture="qwen3moe", layers=1), 3)
    changed = with_key(model, "tokenizer.ggml.tokens", [f"token {i}" for i in range(5000)])
    monkeypatch.setattr(Tokenizer, "from_metadata", None)
    assert run.main([str(changed), "-p", "x"]) == 1
    err = capsys.readouterr().err
    assert "token_embd.weight" in err and "5000" in err
