from fomoe_io._hip import Buffer, Library, Stream

NAMES: tuple[str, ...]

def use_blas_library(name: str, library: Library) -> None: ...

class Blas:
    device: int
    workspace: Buffer
    def __init__(self, device: int, workspace_bytes: int) -> None: ...

class MatMul:
    blas: Blas
    tokens: int
    rows: int
    columns: int
    y_stride: int
    def __init__(self, blas: Blas, tokens: int, rows: int, columns: int, y_stride: int) -> None: ...
    def bind(self, x: Buffer | int, weights: Buffer | int, y: Buffer | int) -> Product: ...

class Product:
    shape: MatMul
    def __init__(self, shape: MatMul, x: Buffer | int, weights: Buffer | int, y: Buffer | int) -> None: ...
    def run(self, stream: Stream) -> None: ...
