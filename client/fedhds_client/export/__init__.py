"""An adapter that is finished, in the forms that other programs load."""
