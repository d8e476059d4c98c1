"""A federation of real daemons on one machine: one run, or a sweep over settings, with a line, a table and a plot."""
