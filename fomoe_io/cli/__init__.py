"""The commands.  `python -m fomoe_io.cli.run` passes here before it imports anything heavy."""

from fomoe_io.commands import leave_while_loading

leave_while_loading()
