"""The toolbox `fedhds`: its own commands, and those that the installed packages add."""
