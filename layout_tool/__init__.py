"""GGUF files into stores: fomoe-layout."""

from fomoe_io.commands import leave_while_loading

leave_while_loading()
