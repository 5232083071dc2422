from fomoe_io._hip import Library, Stream
from fomoe_io.errors import DeviceError

NAMES: tuple[str, ...]
KNOWS_NONE: dict[str, tuple[int, ...]]

def use_blas_library(provider: str, library: Library) -> None: ...
def numbers() -> dict[str, int]: ...

class NoProductError(DeviceError): ...

class Blas:
    device: int
    workspace: int
    workspace_bytes: int
    def __init__(self, device: int, workspace: int, workspace_bytes: int) -> None: ...

class MatMul:
    blas: Blas
    tokens: int
    rows: int
    columns: int
    y_stride: int
    is_float32: bool
    def __init__(
        self, blas: Blas, tokens: int, rows: int, columns: int, y_stride: int, is_float32: bool = False
    ) -> None: ...

class Product:
    shape: MatMul
    def __init__(self, shape: MatMul, x: int, weights: int, y: int) -> None: ...
    def run(self, stream: Stream) -> None: ...
