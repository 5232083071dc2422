"""A GGUF taken apart and written again with changes: models that differ from a good one in one point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_model import add_key

Keys = dict[str, Any]
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
Edit = Callable[[Keys, Tensors], None]

_NUMPY = {np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8")}


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """Write `source` to `target`, its keys (without the architecture) and tensors changed in place by `edit`.

    Tensors are arrays of numpy's shape, the last dimension the fastest; quantized ones as bytes.
    """
    reader = gguf.GGUFReader(source)
    kinds = {field.name: field.types for field in reader.fields.values()}
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    before = dict(keys)
    edit(keys, tensors)
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture"))
    for name, value in keys.items():
        if before.get(name) is not value:
            add_key(writer, name, value)
        elif kinds[name][0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, sub_type=kinds[name][-1])
        else:
            writer.add_key_value(name, value, kinds[name][0])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=None if values.dtype in _NUMPY else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
