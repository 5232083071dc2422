"""Which backend a configuration means: the only file that knows them all."""

from __future__ import annotations

from fomoe_io.backend import Backend
from fomoe_io.cpu.backend import CpuBackend
from fomoe_io.open_model import OpenModel


def open_backend(opened: OpenModel) -> Backend:
    """The backend of `config.device`, with the model's weights in its memory.

    Raises
    ------
    FomoeError
        BudgetError when memory is too small, DeviceError when a device was asked for and is not there.
    """
    if opened.config.device != "cpu":
        from fomoe_io.gpu import device  # a machine without a GPU never gets here

        gpus = device.open_gpus(opened.config.device, dict(opened.config.tuning.kernel_tuning))
        if len(gpus) > 1:
            from fomoe_io.gpu.chain import ChainBackend
            from fomoe_io.gpu.split import choose

            mode = opened.config.split_mode
            mode = choose(opened, gpus) if mode == "auto" else mode
            if mode == "none":
                gpus = gpus[:1]
            elif mode != "tensor":
                return ChainBackend(opened, gpus, mode)
        if gpus:
            from fomoe_io.gpu.backend import GpuBackend

            return GpuBackend(opened, gpus)
    return CpuBackend(opened)
